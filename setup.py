"""Builds fused_ema._C: C++ with the host compiler, .cu files with nvcc, both driven by ninja.

torch.utils.cpp_extension is not used for the build: it knows no CUDA where torch was built for
CPU, has no flags per source file (the CPU kernels are compiled once per instruction set), and
leaves out -fopenmp, without which at::parallel_for is silently serial.

Build switches (environment):
  FUSED_EMA_BUILD  auto (default: without a compiler the package installs on torch._foreach alone,
                   and says so), require (a failed build is an error), off
  FUSED_EMA_CUDA   auto (default: with nvcc, the CUDA kernels too), require, off
  CUDA_HOME, CXX   the usual meaning
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
CUDA_ARCHS = ("80", "90", "100")

CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # An FMA stands where ema_math.h says so and nowhere else, on every platform.
    "-ffp-contract=off",
    # The kernels view tensors' memory as words of other types.
    "-fno-strict-aliasing",
]
# __Y of avx512fintrin.h "may be used uninitialized": GCC bug 105593, GCC 12 and 13.
AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -Wno-maybe-uninitialized"
INSTRUCTION_SETS = {"generic": ""}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {"avx2": "-mavx2 -mfma -mf16c", "avx512": AVX512}
KERNEL_SOURCES = ("update.cpp", "swap.cpp", "copy.cpp", "weighted_sum.cpp")


def digest(files: Iterable[Path]) -> str:
    """Of what the files hold."""
    whole = hashlib.sha256()
    for path in files:
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:16]


def fingerprint() -> str:
    """Of all that a module is made of here: csrc/, and this file, which has the flags."""
    sources = sorted(path for path in CSRC.rglob("*") if path.is_file())
    return digest([*sources, ROOT / "setup.py"])


class BuildError(RuntimeError):
    """A build that can't be done here, with the reason that info() shows."""


def find_cuda() -> Path | None:
    """The toolkit's root: CUDA_HOME, nvcc on the PATH (through its wrapper), or the usual place."""
    if os.environ.get("FUSED_EMA_CUDA", "auto") == "off":
        return None
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        # A wrapper script may lie far from the toolkit; nvcc itself knows its root.
        told = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "/dev/null", "-c"], capture_output=True, text=True
        ).stderr
        tops = [line.split("=", 1)[1] for line in told.splitlines() if line.startswith("#$ TOP=")]
        roots += [*tops, str(Path(nvcc).resolve().parent.parent)]
    roots.append("/usr/local/cuda")
    for root in roots:
        if root and (Path(root) / "bin" / "nvcc").exists():
            return Path(root).resolve()
    if os.environ.get("FUSED_EMA_CUDA") == "require":
        raise BuildError("FUSED_EMA_CUDA=require, but no nvcc was found; set CUDA_HOME")
    return None


