"""Files: read as data alone, and written whole or not at all."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from fused_ema._format_errors import READ, WRITE, FormatError, unreadable


class Foreign:
    """Stands for an object of another package in a file: none of its code is run or imported."""

    full_name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Foreign:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, saved: Any) -> None:
        pass


class _Dictionary:
    """Stands for a dictionary of another class, and becomes a plain one."""

    def __new__(cls, *args: Any) -> Any:
        return {}


def _foreign(full_name: str) -> Any:
    if full_name == "collections.defaultdict":
        return lambda *args: {}
    if full_name == "dnnlib.util.EasyDict":  # The progress in EDM2's checkpoints.
        return type("_EasyDict", (_Dictionary,), {})
    return type("_Foreign", (Foreign,), {"full_name": full_name})


def load(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:  # torch raises OSError for damaged files too.
        start = file.read(1)
    if not start:
        raise FormatError(f"{READ}: '{path}' is empty")
    is_zip = zipfile.is_zipfile(path)
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        stand_ins = [(_foreign(name), name) for name in sorted(foreign)]
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        if not is_zip and start != b"\x80":
            raise unreadable(path, error) from error
        raise FormatError(
            f"{READ}: '{path}' holds objects that can't be read as data (it is never run as "
            "code), or is damaged; load it where its packages are installed, and save the "
            "state_dict() of what is in it"
        ) from error
    except Exception as error:  # torch raises nearly anything for a damaged file.
        raise unreadable(path, error) from error
    if isinstance(data, Foreign):
        raise FormatError(f"{READ}: '{path}' {pickled(data)}")
    if not isinstance(data, Mapping):
        raise FormatError(
            f"{READ}: '{path}' holds a {type(data).__name__}, not a dictionary; save one"
        )
    return data


def pickled(value: Foreign, key: str = "") -> str:
    what, store = (f"'{key}' is", f"{{'{key}': ckpt['{key}']") if key else ("is", "{'ema': ckpt")
    return (
        f"{what} a pickled {value.full_name}, and to read one is to run code; where its package is "
        "installed, export it: ckpt = torch.load(..., weights_only=False); torch.save("
        f"{store}.state_dict()}}, ...)"
    )


class Replacing:
    """A file under another name that takes its place once it is whole."""

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            raise IsADirectoryError(f"{WRITE}: '{path}' is a folder; name a file")
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> IO[bytes]:
        self._file = self._temporary.open("wb")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                os.replace(self._temporary, self._path)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
