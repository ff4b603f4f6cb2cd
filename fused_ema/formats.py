"""Averages in the checkpoints of training frameworks: found, named by the model, written.

:func:`read` takes a file, a folder or a dictionary and says what is in it. Files are only ever read
as data: with ``torch.load(weights_only=True)``, memory-mapped where the file allows it, and objects
of other packages in them stay names, whose classes are never imported.

What each format calls its own, and where it keeps the average:

==================  ==============================================================================
``fused_ema``       :meth:`EMAManager.state_dict`, alone or under a key beside the model's own
``mmcv``            ``ema_a_b_c`` beside ``a.b.c`` in ``state_dict``; which is which depends on
                    when the file was saved (mmcv 1.x, MMDetection 2.x)
``mmengine``        ``state_dict``; the raw weights are ``module.*`` of ``ema_state_dict``
``averaged_model``  ``module.*`` with ``n_averaged`` (``torch.optim.swa_utils``)
``timm``            ``state_dict_ema`` beside ``state_dict``
``diffusers``       the folder of ``EMAModel.save_pretrained``, or its list ``shadow_params``
``torch_ema``       the list ``shadow_params``
``ema_pytorch``     ``ema_model.*`` beside ``online_model.*``
``lightning``       ``state_dict``; the raw weights are ``current_model_state``
``nemo``            a second file ``*-EMA.ckpt``, or ``ema`` in the state of the optimizer
``ultralytics``     ``ema``, once it is exported as a ``state_dict``
``safetensors``     the only tensors there are
``state_dict``      the same in a file of torch; never guessed, since it could be anything
==================  ==============================================================================
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor, nn

from fused_ema import _safetensors, _tracking, state
from fused_ema._format_errors import READ, WRITE, FormatError, refuse, unreadable
from fused_ema.manager import EMAManager

__all__ = ["FORMATS", "WRITABLE", "FormatError", "Found", "load_into", "read", "write"]

Main = Literal["ema", "raw"]
Names = nn.Module | Mapping[str, Tensor] | Sequence[str]
Tensors = dict[str, Tensor]

_MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module", "net")


@dataclass(frozen=True)
class Found:
    """What is in a checkpoint, by the model's own names.

    ``dataclasses.replace(found, iteration=...)`` adds what a format doesn't record.

    Attributes:
        format: One of :data:`FORMATS`.
        ema: Name to average. Tensors of a file are mapped to it: read when they are used.
        raw: Name to the model's own values, of those that have no average too; empty where the
            checkpoint hasn't got them. ``model.load_state_dict(found.raw)`` takes them over.
        iteration: The iteration that comes next, 0-based, or None.
        num_updates: Updates so far, as the format counts them, or None.
        momentum: The weight of the new value, or None; where it changes, the last or the limit.
        epoch: Epochs so far, or None.
        ema_at: Where the average is kept.
        raw_at: Where the raw weights are kept, or "".
        why: What told the one from the other, where that isn't the format itself.
    """

    format: str
    ema: Tensors
    raw: Tensors = field(default_factory=dict)
    iteration: int | None = None
    num_updates: int | None = None
    momentum: float | None = None
    epoch: int | None = None
    ema_at: str = ""
    raw_at: str = ""
    why: str = ""

    def averaged_model(self) -> Tensors:
        """All of the model's tensors, with the average where there is one."""
        return {**self.raw, **self.ema}


# ---- names


@dataclass(frozen=True)
class _Member:
    name: str
    shape: torch.Size | None
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Model:
    """A model's names: all of them, and those of its parameters, each tensor once."""

    names: Mapping[str, torch.Size | None]
    parameters: Sequence[_Member]
    trainable: Sequence[_Member]
    is_module: bool = False


def _model_of(model: Names | None, op: str) -> _Model | None:
    if model is None:
        return None
    if isinstance(model, nn.Module):
        members = _tracking.read(model).members
        groups: dict[int, list[_tracking.Member]] = {}
        for member in members:
            if not member.is_buffer:
                groups.setdefault(id(member.tensor), []).append(member)
        parameters, trainable = [], []
        for first, *others in groups.values():
            known = _Member(first.name, first.tensor.shape, tuple(m.name for m in others))
            parameters.append(known)
            if first.tensor.requires_grad:
                trainable.append(known)
        return _Model({m.name: m.tensor.shape for m in members}, parameters, trainable, True)
    if isinstance(model, Mapping):
        shapes = {str(name): tensor.shape for name, tensor in model.items()}
        listed = [_Member(name, shape) for name, shape in shapes.items()]
        return _Model(shapes, listed, listed)
    if isinstance(model, str) or not all(isinstance(name, str) for name in model):
        raise TypeError(
            f"{op}: model is a {type(model).__name__}; pass the module, its state_dict() or the "
            "names of its parameters"
        )
    listed = [_Member(name, None) for name in model]
    return _Model(dict.fromkeys(model), listed, listed)


def _own_names(tensors: Tensors, model: _Model | None, prefix: str) -> Tensors:
    """The same by the model's own names, without those of wrappers."""
    known = {} if model is None else model.names
    named: Tensors = {}
    was: dict[str, str] = {}
    for full, tensor in tensors.items():
        name = full
        if name not in known:
            parts = full.split(".")
            name = ".".join(p for p in parts if p not in _tracking._TRANSPARENT)
        if name in named:
            raise FormatError(
                f"{READ}: '{was[name]}' and '{full}' both come to '{name}' once the names of "
                "wrappers are left out; rename one of them"
            )
        named[name], was[name] = tensor, full
    while named and all(n.startswith("module.") for n in named) and not set(named) & set(known):
        named = {name[len("module.") :]: tensor for name, tensor in named.items()}
    if prefix:
        named = {n[len(prefix) :]: t for n, t in named.items() if n.startswith(prefix)}
    return named


