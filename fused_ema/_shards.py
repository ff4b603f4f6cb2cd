"""DTensors and their shards, FSDP2's modules, ZeRO-3's parameters: the only file that knows them.

Everything else works on plain tensors, of a DTensor on the shard that this rank holds. Nothing here
imports torch.distributed: where nobody has, there are no DTensors.
"""

from __future__ import annotations

import copy
import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter, is_not
from types import MemberDescriptorType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fused_ema import _checks, _native

_PLAIN = frozenset({Tensor, nn.Parameter, nn.Buffer})
_shard_of = attrgetter("_local_tensor")


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor."""
    if type(tensor) in _PLAIN:
        return False
    cls = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return cls is not None and isinstance(tensor, cls)


def shard_of(tensor: Tensor) -> Tensor:
    """What this rank holds of it: of a plain tensor all."""
    return cast(Tensor, _shard_of(tensor)) if is_dtensor(tensor) else tensor


def with_shard(like: Tensor, values: Tensor) -> Tensor:
    """A DTensor as ``like`` is one, whose shard are these values; of a plain one the values."""
    if not is_dtensor(like):
        return values
    # from_local() would copy a shard on another type of device than the mesh's, as offloading has.
    cls: Any = sys.modules["torch.distributed.tensor"].DTensor
    spec = copy.copy(like._spec)  # type: ignore[attr-defined]
    spec.tensor_meta = spec.tensor_meta._replace(dtype=values.dtype)
    return cast(Tensor, cls(values, spec, requires_grad=False))


def is_laid_alike(a: Tensor, b: Tensor) -> bool:
    """Whether each rank's shard of one is the same part as that of the other."""
    if not (is_dtensor(a) or is_dtensor(b)):
        return True
    return is_dtensor(a) and is_dtensor(b) and a.shape == b.shape and _layout(a) == _layout(b)


def _layout(tensor: Any) -> tuple[object, object]:
    return tensor.device_mesh, tuple(tensor.placements)


def described(tensor: Tensor) -> str:
    """How it is sharded, for an error message; empty of a plain one."""
    if not is_dtensor(tensor):
        return ""
    mesh, placements = _layout(tensor)
    return f" sharded as {placements} over {mesh}"


def misfit(like: Tensor, given: Tensor) -> str:
    """Why no rank can take its part of what is given without the others; empty where it can."""
    if not is_dtensor(given):
        return ""
    if is_laid_alike(like, given):
        own, held = (cast(Any, t).device_mesh.get_coordinate() for t in (like, given))
        if own == held:
            return ""
        return (
            f"is the shard of the rank at {held}, not of this one at {own}, as in a file that one "
            "rank has pickled; save with torch.distributed.checkpoint, which writes all shards"
        )
    there = described(like) if is_dtensor(like) else " whole"
    return f"is{described(given)} but the model's tensor is{there}"


def part_of(like: Tensor, given: Tensor) -> Tensor:
    """What goes into the shard of ``like`` from a tensor that is no misfit of it."""
    if is_dtensor(given) or not is_dtensor(like):
        return shard_of(given)
    distribute: Any = sys.modules["torch.distributed.tensor"].distribute_tensor
    mesh, placements = _layout(like)
    # Without a source rank each cuts its part out of what it has, and nothing is sent.
    return shard_of(distribute(given.detach(), mesh, placements, src_data_rank=None))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on its mesh's device, which every rank gathers; of a plain one itself."""
    if not is_dtensor(tensor):
        return tensor
    shard, device = shard_of(tensor), cast(Any, tensor).device_mesh.device_type
    if shard.device.type != device:  # Offloaded; a mesh communicates on its own device.
        tensor = with_shard(tensor, shard.to(device))
    return cast(Tensor, cast(Any, tensor).full_tensor())


def offset_of(tensor: Tensor) -> tuple[int, ...]:
    """Where in the whole tensor this rank's shard begins, a number a dimension; 0s of a plain one.

    By it an element is the same one on whatever rank it is.
    """
    if not is_dtensor(tensor):
        return (0,) * tensor.dim()
    utils: Any = sys.modules["torch.distributed.tensor"]._utils
    mesh, placements = _layout(tensor)
    _, offset = utils.compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    return tuple(offset)


