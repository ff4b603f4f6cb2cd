"""Memory for many tensors at once, and moving values whatever their dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain, compress

import torch
from torch import Tensor

from fused_ema import _caches, ops
from fused_ema._foreach import DTYPE_PAIRS, EXCHANGE_PAIRS, has_plain_memory, is_dense
from fused_ema.plan import Plan

# Each tensor starts on a boundary of this many bytes: a cache line of a GPU, and any vector.
ALIGNMENT_BYTES = 128


def allocate(
    like: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    devices: Sequence[torch.device],
    empty: Callable[..., Tensor] = torch.empty,
) -> list[Tensor]:
    """Makes a tensor for each of ``like``, all of a dtype and device in one allocation.

    Args:
        like: Shapes, and strides where they are dense; one with gaps gets strides without them.
            One without memory of its own (a DTensor) gets an allocation of its own.
        dtypes: The dtype of each.
        devices: The device of each.
        empty: Makes an allocation, as torch.empty does.

    Returns:
        Tensors with arbitrary values, each with a storage of its own over its part, so that one of
        them pickles and saves at its own size.
    """
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    offsets = []
    for tensor, dtype, device in zip(like, dtypes, devices, strict=True):
        step = ALIGNMENT_BYTES // dtype.itemsize
        offsets.append(sizes.setdefault((dtype, device), 0))
        if has_plain_memory(tensor):
            sizes[dtype, device] += math.ceil(tensor.numel() / step) * step
    with torch.inference_mode(False):  # Tensors made in it could never be written outside of it.
        flat = {
            (dtype, device): empty(size, dtype=dtype, device=device)
            for (dtype, device), size in sizes.items()
        }
        nothing = {key: torch.empty_like(whole[:0]) for key, whole in flat.items()}
    made = []
    for tensor, dtype, device, offset in zip(like, dtypes, devices, offsets, strict=True):
        if has_plain_memory(tensor):
            whole = flat[dtype, device]
            if tensor.numel() == 0:  # Of which a view would save and stage the whole allocation.
                whole, offset = nothing[dtype, device], 0
            view = with_own_storage(whole.as_strided(tensor.shape, dense_strides(tensor), offset))
        else:
            view = torch.empty_like(tensor.detach(), dtype=dtype, device=device)
        made.append(view)
    return made


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """A tensor's strides where it is dense, else those that it would have without its gaps."""
    if is_dense(tensor):
        return tensor.stride()
    return torch.empty_like(tensor, device="meta").stride()


# A swap moves bits, so any dtype passes as the floating-point one of its width.
_SAME_WIDTH = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
_FLOATS = frozenset(chain.from_iterable(DTYPE_PAIRS))


def make_marks() -> tuple[Tensor, Tensor]:
    """What every Exchange of its owner takes to know whether a call ran; kept, to allocate once."""
    with torch.inference_mode(False):
        # On the CPU, whatever the default device.
        return torch.zeros((), device="cpu"), torch.ones((), device="cpu")


