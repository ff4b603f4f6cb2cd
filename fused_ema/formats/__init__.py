"""Averages in the checkpoints of training frameworks: found, named by the model, written.

:func:`read` takes a file, a folder or a dictionary and says what is in it. Files are only ever read
as data: with ``torch.load(weights_only=True)``, memory-mapped where the file allows it, and objects
of other packages in them stay names, whose classes are never imported.

What each format calls its own, and where it keeps the average:

==================  ==============================================================================
``fused_ema``       :meth:`EMAManager.state_dict`, alone or under a key beside the model's own; or
                    in a folder of ``torch.distributed.checkpoint``
``mmcv``            ``ema_a_b_c`` beside ``a.b.c`` in ``state_dict``; which is which depends on
                    when the file was saved (mmcv 1.x, MMDetection 2.x)
``mmengine``        ``state_dict``; the raw weights are ``module.*`` of ``ema_state_dict``, which
                    has ``steps``
``averaged_model``  ``module.*`` with ``n_averaged`` (``torch.optim.swa_utils``)
``timm``            ``state_dict_ema`` beside ``state_dict``
``deit``            ``model_ema`` beside ``model``
``ema_state_dict``  that, beside ``state_dict``, where nothing says that the file is MMEngine's
``diffusers``       the folder of ``EMAModel.save_pretrained``, or its list ``shadow_params``
``torch_ema``       the list ``shadow_params``
``ema_pytorch``     ``ema_model.*`` beside ``online_model.*``, with ``initted`` and ``step``
``lit_ema``         ``model_ema.*`` beside ``model.*``, without the dots of its names
``lightning``       ``state_dict``; the raw weights are ``current_model_state``
``nemo``            a second file ``*-EMA.ckpt``, or ``ema`` in the state of the optimizer
``ultralytics``     ``ema``, once it is exported as a ``state_dict``
``rt_detr``         ``ema.module``, with ``ema.updates``, beside ``model``
``dino``            ``teacher``, with names ``backbone.*``, beside ``student``
``safetensors``     all of such a file, where its names tell of no other format
``state_dict``      all there is, or what a key or prefix names; never guessed
==================  ==============================================================================

The average of ``averaged_model``, ``ema_pytorch``, ``lit_ema``, ``diffusers`` or ``torch_ema`` may
stand under any key, and that of the first three under any prefix of a module's names, as
``self.ema`` of a LightningModule does. What a file holds doesn't depend on what contains it: a
dictionary, a file of torch or of safetensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from fused_ema import _counters, _safetensors, _tracking
from fused_ema._format_errors import READ, WRITE, FormatError
from fused_ema.formats import (
    _dcp,
    _within,
    detectors,
    diffusers,
    dino,
    ema_pytorch,
    lightning,
    lit_ema,
    nemo,
    openmmlab,
    own,
    pairs,
    plain,
    swa_utils,
    torch_ema,
)
from fused_ema.formats._files import Foreign, Replacing, load, pickled
from fused_ema.formats._found import Format, Found
from fused_ema.formats._names import Model, Names, check_model, model_of
from fused_ema.formats._pairs import raw_beside
from fused_ema.formats._source import MODEL_KEYS, Main, Source, at_key, holds_tensors, shown_path

__all__ = ["FORMATS", "WRITABLE", "FormatError", "Found", "load_into", "read", "write"]

# In the order in which they are asked: a later one may recognise files of an earlier one.
_ALL = (
    own.FORMAT,
    openmmlab.MMENGINE,
    lightning.FORMAT,
    nemo.FORMAT,
    ema_pytorch.FORMAT,
    swa_utils.FORMAT,
    lit_ema.FORMAT,
    diffusers.FORMAT,
    torch_ema.FORMAT,
    pairs.TIMM,
    pairs.DEIT,
    pairs.EMA_STATE_DICT,
    detectors.RT_DETR,
    detectors.ULTRALYTICS,
    dino.FORMAT,
    openmmlab.MMCV,
    plain.SAFETENSORS,
    plain.STATE_DICT,
)
_BY_NAME = {known.name: known for known in _ALL}
_PLAIN = (plain.SAFETENSORS.name, plain.STATE_DICT.name)
FORMATS = tuple(_BY_NAME)
WRITABLE = tuple(known.name for known in _ALL if known.make is not None)

# Of fused_ema.state, which knows managers as nothing here does, and puts it here.
load_into: Callable[..., None]


def read(
    source: str | os.PathLike[str] | Mapping[str, Any],
    model: Names | None = None,
    format: str | None = None,  # noqa: A002
    *,
    main: Main | None = None,
    prefix: str = "",
    key: str = "",
    variant: str | None = None,
    average: str | None = None,
) -> Found:
    """Finds the average in a checkpoint.

    Args:
        source: A file, a folder (of ``EMAModel.save_pretrained``, or one that
            ``torch.distributed.checkpoint`` has saved a manager in) or what was loaded from a file.
        model: The model, its ``state_dict()`` or the names of its parameters. Formats that keep a
            list without names need it; with the others it is checked that they are of that model,
            and raw weights that the module hasn't got are left out.
        format: One of :data:`FORMATS`; None to recognise it.
        main: For ``mmcv``: what the model's own names hold in the file, ``"ema"`` or ``"raw"``.
            None to tell by its metadata.
        prefix: Take only names that begin so, without it: ``"model."`` for the ``self.model`` of a
            LightningModule. Of a module that keeps an average of another, that of either.
        key: Read the value of this key; of keys within keys ``"a.b"``, of a list ``"a.0"``. With
            ``format="state_dict"`` and ``prefix`` it reads what has no format.
        variant: Of a folder: which of the weights, as ``save_pretrained(variant="fp16")`` names
            them. None for the plain ones, or the only ones there are.
        average: Of a manager's state that has several averages: the name of the one to read.

    Returns:
        What was found.

    Raises:
        FormatError: A ValueError: a file that is truncated or no checkpoint, an unknown format, no
            average in it, a checkpoint of another model, or one that doesn't say enough.
        OSError: The file can't be opened.
        TypeError: ``source`` or ``model`` is something else.

    Formula of the momentum: ``1 - decay`` where a format records a decay.
    """
    path = None if isinstance(source, Mapping) else Path(source)
    origin = Source(
        path,
        model_of(model, READ),
        prefix,
        main,
        format=format,
        key=key,
        variant=variant,
        average=average,
    )
    return _read(source, origin)


def _read(source: str | os.PathLike[str] | Mapping[str, Any], origin: Source) -> Found:
    name, path, model = origin.format, origin.path, origin.model
    if name is not None and name not in FORMATS:
        raise FormatError(f"{READ}: format is {name!r}; choose from {', '.join(FORMATS)}")
    if origin.main not in (None, "ema", "raw"):
        raise FormatError(f"{READ}: main is {origin.main!r}; it is 'ema' or 'raw'")
    is_folder = path is not None and path.is_dir()
    is_dcp = path is not None and is_folder and _dcp.is_folder(path)
    if is_folder and origin.key and not is_dcp:
        raise FormatError(f"{READ}: '{path}' is a folder, which has no key '{origin.key}'")
    if origin.variant is not None and (is_dcp or not is_folder):
        raise FormatError(
            f"{READ}: variant is for the folders of diffusers, and {shown_path(path)} is none; "
            "leave it out"
        )
    if path is not None and is_dcp:
        found = _read_dcp(path, origin)
    elif path is not None and is_folder:
        found = diffusers.read_folder(path, origin)
    elif path is not None and _safetensors.is_safetensors(path):
        tensors, metadata = _safetensors.map_any(path)
        found = _read_keyed(tensors, replace(origin, metadata=metadata))
    else:
        data = source if isinstance(source, Mapping) else load(Path(source))
        found = _read_keyed(data, origin)
    if name is not None and found.format != name:
        raise FormatError(
            f"{READ}: {shown_path(path)} has the format '{found.format}', not '{name}'; leave it "
            "out"
        )
    if origin.average is not None and found.format != own.FORMAT.name:
        raise FormatError(
            f"{READ}: {shown_path(path)} has the format '{found.format}', whose average has no "
            f"name; leave average '{origin.average}' out"
        )
    if not found.ema:
        raise FormatError(
            f"{READ}: {shown_path(path)} has no average"
            + (f" of a name that begins with '{origin.prefix}'" if origin.prefix else "")
        )
    if model is not None:
        check_model(found.ema, found.raw, model)
        if model.is_module:  # mmcv saves buffers that a state_dict() leaves out.
            raw = {name: tensor for name, tensor in found.raw.items() if name in model.names}
            found = replace(found, raw=raw)
    return found


def _read_dcp(path: Path, origin: Source) -> Found:
    data, at = _dcp.load(path, origin.key, origin.average)
    found = _find(data, replace(origin, key=""))
    if not at:
        return found
    raw_at = found.raw_at and f"{at}.{found.raw_at}"
    return replace(found, ema_at=f"{at}.{found.ema_at}", raw_at=raw_at)


def _read_keyed(data: Mapping[str, Any], origin: Source) -> Found:
    """What is in the dictionary, or in the value of a key that the caller names."""
    key = origin.key
    if not key:
        return _find(data, origin)
    value = at_key(data, key, origin)
    # Neither the value itself nor what it lies in.
    others = [other for other in MODEL_KEYS if not f"{key}.".startswith(f"{other}.")]
    if isinstance(value, (list, tuple)) and origin.format == "state_dict":
        found = Found("state_dict", origin.listed(value, f"'{key}'"), ema_at=plain.WHOLE)
    elif isinstance(value, Mapping):
        raws = (data[other] for other in others if holds_tensors(data.get(other)))
        found = _find(value, replace(origin, beside=next(raws, {})))
    else:
        what = f"'{key}' of {shown_path(origin.path)}"
        if isinstance(value, Foreign):
            raise FormatError(f"{READ}: {shown_path(origin.path)}: {pickled(value, key)}")
        raise FormatError(
            f"{READ}: {what} is a {type(value).__name__}, not a dictionary (of a list of tensors "
            "say format='state_dict', --format state_dict; of names that begin alike prefix=, "
            "--prefix)"
        )
    at = key if found.ema_at == plain.WHOLE else f"{key}.{found.ema_at}"
    raw, raw_at = found.raw, f"{key}.{found.raw_at}"
    if not raw:
        raw, raw_at = raw_beside(found.ema, at, data, others, origin)
    return replace(found, raw=raw, ema_at=at, raw_at=raw_at)


def _find(data: Mapping[str, Any], origin: Source) -> Found:
    """What the first format finds that recognises a dictionary."""
    chosen = _ALL if origin.format is None else (_BY_NAME[origin.format],)
    if origin.format is None and plain.says_average(origin):
        chosen = (plain.SAFETENSORS,)
    found = next((f for f in _answers(data, origin, chosen) if f is not None), None)
    if found is None:
        raise _unknown(data, origin)
    if found.format in _PLAIN and not plain.says_average(origin):
        _refuse_others(data, found, origin)
        _refuse_marks(found, origin)
    return found


def _answers(
    data: Mapping[str, Any], origin: Source, chosen: Sequence[Format]
) -> Iterator[Found | None]:
    for known in chosen:
        if not known.is_last:
            yield known.read(data, origin)
    yield _within.find(data, origin, [known for known in chosen if known.is_part])
    for known in chosen:
        if known.is_last:
            yield known.read(data, origin)


def _unknown(data: Mapping[str, Any], origin: Source) -> FormatError:
    name, keys = origin.format, ", ".join(f"'{key}'" for key in list(data)[:8])
    if name is not None:
        return FormatError(
            f"{READ}: {shown_path(origin.path)} doesn't have the format '{name}': it has the keys "
            f"{keys}"
        )
    counters = [key for key, value in data.items() if _counters.is_state(value)]
    if counters or _counters.is_state(data):
        what = f"its '{counters[0]}'" if counters else "it"
        return FormatError(
            f"{READ}: {shown_path(origin.path)}: {what} is the state of a manager with into=, and "
            f"{data[counters[0]][_counters.STATE_KEY] if counters else data[_counters.STATE_KEY]}; "
            "say where: format='state_dict' with key= or prefix= (--key, --prefix)"
        )
    return FormatError(
        f"{READ}: {shown_path(origin.path)} has no average in a known format: it has the keys "
        f"{keys}; if its weights are the average, say format='state_dict' (--format state_dict); "
        "if a part of it is, say which as well: key= (--key) for a value of the dictionary, "
        "prefix= (--prefix) for names that begin alike"
    )


def _refuse_others(data: Mapping[str, Any], found: Found, origin: Source) -> None:
    """That a dictionary which the caller takes for the average as a whole has none elsewhere."""
    if origin.format is None:  # All others have been asked.
        return
    listed = replace(origin, numbered=True)
    others = [k for k in _ALL if k.name not in _PLAIN and k is not openmmlab.MMCV]
    try:
        other = next((f for f in _answers(data, listed, others) if f is not None), None)
    except FormatError:
        if found.ema_at != plain.WHOLE:
            raise
        other = None  # Of a file that has nothing else the names are asked, once for all formats.
    other = other or openmmlab.MMCV.read(data, listed)  # Whose names have no marks.
    if other is None or not other.ema:
        return
    is_same = other.ema.keys() == found.ema.keys() and all(
        other.ema[name].data_ptr() == tensor.data_ptr() for name, tensor in found.ema.items()
    )
    if not is_same:
        raise FormatError(
            f"{READ}: {shown_path(origin.path)} has its average in {other.ema_at}, where the "
            f"format '{other.format}' keeps it: leave the format '{origin.format}' out, or say "
            "what is the average: key= (--key)"
        )


def _refuse_marks(found: Found, origin: Source) -> None:
    """That a file which is taken for the average as a whole has no names that tell otherwise."""
    known = {} if origin.model is None else origin.model.names
    names = [name for name in found.ema if name not in known]
    for other in _ALL:
        told = [n for n in names if any(fnmatchcase(n, mark) for mark in other.marks)]
        if told:
            raise FormatError(
                f"{READ}: {shown_path(origin.path)} has names of the format '{other.name}', and so "
                f"isn't the average as a whole: {_tracking.shown(told)}; take the part that is: "
                "prefix= (--prefix) with format='state_dict', or pass the model if it has these "
                "names itself (--model-names)"
            )


def write(
    path: str | os.PathLike[str],
    found: Found,
    format: str,  # noqa: A002
    model: Names | None = None,
) -> None:
    """Writes a checkpoint, first under another name, so that there is never half a file.

    A safetensors file gets the averaged model, and is written tensor by tensor.

    Args:
        path: The file.
        found: What :func:`read` found, or one of your own.
        format: One of :data:`WRITABLE`. ``mmcv`` files have the average in their main keys, as at
            the end of an epoch; ``fused_ema`` files are ``{"model": raw, "ema": state}``.
        model: For ``torch_ema`` and ``diffusers``, which write a list: the model, or the names of
            its parameters in their order.

    Raises:
        FormatError: A ValueError: the format needs what wasn't found.
        OSError: The file can't be written.
    """
    _write(path, found, format, model_of(model, WRITE))


def _write(
    path: str | os.PathLike[str],
    found: Found,
    name: str,
    model: Model | None = None,
    progress: Callable[[int, int], None] | None = None,
    release: bool = False,
) -> None:
    path = Path(path)
    if name not in WRITABLE:
        raise FormatError(f"{WRITE}: format is {name!r}; choose from {', '.join(WRITABLE)}")
    make = _BY_NAME[name].make
    assert make is not None
    content = make(found, model)
    with Replacing(path) as file:
        if name == "safetensors":
            metadata = plain.metadata_of(found)
            _safetensors.write_file(file, content, metadata, progress, release)
        else:
            torch.save(content, file)
