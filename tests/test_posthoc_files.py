"""Snapshots as files: written whole, kept by a rule, resumed, told apart, read in chunks."""

from __future__ import annotations

import json
import re
import sys
import types
from itertools import pairwise

import pytest
import torch
from processes import in_a_process
from sharded import Net, by_parts
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from units import NUM, Unit, manager, trained

import fused_ema
from fused_ema import EMAManager, _safetensors, posthoc, schedules
from fused_ema.__main__ import main
from fused_ema.formats._files import Replacing
from fused_ema.posthoc import _sum
from fused_ema.posthoc._sum import weighted_sum
from fused_ema.testing import assert_bits_equal

STDS = (0.05, 0.10)


def pair_of(model, **options):
    return [EMAManager(model, momentum_fun=schedules.power(s), **options) for s in STDS]


def run(folder, num=NUM, **options):
    model = Unit()
    pair = pair_of(model)
    snapshots = posthoc.Snapshots(pair, folder, **{"every": 60} | options)
    trained(model, *pair, num=num)
    return model, pair, snapshots


def iterations(folder):
    return sorted({int(path.name[:9]) for path in folder.glob("*.safetensors")})


# ---- what is written


def test_a_snapshot_is_the_average_and_says_what_it_is(tmp_path):
    _, (short, _), _ = run(tmp_path)
    path = tmp_path / "000000240-power-0.05.safetensors"
    found = fused_ema.state.read(path)
    assert_bits_equal(found.ema["weight"], dict(short.named_emas())["weight"], "weight")
    assert (found.format, found.iteration, found.num_updates) == ("safetensors", NUM, NUM)
    head = json.loads(_safetensors.map_file(path)[1]["fused_ema.posthoc"])
    profile = {"kind": "power", "gamma": pytest.approx(16.97, abs=0.01)}
    assert head == {
        "version": 1,
        "run": head["run"],
        "average": "power-0.05",
        "iteration": NUM,
        "interval": 1,
        "dtype": "float32",
        "profile": profile,
    }
    runs = {_safetensors.map_file(p)[1]["fused_ema.posthoc"] for p in tmp_path.iterdir()}
    assert {json.loads(text)["run"] for text in runs} == {head["run"]}


