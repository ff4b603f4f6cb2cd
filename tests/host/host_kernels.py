"""The CUDA kernels' own code on this processor: built with g++, called, and checked.

As a script it checks a library that has been built, so that a wrong one may crash by itself:
python host_kernels.py LIBRARY [averages]
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

import fused_ema
from bench.gpu import c_kernels
from bench.gpu.c_kernels import FORMS
from fused_ema.ops import Form
from fused_ema.testing import (
    DTYPE_PAIRS,
    EDGE_SIZES,
    assert_bits_equal,
    bits_of,
    dtype_name,
    random_values,
    reference_update,
    update_tolerance,
)

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SPANS_A_LAUNCH = 1019  # That fit 32,764 bytes of kernel arguments.
AVERAGES_SPANS_A_LAUNCH = 582  # The same of four averages and their params.
# More than two launches of kernel arguments: a warp tile or less each, with empty ones among them.
MANY_SIZES = tuple(i * 37 % 131 for i in range(2 * SPANS_A_LAUNCH + 5))
LISTS = {"edge sizes": EDGE_SIZES, "many": MANY_SIZES, "none": (), "empty": (0, 0)}
# Elements by which ema and param start past a 64-byte boundary. Sixteen bytes are 2 to 8 elements.
OFFSETS = ((0, 0), (1, 1), (3, 3), (8, 0), (0, 1), (1, 0), (3, 7), (5, 2))
MOMENTA = (0.0, 2e-4, 0.25, 0.4999999, 0.5, 0.75, 1.0)


# ---- building


# In the place of update_averages.cu, half of all that g++ has to compile.
NO_AVERAGES = """#include "launch.h"
fused_ema::cuda::Status fused_ema::cuda::launch_update_averages(
    DtypePair, Form, const AveragesWork&, Momenta, Stream) { return 1; }
"""


def sources_of(folder: Path, csrc: Path, averages: bool) -> list[Path]:
    """Of the library that HostKernels calls; without averages these can't be called."""
    sources = [csrc / "cuda" / f"{name}.cu" for name in ("update", "swap", "copy")]
    sources += [csrc / "tiles.cpp", csrc / "cuda" / "c_api.cpp"]
    if averages:
        return [*sources, csrc / "cuda" / "update_averages.cu"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "no_averages.cpp").write_text(NO_AVERAGES)
    return [*sources, folder / "no_averages.cpp"]


