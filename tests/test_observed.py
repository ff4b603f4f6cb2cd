"""found_inf, elements that aren't finite, and telemetry."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from nets import Net, assert_same, is_same, move, values_of
from sharded import Pair, by_parts
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ema import EMAManager, _observed, schedules
from fused_ema.testing import DTYPE_PAIRS, assert_bits_equal

MOMENTA = {"fast": 0.3, "wide": schedules.power(0.1)}


def spoil(model, seed):
    """Makes some elements NaN or infinite; returns where, by name."""
    generator = torch.Generator().manual_seed(seed)
    spoiled = {}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and name != "head.weight":
                where = torch.rand(tensor.shape, generator=generator) < 0.2
                values = (math.nan, math.inf, -math.inf)[seed % 3]
                tensor[where] = values
                spoiled[name] = where
    spoiled["head.weight"] = spoiled["embedding.weight"]
    return spoiled


# ---- found_inf


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_step_that_was_skipped_is_no_update(shape):
    model = Net()
    ema, want = EMAManager(model, 0.25, begin=1), EMAManager(model, 0.25, begin=1)
    for step in range(4):
        move(model, step)
        found_inf = torch.full(shape, float(step % 2))
        before = {name: tensor.clone() for name, tensor in ema.named_emas()}
        ema.update(found_inf=found_inf)
        if step % 2:
            assert_same(ema.named_emas(), before)
        else:
            want.update()
        assert_same(ema.named_emas(), dict(want.named_emas()))
        assert (ema.iteration, ema.num_updates) == (want.iteration, want.num_updates)
    ema.update(7, found_inf=torch.tensor(math.inf))
    assert ema.iteration == want.iteration == 2


def test_found_inf_is_a_tensor_of_one_element():
    ema = EMAManager(Net())
    with pytest.raises(TypeError, match="found_inf is a float; pass a tensor of one element"):
        ema.update(found_inf=1.0)
    with pytest.raises(TypeError, match=r"found_inf is a Tensor of shape \[2\]; pass a tensor"):
        ema.update(found_inf=torch.zeros(2))
    assert ema.iteration == 0


# ---- elements that aren't finite


@pytest.mark.parametrize("form", ["lerp", "mul_add"])
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=str)
def test_what_is_not_finite_is_left_out(backend, form, pair):
    ema_dtype, dtype = pair
    model, twin = Net(dtype), Net(dtype)
    settings = {"form": form, "ema_dtype": ema_dtype, "buffers": "average", "begin": 1}
    ema = EMAManager(model, MOMENTA, nonfinite="skip", **settings)
    want = EMAManager(twin, MOMENTA, **settings)
    for step in range(4):
        for each in (model, twin):
            move(each, step)
        clean = values_of(model)
        before = {n: {k: v.clone() for k, v in ema.named_emas(n)} for n in MOMENTA}
        spoiled = spoil(model, step)
        # The twin goes on from the same averages, with params that are all finite.
        want.load_state_dict(ema.state_dict())
        ema.update()
        want.update()
        for name in MOMENTA:
            expected = dict(want.named_emas(name))
            for key, values in ema.named_emas(name):
                if key in spoiled:
                    expected[key] = torch.where(spoiled[key], before[name][key], expected[key])
                    assert_bits_equal(values, expected[key], key)
        model.load_state_dict(clean)
    assert any(where.any() for where in spoiled.values())


def test_by_default_they_become_part_of_it():
    model = Net()
    ema = EMAManager(model, 0.25)
    model.scale.data.fill_(math.nan)
    ema.update()
    assert dict(ema.named_emas())["scale"].isnan()


# ---- telemetry


def expected_of(model, before, after):
    """By name, in float64: what telemetry says of one update."""
    found = {}
    described = model.state_dict()
    for name, ema in after.items():
        param = described[name].double()
        finite = param.isfinite()
        lag = torch.where(finite, param - ema.double(), 0)
        found[name] = {
            "lag_norm": lag.square().sum().sqrt().item(),
            "param_norm": torch.where(finite, param, 0).square().sum().sqrt().item(),
            "largest_lag": lag.abs().max().item() if lag.numel() else 0.0,
            "nonfinite": (~finite).sum().item(),
            "stalled": ((ema == before[name]) & (lag != 0)).sum().item(),
        }
    return found


def totals_of(by_name):
    found = {}
    for key in ("lag_norm", "param_norm"):
        found[key] = math.sqrt(sum(values[key] ** 2 for values in by_name.values()))
    for key in ("nonfinite", "stalled"):
        found[key] = sum(values[key] for values in by_name.values())
    found["largest_lag"] = max(values["largest_lag"] for values in by_name.values())
    return found


def averaged_of(ema, name=None):
    described = ema.describe()
    return {
        key: values.clone()
        for key, values in ema.named_emas(name)
        if described[key].startswith("averaged") and key != "head.weight"
    }


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_telemetry_says(backend, dtype, nonfinite):
    model = Net(dtype)
    settings = {"ema_dtype": "param", "nonfinite": nonfinite}
    ema = EMAManager(model, {"a": 0.25, "slow": 0.001}, telemetry=True, **settings)
    plain = EMAManager(model, {"a": 0.25, "slow": 0.001}, **settings)
    assert ema.telemetry() == {}
    num_stalled = 0
    for step in range(3):
        move(model, step)
        if step == 2:
            spoil(model, step)
        before = {name: averaged_of(ema, name) for name in ema.averages}
        ema.update()
        plain.update()
        flat, detailed = ema.telemetry(), ema.telemetry(by_name=True)
        for name in ema.averages:
            assert_same(ema.named_emas(name), dict(plain.named_emas(name)))
            after = averaged_of(ema, name)
            by_name = expected_of(model, before[name], after)
            for key, value in totals_of(by_name).items():
                has_nan = nonfinite == "propagate" and step == 2 and math.isnan(value)
                assert has_nan or flat[f"ema/{name}/{key}"] == pytest.approx(value, rel=1e-6), key
                assert str(detailed[f"ema/{name}/{key}"]) == str(flat[f"ema/{name}/{key}"])
                for tensor, values in by_name.items():
                    found = detailed[f"ema/{name}/{key}/{tensor}"]
                    assert found == pytest.approx(values[key], rel=1e-6, nan_ok=True), tensor
        assert len(flat) == 10
        num_stalled += flat["ema/slow/stalled"]
        assert (flat["ema/a/nonfinite"] > 0) == (step == 2)
    # In bf16 an update by a thousandth moves next to nothing.
    assert (num_stalled > 50) == (dtype == torch.bfloat16)


def test_each_third_update_is_measured():
    model = Net()
    ema = EMAManager(model, 0.25, telemetry=3)
    seen = []
    for step in range(7):
        move(model, step)
        ema.update()
        seen.append(ema.telemetry().get("ema/lag_norm"))
    assert seen[:2] == [None, None]
    assert seen[2] == seen[3] == seen[4] != seen[5]
    assert seen[5] == seen[6]
    assert sorted(ema.telemetry()) == [
        f"ema/{key}" for key in ("lag_norm", "largest_lag", "nonfinite", "param_norm", "stalled")
    ]


class Reads(TorchDispatchMode):
    """Counts what waits for a device."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.num += name in ("aten::_local_scalar_dense", "aten::nonzero")
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_before_it_is_asked_for(monkeypatch):
    # As on a device: of params on the CPU the host may know at once that all are finite.
    monkeypatch.setattr(_observed, "_finite_in", torch.isfinite)
    ema = EMAManager(nn.Linear(4, 4), 0.25, telemetry=True)
    with Reads() as reads:
        ema.update()
        assert reads.num == 0
        torch.zeros(()).item()
        assert reads.num == 1  # It does see one.