def test_buffers_that_arent_averaged_are_those_of_the_last(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    pair = pair_of(model)
    posthoc.Snapshots(pair, tmp_path, every=5, means=True)
    for _ in range(20):
        model(torch.randn(4, 3))
        for one in pair:
            one.update()
    found = posthoc.reconstruct(tmp_path, std=0.07)
    assert int(found.ema["1.num_batches_tracked"]) == 20
    assert found.ema["1.running_mean"].abs().sum() > 0
    one = posthoc.reconstruct(tmp_path, uniform=(15, 20), max_error=1)
    other = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    posthoc.reconstruct(tmp_path, uniform=(15, 20), max_error=1, into=other)
    for name, tensor in other.state_dict().items():
        assert_bits_equal(tensor, one.ema[name], name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_of_files(dtype, tmp_path):
    _, (_, long), _ = run(tmp_path, dtype=dtype)
    path = tmp_path / "000000240-power-0.1.safetensors"
    written = _safetensors.map_file(path)[0]["weight"]
    assert_bits_equal(written, dict(long.named_emas())["weight"].to(dtype), "weight")
    if dtype == torch.bfloat16:
        with pytest.warns(UserWarning, match="rounding makes up to .* they are torch.bfloat16"):
            found = posthoc.reconstruct(tmp_path, std=0.03, max_error=1)
        assert found.rounding == pytest.approx(found.norm * 2**-8)
        assert found.ema["weight"].dtype == torch.float32
    else:
        found = posthoc.reconstruct(tmp_path, std=0.07)
        assert found.ema["weight"].dtype == torch.float64


def test_an_average_kept_in_bfloat16_is_no_better_in_a_wider_file(tmp_path):
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    pair = pair_of(model, ema_dtype=torch.bfloat16)
    posthoc.Snapshots(pair, tmp_path, every=10)
    for _ in range(40):
        for one in pair:
            one.update()
    with pytest.warns(UserWarning, match="rounding makes up to .* they are torch.bfloat16"):
        found = posthoc.reconstruct(tmp_path, std=0.03, max_error=9)
    assert found.rounding == pytest.approx(found.norm * 2**-8)
    written = _safetensors.map_file(tmp_path / "000000040-power-0.1.safetensors")[0]["weight"]
    assert written.dtype == torch.float32


class OnlyHost(TorchDispatchMode):
    """No operation may see a tensor of another device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "cpu", func
        return result


@pytest.mark.cuda
@pytest.mark.parametrize("means", [False, True])
def test_host_averages_are_saved_without_the_device(means, tmp_path):
    model = nn.Linear(5, 5, device="cuda")
    there, here = pair_of(model), pair_of(model, device="cpu")
    runs = {"there": there, "here": here}
    saves = {
        name: posthoc.Snapshots(pair, tmp_path / name, means=means) for name, pair in runs.items()
    }
    for _ in range(6):
        with torch.no_grad():
            model.weight.mul_(1.5)
        for one in (*there, *here):
            one.update()
    torch.cuda.synchronize()
    with OnlyHost():
        files = saves["here"].save()
    saves["there"].save()
    assert len(files) == 2 + means
    for file in files:
        emas = [_safetensors.map_file(tmp_path / run / file.name)[0] for run in runs]
        for name, ema in emas[0].items():
            assert_bits_equal(emas[1][name], ema, f"{file.name} {name}")


def test_a_save_that_fails_leaves_nothing_that_counts(tmp_path, monkeypatch):
    _, pair, snapshots = run(tmp_path, num=60)

    def torn(file, *_):
        file.write(b"\0" * 100)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(_safetensors, "write_stream", torn)
        for one in pair:
            one.update()
        with pytest.raises(OSError, match="No space left"):
            snapshots.save()
    assert iterations(tmp_path) == [60]
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())
    snapshots.save()
    assert iterations(tmp_path) == [60, 61]


def test_what_a_killed_save_leaves_isnt_read(tmp_path):
    run(tmp_path)
    left = tmp_path / ".000000300-power-0.05.safetensors.77.tmp"
    left.write_bytes(b"\x40")
    assert posthoc.reconstruct(tmp_path, std=0.07).iteration == NUM


def test_what_a_killed_save_leaves_goes_when_the_run_goes_on(tmp_path):
    state, _ = state_at_120(tmp_path)
    left = tmp_path / ".000000180-power-0.05.safetensors.77.tmp"
    left.write_bytes(b"\x40")
    resumed(tmp_path, state)
    assert not left.exists()
    assert iterations(tmp_path) == [60, 120, 180, 240]


def test_the_last_are_kept(tmp_path):
    run(tmp_path, every=20, keep_last=3)
    assert iterations(tmp_path) == [200, 220, 240]
    assert len(list(tmp_path.iterdir())) == 6


def test_some_are_kept_evenly(tmp_path):
    run(tmp_path, every=4, keep_evenly=6)
    kept = iterations(tmp_path)
    assert (kept[0], kept[-1], len(kept)) == (4, 240, 6)
    gaps = [b - a for a, b in pairwise(kept)]
    assert max(gaps) <= 3 * min(gaps)


def test_a_mean_begins_anew_at_each_snapshot(tmp_path):
    model = Unit()
    one = manager(model, 0.01)
    posthoc.Snapshots(one, tmp_path, every=100, at=[130], means=True, averages=False)
    trained(model, one)
    for since, end in ((0, 100), (100, 130), (130, 200)):
        mean = fused_ema.state.read(tmp_path / f"{end:09d}-mean.safetensors").ema["weight"]
        expected = torch.zeros(NUM + 1)
        expected[since + 1 : end + 1] = 1 / (end - since)
        assert torch.allclose(mean, expected, atol=1e-6)


# ---- runs that go on


def resumed(folder, state, mean=None, **options):
    """Goes on at iteration 120, as a script does that was killed at some later one."""
    model = Unit()
    pair = pair_of(model)
    snapshots = posthoc.Snapshots(pair, folder, **{"every": 60} | options)
    for one, saved in zip(pair, state, strict=True):
        one.load_state_dict(saved)
    if mean is not None:
        snapshots.load_state_dict(mean)
    trained(model, *pair, first=120)
    return pair


def state_at_120(folder, **options):
    _, pair, snapshots = run(folder, num=120, **options)
    copied = [{**one.state_dict(), "ema": clones(one)} for one in pair]
    return copied, snapshots.state_dict()


def clones(one):
    return {name: ema.clone() for name, ema in one.named_emas()}


def test_a_resumed_run_goes_on_in_its_folder(tmp_path):
    state, mean = state_at_120(tmp_path / "a", means=True)
    run(tmp_path / "whole", means=True)
    resumed(tmp_path / "a", state, mean, means=True)
    names = [sorted(p.name for p in (tmp_path / f).iterdir()) for f in ("a", "whole")]
    assert names[0] == names[1]
    for name in names[0]:
        tensors = [_safetensors.map_file(tmp_path / f / name)[0] for f in ("a", "whole")]
        assert_bits_equal(tensors[0]["weight"], tensors[1]["weight"], name)
    assert posthoc.reconstruct(tmp_path / "a", std=0.07).iteration == NUM  # One run.


def test_what_a_resumed_run_comes_to_again_is_moved_aside(tmp_path):
    state, _ = state_at_120(tmp_path)
    resumed(tmp_path, state, every=80)  # To 240, with one at 160; and is killed there.
    assert iterations(tmp_path) == [60, 120, 160, 240]
    with pytest.warns(UserWarning, match="goes on at iteration 120, and .* had 4 snapshots"):
        resumed(tmp_path, state)
    assert iterations(tmp_path) == [60, 120, 180, 240]
    assert iterations(tmp_path / "superseded") == [160, 240]


def test_a_mean_without_its_state_says_where_it_begins(tmp_path):
    model, one = Unit(), None
    one = manager(model, 0.01)
    state = {**one.state_dict(), "iteration": 50, "num_updates": 50}
    posthoc.Snapshots(one, tmp_path, every=60, means=True, averages=False)
    one.load_state_dict(state)
    trained(model, one, first=50, num=60)
    ema = fused_ema.state.read(tmp_path / "000000060-mean.safetensors").ema["weight"]
    assert torch.allclose(ema[51:61], torch.full((10,), 0.1))
    assert not ema[:51].any()
    with pytest.warns(UserWarning, match="relative error"):
        found = posthoc.reconstruct(tmp_path, uniform=(30, 60))
    assert found.error == pytest.approx(2**0.5, rel=1e-3)  # 1/10 over 10 for 1/30 over 30.


def test_another_run_in_the_folder_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(FileExistsError, match=r"has 8 snapshots of another run, up to '000000240-"):
        run(tmp_path)
    assert iterations(tmp_path) == [60, 120, 180, 240]


def test_two_runs_in_a_folder_are_told_apart(tmp_path):
    run(tmp_path / "a", run="first")
    run(tmp_path / "b", run="second", num=120)
    for path in (tmp_path / "b").iterdir():
        path.rename(tmp_path / "a" / f"b{path.name}")
    with pytest.raises(ValueError, match=r"2 runs; choose one: run=") as caught:
        posthoc.reconstruct(tmp_path / "a", std=0.07)
    assert "'second': 4 snapshots, iterations 60 to 120" in str(caught.value)
    assert posthoc.reconstruct(tmp_path / "a", std=0.09, run="second", max_error=1).iteration == 120


# ---- settings


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every is 0; it must be a whole number from 1"),
        ({"averages": False}, ValueError, "neither averages nor means"),
        ({"dtype": torch.int8}, ValueError, "dtype is torch.int8; choose from"),
        ({"keep_last": 2, "keep_evenly": 2}, ValueError, "both keep_last and keep_evenly"),
        ({"keep_evenly": 3, "means": True}, ValueError, "windows that no file covers"),
        ({"keep_evenly": 1}, ValueError, "keep_evenly is 1; .* from 2"),
    ],
)
def test_settings_out_of_range(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        posthoc.Snapshots(manager(Unit(), 0.1), tmp_path, **{"every": 5} | options)


def test_managers_that_dont_go_together(tmp_path):
    with pytest.raises(ValueError, match="of several models"):
        posthoc.Snapshots([manager(Unit(), 0.1), manager(Unit(), 0.2)], tmp_path, every=5)
    model = Unit()
    with pytest.raises(ValueError, match="every is 5, no multiple of the manager's interval 2"):
        posthoc.Snapshots(manager(model, 0.1, 2), tmp_path, every=5)
    with pytest.raises(TypeError, match="ema is a Unit; pass an EMAManager"):
        posthoc.Snapshots(model, tmp_path, every=5)
    with pytest.raises(ValueError, match="'a/b' becomes part of a file's name"):
        posthoc.Snapshots({"a/b": manager(model, 0.1)}, tmp_path, every=5)
    one, other = manager(model, 0.1), manager(model, 0.2)
    snapshots = posthoc.Snapshots([one, other], tmp_path)
    with pytest.raises(RuntimeError, match="no update yet"):
        snapshots.save()
    one.update()
    with pytest.raises(RuntimeError, match=r"at the iterations \[1, 0\]"):
        snapshots.save()
    assert not list(tmp_path.iterdir())


# ---- where it goes


def test_into_files_models_and_managers_alike(tmp_path):
    run(tmp_path / "run")
    kept = posthoc.reconstruct(tmp_path / "run", std=0.07).ema["weight"]
    out = tmp_path / "out.safetensors"
    posthoc.reconstruct(tmp_path / "run", std=0.07, into=out)
    assert_bits_equal(fused_ema.state.read(out).ema["weight"], kept, "file")
    model = Unit()
    posthoc.reconstruct(tmp_path / "run", std=0.07, into=model)
    assert_bits_equal(model.weight.detach(), kept, "model")
    model = Unit()
    one = manager(model, 0.1, interval=2)
    posthoc.reconstruct(tmp_path / "run", std=0.07, at=180, into=one)
    assert (one.iteration, one.num_updates) == (180, 90)
    expected = posthoc.reconstruct(tmp_path / "run", std=0.07, at=180).ema["weight"]
    assert_bits_equal(dict(one.named_emas())["weight"], expected, "manager")
    assert_bits_equal(model.weight.detach(), Unit().weight.detach(), "its model stays")
    as_bf16 = posthoc.reconstruct(tmp_path / "run", std=0.07, dtype=torch.bfloat16)
    assert_bits_equal(as_bf16.ema["weight"], kept.bfloat16(), "bf16")


def test_a_model_that_doesnt_fit_stays_as_it_is(tmp_path):
    run(tmp_path)
    other = nn.Linear(2, 2, bias=False)
    was = other.weight.detach().clone()
    with pytest.raises(ValueError, match=r"'weight' has shape \[2, 2\] in the model but \[241\]"):
        posthoc.reconstruct(tmp_path, std=0.07, into=other)
    with pytest.raises(ValueError, match="'weight' is missing in the model"):
        posthoc.reconstruct(tmp_path, std=0.07, into=nn.Sequential(other))
    assert_bits_equal(other.weight.detach(), was, "weight")
    one = manager(Unit(), 0.1)
    with one.swapped(), pytest.raises(RuntimeError, match="swap back first"):
        posthoc.reconstruct(tmp_path, std=0.07, into=one)


@pytest.mark.parametrize("size", [0, 1, 70_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_weighted_sum_in_chunks(size, dtype):
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(size, generator=draw).to(dtype) for _ in range(5)]
    coefficients = [0.3, -1.2, 2.5, 0.01, -0.61]
    out = torch.full((size,), float("nan"), dtype=torch.float64 if dtype.itemsize == 8 else None)
    weighted_sum(out, inputs, coefficients)
    exact = sum(c * x.double() for c, x in zip(coefficients, inputs, strict=True))
    assert torch.allclose(out.double(), exact, rtol=1e-7 if out.dtype == torch.float32 else 1e-15)


def test_a_weighted_sum_of_several_dtypes():
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
    inputs = [torch.tensor([1.5, -0.25, 3.0]).to(dtype) for dtype in dtypes]
    for wide in ([], [torch.tensor([1 / 3, 1e-9, 2.0], dtype=torch.float64)]):
        given = [*inputs, *wide]
        coefficients = [1.0, -2.0, 4.0, 0.5, 0.25][: len(given)]
        exact = sum(c * x.double() for c, x in zip(coefficients, given, strict=True))
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            out = torch.empty(3, dtype=dtype)
            weighted_sum(out, given, coefficients)
            # A narrow one is rounded from fp32.
            rounded = exact if dtype == torch.float64 else exact.float().to(dtype)
            assert_bits_equal(out, rounded, str(dtype))


def test_memory_stays_that_of_a_few_chunks(tmp_path):
    """8 files of 16 MB into another: the process grows by less than half of them."""
    assert float(in_a_process(megabytes_grown, str(tmp_path))) < 64


def megabytes_grown(folder):
    import resource
    from pathlib import Path

    # So that it can't hold them all; the system maps up to 4 MB more of each as it likes.
    _sum._BLOCK_BYTES = 1 << 18
    folder = Path(folder)
    model = nn.Linear(1, 4_000_000, bias=False)
    pair = pair_of(model)
    posthoc.Snapshots(pair, folder, every=1)
    for _ in range(4):
        for one in pair:
            one.update()
    # A peak can't be taken back: of a process of its own, and before what is measured.
    small = folder / "small"
    run(small)
    posthoc.reconstruct(small, std=0.07, into=small / "out.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = posthoc.reconstruct(folder, std=0.07, into=folder / "out.safetensors", max_error=1)
    assert len(found.used) == 8
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


# ---- what is read


def test_a_truncated_file_is_named_and_the_others_serve(tmp_path):
    run(tmp_path)
    path = tmp_path / "000000120-power-0.1.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=r"left out: '.*000000120-power-0.1.* can't be read"):
        found = posthoc.reconstruct(tmp_path, std=0.07)
    assert len(found.used) == 7
    assert [path.name in line for line in found.problems] == [True]


def test_a_profile_that_is_missing(tmp_path):
    run(tmp_path, num=60)
    for path in tmp_path.glob("*-power-0.1.*"):
        tensors, metadata = _safetensors.map_file(path)
        head = json.loads(metadata["fused_ema.posthoc"])
        del head["profile"]
        with Replacing(path) as file:
            _safetensors.write_file(
                file, tensors, metadata | {"fused_ema.posthoc": json.dumps(head)}
            )
    with pytest.warns(UserWarning, match="has no profile that can be read"):
        found = posthoc.reconstruct(tmp_path, std=0.05)
    assert len(found.used) == 1


def test_snapshots_of_different_models(tmp_path):
    run(tmp_path, run="same", num=60)
    model = nn.Linear(2, 2)
    posthoc.Snapshots(manager(model, 0.1), tmp_path / "b", every=1, run="same")._managers[
        0
    ].update()
    for path in (tmp_path / "b").iterdir():
        path.rename(tmp_path / path.name)
    with pytest.raises(ValueError, match=r"different models: '0.*' has 'bias', which '0"):
        posthoc.reconstruct(tmp_path, std=0.07)


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match=r"has no snapshots$"):
        posthoc.reconstruct(tmp_path, std=0.07)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        posthoc.reconstruct(tmp_path / "nowhere", std=0.07)


def fake_dnnlib(monkeypatch):
    class EasyDict(dict):
        __module__ = "dnnlib.util"

    module = types.ModuleType("dnnlib.util")
    module.EasyDict = EasyDict
    EasyDict.__qualname__ = "EasyDict"
    monkeypatch.setitem(sys.modules, "dnnlib", types.ModuleType("dnnlib"))
    monkeypatch.setitem(sys.modules, "dnnlib.util", module)
    return EasyDict


def test_training_states_of_edm2(tmp_path, monkeypatch):
    """What its CheckpointIO saves; the class of its progress isn't installed when it is read."""
    model, batch = Unit(), 32
    pair = pair_of(model)
    with monkeypatch.context() as patched:
        easy = fake_dnnlib(patched)
        for i in range(NUM):
            model.at(i + 1)
            for one in pair:
                one.update()
            if (i + 1) % 40 == 0:
                content = {
                    "state": easy(cur_nimg=(i + 1) * batch, total_elapsed_time=1.5),
                    "net": {"weight": model.weight.detach().clone()},
                    "optimizer": {},
                    "ema": {"stds": list(STDS), "emas": [clones(one) for one in pair]},
                }
                torch.save(content, tmp_path / f"training-state-{(i + 1) * batch // 1000:07d}.pt")
    (tmp_path / "network-snapshot-0000007-0.100.pkl").write_bytes(b"\x80\x04N.")
    with pytest.warns(UserWarning, match=r"pickled network of EDM2, .*training-state-\*.pt has"):
        found = posthoc.reconstruct(tmp_path, std=0.075)
    assert found.iteration == NUM * batch
    run(tmp_path / "own", every=40)
    own = posthoc.reconstruct(tmp_path / "own", std=0.075)
    assert found.error == pytest.approx(own.error)
    assert torch.allclose(found.ema["weight"], own.ema["weight"], atol=1e-6)


@pytest.mark.parametrize("update_every", [1, 10])
def test_a_folder_of_ema_pytorch(update_every, tmp_path):
    """Files as PostHocEMA lays them, by its own rule; its count is one ahead."""
    gammas = [schedules._gamma_of_std(std) for std in STDS]
    emas = [torch.zeros(NUM + 1, dtype=torch.float64) for _ in STDS]
    for step in range(NUM):
        if step % update_every:
            continue
        for ema, gamma in zip(emas, gammas, strict=True):
            if step == 0:
                ema[1] = 1
            momentum = 1 - (1 - 1 / (step + 2)) ** (gamma + 1)
            ema.mul_(1 - momentum)[step + 1] += momentum
        if update_every > 1 or (step + 1) % 20 == 0:
            for i, ema in enumerate(emas):
                content = {"initted": torch.tensor(1.0), "step": torch.tensor(float(step + 1))}
                torch.save(
                    content | {"ema_model.weight": ema.float()}, tmp_path / f"{i}.{step + 1}.pt"
                )
    with pytest.raises(ValueError, match=r"pass the sigma_rels of the PostHocEMA"):
        posthoc.reconstruct(tmp_path, std=0.07)
    found = posthoc.reconstruct(
        tmp_path, std=0.15, profiles=STDS, update_every=update_every, max_error=9
    )
    last = NUM if update_every == 1 else NUM - update_every + 1
    assert found.iteration == last
    times = torch.arange(last, dtype=torch.float64)
    gamma = schedules._gamma_of_std(0.15)
    expected = ((times + 1) / last) ** (gamma + 1) - (times / last) ** (gamma + 1)
    # An update stands for the interval that it ends, inside of which nothing can be told apart.
    cells = [(max(0, end - update_every), end) for end in range(1, last + 1, update_every)]
    weights = torch.stack([found.ema["weight"][b].double() / (b - a) ** 0.5 for a, b in cells])
    expected = torch.stack([expected[a:b].sum() / (b - a) ** 0.5 for a, b in cells])
    off = float((weights - expected).norm() / expected.norm())
    # Of one that updates each time as of a power function one iteration before.
    assert off < (0.02 if update_every == 1 else 1.01 * found.error + 1e-6)
    assert found.error < 0.02


def checkpoints(folder, suffix):
    folder.mkdir()
    values = {}
    for step in (900, 1000, 1100):
        values[step] = {"w": torch.full((3,), float(step)), "n": torch.tensor(step)}
        if suffix == "safetensors":
            path = folder / f"checkpoint-{step}.safetensors"
            with Replacing(path) as file:
                _safetensors.write_file(file, values[step], {"format": "pt"})
        else:
            torch.save({"state_dict": values[step], "epoch": 3}, folder / f"step{step}.pt")
    return values


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_plain_checkpoints_are_merged_and_not_taken_for_averages(suffix, tmp_path):
    checkpoints(tmp_path / "plain", suffix)
    with pytest.raises(ValueError, match=r"3 plain checkpoints, which don't say .* merge\(\)"):
        posthoc.reconstruct(tmp_path / "plain", std=0.1)
    found = posthoc.merge(tmp_path / "plain")
    assert torch.allclose(found.ema["w"], torch.full((3,), 1000.0))
    assert int(found.ema["n"]) == 1100
    assert found.iteration == 1100
    assert posthoc.merge(tmp_path / "plain", last=1).ema["w"].tolist() == [1100.0] * 3
    found = posthoc.merge(tmp_path / "plain", [0.5, 0.0, 0.5], last=3)
    assert found.ema["w"].tolist() == [1000.0] * 3
    run(tmp_path / "run")
    with pytest.raises(ValueError, match="has no plain checkpoints"):
        posthoc.merge(tmp_path / "run")


@pytest.mark.parametrize("how", ["linear", "cosine", "1-sqrt"])
def test_a_merge_is_the_decay_that_it_stands_for(how, tmp_path):
    """Weights that take a step of their own at each iteration, at a rate that never falls."""
    num = 8
    tmp_path.joinpath("run").mkdir()
    for step in range(num):
        weights = torch.zeros(num)
        weights[: step + 1] = 1
        torch.save({"w": weights}, tmp_path / "run" / f"{step}.pt")
    merged = posthoc.merge(tmp_path / "run", how).ema["w"]
    left = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * x)),
        "1-sqrt": lambda x: 1 - x**0.5,
    }[how]
    expected = torch.tensor([float(left(j / num)) for j in range(num)])
    assert torch.allclose(merged, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "mean"}, "how is 'mean'; choose from uniform, linear, cosine, 1-sqrt"),
        ({"how": [1.0]}, "1 coefficients for 3 checkpoints"),
        ({"last": 0}, "last is 0"),
    ],
)
def test_merges_that_cant_be(options, message, tmp_path):
    checkpoints(tmp_path / "plain", "pt")
    with pytest.raises(ValueError, match=message):
        posthoc.merge(tmp_path / "plain", **options)


