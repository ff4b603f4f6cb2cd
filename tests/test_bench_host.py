from __future__ import annotations

import json

import pytest
import torch

from bench import __main__ as cli
from bench import host


@pytest.mark.parametrize("name", host.ROWS)
@pytest.mark.parametrize("num_tensors", [1, 7])
def test_every_row_updates_what_it_holds(name, num_tensors, monkeypatch, device):
    made = []
    real = host._separate

    def separate(count, where):
        made.append(real(count, where))
        return made[-1]

    monkeypatch.setattr(host, "_separate", separate)
    with torch.no_grad():
        call = host.ROWS[name](num_tensors, torch.device(device))
        before = [tensor.clone() for tensors in made for tensor in tensors]
        versions = sum(t._version for tensors in made for t in tensors)
        call()
    if name in ("plan, emas flat", "manager"):  # Their emas are not among these.
        after = [tensor for tensors in made for tensor in tensors]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        assert sum(t._version for t in after) == versions
    else:
        emas, params = made
        for ema, param, old in zip(emas, params, before, strict=False):
            assert torch.equal(ema, old.lerp(param, host.MOMENTUM))


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