def _by_position(tensors: Any, members: Sequence[Sequence[_Member]], what: str) -> Tensors:
    """A list of tensors by the names of a model's parameters."""
    if not isinstance(tensors, (list, tuple)) or not all(isinstance(t, Tensor) for t in tensors):
        raise FormatError(f"{READ}: {what} is no list of tensors")
    for chosen in members:
        if len(chosen) == len(tensors):
            break
    else:
        raise FormatError(
            f"{READ}: {what} has {len(tensors)} tensors but the model has "
            f"{' or '.join(str(n) for n in dict.fromkeys(map(len, members)))} parameters; it is of "
            "another model (names alone must be those of its parameters, in their order)"
        )
    problems = [
        f"'{member.name}' has shape {list(member.shape)} but tensor {i} has {list(tensor.shape)}"
        for i, (member, tensor) in enumerate(zip(chosen, tensors, strict=True))
        if member.shape is not None and member.shape != tensor.shape
    ]
    if problems:
        refuse(f"{READ}: {what} is of another model", problems)
    named = {}
    for member, tensor in zip(chosen, tensors, strict=True):
        named.update(dict.fromkeys((member.name, *member.others), tensor))
    return named


def _check_model(found: Found, model: _Model) -> None:
    """That the averages are of this model."""
    problems = [f"'{name}' is not in the model" for name in found.ema if name not in model.names]
    for name, tensor in found.ema.items():
        shape = model.names.get(name)
        if shape is not None and shape != tensor.shape:
            problems.append(
                f"'{name}' has shape {list(tensor.shape)} but the model's has {list(shape)}"
            )
    if model.is_module:
        has = found.ema.keys() | found.raw.keys()
        problems += [
            f"'{member.name}' of the model is missing"
            for member in model.trainable
            if not has & {member.name, *member.others}
        ]
    if problems:
        refuse(f"{READ}: the checkpoint is of another model", problems)


# ---- reading


@dataclass(frozen=True)
class _Source:
    """Where a dictionary comes from, and what the caller knows of it."""

    path: Path | None = None
    model: _Model | None = None
    prefix: str = ""
    main: Main | None = None
    # Lists without a model are numbered: enough to say what is in a file.
    numbered: bool = False

    def named(self, value: Any, what: str) -> Tensors:
        return _own_names(_tensors(value, what), self.model, self.prefix)

    def listed(self, value: Any, what: str) -> Tensors:
        if self.model is not None:
            return _by_position(value, (self.model.parameters, self.model.trainable), what)
        if self.numbered and isinstance(value, (list, tuple)):
            return {f"{i}": t for i, t in enumerate(value) if isinstance(t, Tensor)}
        raise FormatError(
            f"{READ}: {what} is a list without names; pass the model it is of: read(..., "
            "model=model), or --model-names FILE"
        )


class _Foreign:
    """Stands for an object of another package in a file: none of its code is run or imported."""

    full_name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Foreign:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, saved: Any) -> None:
        pass


def _foreign(full_name: str) -> Any:
    if full_name == "collections.defaultdict":
        return lambda *args: {}
    return type("_Foreign", (_Foreign,), {"full_name": full_name})


def read(
    source: str | os.PathLike[str] | Mapping[str, Any],
    model: Names | None = None,
    format: str | None = None,  # noqa: A002
    *,
    main: Main | None = None,
    prefix: str = "",
) -> Found:
    """Finds the average in a checkpoint.

    Args:
        source: A file, a folder (``EMAModel.save_pretrained``) or what was loaded from a file.
        model: The model, its ``state_dict()`` or the names of its parameters. Formats that keep a
            list without names need it; with the others it is checked that they are of that model,
            and raw weights that the module hasn't got are left out.
        format: One of :data:`FORMATS`; None to recognise it.
        main: For ``mmcv``: what the model's own names hold in the file, ``"ema"`` or ``"raw"``.
            None to tell by its metadata.
        prefix: Take only names that begin so, without it: ``"model."`` for the ``self.model`` of a
            LightningModule.

    Returns:
        What was found.

    Raises:
        FormatError: A ValueError: a file that is truncated or no checkpoint, an unknown format, no
            average in it, a checkpoint of another model, or one that doesn't say enough.
        OSError: The file can't be opened.
        TypeError: ``source`` or ``model`` is something else.

    Formula of the momentum: ``1 - decay`` where a format records a decay.
    """
    return _read(source, _model_of(model, READ), format, main, prefix, numbered=False)


def _read(
    source: str | os.PathLike[str] | Mapping[str, Any],
    model: _Model | None,
    name: str | None,
    main: Any,
    prefix: str,
    numbered: bool,
) -> Found:
    if name is not None and name not in FORMATS:
        raise FormatError(f"{READ}: format is {name!r}; choose from {', '.join(FORMATS)}")
    if main not in (None, "ema", "raw"):
        raise FormatError(f"{READ}: main is {main!r}; it is 'ema' or 'raw'")
    path = None if isinstance(source, Mapping) else Path(source)
    origin = _Source(path, model, prefix, main, numbered)
    if path is not None and path.is_dir():
        found = _read_folder(path, origin)
    elif path is not None and _safetensors.is_safetensors(path):
        found = _read_safetensors(path, origin)
    else:
        data = source if isinstance(source, Mapping) else _load(Path(source))
        found = _read_mapping(data, origin, name)
    if name is not None and found.format != name:
        raise FormatError(
            f"{READ}: {_shown(path)} has the format '{found.format}', not '{name}'; leave it out"
        )
    if not found.ema:
        raise FormatError(
            f"{READ}: {_shown(path)} has no average"
            + (f" of a name that begins with '{prefix}'" if prefix else "")
        )
    if model is not None:
        _check_model(found, model)
        if model.is_module:  # mmcv saves buffers that a state_dict() leaves out.
            raw = {name: tensor for name, tensor in found.raw.items() if name in model.names}
            found = replace(found, raw=raw)
    return found


