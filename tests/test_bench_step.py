import json

import pytest
import torch

from bench import __main__ as cli
from bench import step

CPU = torch.device("cpu")
TINY = ["step", "--tiny", "--rounds", "2"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("step") / "step.json"
    status = cli.main([*TINY, "--device", "cpu", "--json", str(path)])
    return status, json.loads(path.read_text())


def test_run_measures_every_model_in_every_way(whole_run):
    status, content = whole_run
    assert status == 0
    assert content["settings"] == {"momentum": 0.125, "steps_a_sample": 4, "tiny": True}
    assert [r["model"] for r in content["results"]] == ["vit", "llama"]
    for result in content["results"]:
        assert [r["way"] for r in result["rows"]] == ["off", "naive", "foreach", "manager"]
        assert result["update_alone_ms"] > 0
        off = result["rows"][0]["ms"]
        for r in result["rows"]:
            assert 0 < r["ms_p10"] <= r["ms"] <= r["ms_p90"]
            assert r["rounds"] == 2
            assert r["added_ms"] == pytest.approx(r["ms"] - off)
            assert r["share_of_step"] == pytest.approx((r["ms"] - off) / r["ms"])


@pytest.mark.cuda
def test_run_on_a_gpu_has_streams_and_graphs_too(tmp_path):
    path = tmp_path / "step.json"
    assert cli.main([*TINY, "--device", "cuda", "--json", str(path)]) == 0
    for result in json.loads(path.read_text())["results"]:
        ways = [r["way"] for r in result["rows"]]
        beside = ["side stream", "overlap", "host ema", "host ema by host"]
        assert ways[4:] == [*beside, "captured off", "captured", "captured manager"]


@pytest.mark.parametrize(
    ("name", "layers", "num_elements"),
    [
        # As published: a linear layer of the patches has what their convolution has.
        ("vit", 24, 304_326_632),
        # A layer has 218,112,000; embeddings, head and last norm are left out.
        ("llama", 4, 4 * 218_112_000),
    ],
)
def test_stacks_have_the_published_sizes(name, layers, num_elements):
    size = step.SIZES[name]["full"]
    assert size.layers == layers
    model_type = step.VisionTransformer if name == "vit" else step.LlamaStack
    with torch.device("meta"):
        model = model_type(size)
    assert sum(p.numel() for p in model.parameters()) == num_elements


def test_rotary_positions_turn_pairs_by_their_position():
    size = step.SIZES["llama"]["tiny"]
    turns = step.LlamaStack(size).turns
    x = torch.zeros(1, 1, size.tokens, 8)
    x[..., 0] = 1.0
    turned = step._turned(x, turns)[0, 0]
    position = torch.arange(size.tokens, dtype=torch.float32)
    # The first pair turns by one radian a position.
    assert torch.allclose(turned[:, 0], position.cos(), atol=1e-6)
    assert torch.allclose(turned[:, 1], position.sin(), atol=1e-6)
    assert not turned[:, 2:].any()


@pytest.mark.parametrize("fault", ["nothing", "too much", "no step"])
def test_a_wrong_way_is_found(fault):
    training = step.Training("vit", step.SIZES["vit"]["tiny"], CPU)
    params = training.params()
    ema = [p.clone() for p in params]

    def wrong():
        training.gradients()
        if fault != "no step":
            training.optimizer.step()
        if fault == "too much":
            torch._foreach_lerp_(ema, params, 2 * step.MOMENTUM)

    # The weights have moved before, so that ema and params differ.
    training.gradients()
    training.optimizer.step()
    message = "changed no weight" if fault == "no step" else "the average of tensor"
    assert message in step.check(step.Way("wrong", wrong, ema), params)