def build(
    folder: Path,
    csrc: Path = CSRC,
    strict: bool = True,
    averages: bool = True,
    sources: Sequence[Path] = (),
) -> Path:
    """Compiles files of csrc/cuda/, with the stand-in header, to a library in the folder."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    options = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"]
    # That a thread without a vector neither loads nor stores one is more than g++ can see.
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
    options += warnings if strict else ["-w"]
    if platform.machine() in ("x86_64", "AMD64"):
        options += ["-mfma"]  # Otherwise each FMA is a call of libm: the same bits, slowly.
    folder.mkdir(parents=True, exist_ok=True)
    objects, jobs = [], []
    for source in sources or sources_of(folder, csrc, averages):
        objects.append(str(folder / f"{source.name}.o"))
        command = [*compiler, *options, f"-I{HERE}", f"-I{csrc / 'cuda'}", "-x", "c++"]
        command += ["-c", str(source), "-o", objects[-1]]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    errors = [job.communicate()[1] for job in jobs]
    if any(job.returncode for job in jobs):
        raise RuntimeError("".join(errors))
    library = folder / "libhost_kernels.so"
    subprocess.run([*compiler, "-shared", *objects, "-o", str(library)], check=True)
    return library


# ---- calling


@dataclass(frozen=True)
class Operation(c_kernels.Operation):
    """What is done with a list of pairs; `momentum_in_memory`: by a kernel that reads it there."""

    momentum_in_memory: bool = False


class HostKernels(c_kernels.Kernels):
    """The built library."""

    def __init__(self, library: Path) -> None:
        super().__init__(library)
        # Of the stand-in header.
        self._num_launches = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "num_launches")

    def do(
        self, operation: Operation, a: Sequence[Tensor], b: Sequence[Tensor], by_table: bool
    ) -> int:
        """Runs one operation on pairs of one dtype pair; returns the number of launches."""
        momentum = None
        if operation.momentum_in_memory:
            momentum = torch.tensor(operation.momentum, dtype=torch.float64)
            operation = replace(operation, momentum=-1.0)  # Not to be read.
        self._num_launches.value = 0
        self.run(operation, self.prepare(a, b, by_table), device_momentum=momentum)
        return self._num_launches.value

    def do_averages(
        self,
        form: Form,
        momenta: Sequence[float],
        emas: Sequence[Sequence[Tensor]],
        params: Sequence[Tensor],
        by_table: bool,
    ) -> int:
        """Updates several averages, by a table with the momenta in memory; returns the launches."""
        there = torch.tensor(momenta, dtype=torch.float64) if by_table else None
        self._num_launches.value = 0
        prepared = self.prepare_averages(emas, params, by_table)
        self.run_averages(form, momenta, prepared, device_momenta=there)
        return self._num_launches.value


# ---- checking


def any_bits(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Values of any bits, NaNs with payloads among them."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(
        -(2**63), 2**63 - 1, (size // (8 // dtype.itemsize) + 1,), generator=generator
    )
    return raw.view(dtype)[:size].clone()


def lay_out(sizes: Sequence[int], offset: int) -> tuple[list[int], int]:
    """Where each tensor of a list begins in one buffer, with room around it; and its length."""
    starts, end = [], 0
    for size in sizes:
        starts.append(-(-end // 64) * 64 + offset)
        end = starts[-1] + size + 8
    return starts, end + 64


def views(buffer: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
    """The tensors of a list in their buffer."""
    return [buffer[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def expect(operation: Operation, ema: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Does the operation with the CPU kernels, or for what these do otherwise in torch's words."""
    m = operation.momentum
    if operation.momentum_in_memory and m in (0.0, 1.0):
        # No update, and a copy, to the last bit.
        for e, p in zip(ema, params, strict=True):
            if m == 1.0:
                e.copy_(p)
    elif operation.kind == "swap":
        fused_ema.swap_(ema, params)
    elif operation.kind == "copy to ema":
        fused_ema.copy_(ema, params)
    elif operation.kind == "copy to params":
        fused_ema.copy_(params, ema)
    elif operation.form == "mul_add" and ema and ema[0].dtype in (torch.bfloat16, torch.float16):
        # On the CPU torch rounds alpha to the dtype, and so do our kernels; on CUDA neither does.
        # A double holds the product exactly and the sum all but exactly, so it is one FMA.
        alpha, decay = (torch.tensor(x, dtype=torch.float32) for x in (m, 1.0 - m))
        for e, p in zip(ema, params, strict=True):
            decayed = (e.float() * decay).to(e.dtype).double()
            e.copy_((alpha.double() * p.double() + decayed).float())
    elif operation.form == "two_products":
        for e, p in zip(ema, params, strict=True):  # Torch's own, which no FMA can have crept into.
            e.copy_((1.0 - m) * e + m * p)
    else:
        fused_ema.ops._update(ema, params, m, operation.form)


def check(
    host: HostKernels,
    operation: Operation,
    pair: tuple[torch.dtype, torch.dtype],
    sizes: Sequence[int],
    offsets: tuple[int, int],
    by_table: bool,
) -> int:
    """Runs an operation and compares all memory, also around the tensors; returns the elements."""
    where = f"{operation}, {'/'.join(map(dtype_name, pair))}, offsets {offsets}, table {by_table}"
    finite = operation.kind == "update"
    buffers, lists, wanted, wanted_lists = [], [], [], []
    for side, (dtype, offset) in enumerate(zip(pair, offsets, strict=True)):
        starts, length = lay_out(sizes, offset)
        values = (random_values if finite else any_bits)(length, dtype, seed=side)
        buffers.append(values)
        lists.append(views(values, starts, sizes))
        wanted.append(values.clone())
        wanted_lists.append(views(wanted[-1], starts, sizes))
    before = [torch.cat(tensors) if tensors else torch.empty(0) for tensors in wanted_lists]
    expect(operation, *wanted_lists)
    launches = host.do(operation, *lists, by_table)
    for name, got, want in zip(("ema", "param"), buffers, wanted, strict=True):
        if finite:
            assert_bits_equal(got, want, f"{name}, {where}")
        else:
            assert torch.equal(bits_of(got), bits_of(want)), f"{name}, {where}: other bits"
    if finite and sizes:
        right = reference_update(*before, operation.momentum)
        error = (torch.cat(lists[0]).double() - right).abs()
        bound = update_tolerance(*before, operation.momentum, operation.form)
        assert (error <= bound).all(), f"{where}: {error.max()} off the float64 reference"
    parts = (
        [sizes]
        if by_table
        else [sizes[i : i + SPANS_A_LAUNCH] for i in range(0, len(sizes), SPANS_A_LAUNCH)]
    )
    assert launches == sum(any(part) for part in parts), f"{where}: {launches} launches"
    return sum(sizes)


