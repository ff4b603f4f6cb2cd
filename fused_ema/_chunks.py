"""Tensors in host memory and their partners on a device, cut into chunks of a bounded size.

The elements of all tensors of one device and dtype pair follow each other; a chunk is a range of
them, and a tensor may be cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fused_ema import _storage
from fused_ema._foreach import is_dense


@dataclass(eq=False)
class Item:
    """A tensor on a device, and those in host memory that go with it.

    Attributes:
        name: For errors.
        hosts: In host memory, all of one dtype, with the shape of the other.
        away: The one on the device.
        is_average: Whether an update averages it; else it is copied.
        is_prompt: Whether others than an optimizer may write it, so that it has to be read first.
    """

    name: str
    hosts: Sequence[Tensor]
    away: Tensor
    is_average: bool = True
    is_prompt: bool = False

    @property
    def is_bits(self) -> bool:
        """Whether only bits are moved, of whatever dtype."""
        return not self.is_average and self.hosts[0].dtype == self.away.dtype

    @property
    def numel(self) -> int:
        """Elements to be moved."""
        return as_moved(self.away, self.is_bits).numel()

    def key(self) -> tuple[object, ...]:
        """What chunks depend on, but for addresses on the device."""
        away = self.away
        geometry = (away.dtype, away.shape, away.stride(), away.device)
        return (*geometry, self.is_average, self.is_prompt, *map(id, self.hosts))


@dataclass(eq=False)
class Piece:
    """A part of an item, in one chunk.

    Attributes:
        index: Of the item.
        hosts: Views of its part.
        shape: Of the part; flat where the item is dense.
        begin: Of a flat part, its first element.
        cuts: Of another, (dimension, first, length) one after the other.
        offset: Where in the chunk it begins, in elements.
    """

    index: int
    hosts: list[Tensor]
    shape: tuple[int, ...]
    begin: int
    cuts: tuple[tuple[int, int, int], ...] | None
    offset: int

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    def part_of(self, tensor: Tensor) -> Tensor:
        """Its part of a tensor of the item's shape."""
        if self.cuts is None:
            return tensor.as_strided(self.shape, (1,), tensor.storage_offset() + self.begin)
        for dim, first, length in self.cuts:
            tensor = tensor.narrow(dim, first, length)
        return tensor


@dataclass(eq=False)
class Run:
    """Memory of pieces that lie one after the other, to be copied at once.

    Attributes:
        hosts: A view for each average.
        offset: Where in the chunk it begins, in elements.
    """

    hosts: list[Tensor]
    offset: int


@dataclass(eq=False)
class Chunk:
    """A range of the elements of one device and dtype pair.

    Attributes:
        device: Where the other side is.
        host_dtype, away_dtype: Of the two sides; of bits, that in which they are moved.
        is_average, is_prompt: As the items'.
        by_host: Whether the host's kernels average it.
        pieces: In the order of their offsets.
        runs: The same memory on the host's side, where the device averages.
        length: Elements, with the gaps between pieces.
    """

    device: torch.device
    host_dtype: torch.dtype
    away_dtype: torch.dtype
    is_average: bool
    is_prompt: bool
    by_host: bool
    pieces: list[Piece] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    length: int = 0

    @cached_property
    def _sizes(self) -> list[int]:
        """Of the gaps and the pieces in turn, up to the end."""
        sizes, end = [], 0
        for piece in self.pieces:
            sizes += [piece.offset - end, piece.numel]
            end = piece.offset + piece.numel
        return sizes

    def parts_in(self, buffer: Tensor) -> list[Tensor]:
        """Each piece's place in a buffer of the chunk's length."""
        # One call for all: of 1,000 small tensors a call each takes longer than the update.
        parts = buffer.split_with_sizes(self._sizes)[1::2]
        return [
            part if piece.cuts is None else part.view(piece.shape)
            for part, piece in zip(parts, self.pieces, strict=True)
        ]


def as_moved(tensor: Tensor, is_bits: bool) -> Tensor:
    """A tensor, or its bits as something that every kernel copies."""
    if not is_bits:
        return tensor
    if tensor.element_size() == 1:
        return tensor.detach().view(torch.uint8)
    return _storage.as_floats(tensor.detach())


