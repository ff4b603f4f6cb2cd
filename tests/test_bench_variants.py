"""The variants of the CUDA kernels: they apply, they compile, and on the host they are right."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from host import host_kernels
from runs import needs_a_real_gpu

from bench.gpu import variants
from bench.gpu.variants import BASELINE, VARIANTS, Built, Variant


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
        verdicts = dict(pool.map(check, (variant for variant in VARIANTS if not variant.on_hopper)))
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


@pytest.mark.cuda
@needs_a_real_gpu
def test_on_a_gpu_variants_are_timed_and_a_wrong_one_is_found(tmp_path):
    block = "source.block_tile(kShape, blockIdx.x)"
    edit = ("cuda/loop.cuh", block, block.replace("blockIdx.x", "blockIdx.x - (blockIdx.x == 3)"))
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    chosen = (VARIANTS[0], Variant("wrong", (edit,)))
    failures = []
    built = variants.build_all(chosen, tmp_path, arch, failures)
    assert failures == []
    records = variants.run(built, 1_000_000, seconds=0, rounds=2, failures=failures)
    assert len([r for r in records if r["variant"] == BASELINE]) == len(variants.RUNS)
    assert "wrong, odd update float32/float32: " in " ".join(failures)


def test_one_that_does_not_build_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "nvcc", lambda: "false")
    failures = []
    assert variants.build_all(VARIANTS[:2], tmp_path, "90", failures) == {}
    assert [line.splitlines()[0] for line in sorted(failures)] == [
        "variant '256 threads in steps of 4': nvcc failed:",
        "variant 'as it is': nvcc failed:",
    ]
