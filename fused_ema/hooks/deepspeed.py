"""DeepSpeed: an average that an engine's own steps update, without ZeRO and with ZeRO-1, 2 and 3.

    engine, _, _, _ = deepspeed.initialize(model=model, config=config)
    ema = EngineEMA(engine, momentum=0.001)

Accelerate's ``prepare()`` returns the engine as the model. docs/deepspeed.md says more.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import is_not
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_ema import _averages, _caches, _checks, _slots, _storage, _tracking
from fused_ema._tracking import BufferMode
from fused_ema.formats._files import Replacing
from fused_ema.hooks import _deepspeed, _engine_calls, _engine_state
from fused_ema.manager import EMAManager, _misfit
from fused_ema.ops import Form
from fused_ema.schedules import Schedule

__all__ = ["EngineEMA"]

_TITLE = _deepspeed.TITLE


class EngineEMA:
    """Averages what a DeepSpeed engine trains, after each of its steps.

    What is averaged are the fp32 masters that the engine keeps on this rank: with ZeRO-1 and 2 its
    partitions, with ZeRO-3 its shards, in bf16 and fp16 without ZeRO the copies of the weights; in
    fp32 without ZeRO the weights themselves. They are read in place, and nothing is gathered or
    sent: an update is what :meth:`fused_ema.Plan.update` is, over a few flat tensors.

    A step is one that the engine applies: accumulated batches and steps skipped for an overflow
    don't count, and the number of parameter groups doesn't matter. Each is an iteration to
    ``interval``, ``begin`` and ``momentum_fun``, as in :class:`fused_ema.EMAManager`. Persistent
    buffers are averaged or copied as there; frozen parameters are what they are.

    Every rank makes one, and calls each method as all others do. Averages stop with the object:
    keep it.

    Args:
        engine: What ``deepspeed.initialize()`` or ``accelerator.prepare()`` returned.
        momentum: The weight of the new value, between 0 and 1, both excluded.
        interval: Steps from update to update.
        skip_buffers: Average parameters only.
        momentum_fun: The momentum as a function of the 0-based step.
        form: ``"lerp"``, ``"mul_add"`` or ``"two_products"``.
        begin: The first step that averages; before it the average follows by copy.
        ema_dtype: Of averages; None for the masters'.
        device: Of averages; None for the masters'.
        copy_buffers: The same as ``buffers="copy"``.
        buffers: As in EMAManager.
        decay: Not taken; the error says which momentum it is.

    Raises:
        TypeError: Not an engine; as EMAManager.
        ValueError: An engine that isn't served or has no optimizer; as EMAManager.
        RuntimeError: An engine that is closed or has offloaded its states.

    Example:
        >>> ema = EngineEMA(engine, momentum=0.001)  # doctest: +SKIP
        >>> engine.backward(loss), engine.step()  # an update  # doctest: +SKIP
        >>> with ema.swapped():  # the engine's weights hold the average here  # doctest: +SKIP
        ...     engine(batch)
    """

    def __init__(
        self,
        engine: Any,
        momentum: float = 0.0002,
        interval: int = 1,
        skip_buffers: bool = False,
        momentum_fun: Schedule | None = None,
        *,
        form: Form = "lerp",
        begin: int = 0,
        ema_dtype: torch.dtype | Literal["param"] | None = None,
        device: torch.device | str | None = None,
        copy_buffers: bool = False,
        buffers: BufferMode | Mapping[str, BufferMode] | None = None,
        decay: None = None,
    ) -> None:
        _averages.refuse_several(_TITLE, momentum)
        self._engine = engine
        self._held = _deepspeed.held_by(engine)
        self._is_closed = self._held.is_closed() or _engine_calls.is_closed(engine)
        self._refuse_if_away("")
        self._params = _deepspeed.params_of(engine, self._held)
        self._masters = self._held.masters()
        self._keys = [f"masters of group {i}" for i in range(len(self._masters))]
        self._manager = EMAManager(
            _deepspeed.stand_in(dict(zip(self._keys, self._masters, strict=True)), engine.module),
            momentum,
            interval,
            skip_buffers,
            momentum_fun,
            form=form,
            begin=begin,
            ema_dtype=ema_dtype,
            device=device,
            copy_buffers=copy_buffers,
            buffers=buffers,
            decay=decay,
        )
        # While swapped: the raw values of this rank's weights and of the buffers, in their order.
        self._aside: list[Tensor] | None = None
        self._found_owners: dict[str, list[tuple[int, int, int]]] | None = None
        _engine_calls.observe(engine, self)

    # ---- what it is

    @property
    def iteration(self) -> int:
        """The step that comes next: how many the engine has applied since this was made."""
        return self._manager.iteration

    @property
    def num_updates(self) -> int:
        """How many updates have averaged. Copies before ``begin`` don't count."""
        return self._manager.num_updates

    @property
    def is_swapped(self) -> bool:
        """Whether the engine's weights hold the average."""
        return self._aside is not None

    def momentum_at(self, iteration: int) -> float:
        """As :meth:`fused_ema.EMAManager.momentum_at`."""
        return self._manager.momentum_at(iteration)

    def named_shards(self) -> Iterator[tuple[str, int, Tensor]]:
        """What this rank holds of each trained parameter's average; communicates nothing.

        Yields:
            The parameter's name, of a tied one each; the offset of the part in the parameter,
            flattened; and the live values, of one dimension.
        """
        emas = self._emas()
        for param in self._params:
            for piece in param.pieces:
                values = _engine_state.part(emas[piece.master], piece)
                for name in param.names:
                    yield name, piece.offset, values

    def __repr__(self) -> str:
        return (
            f"EngineEMA({type(self._engine.optimizer).__name__}, {self._manager!r}"
            f"{', swapped' if self.is_swapped else ''})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{_TITLE}: it can't be copied or pickled, since it holds on to one engine's memory; "
            "save_checkpoint(), and make another for the other engine"
        )

    def reset(self) -> None:
        """Starts anew: every average a clone of its master, no step seen.

        Raises:
            RuntimeError: It is swapped.
        """
        self._refuse_if_swapped("reset")
        self._manager.reset()

    def remove(self) -> None:
        """Ends the updates: the engine is as it was before.

        Raises:
            RuntimeError: It is swapped.
        """
        if self.is_swapped:
            raise RuntimeError(f"{_TITLE}.remove: the engine holds the average; swap back first")
        _engine_calls.forget(self._engine, self)

    # ---- for evaluation

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The engine's weights hold the average inside of the ``with``, and the raw ones after it.

        The average is rounded to the weights' dtype. Masters stay as they are, but for fp32 with
        ZeRO-3 or without ZeRO, where they are the weights. This rank's raw weights are set aside;
        what is written to weights or buffers meanwhile is dropped. With ZeRO-1 and 2 the weights
        are gathered once on the way in and once on the way out, as after a step: every rank must
        leave. With ZeRO-3 each rank writes its shards, and the next forward gathers them.

        The engine's step, and its checkpoints, are refused inside.

        Raises:
            RuntimeError: It is swapped already, or another average of this engine is; the engine is
                closed or has offloaded its states.
        """
        self._swap_in("swapped")
        try:
            yield
        finally:
            if self.is_swapped:
                try:
                    self._swap_out("swapped")
                except (KeyboardInterrupt, SystemExit):
                    self._swap_out("swapped")
                    raise

    def swap(self) -> None:
        """Brings the average into the engine's weights; a second call brings the raw ones back."""
        if self.is_swapped:
            self._swap_out("swap")
        else:
            self._swap_in("swap")

    def _swap_in(self, op: str) -> None:
        if self.is_swapped:
            raise RuntimeError(f"{_TITLE}.{op}: the engine is swapped already; swap back first")
        self._refuse_if_another_is_swapped(op)
        self._refuse_if_away(op)
        buffers = self._buffers(op)
        self._held.release()
        targets = [*self._held.weights(), *(slot.param for slot in buffers)]
        aside = _storage.allocate(targets, [t.dtype for t in targets], [t.device for t in targets])
        _storage.copy(aside, targets)
        values = [*self._emas(), *(slot.ema for slot in buffers)]
        self._aside = aside
        try:
            self._write(targets, values)
        except BaseException:
            self._swap_out(op)
            raise

    def _swap_out(self, op: str) -> None:
        assert self._aside is not None
        self._refuse_if_offloaded(f"{_TITLE}.{op}")
        self._held.release()
        # The weights come back whatever has become of buffers meanwhile.
        self._manager._follow_buffers()
        targets = [*self._held.weights(), *(slot.param for slot in self._tracked_buffers())]
        pairs = [
            (t, raw) for t, raw in zip(targets, self._aside, strict=True) if t.shape == raw.shape
        ]
        self._write([target for target, _ in pairs], [raw for _, raw in pairs])
        self._aside = None

    @torch.no_grad()
    def _write(self, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        _storage.copy(targets, values)
        self._held.spread()
        _caches.drop()

    # ---- the whole average

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole average by name on rank 0, on the CPU, and nothing on the others.

        Trained parameters and buffers averaged, frozen parameters as the model holds them. One
        parameter at a time is brought together; every rank calls it.
        """
        found = {}
        is_first = _rank() == 0
        for names, values in self._whole():
            if is_first:
                own = values.to("cpu", copy=True)
                found.update(dict.fromkeys(names, own))
        return found

    def copy_to(self, model: nn.Module | None) -> None:
        """Copies the whole average into an unsharded model, by name, one parameter at a time.

        Args:
            model: As in :meth:`fused_ema.EMAManager.copy_to`. Every rank calls it; one that wants
                no copy passes None.

        Raises:
            TypeError: Neither a module nor None.
            ValueError: The engine or its own model; names, shapes or dtypes that don't fit: one
                error that lists them, on every rank, and nothing is written.
        """
        problem, members = "", {}
        try:
            members = self._room_in(model)
        except (TypeError, ValueError) as error:
            problem = str(error)
        self._raise_on_all("copy_to", problem)
        for names, values in self._whole():
            if members:
                places = {id(members[n].local): members[n].local for n in names}
                _storage.copy(list(places.values()), [values] * len(places))

    def _room_in(self, model: nn.Module | None) -> dict[str, _tracking.Member]:
        if model is None:
            return {}
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; pass a torch.nn.Module or None")
        if any(module is self._engine.module for module in model.modules()):
            raise ValueError(
                "model is the engine's own; use swapped(), or pass another, unsharded one"
            )
        _tracking.refuse_fsdp1(f"{_TITLE}.copy_to", model)
        members = {member.name: member for member in _tracking.read(model).members}
        like = {name: self._like(p) for p in self._params for name in p.names}
        like |= {m.name: s.ema for s in self._buffers("copy_to") for m in s.members}
        problems = [
            f"'{name}' {problem}"
            for name, values in like.items()
            if (problem := _misfit(values, members.get(name)))
        ]
        if problems:
            raise ValueError(
                "the model doesn't fit; nothing was changed:\n  "
                + "\n  ".join(_checks.listed(problems))
            )
        return members

    def _like(self, param: _deepspeed.Param) -> Tensor:
        dtype = param.tensor.dtype
        if param.is_trained:
            # With ZeRO all masters are of one dtype.
            dtype = self._emas()[param.pieces[0].master if param.pieces else 0].dtype
        return torch.empty(param.shape, dtype=dtype, device="meta")

    def _whole(self) -> Iterator[tuple[Sequence[str], Tensor]]:
        """Each parameter and buffer whole, with its names; on every rank, one at a time."""
        self._refuse_if_away("full_state_dict")
        emas, owners = self._emas(), self._owners()
        own = _rank() if self._held.is_sharded else 0
        for param in self._params:
            pieces = [(p.offset, _engine_state.part(emas[p.master], p)) for p in param.pieces]
            if not param.is_trained:
                pieces = [self._held.local(param.tensor)]
            values = torch.empty(
                param.shape,
                dtype=self._like(param).dtype,
                device=self._engine.device,
            )
            flat = values.view(-1)
            mine = dict(pieces)
            for rank, offset, numel in owners[param.names[0]]:
                run = flat.narrow(0, offset, numel)
                if rank == own:
                    run.copy_(mine[offset])
                if self._held.is_sharded:
                    dist.broadcast(run, rank)
            yield param.names, values
        for slot in self._buffers("full_state_dict"):
            yield [member.name for member in slot.members], slot.ema

    def _owners(self) -> dict[str, list[tuple[int, int, int]]]:
        """By the first name, which rank holds which elements: rank, offset and length, in order."""
        if self._found_owners is None:
            own = {param.names[0]: self._runs(param) for param in self._params}
            every: list[Any] = [own]
            if self._held.is_sharded:
                every = [None] * _world()
                dist.all_gather_object(every, own)
            self._found_owners = {}
            for name in own:
                owners, covered = [], 0
                runs = ((*run, rank) for rank, has in enumerate(every) for run in has[name])
                for offset, numel, rank in sorted(runs):
                    if numel and offset == covered:  # Several ranks may have the same.
                        owners.append((rank, offset, numel))
                        covered += numel
                self._found_owners[name] = owners
        return self._found_owners

    def _runs(self, param: _deepspeed.Param) -> list[tuple[int, int]]:
        """What of a parameter this rank holds: offsets and lengths."""
        if param.is_trained:
            return [(piece.offset, piece.numel) for piece in param.pieces]
        offset, values = self._held.local(param.tensor)
        return [(offset, values.numel())]

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What this rank holds, of the live tensors; communicates nothing.

        Returns:
            ``version``, ``iteration``, ``num_updates``; ``shapes``: name to the whole parameter's;
            ``shards``: name to what this rank has of its average, as (offset in the flattened
            parameter, values); ``buffers``: name to average.
        """
        emas = self._emas()
        shards: dict[str, list[tuple[int, Tensor]]] = {}
        for param in self._params:
            # At its own size: a part saves with all of its storage.
            own = [
                (p.offset, _storage.with_own_storage(_engine_state.part(emas[p.master], p)))
                for p in param.pieces
            ]
            if own:
                shards |= dict.fromkeys(param.names, own)
        return {
            "version": _engine_state.VERSION,
            "iteration": self.iteration,
            "num_updates": self.num_updates,
            "shapes": _engine_state.shapes_of(self._params),
            "shards": shards,
            "buffers": {m.name: s.ema for s in self._buffers("state_dict") for m in s.members},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Takes over the averages of one or more ranks: what they hold together must be enough.

        Args:
            state_dict: Of this rank, or those of all, of any number of ranks.

        Raises:
            ValueError: It is swapped; what doesn't fit, or is missing: one error that lists it, on
                every rank. Nothing has changed then.
        """
        states = [state_dict] if isinstance(state_dict, Mapping) else list(state_dict)
        problem = ""
        writes: list[tuple[Tensor, Tensor]] = []
        try:
            self._refuse_if_swapped("load_state_dict")
            buffers = {slot.name: slot.ema for slot in self._buffers("load_state_dict")}
            writes = _engine_state.fitting(states, self._params, self._emas(), buffers)
        except Exception as error:  # Whatever it is: the other ranks wait to hear of it.
            problem = str(error)
        note = "" if problem else repr((states[0]["iteration"], states[0]["num_updates"]))
        self._raise_on_all("load_state_dict", problem, note)
        _storage.copy([dst for dst, _ in writes], [src for _, src in writes])
        self._manager._iteration = states[0]["iteration"]
        self._manager._num_updates = states[0]["num_updates"]

    def save_checkpoint(self, save_dir: str | os.PathLike[str], tag: object = None) -> None:
        """Writes this rank's part beside the engine's checkpoint; every rank calls it.

        Args:
            save_dir: That of ``engine.save_checkpoint()``.
            tag: The same; None for the engine's own, ``global_step`` and its number.
        """
        tag = f"global_step{self._engine.global_steps}" if tag is None else str(tag)
        folder = os.path.join(save_dir, tag)
        os.makedirs(folder, exist_ok=True)
        state = self.state_dict()
        if not self._held.is_sharded and _rank() > 0:
            state["shards"] = {}  # Rank 0 has the same.
        with Replacing(Path(_engine_state.path_of(folder, _rank(), _world()))) as file:
            torch.save(state, file)
        if _rank() == 0:
            # Those of another number of ranks, saved there before, would be of another step.
            stale = set(glob.glob(_engine_state.path_of(glob.escape(folder), "*", "*")))
            for path in stale - {
                _engine_state.path_of(folder, rank, _world()) for rank in range(_world())
            }:
                os.remove(path)

    def load_checkpoint(self, load_dir: str | os.PathLike[str], tag: object = None) -> None:
        """Goes on from what save_checkpoint() wrote, on any number of ranks; every rank calls it.

        On as many ranks as it was saved by, the run goes on bit for bit as the engine does.

        Args:
            load_dir: As for ``engine.load_checkpoint()``, before or after it.
            tag: The same; None for the one in the file ``latest``.

        Raises:
            ValueError: It is swapped; no complete files, or such as don't fit; on every rank.
                Nothing has changed then.
        """
        problem, states = "", []
        try:
            paths = _engine_state.paths_in(os.fspath(load_dir), tag, _world())
            # Its own is enough on as many ranks; rank 0 alone has what every rank has.
            first = [paths[_rank()], paths[0]] if len(paths) == _world() else paths
            states = _engine_state.read(first)
            if not _engine_state.is_enough(states, self._params):
                states = _engine_state.read(first + [path for path in paths if path not in first])
        except Exception as error:  # As there.
            problem = str(error)
        self._raise_on_all("load_checkpoint", problem)
        self.load_state_dict(states)

    @staticmethod
    def is_saved_in(load_dir: str | os.PathLike[str], tag: object = None) -> bool:
        """Whether there are files of averages, complete or not, below a checkpoint's folder."""
        below = "*" if tag is None else glob.escape(str(tag))
        return bool(
            glob.glob(
                _engine_state.path_of(
                    os.path.join(glob.escape(os.fspath(load_dir)), below), "*", "*"
                )
            )
        )

    # ---- how it is kept

    def _emas(self) -> list[Tensor]:
        """The averages of the masters."""
        slots = {slot.name: slot.ema for slot in self._manager._tracked.slots}
        return [slots[key] for key in self._keys]

    def _buffers(self, op: str) -> list[_slots.Slot]:
        """The tracked buffers, as the model has them now."""
        self._manager._follow(op)
        return self._tracked_buffers()

    def _tracked_buffers(self) -> list[_slots.Slot]:
        return [slot for slot in self._manager._tracked.slots if slot.members[0].is_buffer]

    def _on_step(self) -> None:
        """Called after each step that the engine has applied."""
        self._update()

    @contextmanager
    def _saving(self, save_dir: str | os.PathLike[str], tag: object) -> Iterator[None]:
        """Stands around engine.save_checkpoint()."""
        # It would hold the average beside the raw masters, which zero_to_fp32 reads.
        self._refuse_if_swapped("engine.save_checkpoint()")
        yield

    def _update(self) -> None:
        # Where there is a master a parameter, to ask each takes longer than the update.
        if (
            self._is_closed
            or getattr(self._engine.optimizer, "offloaded_states", None)
            or not self._held.one_a_param
        ):
            self._refuse_if_away("update", ask_each=not self._held.one_a_param)
        self._manager.update()

    def _refuse_if_away(self, op: str, ask_each: bool = True) -> None:
        title = f"{_TITLE}.{op}" if op else _TITLE
        if self._is_closed:
            raise RuntimeError(f"{title}: the engine was closed by destroy(); initialize another")
        self._refuse_if_offloaded(title)
        # Compared as objects: each is written in place for as long as the engine lives.
        if op and ask_each and any(map(is_not, self._held.masters(), self._masters)):
            raise RuntimeError(
                f"{title}: the engine has other masters than when this was made; keep "
                "state_dict(), make another EngineEMA and load it"
            )

    def _refuse_if_offloaded(self, title: str) -> None:
        if getattr(self._engine.optimizer, "offloaded_states", None):
            raise RuntimeError(
                f"{title}: the engine has offloaded its states; call engine.reload_states() first"
            )

    def _refuse_if_swapped(self, op: str) -> None:
        if self.is_swapped:
            raise RuntimeError(
                f"{_TITLE}: the engine's weights hold the average, so {op} is refused; leave "
                "swapped() or call swap() first"
            )

    def _refuse_if_another_is_swapped(self, op: str) -> None:
        if any(other.is_swapped for other in _engine_calls.averages_of(self._engine)):
            raise RuntimeError(
                f"{_TITLE}.{op}: the engine holds another average; swap that one back first"
            )

    def _raise_on_all(self, op: str, problem: str, note: str = "") -> None:
        """Raises on every rank what is wrong on any, or that their notes differ."""
        every: list[Any] = [(problem, note)]
        if _world() > 1:
            every = [None] * _world()
            dist.all_gather_object(every, (problem, note))
        if problem:
            raise ValueError(f"{_TITLE}.{op}: {problem}")
        for rank, (other, _) in enumerate(every):
            if other:
                raise ValueError(f"{_TITLE}.{op}: on rank {rank}, so nothing changed here: {other}")
        if len({note for _, note in every}) > 1:
            raise ValueError(
                f"{_TITLE}.{op}: the ranks' states are of several (iteration, num_updates): "
                f"{[note for _, note in every]}; nothing was changed"
            )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
