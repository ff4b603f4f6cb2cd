"""Exponential moving averages of model weights at the speed of the memory.

``ema = (1 - m) * ema + m * param`` over whole lists of tensors, in one launch per device and
dtype pair. ``m`` is the momentum: the weight of the new value, 1 - decay.

    ema = fused_ema.EMAManager(model, momentum=0.001)
    ema.update()                     # after each optimizer.step()
    with ema.swapped():              # the model holds the average in here
        evaluate(model)
    averaged = ema.averaged_model()  # a copy that holds it

Where to go on:

    EMAManager           the average of a model: settings, swaps, checkpoints
    schedules            momenta that change with the iteration
    sources              fp32 masters and Kahan sums, averaged in place of the parameters
    state                averages in files, of this package and of others
    fused_ema.posthoc    the length of an average, chosen after the training
    fused_ema.hooks      mmcv, MMEngine, torch.optim.swa_utils, timm, torch_ema, diffusers,
                         Lightning, transformers, DeepSpeed, lightly, stable-baselines3, torchrl,
                         TRL, MMDetection
    Plan, update_,       lists of tensors that you keep yourself
    swap_, copy_
    info()               what was built, and which kernels serve which device; for bug reports
    fused_ema.testing    references, sizes and layouts for tests of your own

``python -m fused_ema --help`` inspects and converts checkpoints. What goes on behind a call is told
to ``logging.getLogger("fused_ema")``, at INFO and DEBUG. Pages and examples: README.md, docs/ and
examples/ of the sources.
"""

from fused_ema import schedules, sources, state
from fused_ema._version import __version__
from fused_ema.info import Info, info
from fused_ema.manager import EMAManager
from fused_ema.ops import copy_, swap_, update_
from fused_ema.plan import Plan

__all__ = [
    "EMAManager",
    "Info",
    "Plan",
    "__version__",
    "copy_",
    "info",
    "schedules",
    "sources",
    "state",
    "swap_",
    "update_",
]
