"""Signatures and attributes of drop-ins beside the originals that are installed.

A new release of one of these packages shows here: what it added has no place in the table of
differences, and what it took out leaves one that isn't found any longer.
"""

from __future__ import annotations

import inspect
import warnings

import pytest
import stubs
import torch
from torch import nn
from torch.optim import swa_utils as torch_swa_utils

stubs.install()

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="On January 1, 2023, MMCV will release")
    warnings.filterwarnings("ignore", "`torch.jit")
    import diffusers.training_utils
    import lightly.models.utils
    import lightning.pytorch
    import mmengine.hooks
    import mmengine.model
    import stable_baselines3.common.utils as sb3_utils
    import timm.utils
    import torch_ema as their_torch_ema
    import torchrl.objectives
    import transformers
    import trl.trainer.callbacks
    from mmdet.core.hook import ema as mmdet_ema

    import fused_ema.hooks.lightly
    import fused_ema.hooks.lightning
    import fused_ema.hooks.stable_baselines3
    import fused_ema.hooks.torchrl
    import fused_ema.hooks.transformers
    import fused_ema.hooks.trl
    from fused_ema.hooks import diffusers as our_diffusers
    from fused_ema.hooks import mmcv, swa_utils, torch_ema
    from fused_ema.hooks import mmengine as our_mmengine
    from fused_ema.hooks import timm as our_timm

from test_torchrl import make_loss  # noqa: E402

PAIRS = {
    ours: theirs
    for theirs, ours in (
        (torch_swa_utils.AveragedModel, swa_utils.AveragedModel),
        (torch_swa_utils.get_ema_multi_avg_fn, swa_utils.get_ema_multi_avg_fn),
        (torch_swa_utils.get_ema_avg_fn, swa_utils.get_ema_avg_fn),
        (torch_swa_utils.get_swa_multi_avg_fn, swa_utils.get_swa_multi_avg_fn),
        (timm.utils.ModelEmaV3, our_timm.ModelEmaV3),
        (their_torch_ema.ExponentialMovingAverage, torch_ema.ExponentialMovingAverage),
        (diffusers.training_utils.EMAModel, our_diffusers.EMAModel),
        (mmengine.hooks.EMAHook, our_mmengine.FusedEMAHook),
        (mmengine.model.BaseAveragedModel, our_mmengine.FusedBaseAveragedModel),
        (mmengine.model.ExponentialMovingAverage, our_mmengine.FusedExponentialMovingAverage),
        (mmengine.model.MomentumAnnealingEMA, our_mmengine.FusedMomentumAnnealingEMA),
        (mmengine.model.StochasticWeightAverage, our_mmengine.FusedStochasticWeightAverage),
        (lightly.models.utils.update_momentum, fused_ema.hooks.lightly.update_momentum),
        (sb3_utils.polyak_update, fused_ema.hooks.stable_baselines3.polyak_update),
        (torchrl.objectives.SoftUpdate, fused_ema.hooks.torchrl.SoftUpdate),
        (torchrl.objectives.HardUpdate, fused_ema.hooks.torchrl.HardUpdate),
        (
            trl.trainer.callbacks.SyncRefModelCallback,
            fused_ema.hooks.trl.SyncRefModelCallback,
        ),
        (mmdet_ema.BaseEMAHook, mmcv.BaseEMAHook),
        (mmdet_ema.ExpMomentumEMAHook, mmcv.ExpMomentumEMAHook),
        (mmdet_ema.LinearMomentumEMAHook, mmcv.LinearMomentumEMAHook),
    )
}

OPTIONS = (["**options"], [])  # For a next class.
# What of a function is ours alone, and what the original's, by class and function.
DIFFERENCES = {
    "ModelEmaV3": {"__init__": (["stochastic_rounding=False"], ["stochastic_rounding=True"])},
    "ExponentialMovingAverage": {"to": (["non_blocking=False"], [])},
    "EMAModel": {"__init__": ([], ["**kwargs"])},  # They are deprecated names.
    "FusedBaseAveragedModel": {"__init__": OPTIONS},
    "FusedExponentialMovingAverage": {"__init__": OPTIONS},
    "FusedMomentumAnnealingEMA": {"__init__": OPTIONS},
    "FusedStochasticWeightAverage": {"__init__": OPTIONS},
}


def parameters(function):
    found = []
    for p in inspect.signature(function).parameters.values():
        prefix = "*, " if p.kind == p.KEYWORD_ONLY else ""
        found.append(prefix + str(p.replace(annotation=p.empty)))
    return found


def difference(ours, theirs):
    """What each has alone; the rest must stand in one order."""
    a, b = parameters(ours), parameters(theirs)
    alone = [p for p in a if p not in b], [p for p in b if p not in a]
    names = [[p.partition("=")[0] for p in listed if p[:2] != "**"] for listed in (a, b)]
    num_common = min(map(len, names))
    if names[0][:num_common] != names[1][:num_common]:
        return "another order", *alone
    return alone


def public_names(cls):
    of_all = {*dir(object), *(dir(nn.Module) if issubclass(cls, nn.Module) else ())}
    return [n for n in dir(cls) if n[0] != "_" and (n not in of_all or n in vars(cls))]


