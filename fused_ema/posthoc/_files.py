"""Snapshots in files: our own, those of ema-pytorch and EDM2, and plain checkpoints."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_ema import _checks, _safetensors, _tracking
from fused_ema._format_errors import FormatError
from fused_ema.formats._files import load
from fused_ema.formats._source import MODEL_KEYS, holds_tensors, parts, whole
from fused_ema.posthoc._profiles import Kept, Momenta, Power, Profile, from_json
from fused_ema.schedules import _gamma_of_std

KEY = "fused_ema.posthoc"
VERSION = 1

READ = "fused_ema.posthoc"
OWN, EMA_PYTORCH, EDM2, PLAIN = "fused_ema", "ema_pytorch", "edm2", "plain"
_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_OF_EMA_PYTORCH = re.compile(r"(\d+)\.(\d+)\.pt")
_OF_EDM2 = re.compile(r"training-state-(\d+)\.pt")
_PICKLED = re.compile(r"network-snapshot-.*\.pkl")


@dataclass(frozen=True)
class Head:
    """What a file of our own says of itself."""

    path: Path
    run: str
    average: str
    iteration: int
    content: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """An average, or a plain checkpoint, in a file.

    Attributes:
        path: The file.
        kind: What wrote it.
        run: Of which run it is; "" where that isn't known.
        average: Which of the run's averages.
        iteration: How many iterations it has seen; EDM2 counts images. Of a plain checkpoint the
            number in its name.
        profile: None of a plain checkpoint.
        tensors: Mapped to the file: read when they are used.
        averaged: The names of those that are averages; others are as they were then.
        precision: Of what was written.
    """

    path: Path
    kind: str
    run: str
    average: str
    iteration: int
    profile: Profile | None
    tensors: Mapping[str, Tensor]
    averaged: frozenset[str]
    precision: torch.dtype


@dataclass(frozen=True)
class Found:
    """The snapshots of one run, by iteration, and what is wrong with other files."""

    snapshots: list[Snapshot]
    problems: list[str]


def is_named_as_snapshot(path: Path) -> bool:
    """Whether it is a snapshot by its name, and for our own by what it says of itself."""
    if path.suffix == ".safetensors" and not path.name.startswith("."):
        try:
            return KEY in _safetensors.map_file(path)[1]
        except FormatError:
            return False
    patterns = (_OF_EMA_PYTORCH, _OF_EDM2, _PICKLED)
    return any(pattern.fullmatch(path.name) for pattern in patterns)


def heads(folder: Path) -> list[Head]:
    """Our own snapshots in a folder; what can't be read is none."""
    found = []
    for path in sorted(folder.glob("[0-9]*.safetensors")):
        try:
            head = _head_of(path, _safetensors.map_file(path)[1])
        except FormatError:
            continue
        if head is not None:
            found.append(head)
    return found


def _head_of(path: Path, metadata: Mapping[str, str]) -> Head | None:
    if KEY not in metadata:
        return None
    try:
        content = json.loads(metadata[KEY])
        if content["version"] != VERSION:
            raise FormatError(
                f"{READ}: '{path}' has version {content['version']!r} but this fused_ema reads "
                f"{VERSION}; update fused_ema"
            )
        iteration = _checks.count("posthoc", "iteration", content["iteration"], 1)
        return Head(path, str(content["run"]), str(content["average"]), iteration, content)
    except FormatError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"{READ}: the header of '{path}' is damaged ({error})") from error


