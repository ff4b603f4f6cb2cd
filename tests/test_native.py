"""The compiled part: what is built in, what happens without it, how the CPU kernels are chosen."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import instruction_sets

import fused_ema
from fused_ema import _native
from fused_ema.testing import DTYPE_PAIRS, EDGE_SIZES, assert_bits_equal, make_lists

ROOT = Path(__file__).parents[1]


def test_the_compiled_part_is_in_use():
    # The suite proves nothing about kernels that were not built.
    assert _native.C is not None, _native.why_not
    assert fused_ema.info().native


def test_info_names_a_backend_for_every_pair():
    info = fused_ema.info()
    assert info.version == fused_ema.__version__
    assert info.backends["cpu"] == {f"{str(a)[6:]}/{str(b)[6:]}": "cpu" for a, b in DTYPE_PAIRS}
    assert info.reasons.get("cpu") is None
    assert info.instruction_set in ("avx512", "avx2", "generic")
    text = str(info)
    assert f"torch {torch.__version__}" in text
    assert "cpu: cpu for float32/float32" in text


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="built where no nvcc was found")
def test_cuda_kernels_are_built_where_nvcc_is():
    assert fused_ema.info().cuda_architectures == ("80", "90", "100")
    # Linked statically: importing needs neither a CUDA runtime nor a GPU.
    needed = subprocess.run(["ldd", _native.C.__file__], capture_output=True, text=True).stdout
    assert "libcudart" not in needed
    assert "libcuda.so" not in needed


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")
def test_a_cuda_device_that_is_not_there_has_a_reason():
    backend, reason = _native.C.service_of("cuda:0")
    assert backend == "foreach"
    assert reason


def test_parallel_for_is_parallel():
    # Built without -fopenmp, at::parallel_for is silently serial.
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert _native.C.runs_parallel()
    finally:
        torch.set_num_threads(before)


def test_unknown_instruction_sets_are_refused():
    before = _native.C.instruction_set()
    assert not _native.C.set_instruction_set("mmx")
    assert _native.C.instruction_set() == before
    assert "generic" in instruction_sets()


@pytest.mark.parametrize("layout", ["contiguous", "each misaligned"])
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=str)
def test_every_instruction_set_gives_the_same_bits(pair, layout):
    def run_all(name):
        assert _native.C.set_instruction_set(name)
        results = []
        for operation in (
            lambda plan: plan.update(0.1),
            lambda plan: plan.update(0.8),
            lambda plan: plan.update(0.1, "mul_add"),
            lambda plan: plan.swap(),
            lambda plan: plan.copy_to_ema(),
            lambda plan: plan.copy_to_params(),
        ):
            ema, params = make_lists([n for n in EDGE_SIZES if n], pair, layout)
            operation(fused_ema.Plan(ema, params))
            results += ema + params
        return results

    kept = _native.C.instruction_set()
    try:
        results = {name: run_all(name) for name in instruction_sets()}
    finally:
        _native.C.set_instruction_set(kept)
    for name, tensors in results.items():
        for got, want in zip(tensors, results["generic"], strict=True):
            assert_bits_equal(got, want, f"{name} against generic")


def test_no_code_is_shared_between_instruction_sets():
    # A weak symbol in an AVX-512 object may become everyone's copy, and crash older machines.
    objects = sorted((ROOT / "build").glob("temp.*/cpu_avx*_*.o"))
    if not objects:
        pytest.skip("no build folder: an installed package, or another architecture")
    assert len(objects) == 2 * 4  # Sets, and update, swap, copy and the weighted sum.
    for path in objects:
        names = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        for line in names.stdout.splitlines():
            _, kind, name = re.match(r"([0-9a-f]*) +(\S) (.*)", line).groups()
            assert kind.islower() or kind == "U" or f"cpu::{path.stem.split('_')[1]}::" in name


def run_python(code, package_parent):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=package_parent,
        env={"PYTHONPATH": str(package_parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def copied_package(tmp_path):
    shutil.copytree(
        ROOT / "fused_ema", tmp_path / "fused_ema", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path


USE = """
import torch, fused_ema
ema, params = [torch.zeros(3), torch.zeros(2)], [torch.ones(3), torch.ones(2)]
fused_ema.update_(ema, params, 0.25)
plan = fused_ema.Plan(ema, params)
plan.update(0.5)
plan.swap()
torch.ops.fused_ema.update_(ema, params, 0.5)
assert torch.equal(params[0], torch.full((3,), 0.625)), params
assert torch.equal(ema[0], torch.full((3,), 0.8125)), ema
print(fused_ema.info())
"""


def without_module(package):
    for module in package.glob("_C*.so"):
        module.unlink()


def never_built(package):
    without_module(package)
    (package / "_build_info.json").unlink()


def built_off(package):
    without_module(package)
    (package / "_build_info.json").write_text(
        json.dumps({"native": False, "reason": "no C++ compiler: 'c++' is not on the PATH"})
    )


def of_another_torch(package):
    facts = json.loads((package / "_build_info.json").read_text())
    (package / "_build_info.json").write_text(json.dumps(facts | {"torch": "1.13.0"}))


def damaged(package):
    next(package.glob("_C*.so")).write_bytes(b"not a library")


@pytest.mark.parametrize(
    ("breakage", "reason"),
    [
        (without_module, "the compiled part does not load"),
        (never_built, "the package was never built"),
        (built_off, "no C++ compiler"),
        (of_another_torch, "built with torch 1.13.0 but torch"),
        (damaged, "the compiled part does not load"),
    ],
)
def test_it_works_without_the_compiled_part_and_says_why(copied_package, breakage, reason):
    breakage(copied_package / "fused_ema")
    result = run_python(USE, copied_package)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("RuntimeWarning: fused_ema runs on torch._foreach") == 1
    assert reason in result.stderr
    assert f"compiled part: none ({reason}" in result.stdout
    assert "cpu: foreach for" in result.stdout


def test_importing_needs_torch_alone_and_prints_nothing(copied_package):
    result = run_python(
        "import sys, fused_ema\n"
        "extras = {'matplotlib', 'rich', 'hypothesis', 'mmcv', 'mmengine', 'lightning',"
        " 'transformers', 'timm', 'diffusers'}\n"
        "assert not extras & set(sys.modules), extras & set(sys.modules)\n"
        "assert not [name for name in sys.modules if name.startswith('fused_ema.hooks')]",
        copied_package,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