def num_parts(tensor: Tensor) -> int:
    """Into how many parts a mesh divides it; 1 of a plain one, which each rank has whole."""
    if not is_dtensor(tensor):
        return 1
    mesh, placements = cast(Any, _layout(tensor))
    return math.prod(mesh.size(i) for i, p in enumerate(placements) if not p.is_replicate())


def is_first(tensors: Sequence[Tensor]) -> bool:
    """Whether this rank is the first of those that hold a part; of plain tensors, the first."""
    meshes = {_mesh_of(tensor) for tensor in tensors} - {None}
    if meshes:
        return not any(any(mesh.get_coordinate() or ()) for mesh in meshes)
    distributed: Any = sys.modules.get("torch.distributed")
    is_group = distributed is not None and distributed.is_available()
    return not (is_group and distributed.is_initialized()) or distributed.get_rank() == 0


def refusal(tensor: Tensor) -> str:
    """Why a tensor can't be averaged at all, to be said after its name; empty where it can."""
    if is_dtensor(tensor):
        placements = tuple(cast(Any, tensor).placements)
        if any(placement.is_partial() for placement in placements):
            return (
                f"is a DTensor with placements {placements}: each rank holds a summand of it, "
                "which has no average of its own; redistribute() it to Shard or Replicate first, "
                "or leave it out with exclude="
            )
        return ""
    if is_partitioned(tensor):
        return (
            "is partitioned by DeepSpeed ZeRO-3 and empty between its uses, so there is nothing "
            "here to average or to write; average the engine with "
            "fused_ema.hooks.deepspeed.EngineEMA(engine), or do this inside of "
            "deepspeed.zero.GatheredParameters(params, modifier_rank=0)"
        )
    return ""


def is_zero3(tensor: Tensor) -> bool:
    """Whether it is a parameter that DeepSpeed ZeRO-3 partitions, be it whole at the moment."""
    return hasattr(tensor, "ds_id") and hasattr(tensor, "ds_shape")


def is_partitioned(tensor: Tensor) -> bool:
    """Whether it is such a one and empty at the moment, though its shape isn't."""
    return tensor.numel() == 0 and is_zero3(tensor) and 0 not in cast(Any, tensor).ds_shape


def zero3_of(lists: Sequence[Sequence[Tensor]]) -> list[tuple[int, Tensor]]:
    """Those of some lists that ZeRO-3 partitions, with their indices.

    Plain attributes tell them, and to look for one that isn't there is slow: asks only where there
    can be any.
    """
    if "deepspeed" not in sys.modules:
        return []
    listed = [tensors for tensors in lists if isinstance(tensors, (list, tuple))]
    return [(i, t) for tensors in listed for i, t in enumerate(tensors) if is_zero3(t)]


