"""The variants of the CUDA kernels: they apply, they compile, and on the host they are right."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from host import host_kernels
from runs import needs_a_real_gpu

from bench import __main__ as cli
from bench import cases, providers, variants
from bench.c_kernels import Operation
from bench.variants import BASELINE, VARIANTS, Built, Variant


def has_nvcc():
    try:
        subprocess.run([variants.nvcc(), "--version"], capture_output=True, check=True)
    except (OSError, RuntimeError, subprocess.CalledProcessError):
        return False
    return True


def test_names_differ():
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    assert VARIANTS[0] == Variant(BASELINE)


def test_an_edit_that_does_not_apply_is_named(tmp_path):
    wrong = Variant("wrong", (("tiles.h", "no such text", ""),))
    with pytest.raises(ValueError, match=r"'wrong': tiles\.h has 0 times 'no such text'"):
        variants.write_sources(wrong, tmp_path)


def test_values_on_the_host(tmp_path):
    def check(variant):
        folder = tmp_path / variant.name.replace(" ", "_")
        csrc = variants.write_sources(variant, folder)
        changed = [
            (csrc / file).read_text() != (host_kernels.CSRC / file).read_text()
            for file, _, _ in variant.edits
        ]
        assert all(changed)
        return variant.name, host_kernels.verdict_on(csrc, folder)

    with ThreadPoolExecutor(2) as pool:
        verdicts = dict(pool.map(check, (variant for variant in VARIANTS if variant.on_host)))
    assert len(verdicts) > 10
    assert verdicts == dict.fromkeys(verdicts, "")


@pytest.mark.skipif(
    not has_nvcc() and os.environ.get("FUSED_EMA_CUDA") != "require", reason="no nvcc"
)
def test_all_compile_without_a_spill(tmp_path):
    # Swaps load and store both sides, and so meet every edit.
    def compile_one(variant):
        return variants.build(variant, tmp_path, "90", ["cuda/swap.cu"])

    with ThreadPoolExecutor(2) as pool:
        built = list(pool.map(compile_one, VARIANTS))
    spilled = {v.name: b.spilled_bytes for v, b in zip(VARIANTS, built, strict=True)}
    assert spilled == dict.fromkeys(spilled, 0)
    assert all(16 <= b.most_registers <= 128 for b in built)


def test_tables_compare_with_the_baseline():
    built = {name: Built(None, 72, 0) for name in (BASELINE, "other", "faulty")}
    run = {"case": "small", "op": "update", "ema_dtype": "float32", "param_dtype": "float32"}
    records = [
        {**run, "variant": BASELINE, "gb_per_s": 2000.0},
        {**run, "variant": "other", "gb_per_s": 2100.0},
    ]
    made, speeds = variants.tables(built, records)
    assert made.rows[1] == ("other", "72", "")
    assert speeds.title == "GB/s, and what a variant adds: (1) small update float32/float32"
    assert speeds.rows == (
        (BASELINE, "2,000"),
        ("other", "+5.0%"),
        ("faulty", "wrong"),
    )


def test_needs_a_gpu_or_only_builds(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        cli.main(["variants"])
    assert "torch sees no CUDA GPU here; --build-only needs none" in capsys.readouterr().err


@pytest.mark.cuda
@needs_a_real_gpu
def test_run_on_a_gpu(tmp_path):
    path = tmp_path / "variants.json"
    argv = ["variants", "--variants", "4 blocks an SM", "--folder", str(tmp_path / "built")]
    argv += ["--max-elements", "100000", "--rounds", "2", "--json", str(path)]
    assert cli.main(argv) == 0
    content = json.loads(path.read_text())
    assert set(content["built"]) == {BASELINE, "4 blocks an SM"}
    assert len(content["records"]) == 2 * len(variants.RUNS)


@pytest.mark.cuda
@needs_a_real_gpu
def test_a_wrong_variant_is_found(tmp_path):
    block = "source.block_tile(kShape, blockIdx.x)"
    edit = ("cuda/loop.cuh", block, block.replace("blockIdx.x", "blockIdx.x - (blockIdx.x == 3)"))
    wrong = Variant("wrong", (edit,))
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    kernels = {
        variant.name: variants.Kernels(variants.build(variant, tmp_path, arch).library)
        for variant in (VARIANTS[0], wrong)
    }
    case = cases.load("odd", 1_000_000)
    lists = providers.Lists(
        *(cases.make_tensors(case, torch.float32, "cuda", 0, side) for side in ("ema", "param"))
    )
    found = variants.compare(kernels, Operation("update", "lerp", 0.125), lists)
    assert list(found) == ["wrong"]
