"""The weighted sum of many tensors, in chunks, each input read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_ema import _checks, _safetensors, _shards, _tracking
from fused_ema._format_errors import FormatError
from fused_ema._weighted_sum import INPUT_DTYPES, weighted_sum_
from fused_ema.manager import EMAManager
from fused_ema.posthoc._files import READ, Snapshot

# What is read of each file before it is given back to the system, in bytes. More is little faster,
# a quarter slower by a third.
_BLOCK_BYTES = 2 << 20

Progress = Callable[[int, int], None]


def weighted_sum(
    out: Tensor,
    inputs: Sequence[Tensor],
    coefficients: Sequence[float],
    device: torch.device | None = None,
) -> None:
    """``out = sum of coefficients[k] * inputs[k]``, in double, rounded to fp32 or fp64 once.

    Args:
        out: 1-D and contiguous, of any floating-point dtype; a narrower one rounds what fp32 has.
        inputs: As many elements each, of any floating-point dtype, on the CPU.
        coefficients: One for each.
        device: Where it is computed; None for out's.
    """
    device = out.device if device is None else device
    dtypes = {values.dtype for values in inputs}
    if len(dtypes) > 1 or not dtypes <= set(INPUT_DTYPES):
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        inputs = [values.to(wide) for values in inputs]
    if out.dtype in (torch.float32, torch.float64) and out.device == device:
        total = out.zero_()
    else:
        dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
        total = torch.zeros(out.shape, dtype=dtype, device=device)
    if device.type != "cpu":
        inputs = [values.to(device) for values in inputs]
    weighted_sum_(total, inputs, coefficients)
    if total is not out:
        out.copy_(total)


class Sum:
    """The sum of some snapshots, tensor by tensor.

    What isn't averaged is as in the last of them.
    """

    def __init__(
        self,
        snapshots: Sequence[Snapshot],
        coefficients: Sequence[float],
        dtype: torch.dtype | None,
        device: torch.device | None,
        progress: Progress | None,
    ) -> None:
        # Nothing is read of those that count for nothing.
        chosen = [(s, c) for s, c in zip(snapshots, coefficients, strict=True) if c != 0]
        self._inputs = [snapshot.tensors for snapshot, _ in chosen]
        self._coefficients = [coefficient for _, coefficient in chosen]
        self._last = max((s for s, _ in chosen), key=lambda s: s.iteration)
        averaged = frozenset.intersection(*(s.averaged for s, _ in chosen))
        self._averaged = {n for n in averaged if self._last.tensors[n].is_floating_point()}
        self._dtype, self._device, self._progress = dtype, device, progress
        self._mapped = _safetensors.mapped_ranges()
        self._num_done = 0
        self._num_all = sum(tensor.numel() for tensor in self._last.tensors.values())

    @property
    def averaged(self) -> list[str]:
        return [name for name in self._last.tensors if name in self._averaged]

    @property
    def names(self) -> list[str]:
        return list(self._last.tensors)

    def shape_of(self, name: str) -> torch.Size:
        return self._last.tensors[name].shape

    def dtype_of(self, name: str) -> torch.dtype:
        own = self._last.tensors[name].dtype
        if name not in self._averaged:
            return own
        if self._dtype is not None:
            return self._dtype
        return torch.float64 if own == torch.float64 else torch.float32

    def _is_through(self, num_elements: int) -> None:
        self._num_done += num_elements
        if self._progress is not None:
            self._progress(self._num_done, self._num_all)

    def _blocks(self, name: str) -> Iterator[tuple[int, list[Tensor]]]:
        """Where each block begins, and its values in all inputs, which are given back after it."""
        inputs = [tensors[name].reshape(-1) for tensors in self._inputs]
        readings = [_safetensors.Reading(values, self._mapped) for values in inputs]
        size = _BLOCK_BYTES // max(values.element_size() for values in inputs)
        num_elements = inputs[0].numel()
        for begin in range(0, num_elements, size):
            end = min(begin + size, num_elements)
            yield begin, [values[begin:end] for values in inputs]
            for reading in readings:
                reading.is_through(end)
            self._is_through(end - begin)

    def _fill(self, out: Tensor, name: str) -> None:
        """Fills a flat tensor, a block at a time."""
        for begin, inputs in self._blocks(name):
            part = out[begin : begin + inputs[0].numel()]
            weighted_sum(part, inputs, self._coefficients, self._device)

    @torch.no_grad()
    def write_to(self, out: Tensor, name: str) -> None:
        """Fills a tensor of the shape."""
        if name not in self._averaged:
            out.copy_(self._last.tensors[name])
            self._is_through(out.numel())
        elif out.is_contiguous():
            self._fill(out.view(-1), name)
        else:
            whole = torch.empty(out.shape, dtype=out.dtype, device=out.device)
            self._fill(whole.view(-1), name)
            out.copy_(whole)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, in :meth:`dtype_of`, a block at a time."""
        last = self._last.tensors[name]
        if name not in self._averaged:
            yield from _safetensors.chunks_of(last)
            self._is_through(last.numel())
            return
        block = torch.empty(0, dtype=self.dtype_of(name))
        for _, inputs in self._blocks(name):
            out = block.resize_(inputs[0].shape)
            weighted_sum(out, inputs, self._coefficients, self._device)
            yield from _safetensors.chunks_of(out)

    def values(self) -> dict[str, Tensor]:
        """All of it, on the CPU."""
        found = {}
        for name in self.names:
            found[name] = torch.empty(self.shape_of(name), dtype=self.dtype_of(name))
            self.write_to(found[name], name)
        return found

    def into(self, targets: Mapping[str, Tensor], what: str) -> None:
        """Writes into tensors by name.

        Raises:
            FormatError: Names or shapes that don't fit; nothing is written then.
        """
        problems = []
        for name in self.averaged:
            if name not in targets:
                problems.append(f"'{name}' is missing in {what}")
            elif (shape := targets[name].shape) != self.shape_of(name):
                problems.append(
                    f"'{name}' has shape {list(shape)} in {what} but {list(self.shape_of(name))} "
                    "in the snapshots"
                )
            elif not targets[name].is_floating_point():
                problems.append(f"'{name}' is {targets[name].dtype} in {what}")
        if problems:
            lines = "\n  ".join(_checks.listed(problems))
            raise FormatError(f"{READ}: {what} doesn't fit; nothing was changed:\n  {lines}")
        for name in self.names:
            if name not in targets or targets[name].shape != self.shape_of(name):
                continue
            target = targets[name]
            if _shards.is_dtensor(target):
                whole = torch.empty(self.shape_of(name), dtype=self.dtype_of(name))
                self.write_to(whole, name)
                _shards.shard_of(target).copy_(_shards.part_of(target, whole.to(target.device)))
            else:
                self.write_to(target.detach(), name)

    def into_module(self, module: nn.Module) -> None:
        tree = _tracking.read(module)
        self.into({member.name: member.tensor for member in tree.members}, "the model")
        tree.units.note_write()

    def into_manager(
        self, manager: EMAManager, average: str | None, iteration: int, num_updates: int
    ) -> None:
        if manager.is_swapped:
            raise RuntimeError(f"{READ}: the manager's model is swapped; swap back first")
        self.into(dict(manager.named_emas(average)), "the manager")
        state: dict[str, Any] = manager.state_dict()
        state |= {"iteration": iteration, "num_updates": num_updates}
        manager.load_state_dict(state)
