"""The same operations with torch's own functions: any device, no compiler.

Serves when the compiled part is missing. With it, devices and pairs without a kernel are served
from C++ in the same way (csrc/fallback.cpp). The errors are those of csrc/checks.cpp.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

FORMS = ("lerp", "mul_add", "two_products")

# (ema, param), as csrc/dtype_pairs.h lists them.
DTYPE_PAIRS: tuple[tuple[torch.dtype, torch.dtype], ...] = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)
# Of swaps and copies: either way round.
EXCHANGE_PAIRS = DTYPE_PAIRS + tuple((b, a) for a, b in DTYPE_PAIRS if a != b)
_PAIRS = {"update_": DTYPE_PAIRS, "Plan": DTYPE_PAIRS}
_SIDES = {"swap_": ("a", "b"), "copy_": ("dst", "src")}


def are_lists(ema: object) -> bool:
    """Whether these are the lists of several averages."""
    return isinstance(ema, (list, tuple)) and len(ema) > 0 and isinstance(ema[0], (list, tuple))


def check_several(
    op: str,
    emas: Sequence[Sequence[Tensor]],
    params: Sequence[Tensor],
    names: Sequence[str] | None = None,
) -> None:
    """The same as check_lists of several averages of the same params."""
    sides = [f"ema[{k}]" for k in range(len(emas))]
    for side, ema in zip(sides, emas, strict=True):
        _check_pairs(op, (side, "params"), (ema, params), names)
        for index, (first, own) in enumerate(zip(emas[0], ema, strict=True)):
            if first.dtype != own.dtype:
                named = f" ('{names[index]}')" if names is not None else ""
                raise TypeError(
                    f"fused_ema.{op}: ema[0][{index}]{named} is {first.dtype} and "
                    f"{side}[{index}]{named} is {own.dtype}; pass averages of one dtype for a "
                    "param, or make a plan for each"
                )
    writes = (True,) * len(emas) + (op == "Plan",)
    _check_overlap(f"fused_ema.{op}", (*sides, "params"), (*emas, params), names, writes)


def check_lists(
    op: str,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    names: Sequence[str] | None = None,
) -> None:
    """Raises the error of the first pair that ``op`` can't serve; writes nothing."""
    sides = _SIDES.get(op, ("ema", "params"))
    writes = _check_pairs(op, sides, (first, second), names)
    _check_overlap(f"fused_ema.{op}", sides, (first, second), names, writes)


def _check_pairs(
    op: str,
    sides: tuple[str, str],
    lists: tuple[Sequence[Tensor], Sequence[Tensor]],
    names: Sequence[str] | None,
) -> tuple[bool, bool]:
    """All but overlap; returns which of the lists are written."""
    first, second = lists
    title = f"fused_ema.{op}"
    for side, tensors in zip(sides, lists, strict=True):
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(
                f"{title}: {side} is a {type(tensors).__name__}; pass a list or tuple of tensors"
            )
        for index, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"{title}: {side}[{index}] is a {type(tensor).__name__}; pass tensors only"
                )
    if len(first) != len(second):
        raise ValueError(
            f"{title}: {sides[0]} holds {len(first)} tensors but {sides[1]} holds {len(second)}; "
            "pass lists of the same length"
        )
    if names is not None and len(names) != len(first):
        raise ValueError(
            f"{title}: {len(names)} names for {len(first)} pairs; pass one name a pair, or none"
        )
    writes = {"swap_": (True, True), "Plan": (True, True)}.get(op, (True, False))
    for index, pair in enumerate(zip(first, second, strict=True)):
        named = f" ('{names[index]}')" if names is not None else ""
        where = [f"{side}[{index}]{named}" for side in sides]
        _check_pair(op, title, where, pair, writes)
    return writes


