"""The weighted sum of many tensors, in chunks, each input read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_ema import _checks, _safetensors, _shards, _tracking
from fused_ema._format_errors import FormatError
from fused_ema.manager import EMAManager
from fused_ema.posthoc._files import READ, Snapshot

# So small that the sum stays in the first caches, and just below where torch shares an operation
# out to threads, whose hand-over takes longer.
_CHUNK = (1 << 15) - 64
# A launch is to be worth its while.
_CHUNK_OF_ACCELERATOR = 1 << 22
# After so many elements what was read is given back to the system: 1 MB of each file.
_BLOCK = 8 * _CHUNK

Progress = Callable[[int, int], None]


def weighted_sum(
    out: Tensor,
    inputs: Sequence[Tensor],
    coefficients: Sequence[float],
    device: torch.device | None = None,
) -> None:
    """``out = sum of coefficients[k] * inputs[k]``, computed in fp32, or fp64 where out is.

    Args:
        out: 1-D and contiguous.
        inputs: As many elements each, of any floating-point dtype, on the CPU.
        coefficients: One for each.
        device: Where it is computed; None for out's.
    """
    device = out.device if device is None else device
    size = _CHUNK if device.type == "cpu" else _CHUNK_OF_ACCELERATOR
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    total = torch.empty(min(size, out.numel()), dtype=dtype, device=device)
    for begin in range(0, out.numel(), size):
        part = out[begin : begin + size]
        sums = total[: part.numel()].zero_()
        for values, coefficient in zip(inputs, coefficients, strict=True):
            chunk = values[begin : begin + size]
            sums.add_(chunk if device.type == "cpu" else chunk.to(device), alpha=coefficient)
        part.copy_(sums)


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

    def _flat(self, name: str) -> list[Tensor]:
        return [tensors[name].reshape(-1) for tensors in self._inputs]

    def _is_through(self, num_elements: int) -> None:
        self._num_done += num_elements
        if self._progress is not None:
            self._progress(self._num_done, self._num_all)

    def _fill(self, out: Tensor, inputs: Sequence[Tensor]) -> None:
        """Fills a flat tensor, a block at a time."""
        for begin in range(0, out.numel(), _BLOCK):
            part = out[begin : begin + _BLOCK]
            read = [values[begin : begin + _BLOCK] for values in inputs]
            weighted_sum(part, read, self._coefficients, self._device)
            for values in read:
                _safetensors.release_mapped(values, self._mapped)
            self._is_through(part.numel())

    @torch.no_grad()
    def write_to(self, out: Tensor, name: str) -> None:
        """Fills a tensor of the shape."""
        if name not in self._averaged:
            out.copy_(self._last.tensors[name])
            self._is_through(out.numel())
        elif out.is_contiguous():
            self._fill(out.view(-1), self._flat(name))
        else:
            whole = torch.empty(out.shape, dtype=out.dtype, device=out.device)
            self._fill(whole.view(-1), self._flat(name))
            out.copy_(whole)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, in :meth:`dtype_of`, a block at a time."""
        last = self._last.tensors[name]
        if name not in self._averaged:
            yield from _safetensors.chunks_of(last)
            self._is_through(last.numel())
            return
        flat = self._flat(name)
        block = torch.empty(min(_BLOCK, last.numel()), dtype=self.dtype_of(name))
        for begin in range(0, last.numel(), _BLOCK):
            inputs = [values[begin : begin + _BLOCK] for values in flat]
            out = block[: inputs[0].numel()]
            self._fill(out, inputs)
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
