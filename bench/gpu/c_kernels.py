"""csrc/cuda/c_api.cpp called with tensors: the CUDA kernels from a library of their own.

For several builds of them side by side (bench/gpu/variants.py), and for one that runs on the host
(tests/host/). Nothing is checked: wrong lists write anywhere.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bench.providers import Op
from fused_ema.ops import Form
from fused_ema.testing import DTYPE_PAIRS

Kind = Literal["update", "swap", "copy to ema", "copy to params"]
FORMS: tuple[Form, ...] = ("lerp", "mul_add", "two_products")  # In csrc/ema_math.h's order.


@dataclass(frozen=True)
class Operation:
    """What is done with a list of pairs.

    Attributes:
        kind: An update, a swap, or a copy one way.
        form: Of an update.
        momentum: Of an update.
    """

    kind: Kind
    form: Form = "lerp"
    momentum: float = 0.0

    @property
    def op(self) -> Op:
        """What bench calls it, whichever way a copy goes."""
        return self.kind if self.kind == "update" or self.kind == "swap" else "copy"


class _Span(ctypes.Structure):
    _fields_ = (("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("n", ctypes.c_int64))


class _Work(ctypes.Structure):
    _fields_ = (
        ("tiles", ctypes.c_void_p),
        ("num_block_tiles", ctypes.c_uint32),
        ("num_warp_tiles", ctypes.c_uint32),
        ("spans", ctypes.c_void_p),
        ("num_spans", ctypes.c_int64),
    )


class _AveragesSpan(ctypes.Structure):
    _fields_ = (("sides", ctypes.c_void_p * 5), ("n", ctypes.c_int64))


MOST_AVERAGES = 4  # Of csrc/tiles.h.


def _tile_bytes(sides: int) -> int:
    return 8 * sides + 8  # As many pointers, a length, an index.


class Prepared:
    """One list of pairs of one dtype pair, as the kernels take it."""

    def __init__(self, pair: int, work: _Work, kept: tuple[object, ...]) -> None:
        self.pair = pair
        self.work = work
        self._kept = kept  # The memory that `work` points to, and the tensors.


class Kernels:
    """A built library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def prepare(self, ema: Sequence[Tensor], params: Sequence[Tensor], by_table: bool) -> Prepared:
        """The list as a table of tiles in the tensors' memory, or as kernel arguments.

        Args:
            ema: Dense tensors of one dtype on one device.
            params: The same for their dtype, each as long as its ema.
            by_table: A table as a plan has it, and one launch; or spans as a one-shot call has
                them, and one launch for every 1,019 pairs.
        """
        pair = DTYPE_PAIRS.index((ema[0].dtype, params[0].dtype)) if ema else 0
        rows = zip(ema, params, strict=True)
        spans = (_Span * len(ema))(*(_Span(e.data_ptr(), p.data_ptr(), e.numel()) for e, p in rows))
        if not by_table:
            address = ctypes.cast(spans, ctypes.c_void_p)
            return Prepared(pair, _Work(spans=address, num_spans=len(ema)), (spans, ema, params))
        table, work = self._table(self._library.ema_make_tiles, pair, spans, 2, ema)
        return Prepared(pair, work, (table, ema, params))

    def prepare_averages(
        self, emas: Sequence[Sequence[Tensor]], params: Sequence[Tensor], by_table: bool
    ) -> Prepared:
        """The same of two to four averages of the same params, for :meth:`run_averages`."""
        pair = DTYPE_PAIRS.index((emas[0][0].dtype, params[0].dtype)) if params else 0
        spans = (_AveragesSpan * len(params))()
        for i, param in enumerate(params):
            for k in range(MOST_AVERAGES):
                spans[i].sides[k] = emas[k if k < len(emas) else 0][i].data_ptr()
            spans[i].sides[MOST_AVERAGES], spans[i].n = param.data_ptr(), param.numel()
        if not by_table:
            address = ctypes.cast(spans, ctypes.c_void_p)
            return Prepared(
                pair, _Work(spans=address, num_spans=len(params)), (spans, emas, params)
            )
        make = self._library.ema_make_averages_tiles
        table, work = self._table(make, pair, spans, MOST_AVERAGES + 1, params)
        return Prepared(pair, work, (table, emas, params))

    def _table(
        self, make: Any, pair: int, spans: Any, sides: int, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, _Work]:
        counts, size = (ctypes.c_int64 * 2)(), ctypes.c_int64(len(tensors))
        make(pair, spans, size, counts, None)
        made = torch.empty(sum(counts) * _tile_bytes(sides), dtype=torch.uint8)
        make(pair, spans, size, counts, ctypes.c_void_p(made.data_ptr()))
        table = made.to(tensors[0].device) if tensors else made
        # An empty tensor has no address, and a null pointer would mean spans, of which are none.
        work = _Work(tiles=table.data_ptr(), num_block_tiles=counts[0], num_warp_tiles=counts[1])
        return table, work

    def run_averages(
        self,
        form: Form,
        momenta: Sequence[float],
        prepared: Prepared,
        stream: int = 0,
        device_momenta: Tensor | None = None,
    ) -> None:
        """Updates several averages at once; the rest as :meth:`run` has it.

        Raises:
            RuntimeError: A launch failed.
        """
        values = (ctypes.c_double * len(momenta))(*momenta)
        address = device_momenta.data_ptr() if device_momenta is not None else None
        status = self._library.ema_update_averages(
            prepared.pair,
            FORMS.index(form),
            len(momenta),
            values,
            ctypes.c_void_p(address),
            ctypes.byref(prepared.work),
            ctypes.c_void_p(stream),
        )
        if status:
            raise RuntimeError(f"{len(momenta)} averages by {form}: CUDA error {status}")

    def run(
        self,
        operation: Operation,
        prepared: Prepared,
        stream: int = 0,
        device_momentum: Tensor | None = None,
    ) -> None:
        """Runs one operation on the stream of that handle.

        Args:
            operation: What to do.
            prepared: With which list.
            stream: A cudaStream_t.
            device_momentum: A 0-dim float64 tensor in the tensors' memory, for the kernel to read
                in place of the operation's momentum.

        Raises:
            RuntimeError: A launch failed.
        """
        work, handle = ctypes.byref(prepared.work), ctypes.c_void_p(stream)
        if operation.kind == "update":
            form, momentum = FORMS.index(operation.form), ctypes.c_double(operation.momentum)
            address = device_momentum.data_ptr() if device_momentum is not None else None
            status = self._library.ema_update(
                prepared.pair, form, momentum, ctypes.c_void_p(address), work, handle
            )
        elif operation.kind == "swap":
            status = self._library.ema_swap(prepared.pair, work, handle)
        else:
            to_a = int(operation.kind == "copy to ema")
            status = self._library.ema_copy(prepared.pair, to_a, work, handle)
        if status:
            raise RuntimeError(f"{operation}: CUDA error {status}")