def _shown(path: Path | None) -> str:
    return "the dictionary" if path is None else f"'{path}'"


def _read_mapping(data: Mapping[str, Any], origin: _Source, name: str | None) -> Found:
    chosen = _READERS if name is None or name not in _READERS else {name: _READERS[name]}
    for reader in chosen.values():
        found = reader(data, origin)
        if found is not None:
            return found
    if name == "state_dict":
        inner = data.get("state_dict")
        where = "state_dict" if isinstance(inner, Mapping) else ""
        ema = origin.named(inner if where else data, "the file")
        return Found(name, ema, ema_at=where or "the whole file")
    keys = ", ".join(f"'{key}'" for key in list(data)[:8])
    if name is not None:
        raise FormatError(
            f"{READ}: {_shown(origin.path)} doesn't have the format '{name}': it has the keys "
            f"{keys}"
        )
    raise FormatError(
        f"{READ}: {_shown(origin.path)} has no average in a known format: it has the keys {keys}; "
        "if its weights are the average, say format='state_dict' (--format state_dict)"
    )


def _load(path: Path) -> Mapping[str, Any]:
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
    if isinstance(data, _Foreign):
        raise FormatError(f"{READ}: '{path}' {_pickled(data)}")
    if not isinstance(data, Mapping):
        raise FormatError(
            f"{READ}: '{path}' holds a {type(data).__name__}, not a dictionary; save one"
        )
    return data


def _pickled(value: _Foreign, key: str = "") -> str:
    what, store = (f"'{key}' is", f"{{'{key}': ckpt['{key}']") if key else ("is", "{'ema': ckpt")
    return (
        f"{what} a pickled {value.full_name}, and to read one is to run code; where its package is "
        "installed, export it: ckpt = torch.load(..., weights_only=False); torch.save("
        f"{store}.state_dict()}}, ...)"
    )


def _tensors(value: Any, what: str) -> Tensors:
    if isinstance(value, _Foreign):
        raise FormatError(f"{READ}: {_pickled(value, what)}")
    if not isinstance(value, Mapping):
        raise FormatError(f"{READ}: {what} is a {type(value).__name__}, not a state_dict")
    tensors = {str(k): t for k, t in value.items() if not str(k).endswith("_extra_state")}
    wrong = [f"'{k}' is a {type(t).__name__}" for k, t in tensors.items() if not _is_tensor(t)]
    if wrong:
        refuse(f"{READ}: {what} must hold tensors alone", wrong[:8])
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _holds_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and any(map(_is_tensor, value.values()))


def _whole(value: Any) -> int | None:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _momentum_of(decay: Any) -> float | None:
    if isinstance(decay, Tensor) and decay.numel() == 1:
        decay = decay.item()
    return 1 - decay if isinstance(decay, float) and 0 <= decay <= 1 else None


def _parts(data: Mapping[str, Any], prefix: str) -> Tensors:
    return {k[len(prefix) :]: v for k, v in data.items() if str(k).startswith(prefix)}


# ---- one reader a format: what it finds, or None where the dictionary isn't of its format


def _is_manager_state(value: Any) -> bool:
    keys = (state.VERSION_KEY, state.EMA_KEY, state.EMA_DTYPES_KEY)
    return isinstance(value, Mapping) and all(key in value for key in keys)


def _read_fused_ema(data: Mapping[str, Any], origin: _Source) -> Found | None:
    key = ""
    own: Mapping[str, Any] = data
    if not _is_manager_state(data):
        keys = [key for key, value in data.items() if _is_manager_state(value)]
        if len(keys) > 1:
            raise FormatError(
                f"{READ}: {_shown(origin.path)} has several averages, under "
                f"{_tracking.shown(keys)}; read the one you want: read(torch.load(...)[key])"
            )
        if not keys:
            return None
        key = keys[0]
        own = data[key]
    if own[state.VERSION_KEY] != state.VERSION:
        raise FormatError(
            f"{READ}: the state has version {own[state.VERSION_KEY]!r} but this fused_ema reads "
            f"{state.VERSION}; update fused_ema"
        )
    missing = [key for key in state._KEYS if key not in own]
    if missing:
        raise FormatError(f"{READ}: the state has no {_tracking.shown(missing)} (truncated?)")
    at = f"{key}." if key else ""
    ema = origin.named(own[state.EMA_KEY], f"{at}{state.EMA_KEY}")
    raw, raw_at, why = origin.named(own[state.RAW_KEY], f"{at}{state.RAW_KEY}"), "", ""
    beside, beside_at = _beside(data, key, origin)
    if own[state.IS_SWAPPED_KEY]:
        raw_at = f"{at}{state.RAW_KEY}"
        why = "saved while the model held the average"
        # Of what the manager doesn't track there is only the model's.
        raw = {**{n: t for n, t in beside.items() if n not in ema}, **raw}
    elif beside.keys() & ema.keys():
        raw, raw_at = beside, beside_at
    return Found(
        "fused_ema",
        ema,
        raw,
        iteration=_whole(own[state.ITERATION_KEY]),
        num_updates=_whole(own[state.NUM_UPDATES_KEY]),
        ema_at=f"{at}{state.EMA_KEY}",
        raw_at=raw_at,
        why=why,
    )


