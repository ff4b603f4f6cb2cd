"""DTensors and their shards, FSDP2's modules, ZeRO-3's parameters: the only file that knows them.

Everything else works on plain tensors, of a DTensor on the shard that this rank holds. Nothing here
imports torch.distributed: where nobody has, there are no DTensors.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter, is_not
from typing import Any, cast

import torch
from torch import Tensor, nn

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


def refusal(name: str, tensor: Tensor) -> str:
    """Why a tensor can't be averaged at all; empty where it can."""
    if is_dtensor(tensor):
        placements = tuple(cast(Any, tensor).placements)
        if any(placement.is_partial() for placement in placements):
            return (
                f"'{name}' is a DTensor with placements {placements}: each rank holds a summand of "
                "it, which has no average of its own; redistribute() it to Shard or Replicate "
                "first, or leave it out with exclude="
            )
        return ""
    if is_partitioned(tensor):
        return (
            f"'{name}' is partitioned by DeepSpeed ZeRO-3 and empty between its uses, so there is "
            "nothing here to average or to write; average the engine with "
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
        self._dtensors = list({id(t): t for t in tensors if is_dtensor(t)}.values())
        self._shards = [shard_of(tensor) for tensor in self._dtensors]

    def are_current(self) -> bool:
        """Whether they have them still."""
        return not self._dtensors or not any(
            map(is_not, map(_shard_of, self._dtensors), self._shards)
        )

    def note_write(self) -> None:
        """Makes a backward notice that shards were written: they count for themselves only."""
        if self._dtensors:
            _note_write(self._dtensors)


def _note_write(tensors: Sequence[Tensor]) -> None:
    counted = [tensor for tensor in tensors if not tensor.is_inference()]
    torch.autograd.graph.increment_version(counted)


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
            _note_write([param for param in found if param is not None])


def units_of(model: nn.Module) -> Units:
    """Those that hold a tensor of a model: of its modules, and of modules that it is a part of."""
    cls = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    states = getattr(
        sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", None
    )
    if cls is None or not states:
        return Units([])
    own = {id(module) for module in model.modules()}
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


def gather(tensors: Sequence[Tensor], note: object) -> list[object]:
    """The notes of all ranks that hold a part of these tensors, this rank's alone without any.

    Every one of these ranks must call it, with tensors over the same meshes.
    """
    notes = [note]
    meshes = list(dict.fromkeys(cast(Any, t).device_mesh for t in tensors if is_dtensor(t)))
    for mesh in meshes:
        if mesh.get_coordinate() is None:
            continue
        for group in mesh.get_all_groups():
            distributed = sys.modules["torch.distributed"]
            found: list[list[object]] = [[] for _ in range(distributed.get_world_size(group))]
            # Of all so far: a note passes on through one dimension of a mesh after the other.
            distributed.all_gather_object(found, notes, group=group)
            notes = [one for several in found for one in several]
            notes = list(dict.fromkeys(notes))
    return notes


def all_of(tensors: Sequence[Tensor], flags: Sequence[bool]) -> list[bool]:
    """Of each tensor, whether its flag is set on every rank that holds a part of it.

    Communicates where one of them is a DTensor.
    """
    if not any(map(is_dtensor, tensors)):
        return list(flags)
    false = {i for i, flag in enumerate(flags) if not flag and is_dtensor(tensors[i])}
    for note in gather(tensors, tuple(sorted(false))):
        false |= set(cast(tuple[int, ...], note))
    return [flag and i not in false for i, flag in enumerate(flags)]


@contextmanager
def one_error(tensors: Sequence[Tensor]) -> Iterator[None]:
    """What goes wrong inside on one rank is an error on every rank that holds a part."""
    own: Exception | None = None
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        own = error
    if not any(map(is_dtensor, tensors)):
        if own is not None:
            raise own
        return
    notes = gather(tensors, "" if own is None else str(own))
    if own is not None:
        raise own
    others = [note for note in notes if note]
    if others:
        raise ValueError(f"{others[0]}\n(on another rank, so nothing was changed on this one)")
