"""Builds and runs tests/host/sanitize.cpp under AddressSanitizer with UBSan, and ThreadSanitizer.

Each sanitizer must find nothing in the kernels, and must find the fault planted for it.

make sanitize, or: python tests/host/sanitize.py FOLDER
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"

# Name: flags, and the faults that it must see.
SANITIZERS = {
    "address,undefined": ("-fno-sanitize-recover=all", ("overrun", "shift")),
    "thread": ("", ("race",)),
}
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "halt_on_error=1"}


def load_setup():
    """setup.py as a module: which files are compiled with which flags is written there alone."""
    spec = importlib.util.spec_from_file_location("fused_ema_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def compilations(folder: Path, sanitizer: str, flags: str) -> tuple[list[list[str]], list[str]]:
    """The commands that compile everything, and the objects that they make."""
    setup = load_setup()
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    # -O1: a sanitizer needs the loads and stores that the source has.
    common = ["-std=c++20", "-O1", "-g", "-fno-omit-frame-pointer", "-ffp-contract=off"]
    common += ["-fno-strict-aliasing", "-w", f"-fsanitize={sanitizer}", *shlex.split(flags)]
    common += [f"-I{HERE}"]
    cuda_flags = ["-x", "c++"]
    if "avx2" in setup.INSTRUCTION_SETS:
        cuda_flags += ["-mfma"]
    sources = [(HERE / "sanitize.cpp", []), (CSRC / "tiles.cpp", [])]
    sources += [(CSRC / "cpu" / "launch.cpp", [])]
    sources += [(CSRC / "cuda" / f"{name}.cu", cuda_flags) for name in ("update", "swap", "copy")]
    for isa, isa_flags in setup.INSTRUCTION_SETS.items():
        own = [f"-DFUSED_EMA_ISA={isa}", *shlex.split(isa_flags)]
        sources += [(CSRC / "cpu" / name, own) for name in setup.KERNEL_SOURCES]
    commands, objects = [], []
    for number, (source, own) in enumerate(sources):
        objects.append(str(folder / f"{number}_{source.stem}.o"))
        commands.append([*compiler, *common, *own, "-c", str(source), "-o", objects[-1]])
    return commands, objects


def build(folder: Path, sanitizer: str, flags: str) -> Path:
    """The program under a sanitizer."""
    folder.mkdir(parents=True, exist_ok=True)
    commands, objects = compilations(folder, sanitizer, flags)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    program = folder / "sanitize"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    link = [*compiler, f"-fsanitize={sanitizer}", *objects, "-o", str(program), "-pthread"]
    subprocess.run(link, check=True)
    return program


def main(folder: Path) -> int:
    """Runs everything; returns the exit status."""
    failed = False
    for sanitizer, (flags, faults) in SANITIZERS.items():
        program = build(folder / sanitizer.replace(",", "_"), sanitizer, flags)
        for fault in ("", *faults):
            run = subprocess.run(
                [program, fault] if fault else [program],
                env=os.environ | OPTIONS,
                capture_output=True,
                text=True,
            )
            good = (run.returncode != 0) == bool(fault)
            seen = "ERROR: AddressSanitizer", "runtime error", "WARNING: ThreadSanitizer"
            if fault:  # It must be the sanitizer that says so.
                good = good and any(word in run.stderr for word in seen)
            what = f"planted {fault}" if fault else "the kernels"
            result = ("found" if fault else run.stdout.strip()) if good else "FAILED"
            print(f"{sanitizer}: {what}: {result}", flush=True)
            if not good:
                failed = True
                print(run.stdout, run.stderr, sep="\n", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