def test_what_is_not_measured_cannot_be_asked_for():
    for settings in ({}, {"nonfinite": "skip"}, {"telemetry": False}, {"telemetry": 0}):
        with pytest.raises(RuntimeError, match="make the manager with telemetry=True"):
            EMAManager(Net(), **settings).telemetry()
    with pytest.raises(ValueError, match="nonfinite is 'drop'; choose 'propagate' or 'skip'"):
        EMAManager(Net(), nonfinite="drop")
    with pytest.raises(ValueError, match="telemetry is -1; it must be a whole number from 0"):
        EMAManager(Net(), telemetry=-1)


def of_a_sharded_model():
    pair = Pair(by_parts, telemetry=True, nonfinite="skip")
    for _ in range(2):
        pair.step()
        pair.update()
    found = pair.ema.telemetry(by_name=True, group=dist.group.WORLD)
    for key, value in pair.want.telemetry(by_name=True).items():
        assert found[key] == pytest.approx(value, rel=1e-5), key
    own = pair.ema.telemetry()
    assert 0 < own["ema/lag_norm"] < found["ema/lag_norm"]


def test_of_a_sharded_model(two):
    two(of_a_sharded_model)


def test_telemetry_of_a_state_that_went_on():
    """A course with begin, swaps and a refresh changes no bit."""
    model = Net()
    settings = {"begin": 1, "interval": 2}
    ema = EMAManager(model, 0.25, telemetry=2, nonfinite="skip", **settings)
    plain = EMAManager(model, 0.25, **settings)
    for step in range(6):
        move(model, step)
        if step == 3:
            model.scale = nn.Parameter(torch.tensor(3.0))
            ema.refresh(), plain.refresh()
        ema.update(), plain.update()
        with ema.swapped():
            held = values_of(model)
        with plain.swapped():
            assert_same(model.state_dict(), held)
    assert not is_same(ema.named_emas(), values_of(model))