def cuda_version(cuda: Path) -> str:
    """As nvcc tells it: "13.0"."""
    text = subprocess.run([cuda / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    return text.stdout.split("release ")[-1].split(",")[0]


def cuda_library_dir(cuda: Path) -> Path:
    """Where the static runtime lies; distributions differ."""
    for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (cuda / name / "libcudart_static.a").exists():
            return cuda / name
    raise BuildError(
        f"{cuda} holds no libcudart_static.a; install the CUDA runtime's static library"
    )


class NinjaFile:
    """The text of a build.ninja: rules, then one edge an object."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.5", ""]

    def rule(self, name: str, command: str, depfile: bool = True) -> None:
        """How to make a kind of file; depfile: the command lists the headers it read."""
        self.lines += [f"rule {name}", f"  command = {command}"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]
        self.lines.append("")

    def edge(self, out: Path, rule: str, sources: list[Path], **variables: str) -> None:
        """One file to make, and what from."""
        escaped = " ".join(str(s).replace(" ", "$ ").replace(":", "$:") for s in sources)
        name = str(out).replace(" ", "$ ").replace(":", "$:")
        self.lines.append(f"build {name}: {rule} {escaped}")
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"


def ninja_file(objects: Path, target: Path, cuda: Path | None) -> NinjaFile:
    """Every object of the module, and the link."""
    import pybind11
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    cxx = os.environ.get("CXX", "c++")
    if shutil.which(shlex.split(cxx)[0]) is None:
        raise BuildError(f"no C++ compiler: '{cxx}' is not on the PATH")
    includes = [pybind11.get_include(), *include_paths(), sysconfig.get_path("include")]
    torch_flags = [f"-isystem {shlex.quote(path)}" for path in includes]
    torch_flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    if cuda is not None:
        torch_flags.append("-DFUSED_EMA_WITH_CUDA")

    file = NinjaFile()
    file.rule("cxx", f"{cxx} -MD -MF $out.d {' '.join(CXX_FLAGS)} $flags -c $in -o $out")
    file.rule("link", f"{cxx} -shared -fopenmp $in -o $out $flags", depfile=False)
    outputs = []

    def compile_to(name: str, rule: str, source: Path, flags: str) -> None:
        outputs.append(objects / f"{name}.o")
        file.edge(outputs[-1], rule, [source], flags=flags)

    for source in sorted(CSRC.glob("*.cpp")):
        compile_to(source.stem, "cxx", source, " ".join(torch_flags))
    compile_to("cpu_launch", "cxx", CSRC / "cpu" / "launch.cpp", "")
    for isa, flags in INSTRUCTION_SETS.items():
        for name in KERNEL_SOURCES:
            defined = f"-DFUSED_EMA_ISA={isa} {flags}"
            compile_to(f"cpu_{isa}_{name[:-4]}", "cxx", CSRC / "cpu" / name, defined)

    libraries = [f"-L{shlex.quote(path)}" for path in library_paths()]
    libraries += ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    # Where torch lies beside the package, wherever a wheel is installed; importing fused_ema has
    # loaded it before in any case. Ninja reads $$ as $.
    libraries.append("-Wl,-rpath,'$$ORIGIN/../torch/lib'")
    if cuda is not None:
        archs = [f"-gencode arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
        archs.append(f"-gencode arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}")
        nvcc = shlex.quote(str(cuda / "bin" / "nvcc"))
        flags = f"-std=c++17 -O3 -Xcompiler -fPIC {' '.join(archs)} -Werror all-warnings"
        # ptxas turns a register spill into a warning, and -Werror the warning into an error.
        flags += " -Xptxas -warn-spills -Xptxas -Werror"
        names = " ".join(CUDA_ARCHS)
        flags += f" '-DFUSED_EMA_CUDA_ARCHS=\"{names}\"'"
        file.rule("nvcc", f"{nvcc} -MD -MF $out.d {flags} -c $in -o $out")
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            compile_to(f"cuda_{source.stem}", "nvcc", source, "")
        # Static, so that the module loads where there is no CUDA runtime and no GPU.
        libraries.append(f"-L{shlex.quote(str(cuda_library_dir(cuda)))} -lcudart_static")
        libraries += ["-lrt", "-ldl", "-lpthread", "-Wl,--exclude-libs,ALL"]
    file.edge(target, "link", outputs, flags=" ".join(libraries))
    return file


class NinjaBuildExt(build_ext):
    """Builds through ninja, or writes down why not."""

    def build_extension(self, ext: Extension) -> None:
        """Builds the module and writes the facts of the build beside it."""
        wanted = os.environ.get("FUSED_EMA_BUILD", "auto")
        if wanted not in ("auto", "require", "off"):
            raise SystemExit(f"FUSED_EMA_BUILD is '{wanted}'; choose auto, require or off")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        if wanted == "off":
            facts: dict[str, object] = {"native": False, "reason": "built with FUSED_EMA_BUILD=off"}
        else:
            try:
                facts = self._build(target)
            except (BuildError, ImportError, OSError, subprocess.CalledProcessError) as error:
                if wanted == "require":
                    raise
                facts = {"native": False, "reason": f"the build failed: {error}"}
                print(f"fused_ema: {facts['reason']}; installing without it", file=sys.stderr)
        if not facts["native"] and target.exists():
            target.unlink()
        (target.parent / "_build_info.json").write_text(json.dumps(facts, indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        """For --inplace and editable installs: the facts go beside the module."""
        super().copy_extensions_to_source()
        package = ROOT / "fused_ema"
        built = Path(self.build_lib).resolve() / "fused_ema"
        shutil.copy(built / "_build_info.json", package)
        for module in package.glob("_C.*.so"):
            if not (built / module.name).exists():
                module.unlink()  # of an earlier build, which the facts no longer speak of

    def _build(self, target: Path) -> dict[str, object]:
        import torch

        if sys.platform != "linux":
            raise BuildError(f"the compiled part is built on Linux only, this is {sys.platform}")
        ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if ninja is None:
            raise BuildError("ninja is not installed; pip install ninja")
        cuda = find_cuda()
        sources = fingerprint()  # Before they are read: a later change must show.
        objects = Path(self.build_temp).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(str(ninja_file(objects, target, cuda)))
        command = [ninja, "-C", str(objects)]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        if not self.verbose:
            command.append("--quiet")
        subprocess.run(command, check=True)
        return {
            "native": True,
            "torch": torch.__version__,
            "cuda": cuda_version(cuda) if cuda is not None else None,
            "instruction_sets": list(INSTRUCTION_SETS),
            "sources": sources,
            "module": digest([target]),
        }


if __name__ == "__main__":  # tests/sanitize/sanitize.py reads the flags above.
    setup(
        ext_modules=[Extension("fused_ema._C", sources=[], optional=True)],
        cmdclass={"build_ext": NinjaBuildExt},
    )