def lay(
    items: Sequence[Item],
    chunk_bytes: int,
    by_host: Sequence[bool],
    flats: Sequence[Tensor] = (),
) -> list[Chunk]:
    """Cuts items into chunks, in the order in which they are to be read.

    Args:
        items: Any.
        chunk_bytes: That a buffer of a chunk may have, on either side.
        by_host: Of each item, whether the host's kernels average it.
        flats: Allocations that hold hosts of several items.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, item in enumerate(items):
        if item.away.numel():
            dtypes = item.hosts[0].dtype, item.away.dtype
            way = by_host[i] or not item.is_average
            key = (not item.is_prompt, way, item.away.device, item.is_average, *dtypes)
            groups.setdefault(key, []).append(i)
    # Prompt ones first, then those that wait for no core of the host.
    order = sorted(groups, key=lambda key: [bool(part) for part in key[:2]])
    places = _Places(flats)
    return [
        chunk for key in order for chunk in _cut(items, groups[key], chunk_bytes, key[1], places)
    ]


def _cut(
    items: Sequence[Item], indices: Sequence[int], chunk_bytes: int, way: object, places: _Places
) -> Iterator[Chunk]:
    first = items[indices[0]]
    host_dtype = as_moved(first.hosts[0], first.is_bits).dtype
    away_dtype = as_moved(first.away, first.is_bits).dtype
    step = _storage.ALIGNMENT_BYTES // host_dtype.itemsize
    # The host's kernels have the emas where they are: buffers hold params.
    num_bytes = away_dtype.itemsize
    if not way:
        num_bytes = max(num_bytes, host_dtype.itemsize * len(first.hosts))
    capacity = chunk_bytes // num_bytes // step * step
    chunk = None
    for i in indices:
        item = items[i]
        hosts = [as_moved(host, item.is_bits) for host in item.hosts]
        away = as_moved(item.away, item.is_bits)
        is_flat = is_dense(away) and all(h.stride() == away.stride() for h in hosts)
        cut = _flat_cuts(away.numel()) if is_flat else _cuts(away.shape, capacity)
        for begin, length, cuts in cut:
            while length:
                offset = 0 if chunk is None else math.ceil(chunk.length / step) * step
                room = capacity - offset
                if chunk is None or room < (1 if cuts is None else length):
                    if chunk is not None:
                        yield chunk
                    chunk = Chunk(
                        item.away.device,
                        host_dtype,
                        away_dtype,
                        item.is_average,
                        item.is_prompt,
                        bool(way),
                    )
                    offset, room = 0, capacity
                taken = min(length, room)
                shape: tuple[int, ...] = (taken,)
                if cuts is not None:
                    shape = tuple(_cut_shape(away.shape, cuts))
                piece = Piece(i, [], shape, begin, cuts, offset)
                piece.hosts = [piece.part_of(host) for host in hosts]
                chunk.pieces.append(piece)
                if not way:
                    places.add(chunk, piece)
                chunk.length = offset + taken
                begin, length = begin + taken, length - taken
    if chunk is not None:
        yield chunk


def _flat_cuts(numel: int) -> Iterator[tuple[int, int, None]]:
    yield 0, numel, None


def _cuts(
    shape: Sequence[int], capacity: int
) -> Iterator[tuple[int, int, tuple[tuple[int, int, int], ...]]]:
    """Boxes of at most so many elements, that a tensor of any strides can be cut into."""
    left: list[tuple[tuple[int, int, int], ...]] = [()]
    while left:
        cuts = left.pop()
        sizes = _cut_shape(shape, cuts)
        numel = math.prod(sizes)
        if numel <= capacity:
            yield 0, numel, cuts
            continue
        dim = max(range(len(sizes)), key=sizes.__getitem__)
        half = sizes[dim] // 2
        left.append((*cuts, (dim, half, sizes[dim] - half)))
        left.append((*cuts, (dim, 0, half)))


def _cut_shape(shape: Sequence[int], cuts: Iterable[tuple[int, int, int]]) -> list[int]:
    sizes = list(shape)
    for dim, _, length in cuts:
        sizes[dim] = length
    return sizes


class _Places:
    """Tells where pieces lie one after the other in allocations of several tensors."""

    def __init__(self, flats: Sequence[Tensor]) -> None:
        self._flats = [
            (flat.data_ptr(), flat.data_ptr() + flat.numel() * flat.element_size(), flat)
            for flat in flats
        ]
        self._open: tuple[Chunk, list[Tensor], list[int]] | None = None

    def add(self, chunk: Chunk, piece: Piece) -> None:
        """Puts a piece's memory to the run before it, or begins a new one."""
        size = piece.hosts[0].element_size()
        addresses = [host.data_ptr() for host in piece.hosts]
        flats = [self._flat_of(address) for address in addresses]
        end = piece.offset + piece.numel
        if self._open is not None and self._open[0] is chunk and piece.cuts is None:
            _, open_flats, starts = self._open
            run = chunk.runs[-1]
            distance = (piece.offset - run.offset) * size
            if all(
                flat is was and address - start == distance
                for flat, was, address, start in zip(
                    flats, open_flats, addresses, starts, strict=True
                )
            ):
                run.hosts = [
                    _range_of(flat, start, (end - run.offset) * size, host.dtype)
                    for flat, start, host in zip(open_flats, starts, run.hosts, strict=True)
                ]
                return
        chunk.runs.append(Run(piece.hosts, piece.offset))
        found = [flat for flat in flats if flat is not None]
        is_open = piece.cuts is None and len(found) == len(flats)
        self._open = (chunk, found, addresses) if is_open else None

    def _flat_of(self, address: int) -> Tensor | None:
        return next((flat for a, b, flat in self._flats if a <= address < b), None)


def _range_of(flat: Tensor, address: int, num_bytes: int, dtype: torch.dtype) -> Tensor:
    begin = (address - flat.data_ptr()) // flat.element_size()
    return flat[begin : begin + num_bytes // flat.element_size()].view(dtype)