def _beside(data: Mapping[str, Any], key: str, origin: _Source) -> tuple[Tensors, str]:
    """The model's own weights beside an average that is kept under a key."""
    for other in _MODEL_KEYS if key else ():
        if other != key and _holds_tensors(data.get(other)):
            return origin.named(data[other], other), other
    return {}, ""


def _read_mmengine(data: Mapping[str, Any], origin: _Source) -> Found | None:
    if not {"state_dict", "ema_state_dict"} <= data.keys():
        return None
    saved = data["ema_state_dict"]
    raw_part = _parts(_tensors(saved, "ema_state_dict"), "module.")
    main = _tensors(data["state_dict"], "state_dict")
    missing = [
        f"'{name}' of ema_state_dict is not in state_dict" for name in raw_part if name not in main
    ]
    if missing or not raw_part:
        refuse(
            f"{READ}: {_shown(origin.path)} is no file of MMEngine", missing or ["no 'module.*'"]
        )
    steps = _whole(saved.get("steps"))
    iteration, epoch = _progress(data.get("meta"))
    return Found(
        "mmengine",
        origin.named({name: main[name] for name in raw_part}, "state_dict"),
        origin.named({**main, **raw_part}, "ema_state_dict"),
        iteration=steps if iteration is None else iteration,
        num_updates=steps,
        epoch=epoch,
        ema_at="state_dict",
        raw_at="ema_state_dict 'module.*'",
    )


def _progress(meta: Any) -> tuple[int | None, int | None]:
    if not isinstance(meta, Mapping):
        return None, None
    return _whole(meta.get("iter")), _whole(meta.get("epoch"))


def _read_lightning(data: Mapping[str, Any], origin: _Source) -> Found | None:
    if not {"state_dict", "current_model_state", "averaging_state"} <= data.keys():
        return None
    averaging = data["averaging_state"]
    return Found(
        "lightning",
        origin.named(data["state_dict"], "state_dict"),
        origin.named(data["current_model_state"], "current_model_state"),
        iteration=_whole(data.get("global_step")),
        num_updates=_whole(averaging.get("n_averaged")) if isinstance(averaging, Mapping) else None,
        epoch=_whole(data.get("epoch")),
        ema_at="state_dict",
        raw_at="current_model_state",
    )


def _read_timm(data: Mapping[str, Any], origin: _Source) -> Found | None:
    if "state_dict_ema" not in data:
        return None
    raw = data.get("state_dict")
    return Found(
        "timm",
        origin.named(data["state_dict_ema"], "state_dict_ema"),
        {} if raw is None else origin.named(raw, "state_dict"),
        epoch=_whole(data.get("epoch")),
        ema_at="state_dict_ema",
        raw_at="" if raw is None else "state_dict",
    )


def _is_nemo_optimizer(value: Any) -> bool:
    keys = {"opt", "ema", "current_step", "decay", "every_n_steps"}
    return isinstance(value, Mapping) and keys <= value.keys()


def _read_nemo(data: Mapping[str, Any], origin: _Source) -> Found | None:
    optimizers = data.get("optimizer_states")
    found = [s for s in optimizers if _is_nemo_optimizer(s)] if isinstance(optimizers, list) else []
    if _is_nemo_optimizer(data):
        found = [data]
    path = origin.path
    weights = data.get("state_dict")
    is_second = path is not None and path.stem.endswith("-EMA")
    other = "" if path is None else path.stem[: -len("-EMA")] if is_second else f"{path.stem}-EMA"
    sibling = None if path is None else path.with_name(other + path.suffix)
    is_pair = is_second or (sibling is not None and sibling.is_file())
    raw: Tensors = {}
    if (found or is_pair) and _holds_tensors(weights):
        raw = origin.named(weights, "state_dict")
    iteration, epoch = _whole(data.get("global_step")), _whole(data.get("epoch"))
    # The second file has the optimizer's state as well; its weights are the whole of it.
    if path is not None and sibling is not None and raw:
        ema_file, raw_file = (path, sibling) if is_second else (sibling, path)
        if is_pair:
            beside: Tensors = {}
            if sibling.is_file():
                beside = origin.named(_load(sibling).get("state_dict"), f"state_dict of {sibling}")
            return Found(
                "nemo",
                raw if is_second else beside,
                beside if is_second else raw,
                iteration=iteration,
                num_updates=_whole(found[0]["current_step"]) if found else None,
                momentum=_momentum_of(found[0]["decay"]) if found else None,
                epoch=epoch,
                ema_at=f"state_dict of {ema_file.name}",
                raw_at=f"state_dict of {raw_file.name}" if raw_file.is_file() else "",
                why="the name of the file" if is_second else "a file of the same name with -EMA",
            )
    if not found:
        return None
    if len(found) > 1:
        raise FormatError(
            f"{READ}: {len(found)} optimizers have an average; read the one you want: "
            "read(torch.load(...)['optimizer_states'][i], model=...)"
        )
    own = found[0]
    at = "ema" if own is data else "optimizer_states ema"
    step = _whole(own["current_step"])
    return Found(
        "nemo",
        origin.listed(own["ema"], at),
        raw,
        iteration=step if iteration is None else iteration,
        num_updates=step,
        momentum=_momentum_of(own["decay"]),
        epoch=epoch,
        ema_at=at,
        raw_at="state_dict" if raw else "",
    )


