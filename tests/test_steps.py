"""register_step_post_hook(): one update for each step, or an error."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from masters import Hooked, Wrapped, backward, net
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_ema import EMAManager, sources

SGD = torch.optim.SGD


def trained(optimizer_of, steps=4, step="step"):
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = optimizer_of(model.parameters())
    ema = EMAManager(model, 0.25)
    handle = ema.register_step_post_hook(optimizer)
    expected = model.weight.detach().clone()
    for _ in range(steps):
        model(torch.randn(5, 3)).square().mean().backward()
        getattr(optimizer, step)()
        expected.lerp_(model.weight.detach(), 0.25)
        model.zero_grad()  # Not the optimizer's, which would prepare a class for hooks.
    assert torch.equal(dict(ema.named_emas())["weight"], expected)
    assert ema.num_updates == steps
    return model, optimizer, ema, handle


class WithoutInit(torch.optim.Optimizer):
    """As timm's Lookahead: its own hooks' dicts, and no Optimizer.__init__."""

    def __init__(self, params):
        self.inside = SGD(params, lr=0.1)
        self.param_groups = self.inside.param_groups
        self.defaults, self.state = {}, self.inside.state
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()

    def step(self, closure=None):
        self.inside.step()
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.mul_(0.99)  # After the step inside.


class Bare(WithoutInit):
    def __init__(self, params):
        super().__init__(params)
        del self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks


class Nested(SGD):
    """Calls a step that has hooks as well."""

    def step(self, closure=None):
        return super().step(closure)


class Around(SGD):
    """Keeps its optimizer where Opacus does."""

    def __init__(self, params):
        self.original_optimizer = SGD(params, lr=0.1)

    @property
    def param_groups(self):
        return self.original_optimizer.param_groups

    def step(self, closure=None):
        self.original_optimizer.step()


class TwoSteps(torch.optim.Optimizer):
    """As SAM."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.base_optimizer = SGD(self.param_groups, lr=0.1)

    def first_step(self):
        pass

    def second_step(self):
        self.base_optimizer.step()

    def step(self, closure=None):
        self.first_step()
        self.second_step()


@pytest.mark.parametrize("kind", [SGD, Nested, WithoutInit, Around])
def test_one_update_for_each_step(kind):
    SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # Prepares SGD.step, which Nested calls.
    trained(lambda params: kind(params) if kind in (WithoutInit, Around) else kind(params, lr=0.1))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Bare, r"Bare never ran torch\.optim\.Optimizer's __init__"),
        (TwoSteps, r"wraps an optimizer and has steps of its own \(first_step, second_step\)"),
        (lambda params: nn.Linear(1, 1), "optimizer is a Linear; pass a torch.optim.Optimizer"),
    ],
)
def test_steps_that_call_no_hooks(kind, says):
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=says):
        EMAManager(model, 0.1).register_step_post_hook(kind(model.parameters()))


def test_a_scheduler_does_not_matter():
    def made(params):
        optimizer = SGD(params, lr=0.1)
        torch.optim.lr_scheduler.StepLR(optimizer, 2)
        return optimizer

    trained(made)


def test_twice_is_refused_until_it_is_removed():
    model, optimizer, ema, handle = trained(lambda params: SGD(params, lr=0.1))
    with pytest.raises(RuntimeError, match="this SGD calls update\\(\\) already"):
        ema.register_step_post_hook(optimizer)
    handle.remove()
    optimizer.step()
    assert ema.num_updates == 4
    ema.register_step_post_hook(optimizer)
    optimizer.step()
    assert ema.num_updates == 5
    other = EMAManager(model, 0.5)
    other.register_step_post_hook(optimizer)
    optimizer.step()
    assert (ema.num_updates, other.num_updates) == (6, 1)


def test_a_copy_of_the_optimizer_has_no_hook():
    _, optimizer, ema, _ = trained(lambda params: SGD(params, lr=0.1))
    copy.deepcopy(optimizer).step()
    assert ema.num_updates == 4


def test_a_step_while_swapped_is_refused_before_it_writes():
    model, optimizer, ema, _ = trained(lambda params: SGD(params, lr=0.1))
    model(torch.ones(1, 3)).sum().backward()
    averages = {name: tensor.clone() for name, tensor in ema.named_emas()}
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ema.swapped():
        with pytest.raises(RuntimeError, match=r"optimizer\.step: the model holds the ema"):
            optimizer.step()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, averages[name])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, raw[name])


