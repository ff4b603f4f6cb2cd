from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

import fused_ema
from bench import __main__ as cli
from bench import manager, report
from bench.providers import Lists

CPU = torch.device("cpu")
AVERAGING = ("plan", "update", "schedule", "naive")
STAYING = ("skip", "swapped", "naive swapped")
QUICK = ["manager", "--tensors", "21", "--rounds", "2", "--long", "60", "--device", "cpu"]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("manager") / "new" / "m.json"
    threads = torch.get_num_threads()
    status = cli.main([*QUICK, "--json", str(path)])
    torch.set_num_threads(threads)
    return status, json.loads(path.read_text())


# ---- what is timed


@pytest.mark.parametrize("num_tensors", [1, 2, 7, 100, 1000])
def test_the_model_has_that_many_tensors_and_about_as_many_modules(num_tensors):
    model = manager.make_model(num_tensors, CPU)
    entries = list(model.state_dict().values())
    assert len(entries) == num_tensors
    assert all(entry.numel() == 1 for entry in entries)
    assert num_tensors <= sum(1 for _ in model.modules()) <= 1.5 * num_tensors + 4
    assert model(torch.ones(1, 1)).shape == (1, 1)


@pytest.mark.parametrize("name", [*AVERAGING, *STAYING])
def test_each_row_does_what_it_says(name, device):
    rows = manager.make_rows(9, torch.device(device))
    assert set(rows) == {*AVERAGING, *STAYING}
    row = rows[name]
    assert manager.check(row) == ""
    # By hand as well, in float64, with no use of the bench's own check.
    with torch.no_grad():
        for param in row.lists.params:
            param += 1
    before = [(e.double(), p.detach().double()) for e, p in zip(*_sides(row.lists), strict=True)]
    momentum = 0.0 if row.momentum is None else row.momentum()
    assert (momentum == 0) == (name in STAYING)
    row.call()
    for ema, param, (old_ema, old_param) in zip(*_sides(row.lists), before, strict=True):
        right = (1 - momentum) * old_ema + momentum * old_param
        torch.testing.assert_close(ema.double(), right, rtol=1e-6, atol=1e-6)
        assert torch.equal(param.double(), old_param)


def _sides(lists: Lists):
    return lists.ema, lists.params


def test_ours_share_their_memory_and_nobody_else_s():
    rows = manager.make_rows(5, CPU)
    pointers = {
        name: {t.data_ptr() for side in _sides(row.lists) for t in side}
        for name, row in rows.items()
    }
    naive = [pointers.pop("naive"), pointers.pop("naive swapped")]
    ours = [*pointers.values()]
    assert all(found == ours[0] for found in ours)
    assert len(set.union(ours[0], *naive)) == 3 * 2 * 5


def test_the_schedule_is_asked_for_each_update():
    row = manager.make_rows(3, CPU)["schedule"]
    right = fused_ema.schedules.exponential()
    for i in range(3):
        assert row.momentum() == right(i)
        row.call()


# ---- what is checked and counted


@pytest.mark.parametrize(
    ("momentum", "change", "message"),
    [
        (lambda: 0.125, lambda lists: None, "update: ema element 0 is "),
        (lambda: 0.125, lambda lists: lists.params[1].fill_(9), "update: ema element 0 is "),
        (None, lambda lists: lists.ema[1].add_(1), "1 of 3 ema elements have changed"),
        (None, lambda lists: lists.params[0].add_(1), "2 of 3 param elements have changed"),
    ],
)
def test_check_finds_a_row_that_does_something_else(momentum, change, message):
    lists = Lists([torch.zeros(2), torch.zeros(1)], [torch.ones(2), torch.ones(1)])
    row = manager.Row("a row", lambda: change(lists), lists, momentum)
    assert manager.check(row).startswith(message)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: None, 0),
        (lambda: torch.empty(1000), 4000),
        (lambda: [torch.empty(10) for _ in range(3)], 120),
        (lambda: torch.empty(10, dtype=torch.float64).clone(), 160),
    ],
)
def test_allocated_bytes_count_what_is_freed_again(call, expected):
    assert manager.allocated_bytes(call, CPU) == expected


@pytest.mark.cuda
def test_allocated_bytes_on_a_gpu():
    device = torch.device("cuda")
    assert manager.allocated_bytes(lambda: None, device) == 0
    assert manager.allocated_bytes(lambda: torch.empty(1000, device=device), device) >= 4000


def test_state_dict_calls_are_counted_at_every_depth():
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)))
    assert manager.state_dict_calls(lambda: None) == 0
    assert manager.state_dict_calls(lambda: model[0][0].state_dict()) == 10
    assert manager.state_dict_calls(lambda: model.state_dict()) == 30
    original = nn.Module.state_dict
    with pytest.raises(ZeroDivisionError):
        manager.state_dict_calls(lambda: 1 / 0)
    assert nn.Module.state_dict is original


# ---- a run


