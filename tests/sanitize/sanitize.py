"""Builds tests/sanitize/sanitize.cpp and runs it under sanitizers.

Each must find nothing in the kernels, and must find the faults planted for it.

make sanitize, or: python tests/sanitize/sanitize.py FOLDER
    AddressSanitizer with UBSan, and ThreadSanitizer; the CUDA kernels' code runs on the processor.
make gpu-sanitize, or: python tests/sanitize/sanitize.py FOLDER --gpu [TOOL...]
    NVIDIA's compute-sanitizer, on a machine with a GPU: memcheck, initcheck, racecheck, synccheck.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CUDA_SOURCES = (
    *("update.cu", "update_averages.cu", "swap.cu", "copy.cu", "weighted_sum.cu"),
    "device.cu",
)


class Check(NamedTuple):
    """A sanitizer over one build of the program."""

    name: str
    command: list[str]  # What comes before a fault's name.
    faults: tuple[str, ...]  # That it must see,
    says: tuple[str, ...]  # and with which words.


def load_setup():
    """setup.py as a module: which files are compiled with which flags is written there alone."""
    spec = importlib.util.spec_from_file_location("fused_ema_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SETUP = load_setup()
CXX = shlex.split(os.environ.get("CXX", "c++"))
CXX_FLAGS = ["-std=c++20", "-g", "-ffp-contract=off", "-fno-strict-aliasing", "-w"]

# ---- building


def cpu_sources() -> Iterator[tuple[Path, list[str]]]:
    """What g++ compiles either way, each file with its own flags."""
    yield CSRC / "tiles.cpp", []
    yield CSRC / "parallel.cpp", [f"-I{HERE}"]
    yield CSRC / "cpu" / "launch.cpp", []
    for isa, isa_flags in SETUP.INSTRUCTION_SETS.items():
        for name in SETUP.KERNEL_SOURCES:
            yield CSRC / "cpu" / name, [f"-DFUSED_EMA_ISA={isa}", *shlex.split(isa_flags)]


def build(folder: Path, compilations: list[tuple[Path, list[str]]], link: list[str]) -> str:
    """Compiles each source with its command, links, and returns the program's path."""
    folder.mkdir(parents=True, exist_ok=True)
    objects, commands = [], []
    for number, (source, command) in enumerate(compilations):
        objects.append(str(folder / f"{number}_{source.stem}.o"))
        commands.append([*command, "-c", str(source), "-o", objects[-1]])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    program = str(folder / "sanitize")
    subprocess.run([*link, *objects, "-o", program], check=True)
    return program


def host_check(folder: Path, sanitizer: str, flags: list[str], faults: tuple[str, ...]) -> Check:
    """A build in which g++ compiles all."""
    # -O1: a sanitizer needs the loads and stores that the source has.
    common = [*CXX, *CXX_FLAGS, "-O1", "-fno-omit-frame-pointer", f"-fsanitize={sanitizer}", *flags]
    common += [f"-I{HERE}", f"-I{ROOT / 'tests' / 'host'}"]
    fma = ["-mfma"] if "avx2" in SETUP.INSTRUCTION_SETS else []
    sources = [(HERE / "sanitize.cpp", []), *cpu_sources()]
    # device.cu only asks the CUDA runtime, which isn't there.
    sources += [(CSRC / "cuda" / name, ["-x", "c++", *fma]) for name in CUDA_SOURCES[:-1]]
    program = build(
        folder / sanitizer.replace(",", "_"),
        [(source, [*common, *own]) for source, own in sources],
        [*CXX, f"-fsanitize={sanitizer}", "-pthread"],
    )
    says = ("ERROR: AddressSanitizer", "runtime error", "WARNING: ThreadSanitizer")
    return Check(sanitizer, [program], faults, says)


