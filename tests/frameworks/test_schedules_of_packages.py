"""Schedules beside the packages that they are said to be of."""

from __future__ import annotations

import pytest
import torch
from ema_pytorch import EMA
from nets import Net, move
from torch import nn

from fused_ema import EMAManager, schedules

STEPS = 140


def small(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Linear(4, 3).to(dtype)


@pytest.mark.parametrize("after", [100, 0, 7])
@pytest.mark.parametrize("least", [0.0, 0.3])
def test_inverse_gamma_is_ema_pytorch_s(after, least):
    model = small()
    settings = {"beta": 0.9, "min_value": least, "inv_gamma": 3.0, "power": 0.75}
    theirs = EMA(model, update_after_step=after, update_every=1, **settings)
    schedule = schedules.inverse_gamma(0.1, 3.0, 0.75, max_momentum=1 - least, after=after)
    ours = EMAManager(model, momentum_fun=schedule)
    for i in range(STEPS):
        move(model, i)
        ours.update()
        theirs.update()
        # Their step is float32.
        if i > after:
            assert schedule(i) == pytest.approx(1 - theirs.get_current_decay(), abs=1e-6)
        for name, ema in ours.named_emas():
            torch.testing.assert_close(
                ema, theirs.ema_model.state_dict()[name], rtol=1e-5, atol=1e-5
            )


def test_inverse_gamma_with_their_defaults_and_their_phase():
    model, every = small(), 10
    theirs = EMA(model)
    schedule = schedules.inverse_gamma(after=100 + every - 1)
    ours = EMAManager(model, momentum_fun=schedule, interval=every)
    for i in range(3 * STEPS):
        move(model, i)
        ours.update(iteration=i + every - 1)
        theirs.update()
        for name, ema in ours.named_emas():
            torch.testing.assert_close(
                ema, theirs.ema_model.state_dict()[name], rtol=1e-5, atol=1e-5
            )
    without = schedules.inverse_gamma()
    assert abs(without(119) - schedule(119)) > 0.1


def test_ramp_is_torch_ema_s_and_diffusers():
    import torch_ema
    from diffusers.training_utils import EMAModel

    model = Net(torch.float64).body[0]
    ours = EMAManager(model, momentum_fun=schedules.ramp(0.01, first=1))
    theirs = torch_ema.ExponentialMovingAverage(model.parameters(), 0.99)
    other = EMAModel(model.parameters(), decay=0.99)
    copying = EMAManager(model, momentum_fun=schedules.ramp(0.01), begin=1)
    for i in range(STEPS):
        move(model, i)
        ours.update()
        theirs.update()
        other.step(model.parameters())
        copying.update()
        torch.testing.assert_close([e for _, e in ours.named_emas()], theirs.shadow_params)
        torch.testing.assert_close([e for _, e in copying.named_emas()], other.shadow_params)


def test_inverse_gamma_after_is_diffusers_and_timm_s():
    import stubs

    stubs.install()
    from diffusers.training_utils import EMAModel
    from timm.utils import ModelEmaV3

    model = small()
    for after in (0, 5):
        schedule = schedules.inverse_gamma(0.1, 2.0, 0.8, after=after)
        settings = {"decay": 0.9, "update_after_step": after}
        diffused = EMAModel(
            model.parameters(), use_ema_warmup=True, inv_gamma=2.0, power=0.8, **settings
        )
        timms = ModelEmaV3(model, use_warmup=True, warmup_gamma=2.0, warmup_power=0.8, **settings)
        for i in range(60):
            for decay in (diffused.get_decay(i + 1), timms.get_decay(i + 1)):
                assert schedule(i) == pytest.approx(1 - decay, abs=1e-12)