def test_the_manager_allocates_nothing_and_walks_nothing(whole_run):
    status, content = whole_run
    assert status == 0
    assert content["schema"] == 1
    assert content["environment"]["torch_version"] == torch.__version__
    assert content["failures"] == []
    assert content["allocated_bytes"] == {"swapped": 0, "naive swapped": 2 * 4 * 21}
    calls = content["state_dict_calls"]
    assert calls.pop("naive") == 10 * content["settings"]["num_modules"]
    assert calls == {"update": 0, "schedule": 0, "skip": 0}


def test_the_long_run_is_recorded(whole_run):
    long = whole_run[1]["long_run"]
    us, ratio = long.pop("us"), long.pop("worn_of_new")
    assert long == {"num_updates": 60, "num_tensors": 20}
    assert min(us.values()) > 0
    assert ratio == us["worn"] / us["new"]


def test_settings_are_recorded(whole_run):
    settings = whole_run[1]["settings"]
    num_modules = settings.pop("num_modules")
    assert 21 <= num_modules <= 36
    assert settings == {
        **{"num_tensors": 21, "momentum": 0.125, "form": "mul_add", "cache": "hot"},
        "num_updates": 10,
    }


def test_all_rows_are_recorded(whole_run):
    rows = whole_run[1]["rows"]
    assert {r["row"] for r in rows} == {*AVERAGING, *STAYING}
    for r in rows:
        assert r["rounds"] == 2
        assert 0 < r["us_p10"] <= r["us"] <= r["us_p90"]
        assert r["title"]


def test_beyond_the_plan_is_the_difference_of_the_medians(whole_run):
    content = whole_run[1]
    us = {r["row"]: r["us"] for r in content["rows"]}
    for name in ("update", "schedule"):
        assert content["beyond_plan_us"][name] == pytest.approx(us[name] - us["plan"])
        assert content["targets"][name]["us"] == content["beyond_plan_us"][name]
    assert content["targets"]["skip"]["us"] == pytest.approx(us["skip"])
    limits = {name: target["target_us"] for name, target in content["targets"].items()}
    assert limits == {"update": 10, "schedule": 10, "skip": 2}
    for target in content["targets"].values():
        assert target["met"] == (target["us"] <= target["target_us"])


def test_a_missed_target_is_only_shown(monkeypatch, capsys):
    monkeypatch.setattr(manager, "TARGETS_US", {"update": -1e9, "schedule": 1e9, "skip": 0.0})
    monkeypatch.setattr(report, "find", lambda package: None)
    assert cli.main(QUICK) == 0
    out = capsys.readouterr().out
    assert "-1000000000 us: MISSED" in out
    assert "1000000000 us: met" in out
    assert "0 us: MISSED" in out
    assert "swapped() allocates 0 bytes; clone and two copies 168\n" in out
    assert "10 updates call state_dict() 0 times" in out


# ---- faults


@pytest.mark.parametrize("wrong", ["nothing", "walks", "momentum"])
def test_a_manager_that_does_something_else_fails_the_run(wrong, monkeypatch, capsys, tmp_path):
    original = fused_ema.EMAManager.update

    def update(self, iteration=None):
        if wrong == "walks":
            self._model.state_dict()
        if wrong == "momentum":
            self._averages = replace(self._averages, momenta=(0.1251,))
        if wrong != "nothing":
            original(self, iteration)

    monkeypatch.setattr(fused_ema.EMAManager, "update", update)
    assert cli.main([*QUICK, "--json", str(tmp_path / "m.json")]) == 1
    content = json.loads((tmp_path / "m.json").read_text())
    err = capsys.readouterr().err
    assert [f"FAILED: {line}" for line in content["failures"]] == err.splitlines()
    if wrong == "walks":
        num_calls = 10 * content["settings"]["num_modules"]
        assert content["state_dict_calls"]["update"] == num_calls
        assert (
            f"EMAManager.update: {num_calls:,} calls of state_dict() in 10 updates, expected none"
            in err
        )
        assert "skipped by the interval: " in err
    else:
        assert "FAILED: EMAManager.update: update: ema element 0 is " in err


def test_a_swap_that_allocates_fails_the_run(monkeypatch, capsys):
    original = fused_ema.EMAManager._swap_in

    def swap_in(self, *args):
        torch.empty(5)
        original(self, *args)

    monkeypatch.setattr(fused_ema.EMAManager, "_swap_in", swap_in)
    assert cli.main(QUICK) == 1
    assert "FAILED: swapped() allocated 20 bytes, expected none\n" in capsys.readouterr().err


def test_counters_that_see_nothing_fail_the_run(monkeypatch, capsys):
    monkeypatch.setattr(manager, "allocated_bytes", lambda call, device: 0)
    assert cli.main(QUICK) == 1
    assert "the counters of bytes or of state_dict() calls don't work" in capsys.readouterr().err


@pytest.mark.cuda
def test_run_on_a_gpu(tmp_path):
    path = tmp_path / "m.json"
    assert cli.main([*QUICK[:-1], "cuda", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["allocated_bytes"]["swapped"] == 0
    assert content["environment"]["device"] == "cuda"


@pytest.mark.parametrize("argv", [["--tensors", "0"], ["--rounds", "0"], ["--threads", "x"]])
def test_bad_argument(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["manager", *argv])
    assert stopped.value.code == 2
    assert "expected a number from 1 to inf" in capsys.readouterr().err