# ---- several optimizers


class Part(nn.Module):
    """Parameters that can be given to several optimizers."""

    def __init__(self, num=2):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*[nn.Linear(3, 3) for _ in range(num)])

    def forward(self, x):
        return self.layers(x)


def split(num=2, **options):
    model = Part(num)
    options = {"lr": 0.1} | options
    return model, [SGD(layer.parameters(), **options) for layer in model.layers]


def lose(model, seed, factor=1.0):
    generator = torch.Generator().manual_seed(seed)
    return model(torch.randn(5, 3, generator=generator)).square().mean() * factor


class Expected:
    """The average of a model's parameters after each of the calls."""

    def __init__(self, model, momentum=0.25):
        self.model, self.momentum, self.num_updates = model, momentum, 0
        self.averages = [p.detach().float().clone() for p in model.parameters()]

    def __call__(self):
        params = [p.detach().float() for p in self.model.parameters()]
        torch._foreach_lerp_(self.averages, params, self.momentum)
        self.num_updates += 1

    def check(self, ema):
        assert ema.num_updates == self.num_updates
        averages = dict(ema.named_emas())
        for (name, _), average in zip(self.model.named_parameters(), self.averages, strict=True):
            assert torch.equal(averages[name], average), name


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_several_optimizers_make_one_update(order):
    model, optimizers = split(3)
    ema = EMAManager(model, 0.25)
    handle = ema.register_step_post_hook(*(optimizers[i] for i in order))
    expected = Expected(model)
    for seed in range(4):
        lose(model, seed).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        expected()
        expected.check(ema)
    handle.remove()
    for optimizer in optimizers:
        optimizer.step()
    expected.check(ema)
    ema.register_step_post_hook(*optimizers)


def test_muon_for_matrices_and_adamw_for_the_rest():
    model = Part()
    matrices = torch.optim.Muon([layer.weight for layer in model.layers], lr=0.1)
    rest = torch.optim.AdamW([layer.bias for layer in model.layers], lr=0.1)
    ema = EMAManager(model, 0.25)
    ema.register_step_post_hook(matrices, rest)
    expected = Expected(model)
    for seed in range(4):
        lose(model, seed).backward()
        for optimizer in (rest, matrices):
            optimizer.step()
            optimizer.zero_grad()
        expected()
    expected.check(ema)


@pytest.mark.parametrize("steps", ["aaab", "abbb", "ab" * 3, "aab"])
def test_one_that_steps_more_often_waits_for_the_other(steps):
    model, (a, b) = split()
    ema = EMAManager(model, 0.25)
    ema.register_step_post_hook(a, b)
    expected = Expected(model)
    for turn in range(3):
        for i, which in enumerate(steps):
            lose(model, 10 * turn + i).backward()
            (a if which == "a" else b).step()
            model.zero_grad()
            if which == "b" and steps[i - 1] == "a":
                expected()
            expected.check(ema)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("skipped", [0, 1])