def _check_pair(
    op: str,
    title: str,
    where: Sequence[str],
    pair: tuple[Tensor, Tensor],
    writes: tuple[bool, bool],
) -> None:
    a, b = pair
    for place, tensor in zip(where, pair, strict=True):
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{title}: {place} has layout {tensor.layout}; only dense tensors can be averaged, "
                "pass .to_dense() or leave it out"
            )
    pairs = _PAIRS.get(op, EXCHANGE_PAIRS)
    if (a.dtype, b.dtype) not in pairs:
        listed = ", ".join(f"{dtype_name(x)}/{dtype_name(y)}" for x, y in pairs)
        raise TypeError(
            f"{title}: {where[0]} is {a.dtype} and {where[1]} is {b.dtype}; supported pairs: "
            f"{listed}. Convert one of them, or leave the pair out"
        )
    if a.shape != b.shape:
        raise ValueError(
            f"{title}: {where[0]} has shape {list(a.shape)} but {where[1]} has shape "
            f"{list(b.shape)}; pass lists whose tensors match pairwise"
        )
    if a.device != b.device:
        raise ValueError(
            f"{title}: {where[0]} is on {a.device} but {where[1]} is on {b.device}; move one of "
            "them to the other's device"
        )
    for place, tensor, written in zip(where, pair, writes, strict=True):
        if not written:
            continue
        if any(s == 0 and n > 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(
                f"{title}: {place} is expanded: several of its elements share one place in memory; "
                "pass a .contiguous() copy"
            )
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{title}: {place} is an inference tensor and can't be written outside "
                "torch.inference_mode(); pass a .clone() made outside of it"
            )
    for place, tensor in zip(where, pair, strict=True):
        if not has_plain_memory(tensor):
            continue
        needed, held = _bytes_needed(tensor), tensor.untyped_storage().nbytes()
        if needed > held:
            raise ValueError(
                f"{title}: {place} needs {needed} bytes of memory but its storage holds {held}; it "
                "was freed or cut, as sharding does between uses: call this while the tensor is "
                "whole, or leave it out"
            )


def _bytes_needed(tensor: Tensor) -> int:
    """Bytes of its storage up to the end of its last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()


def holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a dtype has all values of another one."""
    try:
        return dtype == other or torch.promote_types(dtype, other) == dtype
    except RuntimeError:  # float8 and the unsigned ones promote to nothing.
        return False


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _check_overlap(
    title: str,
    sides: Sequence[str],
    lists: Sequence[Sequence[Tensor]],
    names: Sequence[str] | None,
    writes: Sequence[bool],
) -> None:
    ranges = []
    for side, (tensors, written) in enumerate(zip(lists, writes, strict=True)):
        for index, tensor in enumerate(tensors):
            # Whether tensors with gaps overlap can't be told from their ranges (as in torch).
            if tensor.numel() == 0 or tensor.device.type == "meta" or not is_dense(tensor):
                continue
            start = tensor.data_ptr()
            if start == 0:  # A wrapper, whose memory is that of the tensors inside.
                continue
            end = start + tensor.numel() * tensor.element_size()
            ranges.append((str(tensor.device), start, end, not written, side, index))
    ranges.sort()
    last_read = last_write = None
    for entry in ranges:
        device, start, end, read_only, side, index = entry
        # A read may repeat a read; anything else that starts before a written range ends is wrong.
        for other in (last_write,) if read_only else (last_write, last_read):
            if other is not None and other[0] == device and start < other[2]:
                one, two = sorted((other[4:6], (side, index)))
                where = [
                    f"{sides[s]}[{i}]" + (f" ('{names[i]}')" if names is not None else "")
                    for s, i in (one, two)
                ]
                raise ValueError(
                    f"{title}: {where[0]} and {where[1]} share memory; pass each tensor once, or a "
                    ".clone() of one of them"
                )
        previous = last_read if read_only else last_write
        if previous is None or previous[0] != device or end > previous[2]:
            if read_only:
                last_read = entry
            else:
                last_write = entry


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a range of memory, in any order."""
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)


def has_plain_memory(tensor: Tensor) -> bool:
    """Whether its elements lie in memory of its own: not so for a DTensor or a sparse tensor."""
    return tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)


def check_momentum(op: str, momentum: float | Tensor) -> float | Tensor:
    """Returns a momentum in [0, 1] as a float, or the 0-dim float64 tensor that holds it."""
    if isinstance(momentum, Tensor):
        if momentum.dim() != 0 or momentum.dtype != torch.float64:
            raise TypeError(
                f"fused_ema.{op}: momentum is a {momentum.dtype} tensor of shape "
                f"{list(momentum.shape)}; pass a float, or a 0-dim torch.float64 tensor"
            )
        if momentum.device.type != "cpu":
            return momentum
        momentum = momentum.item()
    if not isinstance(momentum, numbers.Real):
        raise TypeError(
            f"fused_ema.{op}: momentum is a {type(momentum).__name__}; pass a float, or a 0-dim "
            "torch.float64 tensor"
        )
    momentum = float(momentum)
    if not 0.0 <= momentum <= 1.0:  # false for NaN too
        raise ValueError(
            f"fused_ema.{op}: momentum is {momentum}; it is the weight of the new value and must "
            "be in [0, 1]"
        )
    return momentum


def check_momenta(
    op: str, momenta: Sequence[float] | Tensor, num_averages: int
) -> list[float | Tensor]:
    """A momentum for each of several averages, as check_momentum() returns it."""
    if isinstance(momenta, Tensor):
        if momenta.shape != (num_averages,) or momenta.dtype != torch.float64:
            raise TypeError(
                f"fused_ema.{op}: the momenta are a {momenta.dtype} tensor of shape "
                f"{list(momenta.shape)} for {num_averages} averages; pass as many floats, or a "
                "1-dim torch.float64 tensor of as many elements"
            )
        return [check_momentum(op, momentum) for momentum in momenta.unbind()]
    if not isinstance(momenta, (list, tuple)):
        raise TypeError(
            f"fused_ema.{op}: momentum is a {type(momenta).__name__} for {num_averages} averages; "
            "pass a list of as many floats, or a 1-dim torch.float64 tensor"
        )
    if len(momenta) != num_averages:
        raise ValueError(
            f"fused_ema.{op}: {len(momenta)} momenta for {num_averages} averages; pass one for "
            "each of them"
        )
    return [check_momentum(op, momentum) for momentum in momenta]


def check_form(op: str, form: str) -> None:
    """Raises ValueError unless ``form`` is one of FORMS."""
    if form not in FORMS:
        listed = "'lerp', 'mul_add' or 'two_products'"
        raise ValueError(f"fused_ema.{op}: form is '{form}'; choose {listed}")


class _Temporaries:
    """Memory for one tensor at a time, made before a call's first write.

    Where there is none, nothing is left half done. Wrappers, which have no memory of their own, get
    theirs when they need it.
    """

    def __init__(self, needed: Iterable[tuple[Tensor, torch.dtype]]):
        num_bytes: dict[torch.device, int] = {}
        for tensor, dtype in needed:
            if has_plain_memory(tensor):
                most = max(num_bytes.get(tensor.device, 0), tensor.numel() * dtype.itemsize)
                num_bytes[tensor.device] = most
        self._rooms = {
            device: torch.empty(most, dtype=torch.uint8, device=device)
            for device, most in num_bytes.items()
        }

    def copy_of(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy in that dtype, good until the next one is asked for."""
        if not has_plain_memory(tensor):
            return tensor.to(dtype, copy=True)
        room = self._rooms[tensor.device][: tensor.numel() * dtype.itemsize]
        return room.view(dtype).view(tensor.shape).copy_(tensor)