class Shards:
    """The DTensors of a list with the shards that they had.

    A conversion, a move or FSDP2's first forward gives a DTensor another shard, in the same object.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._dtensors = tuple({id(t): t for t in tensors if is_dtensor(t)}.values())
        self._shards = tuple(map(shard_of, self._dtensors))
        self._counted = _counted(self._dtensors)
        # Where it is one, C reads it at its place: 500 DTensors in 2 us instead of 25.
        cls = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
        slot = getattr(cls, "_local_tensor", None)
        self._slot = slot if isinstance(slot, MemberDescriptorType) else None

    def are_current(self) -> bool:
        """Whether they have them still."""
        if self._slot is not None and _native.C is not None:
            return bool(_native.C.slots_hold(self._slot, self._dtensors, self._shards))
        return not any(map(is_not, map(_shard_of, self._dtensors), self._shards))

    @property
    def watched(self) -> tuple[object, ...] | None:
        """What are_current() asks, as csrc/repeat.cpp takes it; None where there is nothing."""
        return (self._slot, self._dtensors, self._shards) if self._dtensors else None

    def note_write(self) -> None:
        """Makes a backward notice that shards were written: they count for themselves only."""
        if self._counted:
            torch.autograd.graph.increment_version(self._counted)


def _counted(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if not tensor.is_inference()]


class Units:
    """The groups of parameters that FSDP2 shards, gathers and frees together.

    Between a forward and a backward, and after an evaluation, what is registered under the names
    of a group may be its gathered parameters; writes to the shards reach a forward only after they
    are freed.
    """

    def __init__(self, groups: Sequence[Any]) -> None:
        self._groups = groups

    def reshard(self, title: str, by_force: bool = False) -> bool:
        """Frees what is gathered, without communication; returns whether there was any.

        Args:
            title: For the error.
            by_force: In the middle of a forward or backward, too: one that was broken off.

        Raises:
            RuntimeError: A forward or backward is under way.
        """
        gathered = [
            group
            for group in self._groups
            if not group.is_sharded or group._all_gather_result is not None
        ]
        for group in () if by_force else gathered:
            if group._training_state.name != "IDLE":
                raise RuntimeError(
                    f"{title}: '{group._module_fqn or 'the model'}' is in the middle of a forward "
                    "or backward pass, where FSDP2 has its parameters gathered; call this between "
                    "the passes (after one that was broken off: reshard() its FSDP modules first)"
                )
        for group in gathered:
            # Of a gather that was started, a forward would take the values of then.
            if group._all_gather_result is not None:
                group.wait_for_unshard()
            # As reshard() does, which in the middle of a forward may do nothing.
            group._to_sharded()
        return bool(gathered)

    def note_write(self) -> None:
        """Makes a backward notice that shards were written after its forward had gathered them."""
        if self._groups:
            found = (
                getattr(param, "_unsharded_param", None)
                for group in self._groups
                for param in group.fsdp_params
            )
            torch.autograd.graph.increment_version(_counted([p for p in found if p is not None]))


def units_of(*models: nn.Module) -> Units:
    """Those that hold a tensor of models: of their modules, and of those they are parts of."""
    cls = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    states = getattr(
        sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", None
    )
    if cls is None or not states:
        return Units([])
    own = {id(module) for model in models for module in model.modules()}
    found = {}
    for module in list(states):
        if isinstance(module, cls):
            for group in _groups_of(module):
                if any(id(p._module_info.module) in own for p in group.fsdp_params):
                    found[id(group)] = group
    return Units(list(found.values()))


def _groups_of(module: Any) -> Sequence[Any]:
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):  # From torch 2.12 on there may be several.
        return cast(Sequence[Any], state._fsdp_param_groups)
    return () if state._fsdp_param_group is None else (state._fsdp_param_group,)


# ---- what ranks tell each other: where a manager is made and where it loads, never in a step


def dtensors_of(model: nn.Module) -> list[Tensor]:
    """A model's DTensors, and those that FSDP2 has gathered for the time being."""
    if "torch.distributed.tensor" not in sys.modules:
        return []
    params = [param for group in units_of(model)._groups for param in group.fsdp_params]
    infos = [param._module_info for param in params]
    own = {(id(info.module), info.param_name) for info in infos}
    found = [param.sharded_param for param in params]
    for module in model.modules():
        found += [t for key, t in module._parameters.items() if (id(module), key) not in own]
        found += module._buffers.values()
    return [tensor for tensor in found if is_dtensor(tensor)]


class Fact(NamedTuple):
    """What ranks must have in common: those that hold parts of a DTensor; all, where it is None."""

    tensor: Tensor | None
    name: str
    text: str


class _Note(NamedTuple):
    """What a rank tells others: the name of its error, or what else the text is."""

    rank: int
    kind: str
    text: str


_ERRORS = {"TypeError": TypeError, "ValueError": ValueError, "RuntimeError": RuntimeError}
_MESHES, _DIGEST, _FACT = "meshes", "digest", "fact"


