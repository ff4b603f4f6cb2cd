"""docs/steps.md: the line of each row, run with what the row speaks of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from masters import Hooked, InList, InState, Kahan, Wrapped, backward, net
from test_steps import Around, DeepSpeedOptimizerWrapper, Releasing, TwoSteps, released

import fused_ema
from fused_ema import EMAManager

TABLE = (Path(__file__).parents[1] / "docs/steps.md").read_text()
ROWS = dict(re.findall(r"^\| (?!what trains|---)([^|]+) \| ([^|]+) \|", TABLE, re.MULTILINE))


def row(start):
    (found,) = [line for name, line in ROWS.items() if name.startswith(start)]
    return re.findall(r"`([^`]+)`", found)


def train(start, model, optimizer, values=None, step=None, num=4, **names):
    """Trains by the line of a row, and compares with averages of what each step leaves."""
    names |= {"fused_ema": fused_ema, "model": model, "optimizer": optimizer}
    names["ema"] = EMAManager(model, momentum=0.001)
    lines = [code for code in row(start) if re.match(r"\w+ = |ema\.", code)]
    setting_up = [code for code in lines if code != "ema.update()"]
    exec("\n".join(setting_up), names)
    ema = names["ema"]
    values = values or (lambda: [p.detach().float() for p in model.parameters()])
    averages = [tensor.clone() for tensor in values()]
    for seed in range(num):
        backward(model, seed)
        (step or optimizer.step)()
        exec("\n".join(code for code in lines if code == "ema.update()"), names)
        for param in model.parameters():
            param.grad = None
        torch._foreach_lerp_(averages, values(), 0.001)
    assert ema.num_updates == num
    for (name, _), average in zip(model.named_parameters(), averages, strict=True):
        assert torch.equal(dict(ema.named_emas())[name], average), name


def sgd(params):
    return torch.optim.SGD(params, lr=0.5)


def test_one_optimizer():
    model = net(torch.float32)
    train("one optimizer", model, sgd(model.parameters()))


def test_several_optimizers():
    model = net(torch.float32)
    first, second = sgd(model[0].parameters()), sgd(model[1:].parameters())

    def step():
        second.step()
        first.step()

    train("several", model, None, step=step, first=first, second=second)


def test_a_part():
    model = net(torch.float32)
    train("an optimizer that holds a part", model, sgd(model[0].parameters()))


def test_apply_optimizer_in_backward():
    model = net(torch.float32)
    released(model)
    train("torch's `_apply", model, None, step=lambda: None)


def test_one_that_releases_gradients():
    model = net(torch.float32)
    optimizer = Releasing(model.parameters(), lr=0.1)
    optimizer.prepare(model)
    train("optimi", model, optimizer)


def test_two_steps():
    model = net(torch.float32)
    optimizer = TwoSteps(model.parameters())
    with pytest.raises(TypeError, match=r"call update\(\) after the last of them"):
        EMAManager(model).register_step_post_hook(optimizer)
    train("two steps", model, optimizer, step=optimizer.second_step)


@pytest.mark.parametrize("kind", [InList, Wrapped])
def test_a_wrapper_that_writes_copies_back(kind):
    model = net()
    train("a wrapper that steps", model, kind(model.parameters()))


def test_a_wrapper_with_hooks_of_its_own():
    model = net()
    train("one optimizer", model, Hooked(model.parameters()))


def test_masters_in_the_state():
    model = net()
    optimizer = InState(model.parameters())

    def masters():
        return [optimizer.state[p].get("master_param", p).float() for p in model.parameters()]

    train("fp32 masters in the optimizer", model, optimizer, masters)


def test_kahan_sums():
    model = net()
    optimizer = Kahan(model.parameters())

    def sums():
        states = [optimizer.state[param] for param in model.parameters()]
        lost = [state.get("kahan_comp", torch.zeros(())) for state in states]
        return [p.float() + c.float() for p, c in zip(model.parameters(), lost, strict=True)]

    train("Kahan", model, optimizer, lambda: [tensor.detach() for tensor in sums()])


def test_masters_in_a_list():
    model = net()
    optimizer = InList(model.parameters())
    params, copies = list(model.parameters()), optimizer.masters
    values = lambda: [master.detach() for master in copies]  # noqa: E731
    train("fp32 masters in a wrapper", model, optimizer, values, params=params, copies=copies)


def test_a_wrapper_as_that_of_accelerate():
    model = net(torch.float32)
    train("accelerate", model, Around(model.parameters()))


def test_deepspeed():
    model = net(torch.float32)
    (line,) = row("DeepSpeed")
    with pytest.raises(TypeError, match=re.escape(line)):
        EMAManager(model).register_step_post_hook(DeepSpeedOptimizerWrapper(model.parameters()))


def test_each_row_has_a_test():
    starts = re.findall(r'(?:train|row)\("([^"]+)"', Path(__file__).read_text())
    rest = [name for name in ROWS if not any(name.startswith(start) for start in starts)]
    # Tested in the frameworks: tests/frameworks/test_readme.py.
    assert rest == ["Lightning, transformers' Trainer, mmcv, MMEngine"]
    assert len(ROWS) == 13