# ---- from a shell


def test_inspect_says_what_can_be_had(tmp_path, capsys):
    run(tmp_path, every=15, run="r1")
    assert main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "32 of fused_ema, run r1" in said
    assert re.search(
        r"^power-0.05 +16, iterations 15 to 240: a power function of std 0.05", said, re.M
    )
    errors = dict(re.findall(r"--std ([\d.]+) +error ([\d.e-]+)", said))
    for std in (0.03, 0.075, 0.2):
        found = posthoc.reconstruct(tmp_path, std=std)
        assert errors[f"{std:g}"] == f"{found.error:.2g}"
    assert re.search(r"--uniform 192:240 +error 0.14 .* too far off", said)


def test_reconstruct_in_a_shell(tmp_path, capsys):
    run(tmp_path / "run")
    out = tmp_path / "o.safetensors"
    assert main(["reconstruct", str(tmp_path / "run"), "--std", "0.07", str(out)]) == 0
    said = capsys.readouterr().out
    assert "std 0.07 at iteration 240, of 8 files, relative error" in said
    expected = posthoc.reconstruct(tmp_path / "run", std=0.07)
    assert_bits_equal(fused_ema.state.read(out).ema["weight"], expected.ema["weight"], "weight")
    command = ["reconstruct", str(tmp_path / "run"), "--uniform", "60:240", str(out)]
    assert main(command) == 0
    assert "uniform over iterations 60 to 240" in capsys.readouterr().out
    checkpoints(tmp_path / "plain", "pt")
    command = ["reconstruct", str(tmp_path / "plain"), "--merge", "uniform", "--last", "2"]
    assert main([*command, str(out)]) == 0
    assert "uniform merge of 2 checkpoints, of 2 files, " in capsys.readouterr().out
    assert main(["reconstruct", str(tmp_path / "run"), "--std", "0.4", str(out)]) == 2
    assert "std is 0.4; it must be at most 0.2887" in capsys.readouterr().err