@torch.no_grad()
def update(
    ema: Sequence[Tensor], params: Sequence[Tensor], momentum: float | Tensor, form: str
) -> None:
    """``ema = (1 - m) * ema + m * param``, on checked lists."""
    two_products = form == "two_products"
    temporaries = _Temporaries(
        (p, p.dtype if two_products else e.dtype)
        for e, p in zip(ema, params, strict=True)
        if two_products or e.dtype != p.dtype
    )
    for emas, parts in _by_device_and_dtype(ema, params):
        is_lazy = any(_is_lazy_view(t) for t in (*emas, *parts))
        if isinstance(momentum, Tensor):
            _update_by_tensor(emas, parts, momentum, form)
        elif two_products:
            for e, p in zip(emas, parts, strict=True):
                e.mul_(1.0 - momentum).add_(temporaries.copy_of(p, p.dtype).mul_(momentum))
        elif form == "mul_add" and (is_lazy or emas[0].device.type == "cpu"):
            # On the CPU foreach rounds 1 - m to a bf16 or fp16 ema's dtype, which mul_ doesn't.
            for e, p in zip(emas, parts, strict=True):
                same = p if p.dtype == e.dtype else temporaries.copy_of(p, e.dtype)
                e.mul_(1.0 - momentum).add_(same, alpha=momentum)
        elif form == "mul_add":
            torch._foreach_mul_(emas, 1.0 - momentum)
            torch._foreach_add_(emas, parts, alpha=momentum)
        elif emas[0].dtype == parts[0].dtype and not is_lazy:
            torch._foreach_lerp_(emas, parts, momentum)
        else:
            for e, p in zip(emas, parts, strict=True):
                e.lerp_(p if p.dtype == e.dtype else temporaries.copy_of(p, e.dtype), momentum)


def _is_lazy_view(tensor: Tensor) -> bool:
    """Views that are negated when they are read: torch's lists refuse to write them."""
    return tensor.is_neg() or tensor.is_conj()


def _update_by_tensor(
    ema: Iterable[Tensor], params: Iterable[Tensor], momentum: Tensor, form: str
) -> None:
    # No foreach function takes a weight from device memory without a synchronisation.
    for e, p in zip(ema, params, strict=True):
        values = p.to(e.dtype)
        if form == "lerp":
            averaged = e.lerp(values, momentum.to(e.dtype))
        else:
            averaged = e.mul(1.0 - momentum).add_(momentum * p)
        # 0 is no update and 1 a copy, to the last bit: 0 * inf is NaN.
        e.copy_(torch.where(momentum == 0, e, torch.where(momentum == 1, values, averaged)))


