"""Runs a Python module on a GPU that is only pretended, to see its code work where there is none.

    python tests/pretend/run.py pytest -m cuda --require-cuda
    python tests/pretend/run.py bench step --tiny

Needs a torch built for CUDA, and nvcc's headers. The device's memory is the host's, the kernels'
own code runs on the processor (runtime.cpp), torch's operations are those of its CPU backend
(torch_on_cpu.py). What the host does, launches, captures and frees is real; speed, concurrency and
the arithmetic of a GPU are not. It builds a copy of the project in build/pretend. PRETEND_GB says
how much memory the device has: 6 by default, and one test needs 20. With PRETEND_NO_WORK set our
launches do nothing, so that what the host does before them can be timed (`bench host`).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILT = ROOT / "build" / "pretend"
# In setup.py: what stands there, and what becomes of it. g++ compiles the CUDA kernels, with the
# header beside this file, and the runtime is the pretended one.
FLAGS = "-std=c++20 -O2 -mfma -fPIC -ffp-contract=off -fno-strict-aliasing -w -x c++"
CHANGES = (
    ("CSRC = ROOT", f"PRETEND_FLAGS = {f'{FLAGS} -I{HERE}'!r}\nCSRC = ROOT"),
    (
        'f"{nvcc} -MD -MF $out.d {flags} -c $in -o $out"',
        'f"{cxx} -MD -MF $out.d {PRETEND_FLAGS} -I{cuda}/include -c $in -o $out"',
    ),
    (
        'f"-L{shlex.quote(str(cuda_library_dir(cuda)))} -lcudart_static"',
        "os.environ['PRETEND_RUNTIME']",
    ),
)


def build() -> dict[str, str]:
    """Builds the runtime and the project; returns the environment to run in."""
    copy = BUILT / "project"
    ignored = shutil.ignore_patterns(
        *(".git", ".venv*", "build", "*.so", "_build_info.json", "__pycache__", ".*_cache")
    )
    shutil.copytree(ROOT, copy, ignore=ignored, dirs_exist_ok=True)
    setup = copy / "setup.py"
    text = setup.read_text()
    for old, new in CHANGES:
        if text.count(old) != 1:
            sys.exit(f"setup.py has {text.count(old)} times {old}")
        text = text.replace(old, new)
    setup.write_text(text)

    cuda = subprocess.run(
        [sys.executable, "-c", "import setup; print(setup.find_cuda() or '')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if not cuda:
        sys.exit("no nvcc here, whose headers this needs")
    # By this name the driver's library counts as loaded already.
    runtime = BUILT / "libcuda.so.1"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-w", f"-I{cuda}/include"]
    command += [f"-Wl,-soname,{runtime.name}", str(HERE / "runtime.cpp"), "-o", str(runtime)]
    subprocess.run(command, check=True)
    env = os.environ | {"PRETEND_RUNTIME": str(runtime), "FUSED_EMA_BUILD": "require"}
    build_it = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(build_it, cwd=copy, env=env, check=True)
    path = os.pathsep.join([str(HERE), str(copy), os.environ.get("PYTHONPATH", "")])
    return env | {"LD_PRELOAD": str(runtime), "PYTHONPATH": path}


def main() -> int:
    """Builds, then runs the module; returns its exit status."""
    module, *arguments = sys.argv[1:] or ["pytest", "-m", "cuda", "--require-cuda"]
    env = build()
    # Pytest's workers (-n 2) are processes of their own, and load it by this variable as well.
    first = "" if module == "pytest" else "import torch_on_cpu; "
    env["PYTEST_PLUGINS"] = "torch_on_cpu"
    code = f"{first}import runpy, sys; sys.argv = sys.argv[1:]; "
    code += f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", code, module, *arguments]
    return subprocess.run(command, cwd=BUILT / "project", env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
