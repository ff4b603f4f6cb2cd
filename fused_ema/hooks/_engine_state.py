"""What a rank's part of an engine's averages is on disk, and which of it goes where.

Each file says which elements of which parameter it holds, so that any number of ranks can take what
belongs to them from the files of any other.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_ema import _checks, _storage
from fused_ema._foreach import dtype_name, holds
from fused_ema.hooks._deepspeed import TITLE, Param, Piece, shape_of

VERSION = 1

_KEYS = ("version", "iteration", "num_updates", "shapes", "shards", "buffers")


def part(master: Tensor, piece: Piece) -> Tensor:
    """A piece of a master or its average: a view of one dimension, unless it lies otherwise."""
    return master.detach().reshape(-1).narrow(0, piece.start, piece.numel)


def shapes_of(params: Iterable[Param]) -> dict[str, list[int]]:
    """Name to shape of what is trained, whole."""
    return {name: list(p.shape) for p in params if p.is_trained for name in p.names}


def is_enough(states: Sequence[Any], params: Iterable[Param]) -> bool:
    """Whether each part that this rank holds is in one of the states as it is."""
    runs = {
        (name, offset, values.numel())
        for state in states
        if isinstance(state, Mapping)
        for name, shards in state.get("shards", {}).items()
        for offset, values in shards
    }
    return all(
        (p.names[0], piece.offset, piece.numel) in runs for p in params for piece in p.pieces
    )


def fitting(
    states: Sequence[Any],
    params: Sequence[Param],
    emas: Sequence[Tensor],
    buffers: Mapping[str, Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """What to copy where, to go on from some states.

    Args:
        states: Of all ranks that saved, or as many as needed.
        params: The model's.
        emas: The averages of this rank's masters.
        buffers: Those of the model's buffers, by name.

    Raises:
        TypeError: Something else than states.
        ValueError: What doesn't fit, or is missing; one error that lists it.
    """
    for state in states:
        if not isinstance(state, Mapping) or not all(key in state for key in _KEYS):
            raise TypeError("no state of an EngineEMA; pass what state_dict() returned")
        if state["version"] != VERSION:
            raise ValueError(
                f"the state has version {state['version']} but this fused_ema reads {VERSION}"
            )
        for key in ("iteration", "num_updates"):
            _checks.count(TITLE.removeprefix("fused_ema."), key, state[key], least=0)
    ours, theirs = shapes_of(params), states[0]["shapes"]
    problems = [
        f"'{name}' has shape {theirs.get(name, 'none')} there and {ours.get(name, 'none')} here"
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
    ]
    positions = {(state["iteration"], state["num_updates"]) for state in states}
    if len(positions) > 1:
        problems.append(f"the ranks were at several positions: {sorted(positions)}")
    writes: list[tuple[Tensor, Tensor]] = []
    for param in () if problems else params:
        found = [run for state in states for run in state["shards"].get(param.names[0], ())]
        for piece in param.pieces:
            ema = emas[piece.master]
            if ema.is_contiguous():
                problems += _fill(writes, part(ema, piece), piece, found, param)
                continue
            # Its flat form is a copy; such a one is the parameter's alone.
            flat = torch.empty_like(part(ema, piece))
            runs: list[tuple[Tensor, Tensor]] = []
            problems += _fill(runs, flat, piece, found, param)
            _storage.copy([dst for dst, _ in runs], [src for _, src in runs])
            writes.append((ema, flat.view(ema.shape)))
    for name, ema in buffers.items():
        values = states[0]["buffers"].get(name)
        if values is None or values.shape != ema.shape:
            problems.append(f"the buffer '{name}' is missing or of another shape")
        else:
            writes.append((ema, values))
    if problems:
        raise ValueError(
            "the state doesn't fit this engine; nothing was changed:\n  "
            + "\n  ".join(_checks.listed(problems))
        )
    return writes


def whole(
    states: Sequence[Any], params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The averages in some states by name, each put together when it is asked for.

    Args:
        states: Of all ranks that saved.
        params: What is trained, by name: of its shapes, that of ZeRO-3's parameters the whole one.
        buffers: Those of the model, by name.

    Raises:
        TypeError: Something else than states.
        ValueError: As fitting(), before the first one.
    """
    # Without memory: what fits where is asked as for an engine that holds everything.
    held, rooms = [], []
    for i, (name, tensor) in enumerate(params.items()):
        shape = shape_of(tensor)
        rooms.append(torch.empty(shape, dtype=torch.float64, device="meta"))
        held.append(Param((name,), tensor, True, (Piece(i, 0, 0, shape.numel()),)))
    runs = (values for _, values in fitting(states, held, rooms, buffers))
    for name, room in zip(params, rooms, strict=True):
        parts: list[Tensor] = []
        while sum(map(Tensor.numel, parts)) < room.numel():
            parts.append(next(runs))
        if parts:
            yield name, torch.cat(parts).view(room.shape)
    yield from zip(buffers, runs, strict=True)


def _fill(
    writes: list[tuple[Tensor, Tensor]],
    part: Tensor,
    piece: Piece,
    found: Sequence[tuple[int, Tensor]],
    param: Param,
) -> list[str]:
    """Adds what goes where from saved runs of a parameter; says what is wrong with them."""
    covered = piece.offset
    end = piece.offset + piece.numel
    for offset, values in sorted(found, key=lambda run: run[0]):
        if values.dim() != 1 or not holds(part.dtype, values.dtype):
            return [
                f"'{param.names[0]}' is {dtype_name(values.dtype)} there and "
                f"{dtype_name(part.dtype)} here, which can't hold all its values"
            ]
        first, last = max(covered, offset), min(end, offset + values.numel())
        if offset <= covered < last:
            dst = part.narrow(0, first - piece.offset, last - first)
            writes.append((dst, values.narrow(0, first - offset, last - first)))
            covered = last
    if covered < end:
        return [f"'{param.names[0]}': elements {covered} to {end} are in none of the files"]
    return []


def path_of(folder: str, rank: object, world: object) -> str:
    """The file of one of so many ranks; with stars, a pattern."""
    return os.path.join(folder, f"fused_ema_rank_{rank}_of_{world}.pt")


def paths_in(folder: str, tag: object, world: int) -> list[str]:
    """The files of a checkpoint by the rank that wrote them; if there are, of as many ranks as now.

    Raises:
        OSError: No tag is given, and there is no file ``latest``.
        ValueError: There are none, or some are missing.
    """
    if tag is None:
        with open(os.path.join(folder, "latest")) as file:
            tag = file.read().strip()
    folder = os.path.join(folder, str(tag))
    found = glob.glob(path_of(glob.escape(folder), "*", "*"))
    worlds = {int(path.rpartition("_of_")[2].removesuffix(".pt")) for path in found}
    saved_by = world if world in worlds else max(worlds, default=0)
    paths = [path_of(folder, rank, saved_by) for rank in range(saved_by)]
    if missing := [path for path in paths if path not in found]:
        raise ValueError(f"{missing} are missing, of {saved_by} ranks that saved the checkpoint")
    if not paths:
        raise ValueError(
            f"{folder!r} has no average; save one with save_checkpoint() beside the engine's"
        )
    return paths


def read(paths: Sequence[str]) -> list[Any]:
    """The states in some files; tensors as maps of the files.

    Raises:
        ValueError: One that can't be read.
    """
    states = []
    for path in paths:
        try:
            states.append(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        except Exception as error:
            raise ValueError(
                f"{path!r} can't be read as averages (damaged or cut short?): {error}"
            ) from error
    return states