def find(
    files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    run: str | None = None,
    profiles: Sequence[float] = (),
    update_every: int = 1,
    plain: bool = False,
) -> Found:
    """Reads what a folder or some files hold.

    Args:
        files: A folder, or files.
        run: Which one of several.
        profiles: Of ema-pytorch's files: the relative standard deviations, by their index.
        update_every: Of ema-pytorch's files.
        plain: Take plain checkpoints, which otherwise are passed over.

    Raises:
        FormatError: There are none, or of several runs, models or kinds.
        OSError: A folder or file isn't there.
    """
    one_place = isinstance(files, (str, os.PathLike))
    listed: list[Path] = [Path(files)] if one_place else [Path(p) for p in files]  # type: ignore
    paths = [path for given in listed for path in _paths_in(given)]
    problems: list[str] = []
    found: list[Snapshot] = []
    for path in paths:
        try:
            found += _read(path, profiles, update_every)
        except FormatError as error:
            problems.append(
                str(error).removeprefix(f"{READ}: ").replace("fused_ema.state.read: ", "")
            )
    kinds = sorted({snapshot.kind for snapshot in found} - {PLAIN})
    where = f"'{listed[0]}'" if one_place else f"{len(paths)} files"
    if plain:
        found = [snapshot for snapshot in found if snapshot.kind == PLAIN]
    elif len(kinds) > 1:
        raise FormatError(
            f"{READ}: {where} has snapshots of {' and '.join(kinds)}; name the files of one"
        )
    else:
        num_plain = sum(snapshot.kind == PLAIN for snapshot in found)
        found = [snapshot for snapshot in found if snapshot.kind != PLAIN]
        if not found and num_plain:
            raise FormatError(
                f"{READ}: {where} has {num_plain} plain checkpoints, which don't say what they "
                "are averages of; combine them with merge() (--merge uniform)"
            )
    found = _of_one_run(found, run, where)
    if not found:
        what = "plain checkpoints" if plain else "snapshots"
        lines = "".join(f"\n  {line}" for line in _checks.listed(problems))
        raise FormatError(
            f"{READ}: {where} has no {what}{' that can be read:' if lines else ''}{lines}"
        )
    found.sort(key=lambda snapshot: snapshot.iteration)
    _refuse_other_models(found)
    return Found(found, problems)


def _paths_in(given: Path) -> list[Path]:
    if not given.is_dir():
        if not given.exists():
            raise FileNotFoundError(2, "No such file or folder", str(given))
        return [given]
    files = sorted(p for p in given.iterdir() if p.is_file() and not p.name.startswith("."))
    return [p for p in files if p.suffix in _SUFFIXES or _PICKLED.fullmatch(p.name)]


def _read(path: Path, profiles: Sequence[float], update_every: int) -> list[Snapshot]:
    if _PICKLED.fullmatch(path.name):
        raise FormatError(
            f"'{path}' is a pickled network of EDM2, and to read one is to run code; its "
            "training-state-*.pt has the same averages as data"
        )
    if _safetensors.is_safetensors(path):
        tensors, metadata = _safetensors.map_any(path)
        head = _head_of(path, metadata)
        return [_plain(path, tensors) if head is None else _own(head, tensors, metadata)]
    data = load(path)
    if named := _OF_EMA_PYTORCH.fullmatch(path.name):
        ema = parts(data, "ema_model.")
        if {"initted", "step"} <= data.keys() and ema:
            index, step = map(int, named.groups())
            return [_of_ema_pytorch(path, ema, index, step, profiles, update_every)]
    of_edm2 = data.get("ema")
    if isinstance(of_edm2, Mapping) and {"stds", "emas"} <= of_edm2.keys():
        return _of_edm2(path, data)
    inner = data.get("state_dict")
    nested = [data[k] for k in MODEL_KEYS if holds_tensors(data.get(k))]
    weights = inner if holds_tensors(inner) else nested[0] if nested else data
    if not holds_tensors(weights):
        raise FormatError(f"'{path}' holds no tensors of a model")
    return [_plain(path, {k: v for k, v in weights.items() if isinstance(v, Tensor)})]


def _own(head: Head, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Snapshot:
    interval = int(head.content["interval"])
    try:
        time = head.iteration // interval * interval
        profile = from_json(head.content["profile"], time)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"'{head.path}' has no profile that can be read ({error})") from error
    averaged = frozenset(json.loads(metadata.get("fused_ema.averaged", "null")) or tensors)
    precision = getattr(torch, str(head.content.get("dtype")), torch.float32)
    return Snapshot(
        head.path,
        OWN,
        head.run,
        head.average,
        head.iteration,
        profile,
        tensors,
        averaged,
        precision,
    )


def _of_ema_pytorch(
    path: Path,
    ema: Mapping[str, Tensor],
    index: int,
    step: int,
    profiles: Sequence[float],
    update_every: int,
) -> Snapshot:
    if index >= len(profiles):
        raise FormatError(
            f"'{path}' doesn't say what average it is; pass the sigma_rels of the PostHocEMA in "
            f"their order: profiles=(0.05, 0.28) (--profiles), of which {index} is missing"
        )
    gamma = _gamma_of_std(profiles[index])
    averaged = _floats(ema)
    precision = next((ema[name].dtype for name in averaged), torch.float32)
    if update_every == 1:
        # Its count is one ahead of its power function's, which moves all of them alike.
        profile: Profile = Power(gamma, step)
    else:
        profile = _of_few_updates(gamma, step, update_every)
    return Snapshot(path, EMA_PYTORCH, "", str(index), step, profile, ema, averaged, precision)


