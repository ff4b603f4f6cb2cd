"""What a DeepSpeed engine holds on this rank: the masters that are averaged, and the weights.

Only this file knows DeepSpeed's optimizers, and what each calls its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_ema import _tracking
from fused_ema.hooks import required

TITLE = "fused_ema.hooks.deepspeed.EngineEMA"


@dataclass(frozen=True)
class Piece:
    """A run of a parameter's elements that lies in one of this rank's masters.

    Attributes:
        master: Its index.
        start: The run's first element there.
        offset: The run's first element in the parameter, flattened.
        numel: Its length. Never padding.
    """

    master: int
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Param:
    """A parameter of the model.

    Attributes:
        names: Several where it is tied.
        tensor: The model's, of ZeRO-3 empty between its uses.
        is_trained: Whether the engine's optimizer has it, on whatever rank.
        pieces: What of it this rank's masters hold.
    """

    names: tuple[str, ...]
    tensor: Tensor
    is_trained: bool
    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> torch.Size:
        """The whole parameter's."""
        return shape_of(self.tensor)


def shape_of(tensor: Tensor) -> torch.Size:
    """A parameter's whole shape, also where ZeRO-3 has it empty."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


class Whole:
    """Without ZeRO each rank has every master. In fp32 the weights are their own masters."""

    is_sharded = False

    def __init__(self, engine: Any, groups: Sequence[Sequence[Tensor]], one_a_param: bool) -> None:
        self._optimizer = engine.optimizer
        self._groups = groups
        self.one_a_param = one_a_param

    def masters(self) -> list[Tensor]:
        """In an order that doesn't change; the tensors may."""
        if not self.one_a_param:
            return list(self._optimizer.fp32_groups_flat)
        groups = getattr(self._optimizer, "fp32_groups", self._groups)
        return [master for group in groups for master in group]

    def weights(self) -> list[Tensor]:
        """What the forward reads, or is gathered from: one for each master, of its shape."""
        if not self.one_a_param:
            return list(self._optimizer.fp16_groups_flat)
        return [param for group in self._groups for param in group]

    def pieces(self) -> Iterator[tuple[Tensor, Piece]]:
        """Each trained parameter of which this rank's masters hold something, with what."""
        if self.one_a_param:
            for i, param in enumerate(self.weights()):
                yield param, Piece(i, 0, 0, param.numel())
            return
        for i, (flat, params) in enumerate(zip(self.weights(), self._groups, strict=True)):
            yield from _cut(i, flat, params, 0, flat.numel())

    def trained(self) -> list[Tensor]:
        """The parameters that the optimizer has, on whatever rank."""
        return [param for group in self._groups for param in group]

    def local(self, param: Tensor) -> tuple[int, Tensor]:
        """What this rank holds of the weights of any parameter: an offset, and flat values."""
        return 0, param.detach().reshape(-1)

    def is_closed(self) -> bool:
        """Whether the engine's destroy() can be seen to have run."""
        return False

    def release(self) -> None:
        """To be called before weights are read or written: drops what was made of them."""

    def spread(self) -> None:
        """To be called once they are written: brings them to where the forward reads them."""


class Partitions(Whole):
    """ZeRO-1 and 2: a master is this rank's part of a group's flat weights, whole on each rank."""

    is_sharded = True

    def __init__(self, engine: Any, names: tuple[str, str, str, str]) -> None:
        optimizer = engine.optimizer
        self._masters, self._flats, self._parts, groups = (getattr(optimizer, n) for n in names)
        super().__init__(engine, groups, one_a_param=False)
        self._process_groups = optimizer.real_dp_process_group
        self._ranks = [dist.get_rank(group) for group in self._process_groups]

    def masters(self) -> list[Tensor]:
        return list(self._masters)

    def weights(self) -> list[Tensor]:
        return [parts[rank] for parts, rank in zip(self._parts, self._ranks, strict=True)]

    def pieces(self) -> Iterator[tuple[Tensor, Piece]]:
        for i, (flat, own) in enumerate(zip(self._flats, self.weights(), strict=True)):
            yield from _cut(i, flat, self._groups[i], self._ranks[i] * own.numel(), own.numel())

    def is_closed(self) -> bool:
        own = [param for param, _ in self.pieces()]
        return bool(own) and all(getattr(param, "_hp_mapping", None) is None for param in own)

    def spread(self) -> None:
        # As after each step.
        required("deepspeed.runtime.utils", "deepspeed", "deepspeed").all_gather_dp_groups(
            groups_flat=self._flats,
            partitioned_param_groups=self._parts,
            dp_process_group=self._process_groups,
            start_alignment_factor=self._optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=self._optimizer.allgather_bucket_size,
        )


