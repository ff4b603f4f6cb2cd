"""Nothing here draws random numbers or changes a setting of the process, made or used."""

from __future__ import annotations

import copy
import random
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from nets import Net
from torch import nn
from untouched import changes, process_state, untouched

import fused_ema
from fused_ema.hooks import _options, diffusers, swa_utils, timm, torch_ema


@contextmanager
def restored():
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with warnings.catch_warnings():
        try:
            yield
        finally:
            torch.set_rng_state(state[0])
            random.setstate(state[1])
            np.random.set_state(state[2])
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            torch.set_default_device(None)
            torch.set_grad_enabled(True)
            torch.use_deterministic_algorithms(False)


TOUCHES = {
    "torch's generator": lambda: nn.Linear(1, 1),
    "Python's generator": random.random,
    "numpy's generator": np.random.random,
    "grad mode": lambda: torch.set_grad_enabled(False),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "warnings filters": lambda: warnings.simplefilter("ignore", ResourceWarning),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
}


@pytest.mark.parametrize("name", TOUCHES)
def test_the_comparison_notices(name):
    with restored():
        before = process_state()
        TOUCHES[name]()
        assert changes(before, process_state()) == [name]


def lists(model):
    params = [p for p in model.parameters() if p.numel()]
    return [p.detach().clone() for p in params], [p.detach() for p in params]


def use_one_shots(model):
    ema, params = lists(model)
    fused_ema.update_(ema, params, 0.1)
    fused_ema.swap_(ema, params)
    fused_ema.copy_(ema, params)


def use_plan(model):
    plan = fused_ema.Plan(*lists(model))
    for form in ("lerp", "mul_add"):
        plan.update(0.1, form)
    plan.swap()
    plan.copy_to_ema()
    plan.copy_to_params()
    plan.describe()


def use_manager(model):
    settings = {"momentum_fun": fused_ema.schedules.power(0.1), "begin": 1}
    ema = fused_ema.EMAManager(model, 0.1, **settings)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = ema.register_step_post_hook(optimizer)
    for _ in range(3):
        optimizer.step()
    handle.remove()
    with ema.swapped():
        repr(ema)
    ema.swap()
    ema.swap()
    ema.copy_to(copy.deepcopy(model))
    ema.load_state_dict(copy.deepcopy(ema.state_dict()))
    ema.refresh()
    ema.reset()
    ema.update()


def use_options(model):
    _options.checked(momentum=0.1, interval=2, device="cpu", include="*")


def use_averaged_model(model):
    for options in (
        {},
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9), "use_buffers": True},
        {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn(), "device": "cpu"},
        {"avg_fn": lambda a, p, n: p},
    ):
        averaged = swa_utils.AveragedModel(model, **options)
        for _ in range(3):
            averaged.update_parameters(model)
        copy.deepcopy(averaged).load_state_dict(averaged.state_dict())


def use_model_ema(model):
    for options in ({}, {"exclude_buffers": True}, {"device": "cpu"}, {"dtype": torch.float64}):
        if "dtype" in options:
            del model.table  # A complex average would become real.
        ema = timm.ModelEmaV3(model, 0.9, use_warmup=True, **options)
        for step in range(3):
            ema.update(model, step)
        ema.set(model)
        copy.deepcopy(ema).load_state_dict(ema.state_dict())


def use_torch_ema(model):
    ema = torch_ema.ExponentialMovingAverage(model.parameters(), 0.9)
    ema.update()
    with ema.average_parameters():
        pass
    ema.store()
    ema.copy_to()
    ema.restore()
    ema.load_state_dict(copy.deepcopy(ema.state_dict()))
    ema.to(dtype=torch.float64)
    ema.update()


def use_diffusers(model):
    ema = diffusers.EMAModel(model.parameters())
    ema.step(model.parameters())
    with ema.average_parameters(model.parameters()):
        pass
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    ema.restore(model.parameters())
    ema.load_state_dict(copy.deepcopy(ema.state_dict()))
    ema.to(dtype=torch.float64)
    ema.step(model.parameters())


USES = [
    use_one_shots,
    use_plan,
    use_manager,
    use_options,
    use_averaged_model,
    use_model_ema,
    use_torch_ema,
    use_diffusers,
]


@pytest.mark.parametrize("use", USES)
def test_nothing_of_the_process_is_touched(backend, use):
    model = Net()
    with untouched():
        use(model)


@pytest.mark.parametrize("use", [use_plan, use_manager, use_averaged_model, use_torch_ema])
def test_not_where_gradients_are_off_or_another_dtype_is_the_default(use):
    model = Net()
    with restored():
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        with untouched():
            use(model)
