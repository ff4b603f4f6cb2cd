"""``nemo``: a second file ``*-EMA.ckpt``, or a list in the state of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fused_ema._format_errors import READ, FormatError
from fused_ema.formats._files import load
from fused_ema.formats._found import Format, Found
from fused_ema.formats._names import Tensors
from fused_ema.formats._source import Source, holds_tensors, momentum_of, whole


def _is_optimizer(value: Any) -> bool:
    keys = {"opt", "ema", "current_step", "decay", "every_n_steps"}
    return isinstance(value, Mapping) and keys <= value.keys()


def _read(data: Mapping[str, Any], origin: Source) -> Found | None:
    optimizers = data.get("optimizer_states")
    found = [s for s in optimizers if _is_optimizer(s)] if isinstance(optimizers, list) else []
    if _is_optimizer(data):
        found = [data]
    path = origin.path
    weights = data.get("state_dict")
    is_second = path is not None and path.stem.endswith("-EMA")
    other = "" if path is None else path.stem[: -len("-EMA")] if is_second else f"{path.stem}-EMA"
    sibling = None if path is None else path.with_name(other + path.suffix)
    is_pair = is_second or (sibling is not None and sibling.is_file())
    raw: Tensors = {}
    if (found or is_pair) and holds_tensors(weights):
        raw = origin.named(weights, "state_dict")
    iteration, epoch = whole(data.get("global_step")), whole(data.get("epoch"))
    # The second file has the optimizer's state as well; its weights are the whole of it.
    if path is not None and sibling is not None and raw:
        ema_file, raw_file = (path, sibling) if is_second else (sibling, path)
        if is_pair:
            beside: Tensors = {}
            if sibling.is_file():
                beside = origin.named(load(sibling).get("state_dict"), f"state_dict of {sibling}")
            return Found(
                "nemo",
                raw if is_second else beside,
                beside if is_second else raw,
                iteration=iteration,
                num_updates=whole(found[0]["current_step"]) if found else None,
                momentum=momentum_of(found[0]["decay"]) if found else None,
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
            "key='optimizer_states.0' (--key optimizer_states.0)"
        )
    own = found[0]
    at = "ema" if own is data else "optimizer_states ema"
    step = whole(own["current_step"])
    return Found(
        "nemo",
        origin.listed(own["ema"], at),
        raw,
        iteration=step if iteration is None else iteration,
        num_updates=step,
        momentum=momentum_of(own["decay"]),
        epoch=epoch,
        ema_at=at,
        raw_at="state_dict" if raw else "",
    )


FORMAT = Format("nemo", _read)