SCORE = """
import json, struct, sys
with open(sys.argv[1], "rb") as file:
    entry = json.loads(file.read(int.from_bytes(file.read(8), "little")))["weight"]
    begin, end = entry["data_offsets"]
    weights = struct.unpack(f"<{(end - begin) // 4}f", file.read()[begin:end])
print(f"of {len(weights)}:", sum(w * w for w in weights))
"""


def test_a_sweep_asks_a_command_for_each(tmp_path, capsys):
    run(tmp_path / "run", every=15)
    script = tmp_path / "score.py"
    script.write_text(SCORE)
    sweep = ["sweep", str(tmp_path / "run"), "--std", "0.05:0.2:3"]
    plot = tmp_path / "curve.png"
    command = [*sweep, "--eval", f"{sys.executable} {script}", "--lower-is-better"]
    assert main([*command, "--plot", str(plot)]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines()[1:4]]
    assert [row[0] for row in rows] == ["0.05", "0.1", "0.2"]
    for row in rows:
        weights = posthoc.reconstruct(tmp_path / "run", std=float(row[0])).ema["weight"]
        assert float(row[2]) == pytest.approx(float(weights.square().sum()), rel=1e-4)
    assert "best: std 0.2" in said
    assert "at the end of the range" in said
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main([*sweep, "--eval", f"{sys.executable} -c 'raise SystemExit(3)'"]) == 2
    assert "ended with status 3: it said nothing" in capsys.readouterr().err
    assert main([*sweep, "--eval", f"{sys.executable} -c 'print(None)'"]) == 2
    assert "printed no number: 'None'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print(7, path)", "best: std 0.05, 7\n"),
        ("print(3, 'nan' if '0.05' in path else 5)", "best: std 0.1, 5\n"),
        ("print('loss 3 nan')", "error: --eval: no score is a finite number\n"),
    ],
)
def test_scores_of_a_sweep(code, said, tmp_path, capsys):
    """A file's name is no score, and neither is the number before one that isn't finite."""
    run(tmp_path / "run")
    script = tmp_path / "score.py"
    script.write_text(f"import sys; path = sys.argv[1]; {code}")
    sweep = ["sweep", str(tmp_path / "run"), "--std", "0.05:0.2:3", "--eval"]
    main([*sweep, f"{sys.executable} {script}"])
    assert said in "".join(capsys.readouterr())