def check_averages(
    host: HostKernels,
    form: Form,
    count: int,
    pair: tuple[torch.dtype, torch.dtype],
    sizes: Sequence[int],
    offsets: Sequence[int],
    by_table: bool,
) -> None:
    """Updates several averages at once, and compares all memory with one update after the other.

    Args:
        host: The library.
        form: Of the update.
        count: How many averages.
        pair: Dtypes of emas and params.
        sizes: Of the tensors.
        offsets: Elements by which the tensors of each average, and then the params, start past a
            64-byte boundary.
        by_table: Tiles in a table and momenta in memory; or both as arguments.
    """
    where = f"{count} averages by {form}, {pair}, offsets {offsets}, table {by_table}"
    momenta = (0.25, 0.75, 2e-4, 0.5)[:count]
    layouts = [lay_out(sizes, offset) for offset in offsets]
    *emas, params = (
        random_values(length, pair[0] if side < count else pair[1], seed=side)
        for side, (_, length) in enumerate(layouts)
    )
    *starts, params_at = (its for its, _ in layouts)
    wanted, param_lists = [ema.clone() for ema in emas], views(params, params_at, sizes)
    for ema, its, momentum in zip(wanted, starts, momenta, strict=True):
        expect(Operation("update", form, momentum), views(ema, its, sizes), param_lists)
    before = params.clone()
    lists = [views(ema, its, sizes) for ema, its in zip(emas, starts, strict=True)]
    launches = host.do_averages(form, momenta, lists, param_lists, by_table)
    for k, (got, want) in enumerate(zip(emas, wanted, strict=True)):
        assert_bits_equal(got, want, f"average {k}, {where}")
    assert torch.equal(bits_of(params), bits_of(before)), f"{where}: params were written"
    parts = (
        [sizes]
        if by_table
        else [
            sizes[i : i + AVERAGES_SPANS_A_LAUNCH]
            for i in range(0, len(sizes), AVERAGES_SPANS_A_LAUNCH)
        ]
    )
    assert launches == sum(any(part) for part in parts), f"{where}: {launches} launches"


def operations(momenta: Iterable[float] = MOMENTA) -> Iterator[Operation]:
    """Every operation, updates in each form with each momentum."""
    for form, momentum, in_memory in product(FORMS, momenta, (False, True)):
        yield Operation("update", form, momentum, in_memory)
    for kind in ("swap", "copy to ema", "copy to params"):
        yield Operation(kind)


def check_quickly(host: HostKernels, averages: bool) -> None:
    """What finds any of the planted faults, in a second or two; those of several averages too."""
    sizes = (0, 1, 7, 15, 16, 17, 63, 129, 511, 512, 513, 1025, 4097, 8193, 12345)
    pairs = [DTYPE_PAIRS[i] for i in (0, 1, 4)]
    for operation in operations((0.25, 0.75)):
        for pair, offsets, by_table in product(pairs, OFFSETS[:3] + OFFSETS[4:5], (True, False)):
            check(host, operation, pair, sizes, offsets, by_table)
    for by_table in (True, False):
        check(host, Operation("swap"), DTYPE_PAIRS[0], MANY_SIZES, (0, 0), by_table)
        for offsets in ((0,) * 4, (0, 0, 1, 0)) if averages else ():
            check_averages(host, "lerp", 3, DTYPE_PAIRS[1], sizes, offsets, by_table)


def verdict_on(csrc: Path, folder: Path, averages: bool) -> str:
    """Builds these sources and checks them in a process of their own; what it said, or nothing."""
    library = build(folder, csrc, strict=False, averages=averages)
    path = os.pathsep.join([str(CSRC.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, __file__, str(library), *["averages"] * averages],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if run.returncode < 0:
        return f"crashed with signal {-run.returncode}"
    assert run.returncode == 0 or run.stderr.startswith("found: "), run.stderr
    return run.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        check_quickly(HostKernels(Path(sys.argv[1])), "averages" in sys.argv)
    except AssertionError as found:
        sys.exit(f"found: {found}")
