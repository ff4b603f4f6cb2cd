"""python -m bench variants: the CUDA kernels built in other ways, against the kernels as they are.

A variant is a change to the text of csrc/: other tiles, other cache hints, another grid, other
machinery. Each is built into a library of its own, compared bit for bit with the unchanged build,
and timed in turn with it on lists of the benchmark. bench/NOTES.md says what was predicted of each
and what came of it. Where there is no GPU, `--build-only` tells what the compiler made of them. It
leaves the libraries in its folder, each with what it was built from, and `--libraries` of that
folder runs them on a GPU, also on another machine, without nvcc.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench import cases, providers, report, timer
from bench.gpu.c_kernels import Kernels, Operation
from bench.providers import Call, Lists
from fused_ema.__main__ import number
from fused_ema.testing import bits_of

_ROOT = Path(__file__).parents[2]
_SOURCES = (
    *("cuda/update.cu", "cuda/update_averages.cu", "cuda/swap.cu", "cuda/copy.cu"),
    *("cuda/c_api.cpp", "tiles.cpp"),
)
_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-shared", "-Xptxas", "-v")
_LIBRARY, _FACTS = "libvariant.so", "facts.json"
BASELINE = "as it is"
_SECONDS = 40.0
_MAX_ELEMENTS = 2**29
MOMENTUM = 0.125

# ---- the variants

Edit = tuple[str, str, str]
"""A file of csrc/, a text that stands there once, and what it becomes."""


_UPDATE_WALK = "Walk kWalk{256, 1, sizeof(A) == 8 ? 4 : 6};"
_SWAP_WALK = "Walk kWalk{512, 2, 2};"
_LEAST = "kAligned || kIsNarrow || kCount > 2 ? 1 : 2"
_COPY_WALK = "Walk kWalk = sizeof(A) == sizeof(B) ? Walk{256, 1, 8} : Walk{256, 2, 5};"


def _walk(threads: int, step: int, blocks: int) -> tuple[Edit, ...]:
    # Of every operation.
    new = f"Walk kWalk{{{threads}, {step}, {blocks}}};"
    # 2,048 threads an SM leave 32 registers each, too few for two vectors that move by element.
    least = "1" if threads * blocks == 2048 else _LEAST
    return _changes(
        ("cuda/loop.cuh", f"kLeast = {_LEAST};", f"kLeast = {least};"),
        ("cuda/update.cu", _UPDATE_WALK, new),
        ("cuda/swap.cu", _SWAP_WALK, new),
        ("cuda/copy.cu", _COPY_WALK, new),
    )


def _changes(*edits: Edit) -> tuple[Edit, ...]:
    return tuple(edit for edit in edits if edit[1] != edit[2])


def _tiles(block_vectors: int, warp_vectors: int = 128) -> tuple[Edit, ...]:
    return _changes(
        ("tiles.h", "kBlockTileVectors = 1024;", f"kBlockTileVectors = {block_vectors};"),
        ("tiles.h", "kWarpTileVectors = 128;", f"kWarpTileVectors = {warp_vectors};"),
    )


_LOAD = "copy_packet(&to, reinterpret_cast<const Vec<T, N>*>(from));"
_STORE = "copy_packet(reinterpret_cast<Vec<T, N>*>(to), &from);"


def _packets(name: str, access: str) -> Edit:
    # Another copy_packet, in which `access` moves the 16 bytes of `*from` to `*to`.
    text = f"""template <typename T, int N>
__device__ __forceinline__ void {name}(Vec<T, N>* to_vec, const Vec<T, N>* from_vec) {{
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Vec<T, N>) == sizeof(uint4)) {{
    uint4* to = reinterpret_cast<uint4*>(to_vec);
    const uint4* from = reinterpret_cast<const uint4*>(from_vec);
    {access}
    return;
  }}
#endif
  copy_packet(to_vec, from_vec);
}}