def _read_ema_pytorch(data: Mapping[str, Any], origin: _Source) -> Found | None:
    ema = _parts(data, "ema_model.")
    if not {"initted", "step"} <= data.keys() or not ema:
        return None
    raw = _parts(data, "online_model.")
    return Found(
        "ema_pytorch",
        origin.named(ema, "ema_model.*"),
        origin.named(raw, "online_model.*"),
        iteration=_whole(data["step"]),
        ema_at="ema_model.*",
        raw_at="online_model.*" if raw else "",
    )


def _read_averaged_model(data: Mapping[str, Any], origin: _Source) -> Found | None:
    ema = _parts(data, "module.")
    if "n_averaged" not in data or not ema:
        return None
    return Found(
        "averaged_model",
        origin.named(ema, "module.*"),
        num_updates=_whole(data["n_averaged"]),
        ema_at="module.*",
    )


def _read_diffusers(data: Mapping[str, Any], origin: _Source) -> Found | None:
    if not {"shadow_params", "optimization_step"} <= data.keys():
        return None
    step = _whole(data["optimization_step"])
    return Found(
        "diffusers",
        origin.listed(data["shadow_params"], "shadow_params"),
        iteration=step,
        num_updates=step,
        momentum=_momentum_of(data.get("decay")),
        ema_at="shadow_params",
    )


def _read_torch_ema(data: Mapping[str, Any], origin: _Source) -> Found | None:
    if "shadow_params" not in data or "optimization_step" in data:
        return None
    stored = data.get("collected_params")
    updates = _whole(data.get("num_updates"))
    return Found(
        "torch_ema",
        origin.listed(data["shadow_params"], "shadow_params"),
        origin.listed(stored, "collected_params") if stored else {},
        iteration=updates,
        num_updates=updates,
        momentum=_momentum_of(data.get("decay")),
        ema_at="shadow_params",
        raw_at="collected_params" if stored else "",
    )


def _read_nested(data: Mapping[str, Any], origin: _Source) -> Found | None:
    """An average that somebody keeps under a key of their own."""
    found: list[tuple[str, Found]] = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            for name in ("ema_pytorch", "averaged_model", "diffusers", "torch_ema"):
                inner = _READERS[name](value, origin)
                if inner is not None:
                    found.append((str(key), inner))
                    break
    if not found:
        return None
    if len(found) > 1:
        raise FormatError(
            f"{READ}: {_shown(origin.path)} has several averages, under "
            f"{_tracking.shown([key for key, _ in found])}; read the one you want: "
            "read(torch.load(...)[key])"
        )
    key, inner = found[0]
    raw, raw_at = (inner.raw, f"{key}.{inner.raw_at}") if inner.raw else _beside(data, key, origin)
    return replace(inner, raw=raw, ema_at=f"{key}.{inner.ema_at}", raw_at=raw_at)


def _read_ultralytics(data: Mapping[str, Any], origin: _Source) -> Found | None:
    ema, raw = data.get("ema"), data.get("model")
    if isinstance(ema, _Foreign) or (ema is None and isinstance(raw, _Foreign)):
        key = "ema" if isinstance(ema, _Foreign) else "model"
        raise FormatError(f"{READ}: {_shown(origin.path)}: {_pickled(data[key], key)}")
    if not _holds_tensors(ema):
        return None
    raw = origin.named(raw, "model") if _holds_tensors(raw) else {}
    return Found(
        "ultralytics",
        origin.named(ema, "ema"),
        raw,
        num_updates=_whole(data.get("updates")),
        epoch=_whole(data.get("epoch")),
        ema_at="ema",
        raw_at="model" if raw else "",
    )


# ---- mmcv 1.x and MMDetection 2.x


def _flat(name: str) -> str:
    return f"ema_{name.replace('.', '_')}"


def _read_mmcv(data: Mapping[str, Any], origin: _Source) -> Found | None:
    weights = data.get("state_dict", data)
    if not _holds_tensors(weights):
        return None
    flats: dict[str, list[str]] = {}
    for name in weights:
        flats.setdefault(_flat(str(name)), []).append(str(name))
    buffers = {key: names for key, names in flats.items() if key in weights}
    if not buffers:
        return None
    both = [names for names in buffers.values() if len(names) > 1]
    if both:
        first, second = both[0][:2]
        raise FormatError(
            f"{READ}: '{_flat(first)}' stands for both '{first}' and '{second}': the hook of mmcv "
            "mixed up their averages; rename one of them"
        )
    tensors = _tensors(weights, "state_dict")
    main = {name: tensor for name, tensor in tensors.items() if name not in buffers}
    other = {names[0]: tensors[key] for key, names in buffers.items()}
    other = {name: other[name] for name in main if name in other}
    wrong = [
        f"'{name}' has shape {list(main[name].shape)} but '{_flat(name)}' {list(t.shape)}"
        for name, t in other.items()
        if main[name].shape != t.shape
    ]
    if wrong:
        refuse(f"{READ}: {_shown(origin.path)} is no file of mmcv's EMA hooks", wrong)
    meta = data.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    config = _Config(meta.get("config"))
    holds, why = _main_of(meta, config, origin)
    iteration, epoch = _progress(meta)
    if iteration is not None and "by iterations" in why:
        iteration += 1  # It was saved before the runner counted its iteration.
    ema, raw = ({n: main[n] for n in other}, {**main, **other}) if holds == "ema" else (other, main)
    momentum = config.ema_hook.get("momentum")
    at = "state_dict" if "state_dict" in data else "the whole file"
    return Found(
        "mmcv",
        origin.named(ema, at),
        origin.named(raw, at),
        iteration=iteration,
        momentum=momentum if isinstance(momentum, float) and 0 < momentum < 1 else None,
        epoch=epoch,
        ema_at=at if holds == "ema" else f"{at} 'ema_*'",
        raw_at=f"{at} 'ema_*'" if holds == "ema" else at,
        why="main was given" if why == "main" else why,
    )


