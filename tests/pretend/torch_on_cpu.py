"""Torch's CUDA operations, done by its CPU kernels on the same memory (see runtime.cpp).

To be imported before anything is done on the pretended GPU. Operations that are captured are noted
and run at each replay, like kernels of this project.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings

import torch
import torch.autograd.profiler
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils import _pytree as pytree

RUNTIME = ctypes.CDLL(os.environ["PRETEND_RUNTIME"])
# They make tensors, or other views of one: nothing that a kernel does.
WITHOUT_KERNEL = {
    *("empty.memory_format", "empty_strided", "as_strided", "view", "view.dtype", "unfold"),
    *("resize_", "_resize_output_", "_reshape_alias", "set_", "set_.source_Storage"),
    *("set_.source_Storage_storage_offset", "set_.source_Tensor", "record_stream", "is_set_to"),
    *("is_pinned", "_pin_memory", "_lazy_clone"),
}
HALF = (torch.float16, torch.bfloat16)
num_operations = 0
_library = torch.library.Library("aten", "IMPL")
_generators: dict[int, tuple[torch.Generator, torch.Generator]] = {}
_captured: list[object] = []


@ctypes.CFUNCTYPE(None, ctypes.c_long)
def _replay(number: int) -> None:
    with torch._C._AutoDispatchBelowAutograd():
        _captured[number]()


def note(work) -> None:
    """Leaves work to the graph that is being captured."""
    _captured.append(work)
    stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(0))
    RUNTIME.pretend_enqueue(stream, _replay, ctypes.c_long(len(_captured) - 1))


# ---- the same memory as a CPU tensor, and back


def on_cpu(value):
    """What the CPU's operation gets for an argument."""
    if isinstance(value, torch.Generator) and value.device.type == "cuda":
        if id(value) not in _generators:
            seeded = torch.Generator().manual_seed(value.initial_seed())
            _generators[id(value)] = (value, seeded)  # Kept, so that no other gets its id.
        return _generators[id(value)][1]
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if not isinstance(value, Tensor) or value.device.type != "cuda":
        return value
    storage = value.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    alias = torch.empty(0, dtype=value.dtype)
    alias.set_(flat, value.storage_offset(), value.shape, value.stride())
    if value.is_conj():
        alias = alias.conj()
    return torch._neg_view(alias) if value.is_neg() else alias


