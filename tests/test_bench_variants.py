"""The variants of the CUDA kernels: they apply, they compile, and on the host they are right."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from host import host_kernels
from runs import needs_a_real_gpu

from bench import __main__ as cli
from bench import report
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
        return variant.name, host_kernels.verdict_on(csrc, folder, averages=False)

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
    built = {name: Built(None, 72, 0, "90", "") for name in (BASELINE, "other", "faulty")}
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


# ---- libraries that were built before


CHOSEN = VARIANTS[:3]
FAKE_NVCC = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo a library >"$2"
echo "ptxas info    : Used 40 registers
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 38 registers" >&2
"""


def no_nvcc():
    raise AssertionError("nvcc was asked for")


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """A folder with what a build left of CHOSEN, where no compiler is."""
    fake = tmp_path / "nvcc"
    fake.write_text(FAKE_NVCC)
    fake.chmod(0o755)
    folder = tmp_path / "libraries"
    with monkeypatch.context() as patch:
        patch.setattr(variants, "nvcc", lambda: str(fake))
        failures = []
        assert list(variants.build_all(CHOSEN, folder, "90", failures)) == [v.name for v in CHOSEN]
        assert failures == []
    monkeypatch.setattr(variants, "nvcc", no_nvcc)
    return folder


@pytest.fixture
def runs(monkeypatch):
    """Of a run on a GPU what it was given: torch sees one, which measures nothing."""
    seen = []

    def run(built, *_):
        seen.append(built)
        return []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(report, "measuring", lambda device: nullcontext({}))
    monkeypatch.setattr(variants, "run", run)
    return seen


def variants_of(*arguments):
    names = ",".join(v.name for v in CHOSEN)
    return cli.main(["variants", "--variants", names, *map(str, arguments)])


def test_what_was_built_is_run_without_a_compiler(libraries, runs, tmp_path):
    assert variants_of("--libraries", libraries, "--json", tmp_path / "out.json") == 0
    (built,) = runs
    assert list(built) == [v.name for v in CHOSEN]
    as_it_is = built[BASELINE]
    assert as_it_is.library == libraries / "as_it_is" / "libvariant.so"
    assert (as_it_is.most_registers, as_it_is.spilled_bytes, as_it_is.arch) == (40, 12, "90")
    assert len({b.fingerprint for b in built.values()}) == len(CHOSEN)
    told = json.loads((tmp_path / "out.json").read_text())["built"]
    assert told[BASELINE] == json.loads((libraries / "as_it_is" / "facts.json").read_text())


@pytest.mark.parametrize("lost", ["libvariant.so", "facts.json"])
def test_a_missing_library_is_named_and_the_rest_is_run(lost, libraries, runs, capsys):
    (libraries / "256_threads_in_steps_of_4" / lost).unlink()
    assert variants_of("--libraries", libraries) == 1
    assert [list(built) for built in runs] == [[BASELINE, CHOSEN[2].name]]
    assert (
        f"FAILED: variant '256 threads in steps of 4': no library in {libraries}"
        in capsys.readouterr().err
    )


def without_the_baseline(folder, monkeypatch):
    (folder / "as_it_is" / "libvariant.so").unlink()


def for_a_later_gpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))


def for_an_earlier_gpu(folder, monkeypatch):
    path = folder / "as_it_is" / "facts.json"
    path.write_text(path.read_text().replace('"90"', '"92"'))


def of_other_sources(folder, monkeypatch):
    old = variants.sources_of
    monkeypatch.setattr(
        variants, "sources_of", lambda v: old(v) | {"tiles.h": old(v)["tiles.h"] + "\n"}
    )


def with_other_flags(folder, monkeypatch):
    monkeypatch.setattr(variants, "_FLAGS", (*variants._FLAGS, "-g"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_the_baseline, "has no library of 'as it is'"),
        (for_a_later_gpu, "was built for sm_90, this GPU is sm_100: build with --arch 100"),
        (for_an_earlier_gpu, "was built for sm_92, this GPU is sm_90: build with --arch 90"),
        (of_other_sources, "was built from other sources"),
        (with_other_flags, "was built from other sources"),
    ],
)
def test_libraries_that_do_not_fit_are_refused(change, message, libraries, runs, monkeypatch):
    change(libraries, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        variants_of("--libraries", libraries)
    assert stopped.value.code == 2
    assert runs == []
    with pytest.raises(RuntimeError, match=message):
        variants.load_all(CHOSEN, libraries, 10 * torch.cuda.get_device_capability()[0], [])


def test_a_failed_build_leaves_nothing_to_run(libraries, monkeypatch):
    monkeypatch.setattr(variants, "nvcc", lambda: "false")
    variants.build_all(CHOSEN[1:], libraries, "90", [])
    failures = []
    assert list(variants.load_all(CHOSEN, libraries, 90, failures)) == [BASELINE]
    assert len(failures) == 2


@pytest.mark.parametrize("more", [["--build-only"], ["--arch", "80"]])
def test_libraries_leave_nothing_to_build(more, libraries, runs, capsys):
    with pytest.raises(SystemExit):
        variants_of("--libraries", libraries, *more)
    assert "--libraries builds nothing" in capsys.readouterr().err