class Exchange:
    """An exchange of pairs of one dtype each, any dtype; it can be undone however far it came.

    Args:
        a: Tensors.
        b: As many of the same shapes, dtypes and devices.
        plan: One whose pairs are exchanged as well.
        marks: Those of make_marks(). An interrupt is raised right after a call: that these are
            exchanged, too, tells that the call ran.
        average: Which of the plan's averages.
    """

    def __init__(
        self,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        plan: Plan | None,
        marks: tuple[Tensor, Tensor],
        average: int = 0,
    ) -> None:
        self._a, self._b = [], []
        # Bool and the 8-bit dtypes have no kernel: masks and the like, seldom. With a copy of one.
        self._narrow = []
        for x, y in zip(a, b, strict=True):
            if x.is_conj() or y.is_conj():  # Whose memory holds other values than they show.
                self._narrow.append((x.detach(), y.detach(), x.detach().clone()))
            elif x.element_size() > 1:
                self._a.append(as_floats(x))
                self._b.append(as_floats(y))
            else:
                x, y = x.detach().view(torch.uint8), y.detach().view(torch.uint8)
                self._narrow.append((x, y, x.clone()))
        self._mark, other = marks
        self._mark_before = self._mark.item()
        if self._a:
            self._a.append(self._mark)
            self._b.append(other)
        self._plan, self._average = plan, average
        self._num_runs = 0 if plan is None else plan._num_runs

    @torch.no_grad()
    def run(self) -> None:
        """Exchanges them."""
        ops.swap_(self._a, self._b)
        for x, y, kept in self._narrow:
            x.copy_(y)
            y.copy_(kept)
        if self._plan is not None:
            self._plan.swap(self._average)

    # The caller's to call: an interrupt may come after run() has returned, too.
    @torch.no_grad()
    def undo(self) -> None:
        """Undoes what an exchange that was interrupted has done."""
        if self._plan is not None and self._plan._num_runs > self._num_runs:
            self._plan.swap(self._average)
        for x, y, kept in self._narrow:
            if torch.equal(y, kept):
                y.copy_(x)
            x.copy_(kept)
        if self._mark.item() != self._mark_before:
            ops.swap_(self._a, self._b)


def as_floats(tensor: Tensor) -> Tensor:
    """The same memory, of 2, 4 or 8 bytes an element, in a dtype that the kernels take."""
    if tensor.dtype in _FLOATS:
        return tensor
    if tensor.is_complex():
        return as_floats(torch.view_as_real(tensor.detach()))
    return tensor.detach().view(_SAME_WIDTH[tensor.element_size()])


@torch.no_grad()
def copy(dst: Sequence[Tensor], src: Sequence[Tensor]) -> None:
    """Copies pairs of any dtypes and devices."""
    # To the host in its own dtype: a device would convert a whole tensor in memory of its own.
    pairs = [
        (d, s.to(d.device) if d.is_cpu and not s.is_cpu and d.dtype != s.dtype else s)
        for d, s in zip(dst, src, strict=True)
    ]
    is_fast = [d.device == s.device and (d.dtype, s.dtype) in EXCHANGE_PAIRS for d, s in pairs]
    fast = list(compress(pairs, is_fast))
    # First, since it may want memory for its tables; a copy within one dtype and device wants none.
    if fast:
        ops.copy_([d for d, _ in fast], [s for _, s in fast])
    rest = [pair for pair, done in zip(pairs, is_fast, strict=True) if not done]
    if len(rest) == 1:
        # A counter that is assigned anew in every step: 2 us instead of 12.
        rest[0][0].copy_(rest[0][1])
    elif rest:
        torch._foreach_copy_([d for d, _ in rest], [s for _, s in rest])
    if rest:
        _caches.drop()


def are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each holds nothing infinite and no NaN; waits for a device once."""
    with torch.no_grad():
        found = [tensor.isfinite().all() for tensor in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(found):
        by_device.setdefault(tensor.device, []).append(i)
    finite = [True] * len(found)
    for indices in by_device.values():
        for i, value in zip(
            indices, torch.stack([found[i] for i in indices]).tolist(), strict=True
        ):
            finite[i] = value
    return finite


def with_own_storage(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that saves at its own size, whatever it is a view of.

    What saves or stages a tensor (pickle, torch.save, torch.distributed.checkpoint) takes its whole
    storage. The memory lives as long as any of them.
    """
    if not has_plain_memory(tensor) or not is_dense(tensor) or tensor.numel() == 0:
        return tensor
    whole, size = tensor.untyped_storage(), tensor.element_size()
    begin = tensor.storage_offset() * size
    end = begin + tensor.numel() * size
    if end - begin == whole.nbytes():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        own = tensor.detach()  # Its version counter is the same: a backward notices an update.
        return own.set_(whole[begin:end], 0, tensor.shape, tensor.stride())


def is_same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors begin at one place, in one dtype."""
    if not (has_plain_memory(a) and has_plain_memory(b)) or a.dtype != b.dtype:
        return False
    return a.device == b.device and a.data_ptr() == b.data_ptr()