def _by_device_and_dtype(
    ema: Sequence[Tensor], params: Sequence[Tensor]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]]
    groups = {}
    for e, p in zip(ema, params, strict=True):
        emas, parts = groups.setdefault((e.device, e.dtype, p.dtype), ([], []))
        emas.append(e)
        parts.append(p)
    return list(groups.values())


@torch.no_grad()
def swap(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Exchanges each pair; one tensor's worth of temporary memory."""
    pairs = [_as_bits(x, y) for x, y in zip(a, b, strict=True)]
    temporaries = _Temporaries([(x, x.dtype) for x, _ in pairs])
    for x, y in pairs:
        kept = temporaries.copy_of(x, x.dtype)
        x.copy_(y)
        y.copy_(kept)


@torch.no_grad()
def copy(dst: Sequence[Tensor], src: Sequence[Tensor]) -> None:
    """Copies each ``src`` into its ``dst``, converting the dtype."""
    if len(dst) > 0:
        pairs = []
        for d, s in zip(dst, src, strict=True):
            if _is_lazy_view(d) or _is_lazy_view(s):
                d.copy_(s)
            else:
                pairs.append(_as_bits(d, s))
        if pairs:
            torch._foreach_copy_([d for d, _ in pairs], [s for _, s in pairs])


def _as_bits(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    # Torch's copies of bf16 and fp16 on CUDA go through fp32 and lose a NaN's payload.
    if x.dtype != y.dtype or x.dtype.itemsize != 2 or x.device.type == "cpu":
        return x, y
    if not (has_plain_memory(x) and has_plain_memory(y)):
        return x, y
    return x.view(torch.int16), y.view(torch.int16)


class Plan:
    """The surface of the compiled Plan (csrc/plan.h), on torch's functions."""

    def __init__(
        self,
        ema: Sequence[Any],
        params: Sequence[Tensor],
        names: Sequence[str] | None,
        is_several: bool = False,
    ):
        self._emas: list[Sequence[Tensor]] = [*ema] if is_several else [ema]
        self._params, self._names, self._is_several = params, names, is_several
        self._check_lists()
        self._emas = [list(its) for its in self._emas]
        self._params = list(params)
        self._seen = self._geometry()
        self.num_runs = 0
        self.num_refreshes = 0

    def _check_lists(self) -> None:
        if self._is_several:
            check_several("Plan", self._emas, self._params, self._names)
        else:
            check_lists("Plan", self._emas[0], self._params, self._names)

    def _geometry(self) -> list[tuple[object, ...]]:
        return [
            (
                *(t.shape, t.stride(), t.dtype, t.device, t.data_ptr()),
                t.untyped_storage().nbytes() if has_plain_memory(t) else 0,
            )
            for tensors in (*self._emas, self._params)
            for t in tensors
        ]

    def check(self) -> None:
        # Torch would broadcast a changed shape, and write to memory that was freed or that two
        # share, in silence.
        geometry = self._geometry()
        if geometry != self._seen:
            self._check_lists()
            self._seen = geometry
            self.num_refreshes += 1

    def update(self, momentum: float | Tensor, form: str) -> None:
        momentum = check_momentum("Plan.update", momentum)
        check_form("Plan.update", form)
        self._run(lambda: update(self._emas[0], self._params, momentum, form))

    def update_averages(self, momenta: Sequence[float] | Tensor, form: str) -> None:
        checked = check_momenta("Plan.update", momenta, len(self._emas))
        check_form("Plan.update", form)

        def work() -> None:
            for ema, momentum in zip(self._emas, checked, strict=True):
                update(ema, self._params, momentum, form)

        self._run(work)

    def swap(self, average: int = 0) -> None:
        self._run(lambda: swap(self._emas[average], self._params))

    def copy_to_ema(self, average: int = 0) -> None:
        self._run(lambda: copy(self._emas[average], self._params))

    def copy_to_params(self, average: int = 0) -> None:
        self._run(lambda: copy(self._params, self._emas[average]))

    def _run(self, work: Callable[[], None]) -> None:
        self.check()
        work()
        self.num_runs += 1

    def describe(self) -> list[dict[str, object]]:
        """One entry a (device, dtype pair), as the compiled Plan gives it."""
        return [
            {
                "backend": "foreach",
                "device": str(emas[0].device),
                "ema_dtype": dtype_name(emas[0].dtype),
                "param_dtype": dtype_name(parts[0].dtype),
                "num_tensors": len(emas),
                "num_elements": sum(e.numel() for e in emas),
                "num_averages": len(self._emas),
            }
            for emas, parts in _by_device_and_dtype(self._emas[0], self._params)
        ]
