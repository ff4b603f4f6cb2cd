from __future__ import annotations

import json
import os

import pytest
import torch

from bench import __main__ as cli
from bench import host


@pytest.mark.parametrize("name", host.ROWS)
@pytest.mark.parametrize("num_tensors", [1, 7])
def test_every_row_updates_what_it_holds(name, num_tensors, device):
    with torch.no_grad():
        call, ema, params = host.ROWS[name](num_tensors, torch.device(device))
        assert len(ema) == len(params) == num_tensors
        for param in params:
            param.add_(1)  # A manager's emas begin as clones.
        right = [e.lerp(p, host.MOMENTUM) for e, p in zip(ema, params, strict=True)]
        call()
    assert all(torch.equal(x, y) for x, y in zip(ema, right, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(ema, params, strict=True))


def test_cores_are_busy_inside_and_free_after():
    with host.busy_cores() as processes:
        assert len(processes) == os.cpu_count()
        assert all(process.is_alive() for process in processes)
    assert not any(process.is_alive() for process in processes)


def test_only_a_swept_call_finds_memory_written_before_it(monkeypatch):
    log = []
    real = host.sweep

    def sweep(memory):
        assert memory.nbytes == host.SWEPT_BYTES
        before = memory[::4096].clone()
        real(memory)
        assert (memory[::4096] != before).all()
        log.append("sweep")

    monkeypatch.setattr(host, "sweep", sweep)
    cpu = torch.device("cpu")
    host.measure(lambda: log.append("call"), cpu, 0, swept=True)
    assert log[3:] == ["sweep", "call"] * host.MIN_CALLS  # Three calls warm up.
    log.clear()
    host.measure(lambda: log.append("call"), cpu, 0, swept=False)
    assert set(log) == {"call"}


def test_the_run_tells_three_percentiles_of_each_row(tmp_path, capsys):
    path = tmp_path / "host.json"
    argv = ["host", "--device", "cpu", "--sizes", "1", "5", "--seconds", "0", "--json", str(path)]
    assert cli.main(argv) == 0
    records = json.loads(path.read_text())["records"]
    kinds = {("idle", "hot"), ("idle", "swept"), ("busy", "hot")}
    assert {(r["cores"], r["cache"]) for r in records} == kinds
    assert len(records) == len(kinds) * 2 * len(host.ROWS)
    for r in records:
        assert r["num_calls"] == host.MIN_CALLS
        assert 0 < r["host_us_p50"] <= r["host_us_p90"] <= r["host_us_p99"]
    assert "p50 / p90 / p99" in capsys.readouterr().out