class Shards(Whole):
    """ZeRO-3: a rank holds its shard of each parameter and of its master, padded to equal length.

    In fp32 the shards are their own masters.
    """

    is_sharded = True

    def __init__(self, engine: Any) -> None:
        super().__init__(engine, engine.optimizer.fp16_groups, one_a_param=False)

    def masters(self) -> list[Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def weights(self) -> list[Tensor]:
        return list(self._optimizer.fp16_partitioned_groups_flat)

    def pieces(self) -> Iterator[tuple[Tensor, Piece]]:
        for i, group in enumerate(self._groups):
            start = 0
            for param in group:
                offset, values = self.local(param)
                yield param, Piece(i, start, offset, values.numel())
                start += param.ds_tensor.ds_numel  # type: ignore[attr-defined]

    def local(self, param: Any) -> tuple[int, Tensor]:
        shard = param.ds_tensor
        offset = dist.get_rank(param.ds_process_group) * shard.ds_numel
        numel = max(0, min(shard.ds_numel, param.ds_numel - offset))
        return offset, shard.detach().narrow(0, 0, numel)

    def is_closed(self) -> bool:
        hook = self._optimizer.parameter_offload.fwd_pre_hook
        return hook.id not in (hook.hooks_dict_ref() or ())

    def release(self) -> None:
        # Whatever is whole at the moment, small parameters that stay so included: the next forward
        # gathers it from the shards.
        self._optimizer.checkpoint_event_prologue()


def _cut(
    master: int, flat: Tensor, params: Sequence[Tensor], begin: int, numel: int
) -> Iterator[tuple[Tensor, Piece]]:
    """What of these parameters, which are views of a flat tensor, lies in a part of it."""
    for param in params:
        start, rest = divmod(param.data_ptr() - flat.data_ptr(), flat.element_size())
        if param.numel() == 0:
            continue
        if rest or not 0 <= start <= flat.numel() - param.numel() or not param.is_contiguous():
            raise ValueError(
                f"{TITLE}: a parameter of shape {list(param.shape)} isn't in the engine's flat "
                "weights any more; make it right after deepspeed.initialize(), and bring back what "
                "was offloaded (engine.reload_states())"
            )
        first, end = max(start, begin), min(start + param.numel(), begin + numel)
        if first < end:
            yield param, Piece(master, first - begin, first - start, end - first)


def held_by(engine: Any) -> Whole:
    """What an engine holds on this rank.

    Raises:
        TypeError: Not an engine.
        ValueError: One that isn't served; says which, and what to do.
    """
    runtime = required("deepspeed.runtime.engine", "deepspeed", "deepspeed >= 0.19")
    if not isinstance(engine, runtime.DeepSpeedEngine):
        raise TypeError(
            f"{TITLE}: engine is a {type(engine).__name__}; pass the engine that "
            "deepspeed.initialize() or accelerator.prepare() returned"
        )
    if problem := _refusal(engine):
        raise ValueError(f"{TITLE}: {problem}")
    optimizer = engine.optimizer
    if optimizer is engine.basic_optimizer:
        groups = [group["params"] for group in optimizer.param_groups]
        return Whole(engine, groups, one_a_param=True)
    name = type(optimizer).__name__
    if name == "FP16_UnfusedOptimizer":
        return Whole(engine, optimizer.fp16_groups, one_a_param=True)
    if name == "FP16_Optimizer":
        return Whole(engine, optimizer.fp16_groups, one_a_param=False)
    if name == "DeepSpeedZeroOptimizer_Stage3":
        return Shards(engine)
    return Partitions(engine, _PARTITIONS[name])


# Of each optimizer of ZeRO-1 and 2: this rank's masters, the flat weights, those by rank, and the
# parameters, all by group.
_PARTITIONS = {
    "DeepSpeedZeroOptimizer": (
        *("single_partition_of_fp32_groups", "bit16_groups_flat"),
        *("parallel_partitioned_bit16_groups", "bit16_groups"),
    ),
    "BF16_Optimizer": (
        *("fp32_groups_flat_partition", "bf16_groups_flat"),
        *("bf16_partitioned_groups", "bf16_groups"),
    ),
}
_SERVED = {
    *("FP16_Optimizer", "FP16_UnfusedOptimizer", "DeepSpeedZeroOptimizer_Stage3"),
    *_PARTITIONS,
}


def _refusal(engine: Any) -> str:
    """Why an engine isn't served; empty where it is."""
    if type(engine).__name__ == "PipelineEngine" or engine.pipeline_parallelism:
        return (
            "the engine runs a pipeline, of which each rank holds other layers, which isn't "
            "served; make a fused_ema.Plan of each rank's masters"
        )
    if type(engine).__name__ == "DeepSpeedHybridEngine":
        return "the engine is hybrid and keeps a second form of its weights, which isn't served"
    optimizer = engine.optimizer
    if optimizer is None or engine.basic_optimizer is None:
        return (
            "the engine has no optimizer, so there are no steps to average after; give "
            "deepspeed.initialize() one, or average with fused_ema.EMAManager where you train"
        )
    name = type(optimizer).__name__
    if optimizer is not engine.basic_optimizer and name not in _SERVED:
        return (
            f"the engine's optimizer is a {name}, which isn't served; choose a configuration that "
            f"gives one of {', '.join(sorted(_SERVED))}"
        )
    if engine.has_moe_layers:
        return "the engine's model has experts (MoE), whose partitions aren't served"
    config = engine._config.zero_config
    if engine.mp_world_size > 1 or engine.autotp_size() > 1:
        return "the engine's model is tensor parallel, which isn't served"
    if engine.zero_nvme_offload_optimizer() or getattr(optimizer, "params_in_nvme_and_cpu", False):
        return "the engine offloads to NVMe, where masters have no memory; offload to the CPU"
    if config.zero_hpz_partition_size > 1 or config.zero_quantized_nontrainable_weights:
        return "the engine keeps second or quantised copies of its weights, which isn't served"
    return ""


def params_of(engine: Any, held: Whole) -> list[Param]:
    """The model's parameters, each once, in the model's order."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for member in _tracking.read(engine.module).members:
        if not member.is_buffer:
            names.setdefault(id(member.tensor), []).append(member.name)
            tensors[id(member.tensor)] = member.tensor
    pieces: dict[int, list[Piece]] = {}
    for param, piece in held.pieces():
        pieces.setdefault(id(param), []).append(piece)
    trained = {id(param) for param in held.trained()}
    if strangers := len(trained - tensors.keys()):
        raise ValueError(
            f"{TITLE}: the engine's optimizer has {strangers} parameters that its model doesn't "
            "have, and so no name for them; give deepspeed.initialize() the model's own"
        )
    return [
        Param(tuple(names[key]), tensor, key in trained, tuple(pieces.get(key, ())))
        for key, tensor in tensors.items()
    ]


def stand_in(masters: Mapping[str, Tensor], model: nn.Module) -> nn.Module:
    """A module whose parameters are these tensors and whose buffers are the model's, by its names.

    The buffers stay the model's: its modules' dicts are shared, so what they assign anew is seen.
    """
    found = _without_parameters(model, {})
    found.__dict__["_parameters"] = dict(masters)
    return found


def _without_parameters(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    twin = known[id(module)] = nn.Module.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = {}
    twin.__dict__["_modules"] = {
        key: None if child is None else _without_parameters(child, known)
        for key, child in module._modules.items()
    }
    return twin
