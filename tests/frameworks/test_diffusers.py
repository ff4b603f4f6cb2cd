"""hooks.diffusers beside diffusers' EMAModel: no further from float64, the same files."""

from __future__ import annotations

import copy

import pytest
import torch
from params import assert_lists, copies, make_params, move, saved
from torch import nn

diffusers = pytest.importorskip("diffusers")
from diffusers import DDPMScheduler, UNet2DModel  # noqa: E402
from diffusers.training_utils import EMAModel as Theirs  # noqa: E402

from fused_ema.hooks.diffusers import EMAModel  # noqa: E402
from fused_ema.testing import ROUNDINGS  # noqa: E402

OPTIONS = {
    "plain": {},
    "capped": {"decay": 0.3, "min_decay": 0.05},
    "floor": {"decay": 0.9999, "min_decay": 0.7},
    "crossed": {"decay": 0.3, "min_decay": 0.7},
    "delayed": {"update_after_step": 3},
    "warm-up": {"use_ema_warmup": True},
    "power": {"use_ema_warmup": True, "inv_gamma": 5, "power": 0.75, "foreach": True},
}


def settings_of(ema):
    state = ema.state_dict()
    del state["shadow_params"]
    return list(state.items())


def make_unet(seed=0):
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


# ---- the values


@pytest.mark.parametrize("options", OPTIONS)
def test_the_decay_at_a_step(options):
    ours = EMAModel(make_params(), **OPTIONS[options])
    theirs = Theirs(make_params(), **OPTIONS[options])
    for step in (*range(40), 1000, 10**7):
        assert ours.get_decay(step) == theirs.get_decay(step)
    assert settings_of(ours) == settings_of(theirs)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pair", [(d, d) for d in ROUNDINGS] + [(torch.float32, torch.bfloat16)])
def test_no_further_from_float64_than_diffusers(backend, options, pair):
    params = make_params(pair[1])
    ours, theirs = EMAModel(params, **OPTIONS[options]), Theirs(params, **OPTIONS[options])
    for ema in (ours, theirs):
        ema.to(dtype=pair[0])
    theirs.foreach = False  # Of two dtypes its foreach loop is another computation.
    our_error = their_error = 0.0
    for step in range(8):
        move(params, step)
        # One step from the same average: errors don't add up.
        before = [s.double().clone() for s in ours.shadow_params]
        for s, t in zip(ours.shadow_params, theirs.shadow_params, strict=True):
            t.copy_(s)
        ours.step(iter(params))
        theirs.step(iter(params))
        d = ours.cur_decay_value
        assert d == theirs.cur_decay_value
        assert settings_of(ours) == settings_of(theirs)
        lists = zip(before, params, ours.shadow_params, theirs.shadow_params, strict=True)
        for e, p, s, t in lists:
            assert (s.dtype, s.shape, s.stride()) == (t.dtype, t.shape, t.stride())
            if not p.requires_grad:
                assert torch.equal(s, p.to(s.dtype))
                assert torch.equal(t, s)
                continue
            exact = d * e + (1 - d) * p.detach().double()
            our_error += (s.double() - exact).abs().sum().item()
            their_error += (t.double() - exact).abs().sum().item()
            tolerance = 4 * ROUNDINGS[s.dtype] * (e.abs() + p.detach().double().abs())
            assert ((s.double() - exact).abs() <= tolerance + 1e-7 * (s.dtype.itemsize < 4)).all()
    if pair[0] != torch.float64:  # Nothing here is more exact.
        assert our_error <= their_error


def test_the_first_step_copies_exactly():
    params = make_params()
    ema = EMAModel(params)
    move(params, 1)
    ema.step(params)
    assert_lists(ema.shadow_params, copies(params))