"""
    return "cuda/vec.cuh", "// kAligned: one access.", text + "// kAligned: one access."


def _loads(access: str) -> tuple[Edit, Edit]:
    renamed = _LOAD.replace("copy_packet", "load_packet")
    return _packets("load_packet", access), ("cuda/vec.cuh", _LOAD, renamed)


def _stores(access: str) -> tuple[Edit, Edit]:
    renamed = _STORE.replace("copy_packet", "store_packet")
    return _packets("store_packet", access), ("cuda/vec.cuh", _STORE, renamed)


def _load_instruction(qualifiers: str) -> str:
    return (
        f'asm volatile("ld.global{qualifiers}.v4.u32 {{%0, %1, %2, %3}}, [%4];"'
        ' : "=r"(to->x), "=r"(to->y), "=r"(to->z), "=r"(to->w) : "l"(from));'
    )


_STORE_STREAMING = "__stcs(to, *from);"

_PERSISTENT: tuple[Edit, ...] = (
    (
        "cuda/launch.cuh",
        "  config.gridDim.x = static_cast<uint32_t>(grid);",
        """  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const uint64_t resident =
      uint64_t{Op::kWalk.blocks_per_sm} * static_cast<uint32_t>(multiprocessors);
  config.gridDim.x = static_cast<uint32_t>(grid < resident ? grid : resident);""",
    ),
    (
        "cuda/loop.cuh",
        "    if (blockIdx.x < source.num_block_tiles) {\n"
        "      const TileOf<kCount> tile = source.block_tile(kShape, blockIdx.x);",
        """    uint32_t block = blockIdx.x;
    for (; block < source.num_block_tiles; block += gridDim.x) {
      const TileOf<kCount> tile = source.block_tile(kShape, block);""",
    ),
    (
        "cuda/loop.cuh",
        """      return;
    }
    constexpr uint32_t kWarps = Op::kWalk.threads / kWarpSize;
    const uint32_t index = (blockIdx.x - source.num_block_tiles) * kWarps + threadIdx.x / kWarpSize;
    if (index < source.num_warp_tiles) {""",
        """    }
    constexpr uint32_t kWarps = Op::kWalk.threads / kWarpSize;
    uint32_t index = (block - source.num_block_tiles) * kWarps + threadIdx.x / kWarpSize;
    for (; index < source.num_warp_tiles; index += gridDim.x * kWarps) {""",
    ),
)

_DEPENDENT: tuple[Edit, ...] = (
    (
        "cuda/launch.cuh",
        "  config.stream = static_cast<cudaStream_t>(stream);",
        """  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;""",
    ),
    # The table may be read early: no kernel writes it. Momentum and elements may not.
    (
        "cuda/loop.cuh",
        "    if (blockIdx.x < source.num_block_tiles) {\n"
        "      const TileOf<kCount> tile = source.block_tile(kShape, blockIdx.x);",
        """    cudaTriggerProgrammaticLaunchCompletion();
    if (blockIdx.x < source.num_block_tiles) {
      const TileOf<kCount> tile = source.block_tile(kShape, blockIdx.x);
      cudaGridDependencySynchronize();
      const Op op(args);
      if (op.is_idle) return;""",
    ),
    (
        "cuda/loop.cuh",
        "    if (index < source.num_warp_tiles) {",
        """    cudaGridDependencySynchronize();
    const Op op(args);
    if (op.is_idle) return;
    if (index < source.num_warp_tiles) {""",
    ),
    (
        "cuda/loop.cuh",
        "void run(const Source& source, const Op& op) {",
        """void run(
      const Source& source, const typename Op::Args& args) {""",
    ),
    (
        "cuda/loop.cuh",
        "  const Op op(args);\n  if (op.is_idle) return;\n  Loop<Op>::run(source, op);",
        "  Loop<Op>::run(source, args);",
    ),
)

# 16 bytes of the narrower side, so that a thread's part of the wider one is two accesses of which
# each leaves every other half of a sector to the other. Matters to mixed pairs alone.
_NARROW: tuple[Edit, ...] = (
    ("tiles.h", "kVectorBytes / first}", "kVectorBytes / last_of(first, others...)}"),
    (
        "tiles.h",
        "template <typename... Size>\nFUSED_EMA_HOST_DEVICE",
        "template <typename... Size>\n"
        "FUSED_EMA_HOST_DEVICE constexpr int last_of(int first, Size... others) {\n"
        "  int last = first;\n  ((last = others), ...);\n  return last;\n}\n"
        "template <typename... Size>\nFUSED_EMA_HOST_DEVICE",
    ),
    (
        "cuda/vec.cuh",
        "struct alignas(N * sizeof(T)) Vec {",
        "struct alignas(kVectorBytes) Vec {",
    ),
    (
        "cuda/vec.cuh",
        '  static_assert(sizeof(T) * N == sizeof(Packet), "a Vec moves in one access");\n',
        "",
    ),
    (
        "cuda/vec.cuh",
        "std::conditional_t<sizeof(T) * N == sizeof(uint4), uint4, uint2>",
        "uint4",
    ),
    (
        "cuda/vec.cuh",
        "  *reinterpret_cast<Packet*>(to) = *reinterpret_cast<const Packet*>(from);",
        """#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Vec<T, N>) / sizeof(Packet)); ++i) {
    reinterpret_cast<Packet*>(to)[i] = reinterpret_cast<const Packet*>(from)[i];
  }""",
    ),
)

_BULK: tuple[Edit, ...] = (
    ("cuda/loop.cuh", '#include "vec.cuh"', '#include "bulk.cuh"\n#include "vec.cuh"'),
    (
        "cuda/loop.cuh",
        "      run_body<true>(",
        """      if constexpr (kCount == 2) {
        if ((is_aligned<kVectorBytes / sizeof(T)>(static_cast<T*>(tile.sides[kSide])) && ...)) {
          run_bulk_tile<Op>(op, static_cast<T*>(tile.sides[kSide])...);
          return;
        }
      }
      run_body<true>(""",
    ),
)


_AHEAD: Edit = (
    "cuda/loop.cuh",
    "    if (blockIdx.x < source.num_block_tiles) {\n",
    """#if defined(__CUDA_ARCH__)
  constexpr uint32_t kAhead = 264;  // two rounds of an H200's multiprocessors
  if constexpr (sizeof(Source) == sizeof(TableSource<kCount>)) {
    if (threadIdx.x == 0 && blockIdx.x + kAhead < source.num_block_tiles) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(source.tiles + blockIdx.x + kAhead));
    }
  }
#endif
    if (blockIdx.x < source.num_block_tiles) {
""",
)

# Each vector of every side before the next one.
_ALTERNATE: Edit = (
    "cuda/loop.cuh",
    "    (load_side<kSide, kFull, kAligned>(op, of<kSide>(v), at, num_vectors, first, team_size),"
    " ...);",
    """#pragma unroll
    for (int u = 0; u < kStep; ++u) {
      const int i = first + u * team_size;
      (load_side<kSide, kFull, kAligned>(op, one_of(of<kSide>(v)[u]), at, num_vectors, i, 0), ...);
    }""",
)
_ONE_OF: Edit = (
    "cuda/loop.cuh",
    "template <typename Op, typename Types, typename Numbers>\nstruct LoopOver;",
    """template <typename V>
__device__ __forceinline__ V (&one_of(V& v))[1] {
  return reinterpret_cast<V(&)[1]>(v);
}

template <typename Op, typename Types, typename Numbers>
struct LoopOver;""",
)


@dataclass(frozen=True)
class Variant:
    """Another way to build the kernels.

    Attributes:
        name: What the table and `--variants` call it.
        edits: What becomes of the sources.
        on_hopper: It uses what compute capability 9.0 brought: it runs on no older GPU and on no
            processor (tests/host/), so it is measured last.
        by_table: Its tiles come from a plan's table, or from the kernel's arguments.
    """

    name: str
    edits: tuple[Edit, ...] = ()
    on_hopper: bool = False
    by_table: bool = True


VARIANTS: tuple[Variant, ...] = (
    Variant(BASELINE),
    Variant("256 threads in steps of 4", _walk(256, 4, 3)),
    Variant("256 threads in steps of 2", _walk(256, 2, 5)),
    Variant("512 threads in steps of 2", _walk(512, 2, 2)),
    Variant("512 threads in steps of 1", _walk(512, 1, 4)),
    Variant("1,024 threads in steps of 1", _walk(1024, 1, 2)),
    Variant("the same, table fetched ahead", (*_walk(1024, 1, 2), _AHEAD)),
    Variant("128 threads in steps of 2", _walk(128, 2, 10)),
    Variant("128 threads in steps of 1", _walk(128, 1, 16)),
    Variant("alternate loads", (_ALTERNATE, _ONE_OF)),
    Variant("half the tile", _tiles(512)),
    Variant("arguments, tiles of 4 KB", (*_walk(128, 2, 10), *_tiles(256)), by_table=False),
    Variant("arguments, tiles of 2 KB", (*_walk(128, 1, 16), *_tiles(128)), by_table=False),
    Variant("vectors of the narrow side", (*_NARROW, *_tiles(512, 64))),
    Variant("loads past L1", _loads(_load_instruction(".L1::no_allocate"))),
    Variant("loads evict first", _loads("*to = __ldcs(from);")),
    Variant("loads fetch 256 B", _loads(_load_instruction(".L2::256B"))),
    Variant("stores evict first", _stores(_STORE_STREAMING)),
    Variant("both evict first", (*_loads("*to = __ldcs(from);"), *_stores(_STORE_STREAMING))),
    Variant("persistent grid", _PERSISTENT),
    Variant("dependent launch", _DEPENDENT, on_hopper=True),
    Variant("bulk copies", (*_BULK, *_walk(256, 1, 4)), on_hopper=True),
)


def names() -> tuple[str, ...]:
    """Of all variants."""
    return tuple(variant.name for variant in VARIANTS)


def sources_of(variant: Variant) -> dict[str, str]:
    """The text of each file of csrc/, changed.

    Raises:
        ValueError: An edit's old text doesn't stand in its file exactly once.
    """
    csrc = _ROOT / "csrc"
    texts = {
        str(path.relative_to(csrc)): path.read_text()
        for path in sorted(csrc.rglob("*"))
        if path.is_file()
    }
    texts["cuda/bulk.cuh"] = (Path(__file__).parent / "bulk.cuh").read_text()
    for file, old, new in variant.edits:
        count = texts[file].count(old)
        if count != 1:
            raise ValueError(f"variant '{variant.name}': {file} has {count} times {old!r}")
        texts[file] = texts[file].replace(old, new)
    return texts


def write_sources(variant: Variant, folder: Path) -> Path:
    """Writes csrc/ into the folder, changed, and returns where it is."""
    csrc = folder / "csrc"
    shutil.rmtree(csrc, ignore_errors=True)
    for file, text in sources_of(variant).items():
        path = csrc / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return csrc


def fingerprint(variant: Variant, sources: Sequence[str] = _SOURCES) -> str:
    """Of all that a library is made of, so that one of other sources is known."""
    made_of = [*sources_of(variant).items(), sources, _FLAGS]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


# ---- building


@dataclass(frozen=True)
class Built:
    """A library, what ptxas told of its kernels, and what it was built for and from."""

    library: Path
    most_registers: int
    spilled_bytes: int
    arch: str
    fingerprint: str

    def facts(self) -> dict[str, object]:
        """All but where it lies."""
        return {name: value for name, value in asdict(self).items() if name != "library"}


def _folder_of(variant: Variant, folder: Path) -> Path:
    return folder / variant.name.replace(" ", "_")


def build(variant: Variant, folder: Path, arch: str, sources: Sequence[str] = _SOURCES) -> Built:
    """Compiles a variant for one compute capability, as "90"; leaves its facts beside it.

    Raises:
        RuntimeError: nvcc failed.
    """
    folder = _folder_of(variant, folder)
    csrc = write_sources(variant, folder)
    library, facts = folder / _LIBRARY, folder / _FACTS
    # Of an earlier build, which a failed one must not leave to be run.
    for path in (facts, library):
        path.unlink(missing_ok=True)
    command = [nvcc(), f"-arch=sm_{arch}", *_FLAGS, "-o", str(library)]
    told = subprocess.run(
        [*command, *(str(csrc / source) for source in sources)], capture_output=True, text=True
    )
    if told.returncode:
        raise RuntimeError(f"variant '{variant.name}': nvcc failed:\n{told.stderr}")
    registers = [int(text) for text in re.findall(r"Used (\d+) registers", told.stderr)]
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", told.stderr)
    made_of = fingerprint(variant, sources)
    built = Built(library, max(registers), sum(map(int, spilled)), arch, made_of)
    facts.write_text(json.dumps(built.facts(), indent=1) + "\n")
    return built


def build_all(
    chosen: Sequence[Variant], folder: Path, arch: str, failures: list[str]
) -> dict[str, Built]:
    """Builds them side by side; one that doesn't build is added to `failures`, and left out."""

    def try_to(variant: Variant) -> Built | None:
        try:
            return build(variant, folder, arch)
        except RuntimeError as error:
            failures.append(str(error))
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(try_to, chosen))
    return {variant.name: b for variant, b in zip(chosen, made, strict=True) if b is not None}


def load(variant: Variant, folder: Path) -> Built | None:
    """What a build in this folder left of a variant; None where it left nothing, or not all."""
    folder = _folder_of(variant, folder)
    try:
        facts = json.loads((folder / _FACTS).read_text())
        built = Built(library=folder / _LIBRARY, **facts)
    except (OSError, ValueError, TypeError):
        return None
    return built if built.library.exists() else None


def load_all(
    chosen: Sequence[Variant], folder: Path, capability: int, failures: list[str]
) -> dict[str, Built]:
    """The libraries of an earlier build; one that is missing is added to `failures`, and left out.

    Raises:
        RuntimeError: They can't be run here, or not be compared.
    """
    built: dict[str, Built] = {}
    for variant in chosen:
        found = load(variant, folder)
        if found is None:
            if variant.name == BASELINE:
                raise RuntimeError(
                    f"{folder} has no library of '{BASELINE}', with which all are compared"
                )
            failures.append(f"variant '{variant.name}': no library in {folder}")
            continue
        # Machine code runs on its own major capability, from its minor one on. What the driver
        # would make of the PTX for a later one is not what was built.
        major, minor = divmod(int(found.arch), 10)
        if major != capability // 10 or minor > capability % 10:
            raise RuntimeError(
                f"variant '{variant.name}' was built for sm_{found.arch}, this GPU is "
                f"sm_{capability}: build with --arch {capability}"
            )
        if found.fingerprint != fingerprint(variant):
            raise RuntimeError(
                f"variant '{variant.name}' was built from other sources than those here: build anew"
            )
        built[variant.name] = found
    return built


def nvcc() -> str:
    """The compiler: on the PATH, or in CUDA_HOME."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    found = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), str(home)]))
    if found is None:
        raise RuntimeError("no nvcc on the PATH or in CUDA_HOME")
    return found


# ---- measuring

# Case, dtype pair, operation: where a variant may gain or lose.
RUNS: tuple[tuple[str, str, Operation], ...] = (
    ("single", "float32/float32", Operation("update", "lerp", MOMENTUM)),
    ("vit_l16", "float32/float32", Operation("update", "lerp", MOMENTUM)),
    ("vit_l16", "float32/bfloat16", Operation("update", "lerp", MOMENTUM)),
    ("vit_l16", "bfloat16/bfloat16", Operation("update", "lerp", MOMENTUM)),
    ("vit_l16", "float32/float32", Operation("swap")),
    ("odd", "float32/float32", Operation("update", "lerp", MOMENTUM)),
    ("misaligned", "float32/float32", Operation("update", "lerp", MOMENTUM)),
    ("misaligned", "float32/bfloat16", Operation("update", "lerp", MOMENTUM)),
    ("small", "float32/float32", Operation("update", "lerp", MOMENTUM)),
    ("single", "float32/float32", Operation("copy to ema")),
)


def compare(
    kernels: dict[str, Kernels], operation: Operation, make_lists: Callable[[], Lists]
) -> dict[str, str]:
    """What each variant does otherwise than the baseline, on lists that are made anew for each."""

    def result(name: str) -> tuple[Tensor, Tensor]:
        lists = make_lists()  # A clone would be aligned where a list is not.
        prepared = kernels[name].prepare(lists.ema, lists.params, _by_table(name))
        kernels[name].run(operation, prepared, _stream())
        # Two comparisons and not 20,000, each of which would wait for the GPU.
        flat_ema, flat_params = (
            torch.cat([t.view(-1) for t in side]) for side in (lists.ema, lists.params)
        )
        return bits_of(flat_ema), bits_of(flat_params)

    right = result(BASELINE)
    wrong = {}
    for name in kernels:
        try:
            differ = [int((x != y).sum()) for x, y in zip(right, result(name), strict=True)]
        except RuntimeError as error:  # A launch failed.
            wrong[name] = str(error).splitlines()[0]
            continue
        if any(differ):
            wrong[name] = f"{differ[0]} elements of ema and {differ[1]} of params differ"
    return wrong


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def run(
    built: dict[str, Built],
    max_elements: int,
    seconds: float,
    rounds: int | None,
    failures: list[str],
) -> list[report.Record]:
    """Measures all of these on all lists; adds what is wrong to `failures`."""
    device = torch.device("cuda")
    kernels = {name: Kernels(b.library) for name, b in built.items()}
    clock = timer.CudaClock()
    records: list[report.Record] = []
    for case_name, pair, operation in RUNS:
        case = cases.load(case_name, max_elements)
        num_bytes = providers.least_bytes(
            operation.op, *providers.split_pair(pair), case.num_elements
        )
        wrong = compare(kernels, operation, partial(timer.make_lists, case, pair, device))
        where = f"{case_name} {operation.op} {pair}"
        failures += [f"{name}, {where}: {what}" for name, what in wrong.items()]

        sets, _ = timer.make_sets(case, pair, device, torch.cuda.mem_get_info()[0])
        calls = {
            name: [_call_of(name, library, lists, operation) for lists in sets]
            for name, library in kernels.items()
            if name not in wrong
        }
        share = seconds / len(RUNS)
        for name, timing in timer.interleave(calls, clock, seconds=share, rounds=rounds).items():
            records.append(
                {
                    "variant": name,
                    **report.what(case, operation.op, pair),
                    "bytes": num_bytes,
                    **report.microseconds(timing),
                    "gb_per_s": num_bytes / timing.median / 1e9,
                }
            )
        del sets, calls
        torch.cuda.empty_cache()
    return records


def _by_table(name: str) -> bool:
    return next(variant.by_table for variant in VARIANTS if variant.name == name)


def _call_of(name: str, library: Kernels, lists: Lists, operation: Operation) -> Call:
    prepared = library.prepare(lists.ema, lists.params, _by_table(name))
    return partial(library.run, operation, prepared, _stream())


# ---- what comes out


def tables(built: dict[str, Built], records: Sequence[report.Record]) -> list[report.Table]:
    """What the compiler made of each; and their speeds, a column for each list."""
    made = report.Table(
        "Built",
        ("variant", "most registers", "bytes spilled"),
        tuple(
            (name, str(b.most_registers), str(b.spilled_bytes) if b.spilled_bytes else "")
            for name, b in built.items()
        ),
    )
    if not records:
        return [made]
    runs = list(dict.fromkeys(_run_of(r) for r in records))
    speeds = {(r["variant"], _run_of(r)): r["gb_per_s"] for r in records}
    rows = []
    for name in built:
        cells = []
        for run in runs:
            speed, base = speeds.get((name, run)), speeds[BASELINE, run]
            if name == BASELINE:
                cells.append(f"{base:,.0f}")
            else:
                cells.append(f"{speed / base - 1:+.1%}" if speed else "wrong")
        rows.append((name, *cells))
    numbered = tuple(f"({i + 1})" for i in range(len(runs)))
    legend = ", ".join(f"({i + 1}) {' '.join(run)}" for i, run in enumerate(runs))
    return [
        made,
        report.Table(
            f"GB/s, and what a variant adds: {legend}", ("variant", *numbered), tuple(rows)
        ),
    ]


def _run_of(r: report.Record) -> tuple[str, str, str]:
    return r["case"], r["op"], report.pair_of(r)


def main(argv: Sequence[str]) -> int:
    """Builds and measures the variants; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m bench variants",
        description="Other ways to build the CUDA kernels, checked and timed against them.",
    )
    add = parser.add_argument
    add("--variants", type=report.names(names(), "variant"), help="; ".join(names()))
    add("--build-only", action="store_true", help="needs no GPU: registers and spills")
    add("--arch", help="compute capability to build for, as in 90; unasked the GPU that is here")
    add("--folder", type=Path, default=_ROOT / "build" / "variants", help="(%(default)s)")
    add("--libraries", type=Path, metavar="FOLDER", help="run what was built there, without nvcc")
    add("--max-elements", type=number(int, 1), default=_MAX_ELEMENTS, help="(%(default)s)")
    add("--rounds", type=number(int, 1), help="exactly so many, instead of as time allows")
    add("--seconds", type=number(float, 0), default=_SECONDS, help="for all (%(default)s)")
    report.add_json(parser)
    args = parser.parse_args(argv)
    if not args.build_only and not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU here; --build-only needs none")
    if args.libraries and (args.build_only or args.arch):
        parser.error("--libraries builds nothing: no --build-only or --arch with it")
    if args.build_only:
        arch = args.arch or "90"
        capability = int(arch)
    else:
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
        arch = args.arch or str(capability)
    wanted = {BASELINE, *(args.variants or names())}
    chosen = [v for v in VARIANTS if v.name in wanted and (capability >= 90 or not v.on_hopper)]
    failures: list[str] = []
    if args.libraries:
        try:
            built = load_all(chosen, args.libraries, capability, failures)
        except RuntimeError as error:
            parser.error(f"--libraries: {error}")
    else:
        built = build_all(chosen, args.folder, arch, failures)
    if args.build_only:
        report.show(tables(built, [])[0])
        return report.print_failures(failures)

    # What has not run on a GPU comes last, and by itself: it may hang.
    last = {v.name for v in chosen if v.on_hopper}
    parts = [{n: b for n, b in built.items() if n not in last}]
    if last & built.keys():
        parts.append({n: b for n, b in built.items() if n in last or n == BASELINE})
    records: list[report.Record] = []
    for i, part in enumerate(parts):
        with (
            report.measuring(torch.device("cuda")) as facts,
            report.stoppable(failures),
            torch.no_grad(),
        ):
            seconds = args.seconds * len(part) / len(built)
            found = run(part, args.max_elements, seconds, args.rounds, failures)
            records += [{"part": i, **r} for r in found]
            for table in tables(part, found):
                report.show(table)
        if args.json:
            made = {name: b.facts() for name, b in built.items()}
            report.write_json(args.json, facts, {"built": made, "records": records})
    return report.print_failures(failures)
