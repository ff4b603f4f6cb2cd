"""How a DeepSpeed engine's calls are noticed.

Methods of the engine object stand before its class's. They are bound methods of the functions here,
so that a copy of the engine has them bound to itself, where they find nobody and pass on.
"""

from __future__ import annotations

import types
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fused_ema.hooks.deepspeed import EngineEMA

_KEY = "_fused_ema_watch"


class _Watch:
    """Who averages an engine, kept on the engine; a copy or a pickle of it has nobody."""

    def __init__(self) -> None:
        self.averages: list[weakref.ref[EngineEMA]] = []
        self.is_closed = False
        # What stood before the class's methods already.
        self.before: dict[str, Any] = {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Watch, ()


def averages_of(engine: Any) -> list[EngineEMA]:
    """Those that live."""
    watch = engine.__dict__.get(_KEY)
    if watch is None:
        return []
    return [ema for ref in watch.averages if (ema := ref()) is not None]


def _pass_on(engine: Any, name: str, args: Any, kwargs: Any) -> Any:
    watch = engine.__dict__.get(_KEY)
    before = None if watch is None else watch.before.get(name)
    if before is not None:
        return before(*args, **kwargs)
    return getattr(type(engine), name)(engine, *args, **kwargs)


def step(engine: Any, *args: Any, **kwargs: Any) -> Any:
    """``engine.step()``, and an update of each average where it was applied."""
    averages = averages_of(engine)
    for ema in averages:
        ema._refuse_if_swapped("engine.step()")
    scale = _scale_of(engine)
    result = _pass_on(engine, "step", args, kwargs)
    # A gradient scaler of torch.autocast skips by itself: its scale shrinks then, and only then.
    if engine.was_step_applied() and not _scale_of(engine) < scale:
        for ema in averages:
            ema._on_step()
    return result


def _scale_of(engine: Any) -> float:
    scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    scaler = scaler or getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    return 0.0 if scaler is None else float(scaler.get_scale())


def save_checkpoint(
    engine: Any, save_dir: Any, tag: object = None, *args: Any, **kwargs: Any
) -> Any:
    """``engine.save_checkpoint()``, of the raw weights: refused while an average is swapped in."""
    with ExitStack() as stack:
        for ema in averages_of(engine):
            stack.enter_context(ema._saving(save_dir, tag))
        return _pass_on(engine, "save_checkpoint", (save_dir, tag, *args), kwargs)


def load_checkpoint(engine: Any, *args: Any, **kwargs: Any) -> Any:
    """``engine.load_checkpoint()``, refused while an average is swapped in."""
    for ema in averages_of(engine):
        ema._refuse_if_swapped("engine.load_checkpoint()")
    return _pass_on(engine, "load_checkpoint", args, kwargs)


def destroy(engine: Any, *args: Any, **kwargs: Any) -> Any:
    """``engine.destroy()``, after which there is nothing to average."""
    watch = engine.__dict__.get(_KEY)
    if watch is not None:
        watch.is_closed = True
    for ema in averages_of(engine):
        ema._is_closed = True
    return _pass_on(engine, "destroy", args, kwargs)


def is_closed(engine: Any) -> bool:
    """Whether destroy() has run since somebody averaged it: without ZeRO nothing else tells."""
    watch = engine.__dict__.get(_KEY)
    return watch is not None and watch.is_closed


_NOTICED = {f.__name__: f for f in (step, save_checkpoint, load_checkpoint, destroy)}


def observe(engine: Any, ema: EngineEMA) -> None:
    """Makes an engine tell an average of its calls for as long as that lives."""
    own = engine.__dict__
    if _KEY not in own:
        watch = own[_KEY] = _Watch()
        for name, function in _NOTICED.items():
            if name in own:
                watch.before[name] = own[name]
            own[name] = types.MethodType(function, engine)
    own[_KEY].averages.append(weakref.ref(ema))


def forget(engine: Any, ema: EngineEMA) -> None:
    """Ends it."""
    own = engine.__dict__
    if ema not in averages_of(engine):
        return
    own[_KEY].averages = [weakref.ref(e) for e in averages_of(engine) if e is not ema]
    if own[_KEY].averages:
        return
    # Only where nobody has put another in front meanwhile: those pass on for good.
    if all(getattr(own.get(n), "__func__", None) is f for n, f in _NOTICED.items()):
        before = own.pop(_KEY).before
        for name in _NOTICED:
            del own[name]
        own.update(before)