def train(unet, ema_models, steps, first=0):
    scheduler = DDPMScheduler(num_train_timesteps=10)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.05)
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        images, noise = torch.randn(2, 2, 1, 8, 8, generator=generator)
        times = torch.randint(0, 10, (2,), generator=generator)
        noisy = scheduler.add_noise(images, noise, times)
        (unet(noisy, times).sample - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for ema in ema_models:
            ema.step(unet.parameters())
    return noisy, times


def test_in_a_training_run():
    unet = make_unet()
    unet.conv_in.requires_grad_(False)
    ours, theirs = EMAModel(unet.parameters()), Theirs(unet.parameters(), foreach=True)
    noisy, times = train(unet, [ours, theirs], 6)
    torch.testing.assert_close(ours.shadow_params, theirs.shadow_params, rtol=1e-5, atol=1e-7)
    raw = copies(unet.parameters())
    with torch.no_grad():
        ours.store(unet.parameters())
        ours.copy_to(unet.parameters())
        expected = unet(noisy, times).sample
        ours.restore(unet.parameters())
        assert ours.temp_stored_params is None
        assert_lists(copies(unet.parameters()), raw)
        with ours.average_parameters(unet.parameters()):
            found = unet(noisy, times).sample
        assert_lists(copies(unet.parameters()), raw)
        assert torch.equal(found, expected)
        assert not torch.equal(found, unet(noisy, times).sample)


# ---- files and states


@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained model name or path")
@pytest.mark.parametrize("source", [EMAModel, Theirs])
@pytest.mark.parametrize("target", [EMAModel, Theirs])
def test_pretrained_folders_go_both_ways(source, target, tmp_path):
    unet = make_unet()
    options = {"decay": 0.9, "use_ema_warmup": True, "power": 0.75, "update_after_step": 1}
    ema = source(unet.parameters(), model_cls=UNet2DModel, model_config=unet.config, **options)
    train(unet, [ema], 4)
    ema.save_pretrained(tmp_path)
    taken = target.from_pretrained(tmp_path, model_cls=UNet2DModel)
    assert settings_of(taken) == settings_of(ema)
    assert taken.optimization_step == 4
    assert_lists(taken.shadow_params, ema.shadow_params)
    # The folder is that of a model with the average as its weights.
    model = UNet2DModel.from_pretrained(tmp_path)
    assert_lists(copies(model.parameters()), ema.shadow_params)
    # And it can be saved again.
    taken.save_pretrained(tmp_path / "again")
    again = source.from_pretrained(tmp_path / "again", model_cls=UNet2DModel, foreach=True)
    assert settings_of(again) == settings_of(ema)
    assert_lists(again.shadow_params, ema.shadow_params)


def test_saving_while_the_parameters_hold_the_averages(tmp_path):
    unet = make_unet()
    ema = EMAModel(unet.parameters(), model_cls=UNet2DModel, model_config=unet.config)
    train(unet, [ema], 3)
    averages = copies(ema.shadow_params)
    with ema.average_parameters(unet.parameters()):
        ema.save_pretrained(tmp_path)
        assert_lists(ema.state_dict()["shadow_params"], averages)
    assert_lists(EMAModel.from_pretrained(tmp_path, UNet2DModel).shadow_params, averages)


@pytest.mark.parametrize("missing", ["model_cls", "model_config"])
def test_saving_needs_a_class_and_a_configuration(missing, tmp_path):
    settings = {"model_cls": UNet2DModel, "model_config": {}, missing: None}
    for make in (EMAModel, Theirs):
        with pytest.raises(ValueError, match=missing):
            make(make_params(), **settings).save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("source", [EMAModel, Theirs])
@pytest.mark.parametrize("target", [EMAModel, Theirs])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_states_go_both_ways(source, target, dtype):
    params = make_params()
    ema = source(params, decay=0.9, use_ema_warmup=True, inv_gamma=2.0)
    for step in range(3):
        move(params, step)
        ema.step(params)
    ema.to(dtype=dtype)
    taken = target(params)
    taken.load_state_dict(saved(ema.state_dict()))
    assert settings_of(taken) == settings_of(ema)
    assert_lists(taken.shadow_params, ema.shadow_params)
    before = copies(taken.shadow_params)
    move(params, 9)
    ema.step(params)
    assert_lists(taken.shadow_params, before)


@pytest.mark.parametrize("dtype", ROUNDINGS)
@pytest.mark.parametrize("moment", ["plain", "stored", "swapped"])
def test_a_run_goes_on_from_a_state_bit_for_bit(dtype, moment):
    def run(resumed_from=None):
        params, state, first = make_params(dtype), None, 0
        ema = EMAModel(params, decay=0.9, use_ema_warmup=True)
        if resumed_from is not None:
            weights, loaded, first = resumed_from
            with torch.no_grad():
                for p, w in zip(params, weights, strict=True):
                    p.copy_(w)
            ema.load_state_dict(loaded)
        for step in range(first, 8):
            move(params, step)
            ema.step(params)
            if step == 4:
                weights = copies(params)
                if moment == "stored":
                    ema.store(params)
                    ema.copy_to(params)
                    state = saved((weights, ema.state_dict(), step + 1))
                    ema.restore(params)
                elif moment == "swapped":
                    with ema.average_parameters(params):
                        state = saved((weights, ema.state_dict(), step + 1))
                else:
                    state = saved((weights, ema.state_dict(), step + 1))
        return params, ema, state

    params, ema, state = run()
    again, taken, _ = run(state)
    assert_lists(copies(again), copies(params))
    assert_lists(taken.shadow_params, ema.shadow_params)
    assert settings_of(taken) == settings_of(ema)
    assert taken.optimization_step == 8


# ---- copies, what is stored, and what is swapped


@pytest.mark.parametrize("shadow_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_store_copy_to_and_restore(shadow_dtype):
    results = []
    for make in (EMAModel, Theirs):
        params = make_params()
        ema = make(params)
        ema.to(dtype=shadow_dtype)
        move(params, 1)
        with pytest.raises(RuntimeError, match=r"store\(\)"):
            ema.restore(params)
        ema.store(iter(params))
        kept = copies(ema.temp_stored_params)
        ema.copy_to(iter(params))
        averaged = copies(params)
        ema.restore(iter(params))
        assert ema.temp_stored_params is None
        results.append([*kept, *averaged, *copies(params)])
    assert_lists(*results)


def test_average_parameters_with_two_dtypes():
    params = make_params(torch.bfloat16)
    params[0].data = params[0].data.float()
    ema = EMAModel(params)
    ema.to(dtype=torch.float32)
    move(params, 1)
    raw, averages = copies(params), copies(ema.shadow_params)
    with ema.average_parameters(params):
        assert_lists(copies(params), [a.to(p.dtype) for a, p in zip(averages, params, strict=True)])
        for call in (
            lambda: ema.step(params),
            lambda: ema.store(params),
            lambda: ema.restore(params),
            lambda: ema.to(dtype=torch.float64),
            lambda: ema.pin_memory(),
            lambda: ema.load_state_dict(ema.state_dict()),
            lambda: ema.average_parameters(params).__enter__(),
        ):
            with pytest.raises(RuntimeError, match="the parameters hold the averages"):
                call()
    assert_lists(copies(params), raw)
    assert_lists(ema.shadow_params, averages)


def test_pinning_asks_torch(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t.clone())
    ema = EMAModel(make_params())
    before = ema.shadow_params
    ema.pin_memory()
    assert [id(t) for t in pinned] == [id(t) for t in before]
    assert_lists(ema.shadow_params, before)


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"decay": 1.5}, ValueError, r"decay is 1\.5; it is the weight of the old value"),
        ({"decay": "a"}, TypeError, "decay is a str; pass a number"),
        ({"min_decay": float("nan")}, ValueError, "min_decay is nan"),
        ({"update_after_step": -1}, ValueError, "update_after_step is -1"),
        ({"inv_gamma": 0}, ValueError, "inv_gamma is 0"),
        ({"power": -1.0}, ValueError, r"power is -1\.0"),
        ({"use_ema_warmup": 1}, ValueError, "use_ema_warmup is 1; pass True or False"),
        ({"max_value": 0.1}, TypeError, "unexpected keyword"),
    ],
)
def test_settings_out_of_range(settings, error, message):
    with pytest.raises(error, match=message):
        EMAModel(make_params(), **settings)