@contextmanager
def one_error(title: str, tensors: Sequence[Tensor]) -> Iterator[list[Fact]]:
    """What goes wrong inside on one rank is the same error on every rank that holds a part.

    Each of these must come here, with DTensors over the same meshes, over which it communicates;
    without DTensors it doesn't. Ranks of other meshes, as pipeline stages, differ by right.

    Yields:
        A list to be filled with facts, in the order of which the ranks must agree.
    """
    meshes = _meshes_of(tensors)
    facts: list[Fact] = []
    own: Exception | None = None
    try:
        yield facts
    except (TypeError, ValueError, RuntimeError) as error:
        own = error
    if not meshes:
        if own is not None:
            raise own
        return
    rank = _distributed(title).get_rank()
    errors: list[_Note] = []
    if own is not None:
        kind = next(name for name, cls in _ERRORS.items() if isinstance(own, cls))
        text = f"{own}\n(on rank {rank}, and so an error on every rank with a part of the model)"
        errors = [_Note(rank, kind, text)]
    shapes = ", ".join(f"{tuple(mesh.shape)} of {mesh.mesh_dim_names}" for mesh in meshes)
    known = _Note(rank, _MESHES, f"DTensors over the meshes {shapes}")
    for mesh in meshes:
        here = [fact for fact in facts if fact.tensor is None or _mesh_of(fact.tensor) == mesh]
        lines = [_Note(rank, _FACT, f"'{fact.name}' is {fact.text}") for fact in here]
        digest = hashlib.sha256(repr([line.text for line in lines]).encode()).hexdigest()
        notes = _pass_on(mesh, [*errors, known, _Note(rank, _DIGEST, digest)])
        errors = [note for note in notes if note.kind in _ERRORS]
        has_others = _differ(notes, _MESHES)
        if has_others or (not errors and _differ(notes, _DIGEST)):
            # Of many ranks the facts are many: told only where they differ.
            kind = _MESHES if has_others else _FACT
            notes = notes if has_others else _pass_on(mesh, lines)
            told = [note for note in notes if note.kind == kind]
            errors.append(_Note(min(told).rank, "ValueError", _difference(title, told)))
        if has_others:  # Who went on to the next would wait for ranks that don't have it.
            break
    if errors:
        raise _ERRORS[min(errors).kind](min(errors).text) from own


def _differ(notes: Sequence[_Note], kind: str) -> bool:
    return len({note.text for note in notes if note.kind == kind}) > 1


def _difference(title: str, told: Sequence[_Note]) -> str:
    by_rank: dict[int, list[str]] = {}
    for note in sorted(told, key=lambda note: note.rank):
        by_rank.setdefault(note.rank, []).append(note.text)
    first, *others = by_rank
    other = next((rank for rank in others if by_rank[rank] != by_rank[first]), first)
    lines = [
        f"{text} on rank {has}, not on rank {lacks}"
        for has, lacks in ((first, other), (other, first))
        for text in by_rank[has]
        if text not in by_rank[lacks]
    ]
    if not lines:
        lines = [f"rank {first} and rank {other} have the same in another order"]
    return (
        f"{title}: the ranks that have parts of the model differ; give each the same, sharded "
        "alike:\n  " + "\n  ".join(_checks.listed(lines))
    )


def all_of(title: str, tensors: Sequence[Tensor], flags: Sequence[bool]) -> list[bool]:
    """Of each tensor, whether its flag is set on every rank that holds a part of it.

    Communicates where one of them is a DTensor.
    """
    unset = {str(i) for i, flag in enumerate(flags) if not flag and is_dtensor(tensors[i])}
    for mesh in _meshes_of(tensors):
        rank = _distributed(title).get_rank()
        unset |= {note.text for note in _pass_on(mesh, [_Note(rank, _FACT, i) for i in unset])}
    return [flag and str(i) not in unset for i, flag in enumerate(flags)]


def _mesh_of(tensor: Tensor) -> Any:
    return cast(Any, tensor).device_mesh if is_dtensor(tensor) else None


def _meshes_of(tensors: Sequence[Tensor]) -> list[Any]:
    """Those of DTensors that have other ranks, the largest first: all others' ranks hear of it."""
    meshes = dict.fromkeys(map(_mesh_of, tensors))
    others = [mesh for mesh in meshes if mesh is not None and mesh.size() > 1]
    return sorted((m for m in others if m.get_coordinate() is not None), key=lambda m: -m.size())


def _distributed(title: str) -> Any:
    distributed = sys.modules["torch.distributed"]
    if not distributed.is_initialized():
        raise RuntimeError(
            f"{title}: the model is sharded over several ranks, and this process has no process "
            "group (torch.distributed.init_process_group); call it in the processes that train"
        )
    return distributed


def _pass_on(mesh: Any, notes: Sequence[_Note]) -> list[_Note]:
    """The notes of all ranks of a mesh, through one of its dimensions after the other."""
    distributed = sys.modules["torch.distributed"]
    notes = list(notes)
    for group in mesh.get_all_groups():
        found: list[list[_Note]] = [[] for _ in range(distributed.get_world_size(group))]
        distributed.all_gather_object(found, notes, group=group)
        notes = list(dict.fromkeys(note for several in found for note in several))
    return notes