class _Config:
    """What a config of OpenMMLab says of its hooks, read as text and never run."""

    def __init__(self, text: Any) -> None:
        self.ema_hook: dict[str, Any] = {}
        self.by_epoch: bool | None = None
        self.has_ema_hook = False
        if not isinstance(text, str):
            return
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return
        assigned: dict[str, dict[str, Any]] = {}
        for node in ast.walk(tree):
            settings = _settings(node)
            kind = settings.get("type")
            if isinstance(kind, str) and kind.endswith("EMAHook"):
                self.ema_hook, self.has_ema_hook = settings, True
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                assigned[node.targets[0].id] = _settings(node.value)
        if "checkpoint_config" in assigned:
            by_iters = str(assigned.get("runner", {}).get("type", "")).startswith("Iter")
            self.by_epoch = assigned["checkpoint_config"].get("by_epoch", not by_iters) is True

    def ema_hook_comes_first(self) -> bool | None:
        """Whether it swaps before the checkpoint hook saves; None where nothing is known."""
        if not self.has_ema_hook:
            return None
        priority = self.ema_hook.get("priority", "NORMAL")
        if isinstance(priority, str):
            first = ("HIGHEST", "VERY_HIGH", "HIGH", "ABOVE_NORMAL")
            return priority.upper() in first
        return isinstance(priority, int) and priority < 50


def _settings(node: ast.AST) -> dict[str, Any]:
    """The constants of a ``dict(a=1)`` or ``{'a': 1}``."""
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        pairs = [(k.arg, k.value) for k in node.keywords]
    elif isinstance(node, ast.Dict):
        pairs = [
            (k.value, v)
            for k, v in zip(node.keys, node.values, strict=True)
            if isinstance(k, ast.Constant)
        ]
    return {str(key): v.value for key, v in pairs if isinstance(v, ast.Constant)}


def _main_of(meta: Mapping[str, Any], config: _Config, origin: _Source) -> tuple[Main, str]:
    """What the model's own names hold, and what says so.

    The hook swaps at the end of each epoch, so a file that is saved then, after the swap, has the
    average there; one saved within an epoch, or by a runner without epochs, has the raw weights.
    """
    if origin.main is not None:
        return origin.main, "main"
    own = meta.get("fused_ema")
    if isinstance(own, Mapping) and own.get("main") in ("ema", "raw"):
        return ("ema" if own["main"] == "ema" else "raw"), "meta fused_ema"
    messages = meta.get("hook_msgs")
    last = messages.get("last_ckpt") if isinstance(messages, Mapping) else None
    own_name = origin.path.resolve().name if origin.path else ""
    candidates = [
        ("meta hook_msgs", Path(last).name if isinstance(last, str) else ""),
        ("the config", {True: "epoch_", False: "iter_", None: ""}[config.by_epoch]),
        # Runners of epochs name so whatever they save, so "epoch_" alone says nothing.
        ("the name of the file", own_name if own_name.startswith("iter_") else ""),
    ]
    for where, name in candidates:
        if name.startswith("iter_"):
            return "raw", f"{where}: saved by iterations, when no swap has happened"
        if name.startswith("epoch_"):
            if config.ema_hook_comes_first() is False:
                return "raw", "the config: the priority of the EMA hook lets it swap after the save"
            return "ema", f"{where}: saved at the end of an epoch, after the swap"
    raise FormatError(
        f"{READ}: {_shown(origin.path)} doesn't say whether it was saved at the end of an epoch "
        "(the average is in the main keys) or within one (it is under 'ema_*'); say it: "
        "main='ema' or main='raw' (--main)"
    )


_Reader = Callable[[Mapping[str, Any], _Source], Found | None]
# In the order in which they are asked: a later one may recognise files of an earlier one.
_READERS: dict[str, _Reader] = {
    "fused_ema": _read_fused_ema,
    "mmengine": _read_mmengine,
    "lightning": _read_lightning,
    "timm": _read_timm,
    "nemo": _read_nemo,
    "ema_pytorch": _read_ema_pytorch,
    "averaged_model": _read_averaged_model,
    "diffusers": _read_diffusers,
    "torch_ema": _read_torch_ema,
    "nested": _read_nested,
    "ultralytics": _read_ultralytics,
    "mmcv": _read_mmcv,
}
FORMATS = (*(name for name in _READERS if name != "nested"), "safetensors", "state_dict")


def _read_safetensors(path: Path, origin: _Source) -> Found:
    if path.name.endswith(".index.json"):
        tensors, metadata = _safetensors.map_shards(path)
    else:
        tensors, metadata = _safetensors.map_file(path)

    def number(key: str) -> int | None:
        text = metadata.get(f"fused_ema.{key}", "")
        return int(text) if text.isdecimal() else None

    momentum = None
    if "fused_ema.momentum" in metadata:
        try:
            momentum = float(metadata["fused_ema.momentum"])
        except ValueError:
            momentum = None
    ema = origin.named(tensors, "the file")
    kept = metadata.get("fused_ema.averaged")
    raw: Tensors = {}
    if kept is not None:
        averaged = set(json.loads(kept))
        # What has no average is the model's own.
        raw = {name: tensor for name, tensor in ema.items() if name not in averaged}
        ema = {name: tensor for name, tensor in ema.items() if name in averaged}
    return Found(
        "safetensors",
        ema,
        raw,
        iteration=number("iteration"),
        num_updates=number("num_updates"),
        epoch=number("epoch"),
        momentum=momentum,
        ema_at="the whole file",
        why="" if any(k.startswith("fused_ema.") for k in metadata) else "it has nothing else",
    )


