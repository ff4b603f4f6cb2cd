import json
from collections import Counter

import pytest
import torch

from bench import __main__ as cli
from bench import providers
from bench.gpu import launches
from bench.gpu.launches import Trace
from bench.providers import PLAN, PROVIDERS

PROVIDER = {p.name: p for p in PROVIDERS if p.op == "update"}


@pytest.mark.parametrize(
    ("name", "num_tensors", "trace", "problem"),
    [
        (PLAN, 10_000, Trace(1, 0, 0), ""),
        (PLAN, 10_000, Trace(2, 0, 0), "2 launches, expected 1"),
        (PLAN, 1, Trace(0, 0, 0), "0 launches, expected 1"),
        (PLAN, 1, Trace(1, 1, 2), "1 copies, the host waited 2 times"),
        ("fused_ema", 1019, Trace(1, 0, 0), ""),
        ("fused_ema", 1020, Trace(2, 0, 0), ""),
        ("fused_ema", 1020, Trace(1, 0, 0), "1 launches, expected 2"),
        ("foreach lerp_", 10_000, Trace(157, 3, 3), ""),  # Promised nothing.
    ],
)
def test_more_than_promised_is_named(name, num_tensors, trace, problem):
    assert launches.wrong(PROVIDER[name], num_tensors, trace) == problem


def test_table_has_a_line_a_list_and_the_best_foreach():
    row = {"case": "small", "op": "update", "ema_dtype": "float32", "param_dtype": "float32"}
    row |= {"num_tensors": 10_000, "copies": 0, "waits": 0}
    records = [
        {**row, "provider": PLAN, "kernels": 1},
        {**row, "provider": "fused_ema", "kernels": 10, "copies": 2, "waits": 1},
        {**row, "provider": "foreach mul_ add_", "kernels": 1314},
        {**row, "provider": "foreach lerp_", "kernels": 157},
    ]
    table = launches.table({"records": records}, "4 KB")
    assert table.headers[-1] == "foreach (4 KB)"
    assert table.rows == (
        ("small", "update", "float32/float32", "10,000", "1", "10 + 2, 1 waits", "157"),
    )


@pytest.mark.cuda
def test_run_on_a_gpu(tmp_path):
    path = tmp_path / "launches.json"
    argv = ["launches", "--cases", "odd,small_500", "--max-elements", "100000"]
    assert cli.main([*argv, "--json", str(path)]) == 0
    records = json.loads(path.read_text())["records"]
    assert {r["op"] for r in records} == set(providers.OPS)
    assert all(r["kernels"] == 1 for r in records if r["provider"] == PLAN)
    assert all(r["kernels"] >= 1 for r in records)


def test_a_profiler_that_sees_no_gpu_is_named(monkeypatch):
    launches._require_events.cache_clear()
    monkeypatch.setattr(torch.autograd, "kineto_available", lambda: False)
    with pytest.raises(RuntimeError, match="built without Kineto"):
        launches.trace(lambda: None)


@pytest.mark.cuda
def test_a_profiler_without_events_is_named(monkeypatch):
    launches._require_events.cache_clear()
    monkeypatch.setattr(launches, "_count", lambda call: Counter())
    with pytest.raises(RuntimeError, match="saw no kernel of an addition"):
        launches.trace(lambda: None)
