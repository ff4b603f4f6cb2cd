"""Safetensors files: 8 bytes with the length of a JSON header, the header, the tensors."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from fused_ema._foreach import dtype_name
from fused_ema._format_errors import READ, WRITE, FormatError, refuse, unreadable

_MAX_HEADER_BYTES = 100_000_000
_CHUNK_BYTES = 8 << 20

# The first of two names for one dtype is the one that is written.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def is_safetensors(path: Path) -> bool:
    # The index of a variant has its name before the ending: x.safetensors.index.fp16.json.
    is_index = path.suffix == ".json" and ".safetensors.index." in path.name
    if path.suffix == ".safetensors" or is_index:
        return True
    with path.open("rb") as file:
        start = file.read(9)
    # A zip begins with PK, a pickle with 0x80.
    return len(start) == 9 and start[8:] == b"{" and start[:2] != b"PK"


def map_any(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file, or the shards that an index names: :func:`map_file`."""
    return map_shards(path) if path.suffix == ".json" else map_file(path)


def map_shards(index: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        files = json.loads(index.read_text())["weight_map"]
        names = sorted(set(files.values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("a file outside of its folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(index, error) from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors.update(map_file(index.with_name(name))[0])
    missing = [f"'{name}' is in none of its files" for name in files if name not in tensors]
    if missing:
        refuse(f"{READ}: '{index}' is incomplete", missing)
    return {name: tensors[name] for name in files}, {}


def map_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Maps a safetensors file into memory; nothing is read until a tensor is used.

    Writing to a tensor doesn't reach the file.

    Args:
        path: The file.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        FormatError: The file is truncated or no safetensors file.
        OSError: The file can't be opened.
    """
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        try:
            length = int.from_bytes(file.read(8), "little")
            if num_bytes < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, num_bytes - 8):
                raise ValueError(f"a header of {length} bytes in a file of {num_bytes}")
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("the header is no object")
            metadata = header.pop("__metadata__", None) or {}
            start = 8 + length
            layouts = {name: _layout(name, entry) for name, entry in header.items()}
            end = max((entry[3] for entry in layouts.values()), default=0)
            if start + end > num_bytes:
                raise ValueError(f"{start + end} bytes announced, {num_bytes} there")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise unreadable(path, error) from error
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    tensors = {}
    for name, (dtype, shape, begin, stop) in layouts.items():
        if begin == stop:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        content = mapped[start + begin : start + stop]
        own = torch.frombuffer(content, dtype=torch.uint8)
        if own.data_ptr() % dtype.itemsize:
            own = own.clone()
        tensors[name] = own.view(dtype).view(shape)
    return tensors, {str(k): str(v) for k, v in metadata.items()}


def _layout(name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"'{name}' has the dtype {entry['dtype']}, unknown here")
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    begin, stop = entry["data_offsets"]
    numbers = [*shape, begin, stop]
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers):
        raise ValueError(f"'{name}' has shape {shape} at {begin} to {stop}")
    needed = dtype.itemsize
    for size in shape:
        needed *= size
    if stop - begin != needed:
        raise ValueError(f"'{name}' needs {needed} bytes but has {stop - begin}")
    return dtype, shape, begin, stop


def write_file(
    file: IO[bytes],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    progress: Callable[[int, int], None] | None = None,
    release: bool = False,
) -> None:
    """Writes the header, then tensor by tensor, without a copy of those that are contiguous.

    Args:
        file: Open for writing.
        tensors: By name; tied ones are written under each of their names.
        metadata: Strings for the header.
        progress: Called with the bytes written and the bytes in all.
        release: Give the memory of tensors that are mapped to a file, and were not written to,
            back to the system as soon as they are through.

    Raises:
        FormatError: A dtype that the format hasn't got.
    """
    mapped = mapped_ranges() if release else []

    def chunks(name: str) -> Iterator[memoryview]:
        tensor = tensors[name].detach()
        yield from chunks_of(tensor)
        release_mapped(tensor, mapped)

    layouts = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_stream(file, layouts, metadata, chunks, progress)


def write_stream(
    file: IO[bytes],
    layouts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    chunks: Callable[[str], Iterator[memoryview]],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a file of tensors that are made one after the other.

    Args:
        file: Open for writing.
        layouts: Dtype and shape by name.
        metadata: Strings for the header.
        chunks: The bytes of a tensor, whose name it is given; called once for each.
        progress: As of :func:`write_file`.

    Raises:
        FormatError: A dtype that the format hasn't got.
    """
    names = {dtype: name for name, dtype in reversed(_DTYPES.items())}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    # Largest items first, so that each tensor lies at a multiple of its item's size.
    order = sorted(layouts, key=lambda name: -layouts[name][0].itemsize)
    end = 0
    for name in order:
        dtype, shape = layouts[name]
        if dtype not in names:
            raise FormatError(
                f"{WRITE}: '{name}' is {dtype_name(dtype)}, which safetensors hasn't got; "
                "write another format"
            )
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    done = 0
    for name in order:
        for chunk in chunks(name):
            file.write(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, end)


def chunks_of(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, without numpy, which may not be there."""
    tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    num_bytes = tensor.numel() * tensor.element_size()
    if num_bytes == 0:
        return
    content = memoryview((ctypes.c_ubyte * num_bytes).from_address(tensor.data_ptr())).cast("B")
    for begin in range(0, num_bytes, _CHUNK_BYTES):
        yield content[begin : begin + _CHUNK_BYTES]


def mapped_ranges() -> list[tuple[int, int]]:
    """The addresses that are mapped to files; none where the system doesn't say."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":
            begin, _, end = addresses.partition("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


def release_mapped(tensor: Tensor, mapped: Sequence[tuple[int, int]]) -> None:
    """Gives the memory of a tensor back that lies in one of those ranges, and is only read."""
    storage = tensor.untyped_storage()
    begin, num_bytes = storage.data_ptr(), storage.nbytes()
    if tensor.is_contiguous():  # Which may be a part of what is mapped, and is all that was read.
        begin, num_bytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    if _is_in(mapped, begin, num_bytes):
        page = mmap.PAGESIZE
        end = (begin + num_bytes) // page * page
        begin = -(-begin // page) * page
        _release(begin, end)


def _is_in(mapped: Sequence[tuple[int, int]], begin: int, num_bytes: int) -> bool:
    # Of anonymous memory releasing would be the end.
    i = bisect_right(mapped, begin, key=lambda range_: range_[0]) - 1
    return i >= 0 and begin + num_bytes <= mapped[i][1]


def _release(begin: int, end: int) -> None:
    """Gives whole pages back, with madvise(2)."""
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if advice is not None and begin < end:
        _madvise()(begin, end - begin, advice)


@cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return cast(Callable[[int, int, int], int], function)


class Reading:
    """A contiguous tensor that is read once, from its first element on, and isn't written to.

    Where it is mapped to a file, the memory of what is through is given back. The system reads
    ahead by itself: asked to (MADV_WILLNEED), it read from a disk at a third of the speed.
    """

    def __init__(self, tensor: Tensor, mapped: Sequence[tuple[int, int]]) -> None:
        self._begin, self._item = tensor.data_ptr(), tensor.element_size()
        num_bytes = tensor.numel() * self._item
        self._is_mapped = _is_in(mapped, self._begin, num_bytes)
        self._released = self._page_of(0)

    def _page_of(self, element: int) -> int:
        return (self._begin + element * self._item) // mmap.PAGESIZE * mmap.PAGESIZE

    def is_through(self, end: int) -> None:
        """All before that element has been read."""
        if self._is_mapped:
            # The page in which that element lies is given back with what follows.
            until = self._page_of(end)
            _release(self._released, until)
            self._released = until