def _read_folder(path: Path, origin: _Source) -> Found:
    """The folder of diffusers' ``EMAModel.save_pretrained``: a config and a model."""
    try:
        config = json.loads((path / "config.json").read_text())
    except (FileNotFoundError, ValueError) as error:
        raise FormatError(
            f"{READ}: '{path}' is a folder without a readable config.json; pass a file, or the "
            "folder of EMAModel.save_pretrained"
        ) from error
    if not isinstance(config, dict) or "optimization_step" not in config:
        raise FormatError(
            f"{READ}: config.json of '{path}' has no 'optimization_step', so this is no folder of "
            "EMAModel.save_pretrained; its weights may be raw ones"
        )
    files = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
    files = files or sorted(path.glob("*.bin"))
    if len(files) != 1:
        raise FormatError(f"{READ}: '{path}' has {len(files)} files of weights; keep one")
    file = files[0]
    if file.suffix == ".bin":
        tensors = origin.named(_load(file), file.name)
    else:
        tensors = _read_safetensors(file, origin).ema
    step = _whole(config["optimization_step"])
    return Found(
        "diffusers",
        tensors,
        iteration=step,
        num_updates=step,
        momentum=_momentum_of(config.get("decay")),
        ema_at=file.name,
    )


# ---- a manager goes on from it