def differences(ours, theirs):
    """By name: functions that can't be called alike, and what is missing."""
    if not isinstance(theirs, type):
        found = {ours.__name__: difference(ours, theirs)}
    else:
        found = {}
        for name in ("__init__", *public_names(theirs)):
            own, other = getattr(ours, name, None), getattr(theirs, name)
            kinds = [type(inspect.getattr_static(c, name, None)) for c in (ours, theirs)]
            is_bound = {kind in (staticmethod, classmethod) for kind in kinds}
            if callable(other) != callable(own) or len(is_bound) > 1:
                found[name] = "another kind"
            elif callable(other):
                found[name] = difference(own, other)
    return {name: what for name, what in found.items() if what != ([], [])}


@pytest.mark.parametrize("ours", PAIRS, ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_every_function_is_called_as_the_original_s(ours):
    assert differences(ours, PAIRS[ours]) == DIFFERENCES.get(ours.__name__, {})


def test_the_known_differences_are_of_what_is_compared():
    assert set(DIFFERENCES) <= {ours.__name__ for ours in PAIRS}


def test_the_comparison_notices():
    class Theirs:
        def __init__(self, a, b=1):
            pass

        def order(self, x, y=2):
            pass

        def keyword(self, x, y=2):
            pass

        def default(self, x=1, *, y=2):
            pass

        def more(self):
            pass

        def new(self, x):
            pass

    class Ours(Theirs):
        def __init__(self, a, b=1, c=2):
            pass

        def order(self, y=2, x=0):
            pass

        def keyword(self, x, *, y=2):
            pass

        def default(self, x=3, *, y=2):
            pass

        def new(self):
            pass

        more = None

    assert differences(Theirs, Theirs) == {}
    assert differences(Ours, Theirs) == {
        "__init__": (["c=2"], []),
        "default": (["x=3"], ["x=1"]),
        "keyword": ("another order", ["*, y=2"], ["y=2"]),
        "more": "another kind",
        "new": ([], ["x"]),
        "order": ("another order", ["x=0"], ["x"]),
    }


# ---- attributes of objects

MAKE = {
    "AveragedModel": lambda cls: cls(nn.Linear(2, 2)),
    "ModelEmaV3": lambda cls: cls(nn.Linear(2, 2), stochastic_rounding=False),
    "ExponentialMovingAverage": lambda cls: cls(nn.Linear(2, 2).parameters(), 0.9),
    "EMAModel": lambda cls: cls(nn.Linear(2, 2).parameters()),
    "EMAHook": lambda cls: cls(),
    "MomentumAnnealingEMA": lambda cls: cls(nn.Linear(2, 2)),
    "StochasticWeightAverage": lambda cls: cls(nn.Linear(2, 2)),
    "BaseEMAHook": lambda cls: cls(),
    "ExpMomentumEMAHook": lambda cls: cls(),
    "LinearMomentumEMAHook": lambda cls: cls(),
    "SoftUpdate": lambda cls: cls(make_loss(), tau=0.005),
    "HardUpdate": lambda cls: cls(make_loss()),
    "SyncRefModelCallback": lambda cls: cls(nn.Linear(2, 2), None),
}
MAKE_OF_MMENGINE = {"ExponentialMovingAverage": MAKE["MomentumAnnealingEMA"]}


def attributes(made):
    names = set(vars(made))
    if isinstance(made, nn.Module):
        names -= set(vars(nn.Module()))
        names |= {*made._buffers, *made._modules, *made._parameters}
    return sorted(name for name in names if name[0] != "_")


@pytest.mark.parametrize(
    "ours",
    # Of an abstract one its subclasses are compared.
    [c for c in PAIRS if isinstance(c, type) and c is not our_mmengine.FusedBaseAveragedModel],
    ids=lambda c: f"{c.__module__}.{c.__name__}",
)
def test_every_attribute_is_there_and_can_be_set(ours):
    theirs = PAIRS[ours]
    of_mmengine = theirs.__module__.startswith("mmengine")
    make = (MAKE_OF_MMENGINE if of_mmengine else {}).get(theirs.__name__, MAKE[theirs.__name__])
    a, b = make(ours), make(theirs)
    assert attributes(b)
    for name in attributes(b):
        value, other = getattr(a, name), getattr(b, name)
        if other is None or isinstance(other, (bool, int, float, str, torch.dtype)):
            assert value == other, name
        else:
            assert (value is None) == (other is None), name
        setattr(a, name, value)
        assert getattr(a, name) is value, name


# ---- events


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (fused_ema.hooks.lightning.EMA, lightning.pytorch.Callback),
        (fused_ema.hooks.transformers.EMACallback, transformers.TrainerCallback),
    ],
)
def test_events_are_taken_as_the_framework_gives_them(ours, theirs):
    events = [n for n in vars(ours) if n in dir(theirs) and n[0] != "_" and callable(vars(ours)[n])]
    assert len(events) > 3
    for name in events:
        assert parameters(getattr(ours, name)) == parameters(getattr(theirs, name)), name
    own = {n for n in vars(ours) if n.startswith("on_")}
    assert own <= set(dir(theirs))  # An event of another name never comes.