# ---- ranks


def sharded_run(folder):
    model = by_parts(Net())
    whole = Net()
    managers = [pair_of(model), pair_of(whole)]
    from pathlib import Path

    import torch.distributed as dist

    rank = dist.get_rank()
    posthoc.Snapshots(managers[0], Path(folder) / "sharded", every=3, means=True)
    posthoc.Snapshots(managers[1], Path(folder) / f"whole{rank}", every=3, means=True)
    draw = torch.Generator().manual_seed(0)
    for _ in range(9):
        with torch.no_grad():
            for (_, shard), (_, plain) in zip(
                model.named_parameters(), whole.named_parameters(), strict=True
            ):
                step = torch.randn(plain.shape, generator=draw)
                plain.add_(step)
                part = torch.distributed.tensor.distribute_tensor(
                    step, shard.device_mesh, shard.placements
                )
                shard.add_(part)
        for one in (*managers[0], *managers[1]):
            one.update()
    dist.barrier()
    posthoc.reconstruct(Path(folder) / "sharded", std=0.08, max_error=9, into=managers[0][0])
    posthoc.reconstruct(Path(folder) / "whole0", std=0.08, max_error=9, into=managers[1][0])
    expected = dict(managers[1][0].named_emas())
    for name, ema in managers[0][0].named_emas():
        full = ema.full_tensor() if hasattr(ema, "full_tensor") else ema
        assert_bits_equal(full, expected[name], name)


def test_a_sharded_run_writes_what_a_whole_one_does(two, tmp_path):
    two(sharded_run, str(tmp_path))
    files = sorted(path.name for path in (tmp_path / "sharded").iterdir())
    # Of processes that hold all of it the first one writes.
    assert files == sorted(path.name for path in (tmp_path / "whole0").iterdir())
    assert not (tmp_path / "whole1").exists()
    assert len(files) == 9
    for name in files:
        found, expected = (
            _safetensors.map_file(tmp_path / folder / name)[0] for folder in ("sharded", "whole0")
        )
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert_bits_equal(found[key], tensor, f"{name} {key}")
