"""What is built, and who serves which device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fused_ema import _foreach, _native
from fused_ema._version import __version__


@dataclass(frozen=True)
class Info:
    """What :func:`info` found. ``str()`` of it is a text for a bug report.

    Attributes:
        version: Of fused_ema.
        torch_version: Of the torch in use.
        built_with_torch: Of the torch that the compiled part was built with.
        native: Whether the compiled part is in use.
        why_not: The reason where it isn't.
        cuda_version: Of the nvcc that built the CUDA kernels, or None.
        cuda_architectures: Compute capabilities with machine code; later ones start from PTX.
        instruction_set: Of the CPU kernels on this machine: ``"avx512"``, ``"avx2"``,
            ``"generic"``, or None without them.
        num_threads: That the CPU kernels share; ``torch.set_num_threads`` sets it.
        backends: Device to (dtype pair to backend): ``"cuda"``, ``"cpu"`` or ``"foreach"``.
        reasons: Device to why its backend is foreach.
    """

    version: str
    torch_version: str
    built_with_torch: str | None
    native: bool
    why_not: str
    cuda_version: str | None
    cuda_architectures: tuple[str, ...]
    instruction_set: str | None
    num_threads: int
    backends: dict[str, dict[str, str]]
    reasons: dict[str, str]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [f"fused_ema {self.version} on torch {self.torch_version}"]
        if self.native:
            cuda = (
                f"CUDA {self.cuda_version} (sm {', '.join(self.cuda_architectures)})"
                if self.cuda_version
                else "no CUDA"
            )
            lines.append(
                f"compiled part: built with torch {self.built_with_torch}, {cuda}; CPU kernels "
                f"{self.instruction_set}, {self.num_threads} threads"
            )
        else:
            lines.append(f"compiled part: none ({self.why_not})")
        for device, pairs in self.backends.items():
            backends = sorted(set(pairs.values()))
            reason = f" ({self.reasons[device]})" if device in self.reasons else ""
            lines.append(f"{device}: {', '.join(backends)} for {', '.join(pairs)}{reason}")
        return "\n".join(lines)


def _devices() -> list[str]:
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type != "cuda":
        devices.append(accelerator.type)
    return devices


def info() -> Info:
    """Says what is built, which backend serves which device and dtype pair, and why not a kernel.

    Returns:
        An :class:`Info`; print it for a readable text.
    """
    facts = _native.build_info()
    native = _native.C
    pairs = ["/".join(map(_foreach.dtype_name, pair)) for pair in _foreach.DTYPE_PAIRS]
    backends, reasons = {}, {}
    for device in _devices():
        backend, reason = (
            ("foreach", _native.why_not) if native is None else native.service_of(device)
        )
        backends[device] = dict.fromkeys(pairs, backend)
        if reason:
            reasons[device] = reason
    return Info(
        version=__version__,
        torch_version=torch.__version__,
        built_with_torch=facts.get("torch"),
        native=native is not None,
        why_not=_native.why_not,
        cuda_version=facts.get("cuda") if native is not None else None,
        cuda_architectures=() if native is None else tuple(native.cuda_architectures().split()),
        instruction_set=None if native is None else native.instruction_set(),
        num_threads=torch.get_num_threads(),
        backends=backends,
        reasons=reasons,
    )