def test_parameters_that_do_not_fit_change_nothing():
    params = make_params()
    iterator = iter(params)
    ema = EMAModel(iterator)
    with pytest.raises(ValueError, match="there are no parameters"):
        EMAModel(iterator)
    other = make_params()
    other[1] = nn.Parameter(torch.ones(1))  # Would be broadcast.
    before = copies(ema.shadow_params)
    for call in (ema.step, ema.copy_to, ema.store, ema.restore):
        with pytest.raises(ValueError, match="holds 0 tensors but 6 are averaged"):
            call(iterator)
        with pytest.raises(ValueError, match=r"\[1\] has shape \[1\] but its average has \[\]"):
            call(other)
        with pytest.raises(TypeError, match="parameters is a Linear"):
            call(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="optimization_step is -1"):
        ema.get_decay(-1)
    assert_lists(ema.shadow_params, before)
    assert (ema.optimization_step, ema.cur_decay_value, ema.temp_stored_params) == (0, None, None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (None, TypeError, "is a list; pass a dictionary"),
        ({"decay": 2}, ValueError, "decay is 2"),
        ({"min_decay": -1}, ValueError, "min_decay is -1"),
        ({"optimization_step": -1}, ValueError, "optimization_step is -1"),
        ({"power": "a"}, TypeError, "power is a str"),
        ({"shadow_params": "a"}, ValueError, "'shadow_params' is a str"),
        ({"shadow_params": [torch.ones(2)]}, ValueError, "holds 1 tensors but 6"),
        ({"shadow_params": [torch.ones(2)] * 6}, ValueError, r"\[0\] has shape(.|\n)*\[5\] has"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, error, message):
    ema = EMAModel(make_params(), decay=0.9)
    state = copy.deepcopy(ema.state_dict())
    before, settings = copies(ema.shadow_params), settings_of(ema)
    bad = [] if change is None else {**state, "update_after_step": 5, **change}
    with pytest.raises(error, match=message):
        ema.load_state_dict(bad)
    assert_lists(ema.shadow_params, before)
    assert settings_of(ema) == settings
