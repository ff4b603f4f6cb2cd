"""python -m bench.gpu.module: may the compiled module that lies here be measured as it is?

Its exit status says so to report.sh, which builds otherwise. A module may come from another machine
or from yesterday; what it was built from is in _build_info.json, and that this file is of that
module too.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch

import fused_ema
from fused_ema import _native

_ROOT = Path(__file__).parents[2]


def load_setup() -> Any:
    """setup.py as a module, which knows what a build is made of."""
    spec = importlib.util.spec_from_file_location("fused_ema_setup", _ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def why_not() -> str:
    """Why it may not; empty where it may."""
    native, facts, setup = _native.C, _native.build_info(), load_setup()
    if native is None:
        return _native.why_not
    if facts.get("sources") != setup.fingerprint():
        return "it was built from other sources than those here, or doesn't say from which"
    if facts.get("module") != setup.digest([Path(str(native.__file__))]):
        return "_build_info.json tells of another module"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    backend, reason = native.service_of("cuda:0")
    return str(reason) if backend != "cuda" else why_wrong(torch.device("cuda"))


def why_wrong(device: torch.device) -> str:
    """What an update of a few tiles does wrong on that device; empty if nothing."""
    ema, param = torch.zeros(10_007, device=device), torch.ones(10_007, device=device)
    try:
        fused_ema.update_([ema], [param], 0.25)
        is_right = bool((ema == 0.25).all())
    except RuntimeError as error:
        return f"an update fails: {error}"
    return "" if is_right else "an update gives wrong values"


def main() -> int:
    """Says what is here; the exit status is 1 where it may not be measured."""
    reason = why_not()
    info = fused_ema.info()
    print(
        f"module: not usable, {reason}"
        if reason
        else f"module: of these sources, built with torch {info.built_with_torch} and CUDA "
        f"{info.cuda_version} for sm {', '.join(info.cuda_architectures)}; it works here",
        flush=True,
    )
    return int(bool(reason))


if __name__ == "__main__":
    raise SystemExit(main())