def _of_few_updates(gamma: float, step: int, k: int) -> Profile:
    """Of updates at iterations 0, k, 2 k and on, each by the momentum of a single iteration."""

    def momentum_at(iteration: int) -> float:
        at = iteration + 1 - k
        return 1.0 if at == 0 else -math.expm1((gamma + 1) * math.log1p(-1 / (at + 2)))

    # As if each came k - 1 iterations later, at the end of its interval.
    profile = Momenta(momentum_at, k, 0).at((step - 1) // k * k + k)
    assert isinstance(profile, Kept)
    return Kept(tuple(point - (k - 1) for point in profile.points), profile.log_kept)


def _of_edm2(path: Path, data: Mapping[str, Any]) -> list[Snapshot]:
    state, ema = data.get("state"), data["ema"]
    images = whole(state.get("cur_nimg")) if isinstance(state, Mapping) else None
    if images is None and (named := _OF_EDM2.fullmatch(path.name)):
        images = int(named[1]) * 1000
    if not images:
        raise FormatError(f"'{path}' doesn't say how many images its averages have seen")
    found = []
    for std, tensors in zip(ema["stds"], ema["emas"], strict=True):
        averaged = _floats(tensors)
        precision = next((tensors[name].dtype for name in averaged), torch.float32)
        profile = Power(_gamma_of_std(std), images)
        found.append(
            Snapshot(path, EDM2, "", f"{std:.3f}", images, profile, tensors, averaged, precision)
        )
    return found


def _plain(path: Path, tensors: Mapping[str, Tensor]) -> Snapshot:
    # The name's last number, or the folder's where it has none: checkpoint-500/model.safetensors.
    numbers = next(
        (n for n in (re.findall(r"\d+", path.stem), re.findall(r"\d+", path.parent.name)) if n),
        ["0"],
    )
    averaged = _floats(tensors)
    precision = next((tensors[name].dtype for name in averaged), torch.float32)
    return Snapshot(path, PLAIN, "", "", int(numbers[-1]), None, tensors, averaged, precision)


def _floats(tensors: Mapping[str, Tensor]) -> frozenset[str]:
    return frozenset(name for name, tensor in tensors.items() if tensor.is_floating_point())


def _of_one_run(found: list[Snapshot], run: str | None, where: str) -> list[Snapshot]:
    runs: dict[str, list[Snapshot]] = {}
    for snapshot in found:
        runs.setdefault(snapshot.run, []).append(snapshot)
    if run is not None:
        if found and run not in runs:
            raise FormatError(
                f"{READ}: {where} has no run '{run}': it has {_tracking.shown(list(runs))}"
            )
        return runs.get(run, [])
    if len(runs) > 1:
        lines = [
            f"'{name}': {len(own)} snapshots, iterations {min(s.iteration for s in own):,} to "
            f"{max(s.iteration for s in own):,}"
            for name, own in runs.items()
        ]
        raise FormatError(
            f"{READ}: {where} has snapshots of {len(runs)} runs; choose one: run= (--run)\n  "
            + "\n  ".join(_checks.listed(lines))
        )
    return found


def _refuse_other_models(found: Sequence[Snapshot]) -> None:
    first = found[0]
    for other in found[1:]:
        if other.tensors.keys() != first.tensors.keys():
            name = sorted(other.tensors.keys() ^ first.tensors.keys())[0]
            has, lacks = (first, other) if name in first.tensors else (other, first)
            raise FormatError(
                f"{READ}: '{first.path}' and '{other.path}' are of different models: "
                f"'{has.path.name}' has '{name}', which '{lacks.path.name}' lacks; name the files "
                "of one"
            )
        for name, tensor in first.tensors.items():
            if other.tensors[name].shape != tensor.shape:
                raise FormatError(
                    f"{READ}: '{first.path}' and '{other.path}' are of different models: '{name}' "
                    f"has shape {list(tensor.shape)} and {list(other.tensors[name].shape)}; name "
                    "the files of one"
                )
