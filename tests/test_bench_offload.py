from __future__ import annotations

import json

import pytest
import torch

from bench import __main__ as cli
from bench import offload

CPU = torch.device("cpu")
WAYS = ["host", "device", "emas moved", "params moved"]


@pytest.mark.parametrize("dtype", [*offload.PAIRS.values()])
def test_each_way_averages(dtype):
    model = offload.make_model(dtype, CPU, 256)
    ways = offload.make_ways(model)
    assert list(ways) == WAYS
    for way in ways.values():
        assert offload.check(way, model) == ""
        before = [ema.double() for ema in way.emas]
        way()
        for ema, old, param in zip(way.emas, before, model.parameters(), strict=True):
            right = 0.875 * old + 0.125 * param.detach().double()
            torch.testing.assert_close(ema.double(), right, rtol=1e-6, atol=1e-6)


def test_a_way_that_does_nothing_is_found():
    model = offload.make_model(torch.float32, CPU, 256)
    way = offload.make_ways(model)["host"]
    way.update = lambda: None
    assert offload.check(way, model) == f"{way.title}: the average of tensor 0 is off"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_run(tmp_path, capsys, device):
    path = tmp_path / "offload.json"
    arguments = ["--shrunk", "256", "--rounds", "1", "--device", device, "--json", str(path)]
    assert cli.main(["offload", *arguments]) == 0
    content = json.loads(path.read_text())
    assert [(r["params"], r["way"]) for r in content["rows"]] == [
        (name, way) for name in offload.PAIRS for way in WAYS
    ]
    row = content["rows"][4]  # Of bf16 params, which the host averages.
    assert row["link_bytes"] == 2 * row["num_elements"] == 2 * 12 * 16 * 17
    assert set(content["link_gb_per_s"]) == (
        {"to the device", "to the host", "both"} if device == "cuda" else set()
    )
    assert "averaged on the device" in capsys.readouterr().out
