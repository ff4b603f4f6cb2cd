"""Folders of torch.distributed.checkpoint: what of one is the state of an EMAManager, whole.

One process is enough, and no process group. Nothing but that state and the model's weights is
read, tensor by tensor. The folder's index is a pickle: of the objects in it only their attributes
are taken, no class is imported and none of their code is run.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_ema import _state, _tracking
from fused_ema._format_errors import READ, FormatError, unreadable
from fused_ema.formats._source import MODEL_KEYS

_INDEX = ".metadata"
# What a state is known by; empty dictionaries, as its raw weights mostly are, aren't saved.
_KNOWN_BY = (_state.VERSION_KEY, _state.EMA_DTYPES_KEY, _state.EMA_KEY)

Words = tuple[Any, ...]
"""Where an entry was: the keys of one dictionary within the other."""


def is_folder(path: Path) -> bool:
    """Whether it is one, complete or not."""
    return (path / _INDEX).is_file() or any(path.glob("*.distcp"))


class _Record:
    """Stands for an object of the index: has its attributes."""

    def __new__(cls, *args: Any) -> _Record:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name, (_Record,), {})


@dataclass(frozen=True)
class _Part:
    """Where some of a tensor's elements are, or an object."""

    offsets: tuple[int, ...]
    file: str
    begin: int
    num_bytes: int
    is_plain: bool


@dataclass
class _Entry:
    """A tensor, or an object, whose dtype is None."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    parts: list[_Part] = field(default_factory=list)


def _index_of(path: Path) -> dict[Words, _Entry]:
    try:
        with (path / _INDEX).open("rb") as file:
            index = _Unpickler(file).load()
        words = index.planner_data or {}
        entries: dict[str, _Entry] = {}
        for name, saved in index.state_dict_metadata.items():
            is_tensor = hasattr(saved, "properties")
            dtype = saved.properties.state[0] if is_tensor else None
            entries[name] = _Entry(dtype, tuple(saved.size) if is_tensor else ())
        for at, stored in index.storage_data.items():
            part = _Part(
                tuple(getattr(at, "offset", None) or ()),  # An object has none.
                str(stored.relative_path),
                int(stored.offset),
                int(stored.length),
                not getattr(stored, "transform_descriptors", None),
            )
            if Path(part.file).is_absolute() or ".." in Path(part.file).parts:
                raise ValueError(f"a file outside of its folder, '{part.file}'")
            entries[at.fqn].parts.append(part)
        return {tuple(words.get(name, (name,))): entry for name, entry in entries.items()}
    except FileNotFoundError as error:
        raise FormatError(
            f"{READ}: '{path}' is a checkpoint of torch.distributed.checkpoint without its "
            f"{_INDEX}, which is written last: saving it was broken off; take an earlier one"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # pickle raises nearly anything for a damaged file.
        raise unreadable(path / _INDEX, error) from error


def _read_part(path: Path, part: _Part) -> Any:
    if not part.is_plain:
        raise FormatError(
            f"{READ}: '{path / part.file}' was transformed as it was saved (compressed, say); save "
            "it again without an extension"
        )
    try:
        with (path / part.file).open("rb") as file:
            file.seek(part.begin)
            content = io.BytesIO(file.read(part.num_bytes))
        return torch.load(content, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FormatError(
            f"{READ}: '{path}' is incomplete: it has no '{part.file}', which its {_INDEX} names"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # As torch.load() does.
        raise unreadable(path / part.file, error) from error


def _read_entry(path: Path, entry: _Entry) -> Any:
    if entry.dtype is None:
        return _read_part(path, entry.parts[0])
    if len(entry.parts) == 1:
        only = _read_part(path, entry.parts[0])
        if tuple(only.shape) == entry.shape:
            return only
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    num_read = 0
    for part in entry.parts:
        values: Tensor = _read_part(path, part)
        ranges = zip(part.offsets, values.shape, strict=True)
        tensor[tuple(slice(begin, begin + size) for begin, size in ranges)] = values
        num_read += values.numel()
    if num_read != tensor.numel():
        raise FormatError(
            f"{READ}: '{path}' has {num_read} of the {tensor.numel()} elements of a tensor"
        )
    return tensor


def load(path: Path, key: str, average: str | None = None) -> tuple[dict[str, Any], str]:
    """The state of the manager, and the model's weights beside it.

    Args:
        path: The folder.
        key: Where the state is to be looked for, or "": keys with dots between them.
        average: Of averages with names, the one to be read; the others are empty then.

    Returns:
        A dictionary of what was saved beside each other, and the key that it was under, or "".

    Raises:
        FormatError: The folder is incomplete or damaged, or has no state or several.
    """
    entries = _index_of(path)
    states = _states_in(entries)
    chosen = [at for at in states if _is_at(at, key)]
    if len(chosen) > 1:
        keys = _tracking.shown([_dotted(at) for at in chosen])
        raise FormatError(
            f"{READ}: '{path}' has several averages, under {keys}; read the one you want: key= "
            "(--key)"
        )
    if not chosen:
        tops = dict.fromkeys(str(words[0]) for words in entries)
        where = f" under '{key}'" if key else ""
        raise FormatError(
            f"{READ}: '{path}' has no state of an EMAManager{where}: it has the keys "
            f"{_tracking.shown(list(tops))}; for other averages make a file of it first, with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    own = chosen[0]
    above = own[:-1]
    models = [(*above, name) for name in MODEL_KEYS] if own else []
    found: dict[str, Any] = {}
    emas = (*own, _state.EMA_KEY)
    # Under a name one level deeper than an average without one.
    others = {
        words[: len(emas) + 1]
        for words in entries
        if average and words[: len(emas)] == emas and len(words) > len(emas) + 1
    }
    others = others - {(*emas, average)} if (*emas, average) in others else set()
    for words, entry in entries.items():
        if words[: len(emas) + 1] in others:
            _put(found, words[len(above) : len(emas) + 1], {})
            continue
        is_weight = entry.dtype is not None and words[: len(above) + 1] in models
        if is_weight or words[: len(own)] == own:
            _put(found, words[len(above) :], _read_entry(path, entry))
    return found, _dotted(above)


def _states_in(entries: Iterable[Words]) -> list[Words]:
    have: dict[Words, set[Any]] = {}
    for words in entries:
        for i in range(len(words)):
            have.setdefault(words[:i], set()).add(words[i])
    return [at for at, keys in have.items() if keys.issuperset(_KNOWN_BY)]


def _is_at(at: Words, key: str) -> bool:
    return not key or f"{_dotted(at)}.".startswith(f"{key}.")


def _dotted(words: Words) -> str:
    return ".".join(map(str, words))


def _put(found: dict[str, Any], words: Words, value: Any) -> None:
    inner: Any = found
    for word in words[:-1]:
        inner = inner.setdefault(word, {})
    inner[words[-1]] = value