def on_cuda(value):
    """A new tensor on the pretended GPU with a result's values."""
    if not isinstance(value, Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    on_cpu(made).copy_(value)
    return made


# ---- what the CPU does otherwise, or not at all


def rms_norm(x, shape, weight, eps):
    """The values of `_fused_rms_norm`, and what its backward needs."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    inverse = (x.float().square().mean(tuple(range(-len(shape), 0)), keepdim=True) + eps).rsqrt()
    normed = (x.float() * inverse).to(x.dtype)
    return (normed if weight is None else normed * weight), inverse


def rms_norm_backward(grad, x, shape, inverse, weight, mask):
    """The gradients of x and weight."""
    last = tuple(range(-len(shape), 0))
    normed = x.float() * inverse
    scaled = grad.float() * weight.float()
    of_x = inverse * (scaled - normed * (scaled * normed).mean(last, keepdim=True))
    of_weight = (grad.float() * normed).sum(tuple(range(x.dim() - len(shape))))
    return of_x.to(x.dtype), of_weight.to(weight.dtype)


ONLY_ON_CUDA = {"_fused_rms_norm": rms_norm, "_fused_rms_norm_backward": rms_norm_backward}


def compute(op, args, kwargs):
    """The CPU's operation, but `mul_().add_(alpha=)` in 16-bit dtypes as CUDA has it.

    There both factors stay in float32, and the sum is one FMA.
    """
    name = f"{op._schema.name}.{op._overloadname}"
    if ours := ONLY_ON_CUDA.get(op._schema.name.removeprefix("aten::")):
        return ours(*args, **kwargs)
    if name == "aten::add_.Tensor" and _are_half(args[:2]):
        _add_half(args[0], args[1], kwargs.get("alpha", 1))
        return args[0]
    if name == "aten::_foreach_add_.List" and _are_half(args[0]):
        for e, p in zip(args[0], args[1], strict=True):
            _add_half(e, p, kwargs.get("alpha", 1))
        return None
    if name == "aten::_foreach_mul_.Scalar" and _are_half(args[0]):
        factor = torch.tensor(float(args[1]), dtype=torch.float32)
        for e in args[0]:
            e.copy_(e.float() * factor)
        return None
    # A number that torch has wrapped comes unwrapped. It is a double, and promotes nothing.
    wrapped = {int: torch.int64, float: torch.float64}
    given = zip(args, op._schema.arguments, strict=False)
    args = [
        torch.tensor(value, dtype=wrapped[type(value)])
        if type(value) in wrapped and str(a.type) == "Tensor"
        else value
        for value, a in given
    ]
    return op(*args, **kwargs)


def _are_half(tensors) -> bool:
    return len(tensors) > 0 and all(isinstance(t, Tensor) and t.dtype in HALF for t in tensors)


def _add_half(ema: Tensor, param: Tensor, alpha: float) -> None:
    factor = torch.tensor(float(alpha), dtype=torch.float32).double()
    ema.copy_((factor * param.double() + ema.double()).float())


# ---- the operations


def implementation(op):
    """What is registered for CUDA in place of torch's kernel."""
    schema = op._schema
    position = {argument.name: i for i, argument in enumerate(schema.arguments)}
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    # By position of what is returned: the argument that it is, if it is one.
    returned = [
        next(
            (
                a.name
                for a in schema.arguments
                if r.alias_info
                and a.alias_info
                and a.alias_info.before_set == r.alias_info.before_set
            ),
            None,
        )
        for r in schema.returns
    ]

    def run(*args, **kwargs):
        global num_operations
        num_operations += 1
        kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
        cpu_args, cpu_kwargs = pytree.tree_map(on_cpu, (args, kwargs))

        def given(name, args=args, kwargs=kwargs):
            i = position[name]
            return args[i] if i < len(args) else kwargs.get(name)

        is_captured = torch._C._cuda_isCurrentStreamCapturing()
        if is_captured and written:
            note(lambda: compute(op, cpu_args, cpu_kwargs))
            results = [given(name) for name in returned]
        else:
            made = compute(op, cpu_args, cpu_kwargs)
            for name in written:  # An `out` that was resized has left the memory.
                before, after = given(name), given(name, cpu_args, cpu_kwargs)
                if isinstance(before, Tensor) and before.shape != after.shape:
                    before.resize_(after.shape)
                    on_cpu(before).copy_(after)
            made = (made,) if len(returned) == 1 else tuple(made or ())
            results = [
                given(name) if name else pytree.tree_map(on_cuda, value)
                for name, value in zip(returned, made, strict=True)
            ]
            if is_captured:
                # Not the results themselves, which would keep their autograd graph alive.
                memory = pytree.tree_map(on_cpu, results)
                note(lambda: _rewrite(memory, compute(op, cpu_args, cpu_kwargs)))
        return None if not returned else results[0] if len(returned) == 1 else tuple(results)

    return run


def _rewrite(results, values) -> None:
    tensors = (
        [t for t in pytree.tree_leaves(x) if isinstance(t, Tensor)] for x in (results, values)
    )
    for result, value in zip(*tensors, strict=True):
        result.copy_(value)


def copy_(self, src, non_blocking=False):
    """One way, also between the devices."""
    to, source = on_cpu(self), on_cpu(src)
    if self.device != src.device:
        RUNTIME.pretend_copy()
        if not non_blocking:
            _wait()
    if torch._C._cuda_isCurrentStreamCapturing():
        note(lambda: to.copy_(source))
    else:
        to.copy_(source)
    return self


def item(self):
    """A tensor's only value, for which the host waits."""
    _wait()
    return on_cpu(self).item()


def _wait() -> None:
    if torch._C._cuda_isCurrentStreamCapturing():
        raise RuntimeError("operation not permitted when stream is capturing")
    if torch.cuda.get_sync_debug_mode() == 2:
        raise RuntimeError("called a synchronizing CUDA operation")


def install() -> None:
    """Registers all of them."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    others = ("CPU", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full.partition("::")
        if namespace != "aten" or name in WITHOUT_KERNEL or not has_kernel(full, "CUDA"):
            continue
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        makes_a_view = op is not None and any(
            r.alias_info and not r.alias_info.is_write for r in op._schema.returns
        )
        has_other = name in ONLY_ON_CUDA or any(has_kernel(full, key) for key in others)
        if op is not None and not makes_a_view and has_other:
            _library.impl(name, implementation(op), "CUDA", allow_override=True)
    _library.impl("copy_", copy_, "CUDA", allow_override=True)
    _library.impl("_local_scalar_dense", item, "CUDA", allow_override=True)
    for enable in ("flash_sdp", "mem_efficient_sdp", "cudnn_sdp"):
        getattr(torch.backends.cuda, f"enable_{enable}")(False)
    torch.cuda._sleep = lambda cycles: None
    torch.autograd.profiler.profile = Profile


# ---- the profiler


class Event:
    """As far as it is asked for."""

    def __init__(self, name: str, device_type: DeviceType) -> None:
        self._name = name
        self._device_type = device_type

    def name(self) -> str:
        return self._name

    def device_type(self) -> DeviceType:
        return self._device_type


class Profile:
    """Counts what runtime.cpp and the operations above count."""

    def __init__(self, **options) -> None:
        self.kineto_results = self
        self._counted: list[list[int]] = []

    def _count(self) -> None:
        counts = (ctypes.c_long * 3)()
        RUNTIME.pretend_counts(counts)
        self._counted.append([*counts, num_operations])

    def __enter__(self) -> Profile:
        self._count()
        return self

    def __exit__(self, *error) -> None:
        torch.cuda.synchronize()
        self._count()

    def events(self) -> list[Event]:
        """Those in between."""
        launches, copies, waits, operations = (
            after - before for before, after in zip(*self._counted, strict=True)
        )
        return [
            *[Event("void fused_ema::cuda::tile_loop_kernel<>()", DeviceType.CUDA)] * launches,
            *[Event("void at::native::a_kernel<>()", DeviceType.CUDA)] * operations,
            *[Event("Memcpy HtoD (Pinned -> Device)", DeviceType.CUDA)] * copies,
            *[Event("cudaDeviceSynchronize", DeviceType.CPU)] * waits,
        ]


if torch.version.cuda is None:
    sys.exit(f"torch {torch.__version__} was built without CUDA; this needs one with it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Of each operation that is overridden.
    install()