def build_for_gpu(folder: Path) -> str:
    """A build in which nvcc compiles the program and the CUDA kernels, for the GPU that is here."""
    cuda = SETUP.find_cuda()
    if cuda is None:
        sys.exit("no nvcc here: nothing checked")
    nvcc = [str(cuda / "bin" / "nvcc"), "-arch=native", "-std=c++20", "-O3", "-lineinfo", "-w"]
    cpu = [*CXX, *CXX_FLAGS, "-O2"]
    return build(
        folder / "gpu",
        [
            *((source, [*cpu, *own]) for source, own in cpu_sources()),
            *((CSRC / "cuda" / name, nvcc) for name in CUDA_SOURCES),
            (HERE / "sanitize.cpp", [*nvcc, f"-I{HERE}", "-x", "cu"]),
        ],
        [*nvcc, "-Xcompiler", "-pthread"],
    )


# Tool: what it must see, and its words for it.
GPU_TOOLS = {
    "memcheck": ("overrun", "Invalid __global__ "),
    "initcheck": ("unwritten", "Uninitialized __global__ memory read"),
    "racecheck": ("shared race", "Race reported"),
    "synccheck": ("barrier", "Barrier error detected"),
}


def gpu_checks(program: str, tools: list[str]) -> list[Check]:
    """The tools of compute-sanitizer over one program."""
    path = os.pathsep.join([os.environ["PATH"], str(SETUP.find_cuda() / "bin")])
    sanitizer = shutil.which("compute-sanitizer", path=path)
    if sanitizer is None:
        sys.exit("no compute-sanitizer here: nothing checked")
    checks = []
    for tool in tools:
        fault, says = GPU_TOOLS[tool]
        # The program checks every call itself; CUDA 13's own look for driver functions counts as
        # errors of calls otherwise.
        command = [sanitizer, "--tool", tool, "--report-api-errors", "no"]
        command += ["--error-exitcode", "9", program]
        checks.append(Check(tool, command, (fault,), (says,)))
    return checks


# ---- running


def passes(check: Check, fault: str) -> bool:
    """Runs the kernels, or a fault, under the sanitizer, and prints what came of it."""
    options = {"ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "halt_on_error=1"}
    run = subprocess.run(
        [*check.command, *([fault] if fault else [])],
        env=os.environ | options,
        capture_output=True,
        text=True,
    )
    good = (run.returncode != 0) == bool(fault)
    if fault:  # It must be the sanitizer that says so.
        good = good and any(words in run.stdout + run.stderr for words in check.says)
    counted = next((line for line in run.stdout.splitlines() if "elements" in line), "")
    what = f"planted {fault}" if fault else "the kernels"
    result = ("found" if fault else counted) if good else "FAILED"
    print(f"{check.name}: {what}: {result}", flush=True)
    if not good:
        print(run.stdout, run.stderr, sep="\n", file=sys.stderr)
    return good


def main() -> int:
    """Runs everything; returns the exit status."""
    parser = argparse.ArgumentParser(description="Runs the kernels under sanitizers.")
    parser.add_argument("folder", type=Path, help="for what is built")
    parser.add_argument("--gpu", nargs="*", choices=tuple(GPU_TOOLS), metavar="TOOL")
    args = parser.parse_args()
    if args.gpu is not None:
        checks = gpu_checks(build_for_gpu(args.folder), args.gpu or list(GPU_TOOLS))
    else:
        checks = [
            host_check(
                args.folder,
                "address,undefined",
                ["-fno-sanitize-recover=all"],
                ("overrun", "shift"),
            ),
            host_check(args.folder, "thread", [], ("race",)),
        ]
    runs = [(check, fault) for check in checks for fault in ("", *check.faults)]
    # A GPU serves all at once; a processor is busy with the threads of one.
    with ThreadPoolExecutor(len(runs) if args.gpu is not None else 1) as pool:
        return int(not all(list(pool.map(lambda run: passes(*run), runs))))


if __name__ == "__main__":
    sys.exit(main())