def load_into(manager: EMAManager, found: Found, *, iteration: int | None = None) -> None:
    """Makes a manager go on from what :func:`read` found: averages, by name, and position.

    The model itself stays as it is; ``model.load_state_dict(found.raw)`` gives it its raw weights.
    Averages of names that the manager was told to leave out aren't used.

    Args:
        manager: Not swapped.
        found: What was found.
        iteration: The iteration that comes next, 0-based, instead of the recorded one.

    Raises:
        FormatError: A ValueError: names, shapes or dtypes that don't fit, in one error that lists
            them all; or no iteration is known, and the manager's schedule depends on it.
        RuntimeError: The model is swapped, or its parameters were replaced or added.

        Nothing has changed when an error is raised.
    """
    title = "fused_ema.state.load_into"
    interval, begin = manager._interval, manager._begin
    if iteration is None:
        iteration = found.iteration
    if iteration is None and found.num_updates is not None:
        iteration = (begin // interval + found.num_updates) * interval if found.num_updates else 0
    if iteration is None:
        if manager._momentum_fun is not None or interval > 1 or begin:
            raise FormatError(
                f"{title}: the format '{found.format}' records no iteration, and this manager's "
                "schedule depends on it; pass iteration="
            )
        iteration = 0
    num_updates = found.num_updates
    if num_updates is None:
        num_updates = max(0, iteration // interval - begin // interval)
    ema: Tensors = {}
    for slot in manager._tracked.slots:
        have = [found.ema[m.name] for m in slot.members if m.name in found.ema]
        for member in slot.members:
            if member.name in found.ema:
                ema[member.name] = found.ema[member.name]
            elif have and have[0].shape == member.tensor.shape:
                ema[member.name] = have[0]  # Of tied tensors many files keep one.
    left_out = {m.name for m in _tracking.read(manager._model).members}
    ema.update({n: t for n, t in found.ema.items() if n not in left_out})
    try:
        manager.load_state_dict(state.pack(iteration, num_updates, ema, {}, False))
    except ValueError as error:
        _, _, problems = str(error).partition("nothing was changed:")
        raise FormatError(
            f"{title}: the averages of '{found.format}' don't fit this model; nothing was changed:"
            f"{problems or error}"
        ) from error


# ---- writing


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
    _write(path, found, format, _model_of(model, WRITE))


def _write(
    path: str | os.PathLike[str],
    found: Found,
    name: str,
    model: _Model | None = None,
    progress: Callable[[int, int], None] | None = None,
    release: bool = False,
) -> None:
    path = Path(path)
    if name == "safetensors":
        metadata = _safetensors_metadata(found)
        tensors = found.averaged_model()

        def save(file: IO[bytes]) -> None:
            _safetensors.write_file(file, tensors, metadata, progress, release)
    elif name in _MAKERS:
        content = _MAKERS[name](found, model)

        def save(file: IO[bytes]) -> None:
            torch.save(content, file)
    else:
        raise FormatError(f"{WRITE}: format is {name!r}; choose from {', '.join(WRITABLE)}")
    with _Replacing(path) as file:
        save(file)


class _Replacing:
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


def _safetensors_metadata(found: Found) -> dict[str, str]:
    metadata = {"format": "pt", "fused_ema.slot": "ema"}
    for key in ("iteration", "num_updates", "momentum", "epoch"):
        value = getattr(found, key)
        if value is not None:
            metadata[f"fused_ema.{key}"] = repr(value)
    if found.raw.keys() - found.ema.keys():
        metadata["fused_ema.averaged"] = json.dumps(list(found.ema))
    return metadata


def _raw_of(found: Found, name: str) -> Tensors:
    missing = [n for n in found.ema if n not in found.raw]
    if missing:
        raise FormatError(
            f"{WRITE}: a file of {name} has the raw weights too, and {len(missing)} of them are "
            f"missing in '{found.format}': {_tracking.shown(missing)}; write 'safetensors', or add "
            "them: dataclasses.replace(found, raw=model.state_dict())"
        )
    return found.raw


def _count_of(found: Found, name: str) -> int:
    count = found.iteration if found.num_updates is None else found.num_updates
    if count is None:
        raise FormatError(
            f"{WRITE}: a file of {name} counts its updates, and '{found.format}' records none; "
            "say it: dataclasses.replace(found, num_updates=...) (--iteration)"
        )
    return count


def _list_of(found: Found, model: _Model | None, name: str) -> tuple[list[Tensor], float]:
    if model is None:
        raise FormatError(
            f"{WRITE}: a file of {name} is a list in the order of the model's parameters; pass "
            "the model: write(..., model=model), or --model-names FILE"
        )
    values = found.averaged_model()
    listed: list[Tensor] = []
    missing = []
    for member in model.parameters:
        have = [values[n] for n in (member.name, *member.others) if n in values]
        if have:
            listed.append(have[0])
        else:
            missing.append(f"'{member.name}' is missing")
    if missing:
        refuse(f"{WRITE}: the averages are of another model", missing)
    if found.momentum is None:
        raise FormatError(
            f"{WRITE}: a file of {name} records its decay, and '{found.format}' has none; say "
            "it: dataclasses.replace(found, momentum=1 - decay) (--momentum)"
        )
    return listed, 1 - found.momentum


def _make_fused_ema(found: Found, model: _Model | None) -> dict[str, Any]:
    count = _count_of(found, "fused_ema")
    iteration = count if found.iteration is None else found.iteration
    own = state.pack(iteration, count, dict(found.ema), {}, False)
    return {"model": dict(found.raw), "ema": own} if found.raw else {"ema": own}


def _make_mmcv(found: Found, model: _Model | None) -> dict[str, Any]:
    raw = _raw_of(found, "mmcv")
    main = found.averaged_model()
    buffers: Tensors = {}
    sources: dict[str, str] = {}
    for name in main:
        if name not in found.ema:
            continue
        key = _flat(name)
        if key in sources or key in main:
            raise FormatError(
                f"{WRITE}: '{sources.get(key, key)}' and '{name}' would both be '{key}' in a file "
                "of mmcv; rename one of them"
            )
        sources[key] = name
        buffers[key] = raw[name]
    meta: dict[str, Any] = {"fused_ema": {"main": "ema"}}
    if found.epoch is not None:
        meta["epoch"] = found.epoch
    if found.iteration is not None:
        meta["iter"] = found.iteration
    # The hook registers its buffers with the model itself, so they precede those of its children.
    own = {name: tensor for name, tensor in main.items() if "." not in name}
    return {"meta": meta, "state_dict": {**own, **buffers, **main}}


def _make_mmengine(found: Found, model: _Model | None) -> dict[str, Any]:
    raw = _raw_of(found, "mmengine")
    meta = {"epoch": found.epoch, "iter": found.iteration}
    return {
        "meta": {key: value for key, value in meta.items() if value is not None},
        "state_dict": found.averaged_model(),
        "ema_state_dict": {
            "steps": torch.tensor(_count_of(found, "mmengine")),
            **{f"module.{name}": raw[name] for name in raw},
        },
    }


def _make_averaged_model(found: Found, model: _Model | None) -> dict[str, Any]:
    values = found.averaged_model()
    count = torch.tensor(_count_of(found, "averaged_model"))
    return {"n_averaged": count, **{f"module.{name}": tensor for name, tensor in values.items()}}


def _make_timm(found: Found, model: _Model | None) -> dict[str, Any]:
    raw = _raw_of(found, "timm")
    epoch = {} if found.epoch is None else {"epoch": found.epoch}
    return {**epoch, "state_dict": dict(raw), "state_dict_ema": found.averaged_model()}


def _make_ema_pytorch(found: Found, model: _Model | None) -> dict[str, Any]:
    step = _count_of(found, "ema_pytorch") if found.iteration is None else found.iteration
    raw = found.raw if found.ema.keys() <= found.raw.keys() else {}
    values = found.averaged_model()
    return {
        "initted": torch.tensor(True),
        "step": torch.tensor(step),
        **{f"online_model.{name}": tensor for name, tensor in raw.items()},
        **{f"ema_model.{name}": tensor for name, tensor in values.items()},
    }


def _make_torch_ema(found: Found, model: _Model | None) -> dict[str, Any]:
    listed, decay = _list_of(found, model, "torch_ema")
    return {
        "decay": decay,
        "num_updates": _count_of(found, "torch_ema"),
        "shadow_params": listed,
        "collected_params": None,
    }


def _make_diffusers(found: Found, model: _Model | None) -> dict[str, Any]:
    listed, decay = _list_of(found, model, "diffusers")
    return {
        "decay": decay,
        "min_decay": 0.0,
        "optimization_step": _count_of(found, "diffusers"),
        "update_after_step": 0,
        "use_ema_warmup": False,
        "inv_gamma": 1.0,
        "power": 2 / 3,
        "shadow_params": listed,
    }


def _make_state_dict(found: Found, model: _Model | None) -> dict[str, Any]:
    return found.averaged_model()


_MAKERS: dict[str, Callable[[Found, _Model | None], dict[str, Any]]] = {
    "fused_ema": _make_fused_ema,
    "mmcv": _make_mmcv,
    "mmengine": _make_mmengine,
    "averaged_model": _make_averaged_model,
    "timm": _make_timm,
    "ema_pytorch": _make_ema_pytorch,
    "torch_ema": _make_torch_ema,
    "diffusers": _make_diffusers,
    "state_dict": _make_state_dict,
}
WRITABLE = (*_MAKERS, "safetensors")
