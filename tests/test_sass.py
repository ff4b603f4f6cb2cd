"""What the compiler made of csrc/cuda/: registers, stack and instructions, as cuobjdump shows them.

Needs nvcc, cuobjdump and nvdisasm, and no GPU.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from fused_ema._native import build_info

ROOT = Path(__file__).parents[1]
ARCHS = ("80", "90", "100")

# ---- What the design claims, worked out by hand from the rules at the top of csrc/tiles.h.


SIZES = {"float": 4, "double": 8, "BFloat16": 2, "Half": 2}  # bytes
PAIRS = (
    ("float", "float"),
    ("float", "BFloat16"),
    ("float", "Half"),
    ("double", "double"),
    ("BFloat16", "BFloat16"),
    ("Half", "Half"),
)
BLOCK_VECTORS, WARP_VECTORS = 1024, 128  # of a tile, each of 16 bytes of the wider side
# (sides read, sides written), by the file and the start of the operation's name.
OPERATIONS = {
    "update": {f"Update<(Form){form}, ": ("ab", "a") for form in range(3)},
    "swap": {"Swap<": ("ab", "ab")},
    "copy": {"Copy<true, ": ("b", "a"), "Copy<false, ": ("a", "b")},
}
SOURCES = ("TableSource", "ListSource")  # a plan's table, or the kernel's arguments


class Walk(NamedTuple):
    """How a block goes through its tile."""

    threads: int
    step: int  # vectors of a side that a thread loads before it stores
    blocks: int  # an SM

    def max_registers(self) -> int:
        """Of the 65,536 of an SM, handed out in eights."""
        return 65536 // (self.threads * self.blocks) // 8 * 8


def walk(op: str, size_a: int, size_b: int) -> Walk:
    return {
        "update": Walk(256, 1, 4 if size_a == 8 else 6),
        "swap": Walk(512, 2, 2),
        "copy": Walk(256, 2, 5) if size_a != size_b else Walk(256, 1, 8),
    }[op]


class Moves(NamedTuple):
    """What a thread loads and stores in global memory on one way through a kernel."""

    wide_loads: int = 0  # of 16 bytes
    half_loads: int = 0  # of 8
    narrow_loads: int = 0
    wide_stores: int = 0
    half_stores: int = 0
    narrow_stores: int = 0
    late_loads: int = 0  # after a store

    def is_within(self, other: Moves) -> bool:
        """The same accesses; the compiler may fetch ahead of a store what was claimed behind it."""
        return self == other._replace(late_loads=self.late_loads) and (
            self.late_loads <= other.late_loads
        )


def moves_of(loads: list[int], stores: list[int], late_loads: int = 0) -> Moves:
    """Of accesses of so many bytes."""

    def counts(accesses: list[int]) -> tuple[int, int, int]:
        return accesses.count(16), accesses.count(8), sum(size < 8 for size in accesses)

    return Moves(*counts(loads), *counts(stores), late_loads)


# By what moves: the most loads that are issued and not yet used, in the worst of such ways.
Ways = dict[Moves, int]


class Claim(NamedTuple):
    sizes: dict[str, int]  # bytes of an element, by side
    reads: str
    writes: str
    source: str
    op: str

    def accesses(self, side: str, vectors: int, aligned_b: bool, odd: int) -> list[int]:
        """The bytes of each, for so many vectors and perhaps one odd element."""
        vec = 16 // self.sizes["a"]
        # A b that no head aligns with a moves in elements.
        whole = [vec * self.sizes[side]] if side == "a" or aligned_b else [self.sizes[side]] * vec
        return whole * vectors + [self.sizes[side]] * odd

    @property
    def walk(self) -> Walk:
        return walk(self.op, self.sizes["a"], self.sizes["b"])

    def loads(self, vectors: int, aligned_b: bool, odd: int) -> list[int]:
        """The bytes of each load of so many vectors and perhaps one odd element of each side."""
        return [
            size for side in self.reads for size in self.accesses(side, vectors, aligned_b, odd)
        ]

    def way(
        self,
        vectors: int,
        aligned_b: bool,
        odd: int,
        others: Sequence[int] = (),
        narrow_too: bool = True,
    ) -> tuple[Moves, int]:
        """Moves so many vectors in steps, perhaps an odd element, and has other loads."""
        stores = [
            size for side in self.writes for size in self.accesses(side, vectors, aligned_b, odd)
        ]
        # Each load of a step is issued before one is used, the odd elements' in the first. A b
        # that moves by element goes two vectors at least, unless they are of 8 elements.
        step = self.walk.step if aligned_b or self.sizes["a"] == 2 else max(2, self.walk.step)
        first = self.loads(min(vectors, step), aligned_b, odd)
        late = self.loads(max(0, vectors - step), aligned_b, 0)
        in_flight = len(first) if narrow_too else first.count(16)
        # For sm_100 ptxas uses one of 16 bits before the last is on its way.
        in_flight -= narrow_too and not aligned_b and self.op == "update" and self.sizes["a"] == 2
        return moves_of([*first, *late, *others], stores, len(late)), in_flight

    def loads_in_flight(self) -> int:
        """Of a full tile, both sides aligned."""
        return self.way(BLOCK_VECTORS // self.walk.threads, True, 0)[1]

    def bytes_in_flight(self) -> int:
        """The same in bytes a thread."""
        return sum(self.loads(min(self.walk.step, BLOCK_VECTORS // self.walk.threads), True, 0))

    def ways(self, block_tile: bool, narrow_too: bool = True) -> Ways:
        """Every way through the kernel's block-tile side, or its warp-tile side."""
        from_table = self.source == "TableSource"
        # A momentum on the device is one more load.
        momenta = ([], [8]) if self.op == "update" else ([],)
        if block_tile:  # full, and its table entry's two pointers are read, not its length
            vectors = [BLOCK_VECTORS // self.walk.threads]
            odds, entry = [0], [8, 8] * from_table
        else:
            vectors = range(WARP_VECTORS // 32 + 1)
            odds, entry = [0, 1], [8, 8, 4] * from_table
        moving = (
            self.way(n, aligned_b, odd, [*momentum, *entry], narrow_too)
            for n in vectors
            for aligned_b in (True, False)
            for odd in odds
            for momentum in momenta
        )
        # A warp without a tile, and a momentum of 0 on the device.
        idle = {moves_of(momentum, []): 0 for momentum in momenta if momentum or not block_tile}
        return idle | dict(moving)


def claims(op: str) -> dict[str, Claim]:
    """By kernel name."""
    return {
        f"tile_loop_kernel<{start}{a}, {b}>, {source}<2> >": Claim(
            {"a": SIZES[a], "b": SIZES[b]}, reads, writes, source, op
        )
        for start, (reads, writes) in OPERATIONS[op].items()
        for a, b in PAIRS
        for source in SOURCES
    }


# ---- Reading the compiler's output.


class Instruction(NamedTuple):
    address: int
    opcode: str  # "LDG.E.128.CONSTANT"
    root: str  # "LDG"
    operands: list[str]
    runs_if: list[tuple[str, bool]]  # predicates, and what they must be
    written: list[str]  # predicates
    data: range  # registers that it loads or stores
    named: set[int]  # all of its registers


def read_instruction(address: str, guard: str, opcode: str, text: str) -> Instruction:
    operands = [operand.strip() for operand in text.split(",")]
    root = opcode.split(".")[0]
    # "@!P0 BRA 0x80", or "BRA.U !UP0, 0x80".
    conditions = [guard] * bool(guard) + operands[:-1] * (root == "BRA")
    # Predicates that stand among the destinations: first, or behind one register.
    leading = operands[1:] if re.fullmatch(r"U?R(\d+|Z)", operands[0]) else operands
    written = [*itertools.takewhile(re.compile(r"U?P[\dTR]").fullmatch, leading[:2])]
    if "PR" in written:  # R2P: all of them
        written = [f"P{i}" for i in range(7)]
    named, data = set(), range(0)
    for number, pair in re.findall(r"(?<![A-Z])R(\d+)(\.64)?", text):
        named |= {int(number), int(number) + bool(pair)}
    if root in ("LDG", "STG"):
        words = 4 if ".128" in opcode else 2 if ".64" in opcode else 1
        register = operands[0 if root == "LDG" else -1]
        if register != "RZ":
            data = range(int(register[1:]), int(register[1:]) + words)
    return Instruction(
        address=int(address, 16),
        opcode=opcode,
        root=root,
        operands=operands,
        runs_if=[(text.lstrip("!"), text[0] != "!") for text in conditions],
        written=[name for name in written if name not in ("PT", "UPT")],
        data=data,
        named=named | {*data},
    )


class Kernel(NamedTuple):
    registers: int
    stack: int  # bytes; spilled registers lie there too
    code: list[Instruction]


def short_name(name: str) -> str:
    """Of a demangled kernel, without return type, namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|fused_ema::|cuda::|^void ", "", name)
    return re.sub(r">\(.*", ">", name)


USAGE = re.compile(r"Function (\S+):\n\s*REG:(\d+) STACK:(\d+)")


def read_kernels(usage: str, sass: str) -> dict[str, Kernel]:
    """By short name; what cuobjdump -res-usage and -sass wrote about one architecture."""
    codes: dict[str, list[Instruction]] = {}
    for line in sass.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            code = codes[match[1]] = []
        elif match := re.match(r"\s*/\*(\w+)\*/\s+(?:@(\S+)\s+)?([\w.]+)\s*(.*?)\s*;", line):
            code.append(read_instruction(*match.groups("")))
    names = "\n".join(codes)
    demangled = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True)
    short = dict(zip(codes, map(short_name, demangled.stdout.splitlines()), strict=True))
    facts = {name: [int(text) for text in numbers] for name, *numbers in USAGE.findall(usage)}
    assert sorted(facts) == sorted(codes)
    for code in codes.values():  # no line of a form that is not understood
        assert [instruction.address for instruction in code] == [*range(0, 16 * len(code), 16)]
    return {
        short[name]: Kernel(registers, stack, codes[name])
        for name, (registers, stack) in facts.items()
    }


class Toolchain(NamedTuple):
    nvcc: str  # the command of setup.py, with $in and $out
    sources: str  # the fingerprint of csrc/
    tools: dict[str, str]

    def compile(self, sources: list[Path], folder: Path) -> list[Path]:
        """An object for each."""
        objects = [folder / f"cuda_{source.stem}.o" for source in sources]
        commands = [
            self.nvcc.replace("$in", shlex.quote(str(source))).replace(
                "$out", shlex.quote(str(out))
            )
            for source, out in zip(sources, objects, strict=True)
        ]
        # Two at a time, by a process and not by threads that fork.
        done = subprocess.run(
            ["xargs", "-P2", "-n1", "-d\n", "sh", "-c"],
            input="\n".join(commands),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return objects

    def read(self, file: Path) -> dict[str, dict[str, Kernel]]:
        """The kernels in an object, by architecture."""
        # cuobjdump looks for nvdisasm on the PATH.
        path = f"{Path(self.tools['nvdisasm']).parent}{os.pathsep}{os.environ['PATH']}"

        def dump(what: str, arch: str) -> str:
            command = [self.tools["cuobjdump"], what, "-arch", f"sm_{arch}", str(file)]
            env = os.environ | {"PATH": path}
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout

        return {arch: read_kernels(dump("-res-usage", arch), dump("-sass", arch)) for arch in ARCHS}


def find_tool(name: str, toolkit: Path) -> str | None:
    """From NVIDIA's package of that name, which puts nothing on the PATH, or beside nvcc."""
    try:
        for file in importlib.metadata.files(f"nvidia-cuda-{name}") or ():
            if file.name == name:
                return str(file.locate())
    except importlib.metadata.PackageNotFoundError:
        pass
    return shutil.which(name, path=os.pathsep.join([str(toolkit), os.environ["PATH"]]))


# In another process, so that setuptools changes nothing in this one.
PRINT_NINJA_FILE = """
import pathlib, runpy, setuptools
setuptools.setup = lambda **_: None
build = runpy.run_path("setup.py")
cuda = build["find_cuda"]()
if cuda is not None:
    print(build["ninja_file"](pathlib.Path("objects"), pathlib.Path("target"), cuda))
    print("sources", build["fingerprint"]())
"""


@pytest.fixture(scope="module")
def toolchain() -> Toolchain:
    missing = pytest.fail if os.environ.get("FUSED_EMA_CUDA") == "require" else pytest.skip
    printed = subprocess.run(
        [sys.executable, "-c", PRINT_NINJA_FILE], cwd=ROOT, capture_output=True, text=True
    )
    if printed.returncode != 0:
        missing(f"setup.py: {printed.stderr}")
    rule = re.search(r"rule nvcc\n  command = (.*)", printed.stdout)
    if rule is None:
        missing("setup.py finds no nvcc, or is told to use none")
    toolkit = Path(shlex.split(rule[1])[0]).parent
    tools = {name: find_tool(name, toolkit) for name in ("cuobjdump", "nvdisasm", "c++filt")}
    for name, path in tools.items():
        if path is None:
            missing(f"no {name}: no package of NVIDIA's, not in {toolkit}, not on the PATH")
    # Spills are this test's to report; a warning would stop the compiler before the report.
    command = re.sub(r" -MD -MF \S+| -Werror all-warnings| -Xptxas -Werror", "", rule[1])
    assert tuple(re.findall(r"code=sm_(\d+)", command)) == ARCHS
    return Toolchain(command, printed.stdout.split()[-1], tools)


@pytest.fixture(scope="module")
def compiled(toolchain, tmp_path_factory):
    """The kernels of each architecture and file name, as `make build` has left them."""
    folder = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    ops = [*OPERATIONS, "update_averages"]
    objects = [ROOT / "build" / folder / f"cuda_{op}.o" for op in ops]
    is_built = build_info().get("sources") == toolchain.sources
    if not is_built or not all(path.exists() for path in objects):
        sources = [ROOT / "csrc" / "cuda" / f"{op}.cu" for op in ops]
        objects = toolchain.compile(sources, tmp_path_factory.mktemp("sass"))
    return {
        (arch, op): kernels
        for op, path in zip(ops, objects, strict=True)
        for arch, kernels in toolchain.read(path).items()
    }


@pytest.fixture(params=itertools.product(ARCHS, OPERATIONS), ids=lambda p: f"sm_{p[0]}-{p[1]}")
def kernels(request, compiled) -> dict[str, tuple[Kernel, Claim]]:
    """The kernels of one architecture and file, each with what is claimed of it."""
    arch, op = request.param
    found, wanted = compiled[arch, op], claims(op)
    # 3 forms or 2 directions, 6 pairs, 2 sources: none missing, none that nothing is claimed of.
    assert sorted(found) == sorted(wanted)
    return {name: (found[name], claim) for name, claim in wanted.items()}


# ---- The checks. Each yields what is wrong with one kernel.


def resource_faults(kernel: Kernel, max_registers: int):
    if kernel.stack:
        yield f"has a stack frame of {kernel.stack} bytes"
    if kernel.registers > max_registers:
        yield f"takes {kernel.registers} registers"


# Constants and global memory: no local memory (LDL, STL: spills, arrays indexed at run time), no
# generic access (LD, ST), no shared memory.
MEMORY = {"LDG", "STG", "LDC", "LDCU", "ULDC"}
# A division is a call for 64 bits, after a try in 32: a reciprocal (MUFU) between conversions from
# and to integers. Tiles divide by powers of two only, which are shifts; no form needs a MUFU.
DIVISION = {"CALL", "MUFU", "I2F", "I2FP", "F2I"}


def instruction_faults(kernel: Kernel):
    for instruction in kernel.code:
        root = instruction.root
        if re.match(r"U?LD|ST|ATOM|RED", root) and root not in MEMORY:
            yield f"has {instruction.opcode} at {instruction.address:#x}"
        if root in DIVISION:
            yield f"divides: {instruction.opcode} at {instruction.address:#x}"


# Of fp32, one or two, of two fp16 and of fp64.
FMA = {"FFMA", "FFMA2", "HFMA2", "DFMA"}


def fma_faults(kernel: Kernel):
    for instruction in kernel.code:
        # Times zero it moves a constant into a register.
        moves = not {"RZ", "-RZ"}.isdisjoint(instruction.operands[1:3])
        if instruction.root in FMA and not moves:
            yield f"has {instruction.opcode} at {instruction.address:#x}"


def block_tile_test(code: list[Instruction]) -> tuple[int, bool]:
    """Where blockIdx.x is compared with the number of block tiles; the answer in a block tile."""
    block_index = None
    for instruction in code:
        operands = instruction.operands
        if operands[-1] == "SR_CTAID.X":
            block_index = operands[0]
        elif re.match("U?ISETP.*U32", instruction.opcode) and block_index in operands[2:4]:
            answers = {("GE", True): False, ("LT", True): True}
            answers |= {("LE", False): False, ("GT", False): True}
            comparison = instruction.opcode.split(".")[1]
            return instruction.address, answers[comparison, operands[2] == block_index]
    raise AssertionError("blockIdx.x is compared with nothing")


def ways_through(code: list[Instruction], block_tile: bool, narrow_too: bool) -> Ways:
    """Every way from the entry to an exit, on the side of block tiles or of warp tiles.

    A predicate is followed both ways where it is first read and then remembered until it is
    written, so that loads, stores and exits under one predicate go together. Loads in flight are
    those of 16 bytes, or all of them.
    """
    test, answer = block_tile_test(code)
    todo = [(0, frozenset({("PT", True), ("UPT", True)}), Moves(), 0, frozenset())]
    seen = set()
    ways: Ways = {}

    def follow(address: int, known: dict[str, bool], *loads) -> None:
        state = (address, frozenset(known.items()), *loads)
        if state not in seen:  # a loop comes back to the state that it left
            seen.add(state)
            todo.append(state)

    while todo:
        address, items, moves, in_flight, unused = todo.pop()
        known = dict(items)
        while True:
            instruction = code[address // 16]
            root, data = instruction.root, instruction.data
            if instruction.runs_if:
                unknown = [name for name, _ in instruction.runs_if if name not in known]
                if unknown:
                    for value in (True, False):
                        follow(address, known | {unknown[0]: value}, moves, in_flight, unused)
                    break
                if any(known[name] != value for name, value in instruction.runs_if):
                    address += 16
                    continue
            if root == "EXIT":
                ways[moves] = min(in_flight, ways.get(moves, in_flight))
                break
            if root == "BRA":
                follow(int(instruction.operands[-1], 16), known, moves, in_flight, unused)
                break
            if unused:  # whoever names a register of a load waits for it
                unused = frozenset(load for load in unused if instruction.named.isdisjoint(load))
            if root in ("LDG", "STG"):
                width = {4: "wide", 2: "half"}.get(len(data), "narrow")
                changed = f"{width}_{'loads' if root == 'LDG' else 'stores'}"
                if root == "LDG":
                    if moves.wide_stores or moves.half_stores or moves.narrow_stores:
                        moves = moves._replace(late_loads=moves.late_loads + 1)
                    if narrow_too or len(data) == 4:
                        unused |= {data}
                        in_flight = max(in_flight, len(unused))
                moves = moves._replace(**{changed: getattr(moves, changed) + 1})
            for name in instruction.written:
                known.pop(name, None)
            if address == test:
                known[instruction.operands[0]] = answer == block_tile
            address += 16
    return ways


def block_tile_faults(kernel: Kernel, claimed: Ways):
    found = ways_through(kernel.code, block_tile=True, narrow_too=True)
    for moves in sorted(found):
        # Whether a momentum of 0 was read stands in a predicate, which is followed both ways here.
        if moves != Moves() and not any(moves.is_within(claim) for claim in claimed):
            yield f"has a way that is not claimed: {moves}"
    yield from way_faults(found, claimed)


def warp_tile_faults(kernel: Kernel, claimed: Ways, narrow_too: bool = True):
    # Ways that are not claimed are no fault here: where a guard is computed once for the loads and
    # again for the stores, some take the one and not the other, which the hardware never goes.
    found = ways_through(kernel.code, block_tile=False, narrow_too=narrow_too)
    yield from way_faults(found, claimed)


def way_faults(found: Ways, claimed: Ways):
    for moves, in_flight in claimed.items():
        same = [seen for way, seen in found.items() if way.is_within(moves)]
        if not same:
            yield f"has no way for {moves}"
        elif min(same) < in_flight:
            yield f"has {min(same)} of {in_flight} loads in flight in {moves}"


def assert_none(faults: dict[str, list[str]]) -> None:
    lines = [f"{name} {fault}" for name, found in faults.items() for fault in found]
    assert not lines, "\n".join(lines)


def test_no_spills_and_as_many_blocks_an_sm_as_asked(kernels):
    assert_none(
        {
            name: [*resource_faults(kernel, claim.walk.max_registers())]
            for name, (kernel, claim) in kernels.items()
        }
    )


def test_no_local_memory_no_generic_access_no_division(kernels):
    assert_none({name: [*instruction_faults(kernel)] for name, (kernel, _) in kernels.items()})


def test_two_products_have_no_fma(compiled):
    faults = {
        name: [*fma_faults(kernel)]
        for (_, op), kernels in compiled.items()
        for name, kernel in kernels.items()
        if op.startswith("update")
    }
    assert_none({name: found for name, found in faults.items() if "(Form)2" in name})
    # The check sees those of the other forms.
    assert all(found for name, found in faults.items() if "(Form)2" not in name)


def test_block_tiles_move_in_vectors_and_every_load_is_in_flight(kernels):
    assert_none(
        {
            name: [*block_tile_faults(kernel, claim.ways(block_tile=True))]
            for name, (kernel, claim) in kernels.items()
        }
    )


def test_warp_tiles_move_in_vectors_and_every_wide_one_is_in_flight(kernels):
    assert_none(
        {
            name: [*warp_tile_faults(kernel, claim.ways(False, narrow_too=False), narrow_too=False)]
            for name, (kernel, claim) in kernels.items()
        }
    )


def test_every_load_of_a_warp_tile_is_in_flight(kernels):
    assert_none(
        {
            name: [*warp_tile_faults(kernel, claim.ways(block_tile=False))]
            for name, (kernel, claim) in kernels.items()
        }
    )


def test_loads_in_flight_in_numbers():
    numbers = {
        start: [
            (claim.loads_in_flight(), claim.bytes_in_flight())
            for name, claim in claims(op).items()
            if start in name and claim.source == "TableSource"
        ]
        for op, starts in OPERATIONS.items()
        for start in starts
    }
    # Of a thread, of which an SM holds 1,536 for updates, 2,048 for copies (1,280 of a mixed pair)
    # and 1,024 for swaps.
    update = [(2, 32), (2, 24), (2, 24), (2, 32), (2, 32), (2, 32)]
    assert numbers == {
        "Update<(Form)0, ": update,
        "Update<(Form)1, ": update,
        "Update<(Form)2, ": update,
        "Swap<": [(4, 64), (4, 48), (4, 48), (4, 64), (4, 64), (4, 64)],
        "Copy<true, ": [(1, 16), (2, 16), (2, 16), (1, 16), (1, 16), (1, 16)],
        "Copy<false, ": [(1, 16), (2, 32), (2, 32), (1, 16), (1, 16), (1, 16)],
    }


# ---- Several averages: five sides, of which the third and fourth may be missing.


AVERAGES_WALK = Walk(128, 1, 4)


def pair_in(name: str) -> tuple[str, str]:
    return next(pair for pair in PAIRS if f" {pair[0]}, {pair[1]}>" in name)


@pytest.fixture(params=ARCHS)
def averages(request, compiled) -> dict[str, Kernel]:
    found = compiled[request.param, "update_averages"]
    assert sorted(found) == sorted(
        f"tile_loop_kernel<UpdateAverages<(Form){form}, {a}, {b}>, {source}<5> >"
        for form in range(3)
        for a, b in PAIRS
        for source in SOURCES
    )
    return found


def test_averages_have_no_spills_no_local_memory_no_division(averages):
    assert_none(
        {
            name: [
                *resource_faults(kernel, AVERAGES_WALK.max_registers()),
                *instruction_faults(kernel),
            ]
            for name, kernel in averages.items()
        }
    )


def most_in_flight(code: list[Instruction]) -> int:
    """Loads of 16 bytes that stand in a row before one of them is used or a store comes.

    In order of address: five sides, some of which may be missing, have too many ways to follow.
    """
    unused: list[range] = []
    most = 0
    for instruction in code:
        if instruction.root == "STG":
            unused = []
        unused = [data for data in unused if instruction.named.isdisjoint(data)]
        if instruction.root == "LDG" and len(instruction.data) == 4:
            unused.append(instruction.data)
            most = max(most, len(unused))
    return most


def test_averages_and_params_are_all_on_their_way_before_one_is_used(averages):
    faults = {}
    for name, kernel in averages.items():
        a, b = pair_in(name)
        # A param of half the width moves by 8 bytes.
        wanted = 4 + (SIZES[a] == SIZES[b])
        found = most_in_flight(kernel.code)
        if found < wanted:
            faults[name] = [f"has {found} of {wanted} wide loads in flight"]
    assert_none(faults)


# ---- The checks can fail: one kernel without a fault, and one for each fault.

FAULTY = """
#define KERNEL extern "C" __global__ void

KERNEL good(float4* __restrict__ to, const float4* __restrict__ from, unsigned n) {
  if (blockIdx.x >= n) return;
  const float4 x = from[threadIdx.x], y = from[threadIdx.x + 256];
  to[threadIdx.x] = x;
  to[threadIdx.x + 256] = y;
}
KERNEL narrow(float2* __restrict__ to, const float2* __restrict__ from, unsigned n) {
  if (blockIdx.x >= n) return;
  const float2 x = from[threadIdx.x], y = from[threadIdx.x + 256];
  to[threadIdx.x] = x;
  to[threadIdx.x + 256] = y;
}
// to and from may be one: the second load has to wait for the first store.
KERNEL one_by_one(float4* to, const float4* from, unsigned n) {
  if (blockIdx.x >= n) return;
  to[threadIdx.x] = from[threadIdx.x];
  to[threadIdx.x + 256] = from[threadIdx.x + 256];
}
KERNEL dependent(float4* __restrict__ to, const float4* __restrict__ from, unsigned n) {
  if (blockIdx.x >= n) return;
  const float4 x = from[threadIdx.x], y = from[__float_as_int(x.x)];
  to[threadIdx.x] = x;
  to[threadIdx.x + 256] = y;
}
template <int kLive>
__device__ void hold(float* to, const float* from) {
  float v[kLive];
#pragma unroll
  for (int i = 0; i < kLive; ++i) v[i] = from[i * 256 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kLive; ++i) to[i * 256 + threadIdx.x] = v[i];
}
KERNEL greedy(float* to, const float* from) { hold<100>(to, from); }
KERNEL __launch_bounds__(1024, 2) spilled(float* to, const float* from) { hold<100>(to, from); }
KERNEL indexed(float* to, const int* from) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[from[i] & 63] = i;
  to[threadIdx.x] = v[from[threadIdx.x] & 63];
}
KERNEL generic(float* to, unsigned n) {
  __shared__ float shared[256];
  float* either = blockIdx.x < n ? to : shared;
  either[threadIdx.x] = 1;
}
KERNEL divided(long long* to, long long x, long long y) { to[threadIdx.x] = x / y; }
KERNEL divided_32(unsigned* to, unsigned x, unsigned y) { to[threadIdx.x] = x / y; }
"""
FAULTS = {
    "good": [],
    "narrow": [
        r"no way for Moves\(wide_loads=2, half_loads=0, narrow_loads=0, wide_stores=2,",
        r"not claimed: Moves\(wide_loads=0, half_loads=2, narrow_loads=0, wide_stores=0, half_s",
    ],
    "one_by_one": [r"no way for Moves\(.*late_loads=0", r"not claimed: Moves\(.*late_loads=1"],
    "dependent": [r"has 1 of 2 loads in flight"],
    "greedy": [r"takes 1\d\d registers"],
    "spilled": [r"stack frame of \d+", "has STL", "has LDL"],
    "indexed": [r"stack frame of 256 bytes", "has STL", "has LDL"],
    "generic": [r"has ST\.E at"],
    "divided": ["divides: CALL", "divides: MUFU.RCP", "divides: I2F", "divides: F2I"],
    "divided_32": ["divides: MUFU.RCP", "divides: I2F", "divides: F2I"],
}


def test_the_checks_see_faults(toolchain, tmp_path):
    source = tmp_path / "faulty.cu"
    source.write_text(FAULTY)
    [built] = toolchain.compile([source], tmp_path)
    for arch, kernels in toolchain.read(built).items():
        assert sorted(kernels) == sorted(FAULTS)
        for name, kernel in kernels.items():
            assert_faults(kernel, FAULTS[name], f"sm_{arch} {name}")


def assert_faults(kernel, wanted, name):
    found = [*resource_faults(kernel, max_registers=80), *instruction_faults(kernel)]
    if name.split()[1] in ("good", "narrow", "one_by_one", "dependent"):
        two = {Moves(wide_loads=2, wide_stores=2): 2}
        found += block_tile_faults(kernel, two)
        # Above its n, the kernel exits at once.
        assert [*warp_tile_faults(kernel, {Moves(): 0})] == []
        assert [*warp_tile_faults(kernel, two)] != []
    for fault in found:
        assert any(re.search(pattern, fault) for pattern in wanted), (name, fault)
    for pattern in wanted:
        assert any(re.search(pattern, fault) for fault in found), (name, pattern, found)