def test_a_round_in_which_a_scaler_skips_one_has_no_update(fused, skipped):
    model, optimizers = split(fused=fused)
    ema = EMAManager(model, 0.25)
    ema.register_step_post_hook(*optimizers)
    expected = Expected(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for seed in range(6):
        scaler.scale(lose(model, seed)).backward()
        if seed in (2, 3):
            next(model.layers[skipped].parameters()).grad.fill_(float("inf"))
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        if seed not in (2, 3):
            expected()
        expected.check(ema)


# ---- whose parameters they are


def test_an_optimizer_that_holds_a_part_is_refused():
    model, (a, b) = split()
    ema = EMAManager(model, 0.25)
    says = (
        r"SGD holds 2 of the 4 parameters that are averaged and trained; in no optimizer given: "
        r"'layers\.1\.weight', 'layers\.1\.bias'\. Pass all of them in one call"
    )
    with pytest.raises(ValueError, match=says):
        ema.register_step_post_hook(a)
    assert not a._optimizer_step_post_hooks
    for i, register in enumerate(
        (
            lambda: ema.register_step_post_hook(a, partial=True),
            lambda: ema.register_step_post_hook(a, b),
            lambda: (
                [p.requires_grad_(False) for p in model.layers[1].parameters()]
                and ema.register_step_post_hook(a)
            ),
        )
    ):
        handle = register()
        a.step()
        if i == 1:
            b.step()
        assert ema.num_updates == i + 1
        handle.remove()


def test_what_is_not_averaged_needs_no_optimizer():
    model, (a, _) = split()
    ema = EMAManager(model, 0.25, include="layers.0.*")
    ema.register_step_post_hook(a)
    a.step()
    assert ema.num_updates == 1


def test_parameters_by_their_memory():
    model = Part()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
    offset = 0
    for param in model.parameters():
        param.data = flat.detach()[offset : offset + param.numel()].view_as(param)
        offset += param.numel()
    ema = EMAManager(model, 0.25)
    ema.register_step_post_hook(SGD([flat], lr=0.1))
    with pytest.raises(ValueError, match="holds none of the parameters that are averaged"):
        EMAManager(model, 0.25).register_step_post_hook(SGD([torch.zeros(9)], lr=0.1))


def test_a_second_hook_of_one_manager_is_refused():
    model, (a, b) = split()
    ema = EMAManager(model, 0.25)
    handle = ema.register_step_post_hook(a, b)
    for again in ((a, b), (b, a), (SGD(model.parameters(), lr=0.1),)):
        with pytest.raises(RuntimeError, match=r"this SGD calls update\(\) already"):
            ema.register_step_post_hook(*again)
    handle.remove()
    with pytest.raises(ValueError, match="an optimizer is given twice"):
        ema.register_step_post_hook(a, b, a)
    ema.register_step_post_hook(SGD(model.parameters(), lr=0.1))
    # That optimizer is gone, and its hook with it.
    ema.register_step_post_hook(a, b)
    with pytest.raises(TypeError, match=r"register_step_post_hook\(first, second\)"):
        EMAManager(model, 0.25).register_step_post_hook([a, b])


# ---- masters inside


def test_what_steps_copies_is_refused_and_what_writes_them_back_is_not():
    model = net()
    for optimizer in (Wrapped(model.parameters()), Hooked(model.parameters()).optimizer):
        found = getattr(optimizer, "optimizer", optimizer)
        for given in (optimizer, found):
            with pytest.raises(ValueError, match=r"AdamW steps other tensors of the shapes of '0"):
                EMAManager(model, 0.25).register_step_post_hook(given)
            assert not found._optimizer_step_post_hooks
    model = net()
    optimizer = Hooked(model.parameters())
    ema = EMAManager(model, 0.25)
    ema.register_step_post_hook(optimizer)
    expected = Expected(model)
    for seed in range(4):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
        expected()
        expected.check(ema)


@pytest.mark.parametrize("kind", [Wrapped, Hooked])
def test_a_hook_on_what_steps_the_sources(kind):
    model = net()
    optimizer = kind(model.parameters())
    masters = sources.param_list(model.parameters(), optimizer.masters)
    ema = EMAManager(model, 0.25, sources=masters)
    ema.register_step_post_hook(optimizer.optimizer)
    averages = [master.detach().clone() for master in optimizer.masters]
    for seed in range(4):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(averages, [master.detach() for master in optimizer.masters], 0.25)
    assert ema.num_updates == 4
    for (name, _), average in zip(model.named_parameters(), averages, strict=True):
        assert torch.equal(dict(ema.named_emas())[name], average)


def test_copies_that_come_into_an_optimizer_after_its_hook():
    model, _ = split()
    optimizer = SGD(model.parameters(), lr=0.1)
    ema = EMAManager(model, 0.25)
    ema.register_step_post_hook(optimizer)
    optimizer.step()
    optimizer.add_param_group({"params": [torch.zeros(1)]})
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert ema.num_updates == 3
    masters = [torch.nn.Parameter(param.detach().double()) for param in model.parameters()]
    optimizer.param_groups[0]["params"] = masters
    kept = [master.detach().clone() for master in masters]
    for master in masters:
        master.grad = torch.ones_like(master)
    with pytest.raises(ValueError, match=r"SGD steps other tensors of the shapes of 'layers\.0"):
        optimizer.step()
    for master, was in zip(masters, kept, strict=True):
        assert torch.equal(master, was)
    assert ema.num_updates == 3


class NeverInside(torch.optim.Optimizer):
    """Does the inner optimizer's work by itself."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups, self.state = optimizer.param_groups, optimizer.state

    def step(self, closure=None):
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                param.data.sub_(param.grad)


def test_a_wrapper_that_never_steps_what_is_inside():
    model, _ = split()
    optimizer = NeverInside(SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="NeverInside never calls the step of its optimizer"):
        EMAManager(model, 0.25).register_step_post_hook(optimizer)


class DeepSpeedOptimizerWrapper(Around):
    """Named as accelerate's, whose step does nothing."""


class Zero(SGD):
    """Named as DeepSpeed's own."""


Zero.__module__ = "deepspeed.runtime.zero.stage_1_and_2"


@pytest.mark.parametrize(
    "made", [DeepSpeedOptimizerWrapper, lambda params: Zero(params, lr=0.1)], ids=["wrapped", "own"]
)
def test_deepspeed_is_refused(made):
    model, _ = split()
    optimizer = made(model.parameters())
    with pytest.raises(TypeError, match=r"in.* DeepSpeed's engine.*fused_ema\.hooks\.deepspeed"):
        EMAManager(model, 0.25).register_step_post_hook(optimizer)


# ---- steps inside of a backward


def released(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Its import uses torch.jit.
        from torch.distributed.optim import _apply_optimizer_in_backward
    _apply_optimizer_in_backward(SGD, model.parameters(), {"lr": 0.1})
    return [o for param in model.parameters() for o in param._in_backward_optimizers]


def test_gradient_release_makes_one_update_a_backward():
    model = Part(3)
    optimizers = released(model)
    ema = EMAManager(model, 0.25)
    with pytest.raises(ValueError, match="SGD holds 1 of the 6 parameters"):
        ema.register_step_post_hook(optimizers[0])
    ema.register_step_post_hook(*optimizers)
    expected = Expected(model)
    for seed in range(4):
        if seed == 2:  # Not all of them step.
            model.layers[:2](torch.ones(1, 3)).sum().backward()
        else:
            lose(model, seed).backward()
        expected()
        expected.check(ema)
    with ema.swapped(), pytest.raises(RuntimeError, match=r"optimizer\.step: the model holds"):
        lose(model, 5).backward()


class Releasing(SGD):
    """As optimi's: one optimizer that steps single parameters, and as a whole does nothing."""

    optimizer_accumulation = False

    @torch.no_grad()
    def step(self, closure=None, param=None):
        if param is not None and not self.optimizer_accumulation:
            param.sub_(param.grad, alpha=0.1)

    def prepare(self, model):
        def release(param):
            self.step(param=param)
            param.grad = None  # With accumulation the state has it by now.

        for param in model.parameters():
            param.register_post_accumulate_grad_hook(release)


@pytest.mark.parametrize("calls_step", [True, False])
def test_one_optimizer_that_steps_each_parameter(calls_step):
    model = Part(3)
    optimizer = Releasing(model.parameters(), lr=0.1)
    optimizer.prepare(model)
    ema = EMAManager(model, 0.25)
    ema.register_step_post_hook(optimizer)
    expected = Expected(model)
    for seed in range(6):
        optimizer.optimizer_accumulation = seed == 3
        lose(model, seed).backward()
        if calls_step:
            optimizer.step()
        if seed != 3:
            optimizer.zero_grad()
            expected()
        expected.check(ema)


def test_a_backward_inside_of_another_is_refused():
    model = Part(3)
    ema = EMAManager(model, 0.25)
    handle = ema.register_step_post_hook(*released(model))

    def run(use_reentrant):
        x = torch.ones(2, 3, requires_grad=True)
        x = checkpoint(model.layers[0], x, use_reentrant=use_reentrant)
        model.layers[1:](x).sum().backward()

    run(use_reentrant=False)
    assert ema.num_updates == 1
    kept = model.layers[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"use_reentrant=True.*remove\(\) the hook, and call"):
        run(use_reentrant=True)
    assert torch.equal(model.layers[0].weight, kept)
    handle.remove()
    run(use_reentrant=True)


def test_some_that_step_inside_of_a_backward_and_some_after_it():
    model = Part(2)
    inside = released(model.layers[0])
    after = SGD(model.layers[1].parameters(), lr=0.1)
    EMAManager(model, 0.25).register_step_post_hook(*inside, after)
    lose(model, 0).backward()
    with pytest.raises(RuntimeError, match="SGD steps after the backward pass and others"):
        after.step()
