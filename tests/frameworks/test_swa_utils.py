"""hooks.swa_utils beside torch.optim.swa_utils: the same bits, the same states, in real runs."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from nets import Net, assert_same, move, values_of
from torch import nn
from torch.optim import swa_utils as theirs
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ema.hooks import swa_utils as ours
from fused_ema.testing import ROUNDINGS

FUNCTIONS = {
    "ema": (ours.get_ema_multi_avg_fn(0.9), theirs.get_ema_multi_avg_fn(0.9)),
    "copying": (ours.get_ema_multi_avg_fn(0), theirs.get_ema_multi_avg_fn(0)),
    "swa": (ours.get_swa_multi_avg_fn(), theirs.get_swa_multi_avg_fn()),
}


class Small(nn.Module):
    """A net that learns, with BatchNorm, tied weights and a buffer that it assigns anew."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.into = nn.Linear(4, 4, bias=False)
        self.out = nn.Linear(4, 4, bias=False)
        self.out.weight = self.into.weight
        self.register_buffer("last", torch.zeros(4), persistent=False)
        self.to(dtype)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        self.last = x.detach().mean(0)
        return self.out(self.into(x).tanh())


def batch(number, dtype=torch.float32):
    return torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(number)).to(dtype)


def all_of(module):
    """The state, and the buffers that aren't in it."""
    return {**module.state_dict(), **dict(module.named_buffers())}


def mixed(dtype):
    """A model in which groups of two dtypes are averaged."""
    model = Net(dtype)
    model.embedding.to(torch.bfloat16)
    return model


def without_integers(model):
    """Torch's SWA function for lists has no integers: they become floating-point here."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not (buffer.is_floating_point() or buffer.is_complex()):
                module._buffers[name] = buffer.float()
    return model


def without_bools(model):
    """Nor can torch subtract them."""
    model.mask = model.mask.long()
    return model


# ---- the same bits


@pytest.mark.parametrize("make", [Net, mixed], ids=["one dtype", "two dtypes"])
@pytest.mark.parametrize("dtype", ROUNDINGS)
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_bits_of_torch_s(backend, make, dtype, use_buffers, function):
    model, (our_fn, their_fn) = make(dtype), FUNCTIONS[function]
    if function == "swa" and use_buffers:
        without_integers(model)
    reference = theirs.AveragedModel(model, multi_avg_fn=their_fn, use_buffers=use_buffers)
    # Ours, with our function, with theirs; and theirs with ours.
    averages = [
        ours.AveragedModel(model, multi_avg_fn=our_fn, use_buffers=use_buffers),
        ours.AveragedModel(model, multi_avg_fn=their_fn, use_buffers=use_buffers),
        theirs.AveragedModel(model, multi_avg_fn=our_fn, use_buffers=use_buffers),
    ]
    for step in range(5):
        move(model, step)
        model.scratch = torch.full((2,), float(step)).to(dtype)  # Not persistent, assigned anew.
        reference.update_parameters(model)
        for averaged in averages:
            averaged.update_parameters(model)
            assert_same(all_of(averaged), all_of(reference))
    for averaged in averages:
        assert averaged.module.body[0].weight.is_contiguous(memory_format=torch.channels_last)


# 0.1: 1 - (1 - 0.1) isn't 0.1 in fp64.
@pytest.mark.parametrize("decay", [0.9, 0.1])
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("dtype", ROUNDINGS)
def test_the_bits_of_torch_s_function_for_one_tensor(backend, dtype, use_buffers, decay):
    model = without_bools(mixed(dtype))
    our_fn, their_fn = ours.get_ema_avg_fn(decay), theirs.get_ema_avg_fn(decay)
    reference = theirs.AveragedModel(model, avg_fn=their_fn, use_buffers=use_buffers)
    averages = [
        ours.AveragedModel(model, avg_fn=our_fn, use_buffers=use_buffers),
        theirs.AveragedModel(model, avg_fn=our_fn, use_buffers=use_buffers),
    ]
    for step in range(4):
        move(model, step)
        reference.update_parameters(model)
        for averaged in averages:
            averaged.update_parameters(model)
            assert_same(all_of(averaged), all_of(reference))


def test_the_function_for_one_tensor_runs_over_lists(monkeypatch):
    model = Net()
    averaged = ours.AveragedModel(model, avg_fn=ours.get_ema_avg_fn(0.9))
    averaged.update_parameters(model)
    monkeypatch.setattr(type(averaged.avg_fn), "__call__", None)
    averaged.update_parameters(model)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("avg_fn", [theirs.get_ema_avg_fn(0.9), theirs.get_swa_avg_fn()])
def test_a_function_of_the_user_s_is_called_as_torch_does(use_buffers, avg_fn):
    def recording(calls):
        def one(averaged, param, count):
            calls.append((tuple(averaged.shape), tuple(param.shape), count.clone()))
            return avg_fn(averaged, param, count)

        def many(averaged, params, count):
            calls.append(([tuple(a.shape) for a in averaged], len(params), count.clone()))
            for a, p in zip(averaged, params, strict=True):
                a.copy_(avg_fn(a, p, count))

        return {"avg_fn": one}, {"multi_avg_fn": many}

    for which in (0, 1):
        model, our_calls, their_calls = without_bools(mixed(torch.float32)), [], []
        ours_ = ours.AveragedModel(model, use_buffers=use_buffers, **recording(our_calls)[which])
        theirs_ = theirs.AveragedModel(
            model, use_buffers=use_buffers, **recording(their_calls)[which]
        )
        for step in range(3):
            move(model, step)
            ours_.update_parameters(model)
            theirs_.update_parameters(model)
            assert_same(all_of(ours_), all_of(theirs_))
        assert our_calls == their_calls
        assert our_calls


@pytest.mark.parametrize("use_buffers", [False, True])
def test_without_a_function_all_updates_weigh_the_same(use_buffers):
    model = without_integers(Net())
    averaged = ours.AveragedModel(model, use_buffers=use_buffers)
    # What torch computes on CUDA, bit for bit, and but for roundings what it does on the CPU.
    on_cuda = theirs.AveragedModel(
        model, multi_avg_fn=theirs.get_swa_multi_avg_fn(), use_buffers=use_buffers
    )
    on_cpu = theirs.AveragedModel(model, use_buffers=use_buffers)
    for step in range(9):
        move(model, step)
        for each in (averaged, on_cuda, on_cpu):
            each.update_parameters(model)
        assert_same(all_of(averaged), all_of(on_cuda))
        torch.testing.assert_close(all_of(averaged), all_of(on_cpu))


def test_integers_get_the_truncated_averages_of_torch_s_single_function():
    model = without_bools(Net())
    averaged = ours.AveragedModel(model, use_buffers=True)
    function = ours.AveragedModel(model, multi_avg_fn=ours.get_swa_multi_avg_fn(), use_buffers=True)
    reference = theirs.AveragedModel(model, use_buffers=True)  # On the CPU: one by one.
    for step in range(6):
        move(model, step)
        for each in (averaged, function, reference):
            each.update_parameters(model)
    for name, tensor in reference.state_dict().items():
        if not tensor.is_floating_point() and not tensor.is_complex():
            assert torch.equal(averaged.state_dict()[name], tensor), name
            assert torch.equal(function.state_dict()[name], tensor), name
    assert int(averaged.module.body[1].num_batches_tracked) != int(
        model.body[1].num_batches_tracked
    )


def test_booleans_are_copied_where_torch_raises():
    model = Net()
    averaged = ours.AveragedModel(model, use_buffers=True)
    reference = theirs.AveragedModel(model, use_buffers=True)
    for step in range(2):
        move(model, step)
        averaged.update_parameters(model)
        assert torch.equal(averaged.module.mask, model.mask)
    reference.update_parameters(model)
    with pytest.raises(RuntimeError, match="bool"):
        reference.update_parameters(model)


def test_a_float32_average_of_a_bfloat16_model():
    model = Net()
    del model.table  # Complex: would become real.
    averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.75))
    model.to(torch.bfloat16)
    expected = values_of(averaged.module)
    for step in range(3):
        move(model, step)
        averaged.update_parameters(model)
        for name, p in model.named_parameters():
            wide = p.detach().float()
            expected[name] = wide.clone() if step == 0 else expected[name].lerp(wide, 0.25)
    found = averaged.module.state_dict()
    names = [name for name, _ in model.named_parameters()]
    assert_same({n: found[n] for n in names}, {n: expected[n] for n in names})


def test_torch_s_class_gives_our_function_lists_of_two_dtypes():
    model = Net()
    del model.table
    averaged = theirs.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.75))
    reference = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.75))
    model.body.to(torch.bfloat16)  # Torch groups float32 with no other dtype than that.
    for step in range(3):
        move(model, step)
        averaged.update_parameters(model)
        reference.update_parameters(model)
        assert_same(averaged.state_dict(), reference.state_dict())


# ---- in a training run


@pytest.mark.parametrize("use_buffers", [False, True])
def test_in_a_training_run_and_then_update_bn(use_buffers):
    model = Small()
    settings = {"use_buffers": use_buffers}
    our_average = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.8), **settings)
    their_average = theirs.AveragedModel(
        model, multi_avg_fn=theirs.get_ema_multi_avg_fn(0.8), **settings
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = theirs.SWALR(optimizer, swa_lr=0.05, anneal_epochs=3)
    for step in range(8):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        our_average.update_parameters(model)
        their_average.update_parameters(model)
        assert_same(all_of(our_average), all_of(their_average))
    loader = torch.utils.data.DataLoader([batch(n)[0] for n in range(12)], batch_size=4)
    for average in (our_average, their_average):
        theirs.update_bn(loader, average)
        average.eval()
    assert_same(all_of(our_average), all_of(their_average))
    assert torch.equal(our_average(batch(99)), their_average(batch(99)))


class Reads(TorchDispatchMode):
    """Counts the values that the host reads from tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads_of(update):
    with Reads() as reads:
        update()
    return reads.count


@pytest.mark.parametrize("function", ["ema", "swa"])
def test_the_host_reads_nothing_from_the_device(function):
    model = Small()
    made = [
        library.AveragedModel(model, multi_avg_fn=fn)
        for library, fn in zip((ours, theirs), FUNCTIONS[function], strict=True)
    ]
    for averaged in made:
        averaged.update_parameters(model)
        averaged.update_parameters(model)
    # Torch's weight for an equal average on the host is a read from host memory.
    allowed = {"ema": 0, "swa": 1}[function]
    assert reads_of(lambda: made[0].update_parameters(model)) == allowed
    assert reads_of(lambda: made[1].update_parameters(model)) >= 2


# ---- the count and the state


def trained(steps, library=ours, tied=True, **settings):
    model = Net()
    if not tied:
        model.head = nn.Linear(5, 7, bias=False)
    fn = library.get_ema_multi_avg_fn(0.9)
    averaged = library.AveragedModel(model, multi_avg_fn=fn, **settings)
    for step in range(steps):
        move(model, step)
        averaged.update_parameters(model)
    return model, averaged


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("source", [ours, theirs])
@pytest.mark.parametrize("target", [ours, theirs])
@pytest.mark.parametrize("assign", [False, True])
def test_states_go_both_ways(steps, source, target, assign):
    # Assigning unties; torch then leaves parameters out in silence, and ours raises an error.
    model, averaged = trained(steps, source, tied=not assign)
    _, going_on = trained(2, target, tied=not assign)
    state = copy.deepcopy(averaged.state_dict())
    going_on.load_state_dict(state, assign=assign)
    assert_same(going_on.state_dict(), averaged.state_dict())
    for step in (7, 8):
        move(model, step)
        averaged.update_parameters(model)
        going_on.update_parameters(model)
        assert_same(going_on.state_dict(), averaged.state_dict())
    assert int(going_on.n_averaged) == steps + 2


@pytest.mark.parametrize("way", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
@pytest.mark.parametrize("steps", [0, 2])
def test_copies_and_pickles_go_on(way, steps):
    model, averaged = trained(steps, use_buffers=True)
    copied = way(averaged)
    move(model, 9)
    copied.update_parameters(model)
    assert int(averaged.n_averaged) == steps  # The copy is apart.
    averaged.update_parameters(model)
    assert_same(copied.state_dict(), averaged.state_dict())
    assert repr(copied.multi_avg_fn) == "get_ema_multi_avg_fn(0.9)"


WRITES = {
    "in place": lambda a: a.n_averaged.zero_(),
    "assigned": lambda a: setattr(a, "n_averaged", torch.tensor(0)),
    "converted": lambda a: a.to("cpu", non_blocking=True).n_averaged.fill_(0),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_count_that_somebody_else_writes_is_seen(write):
    model, averaged = trained(3)
    WRITES[write](averaged)
    move(model, 5)
    averaged.update_parameters(model)  # The first update copies.
    assert_same(dict(averaged.module.named_parameters()), dict(model.named_parameters()))


def test_the_first_update_copies_and_construction_does_not_share():
    model = Net()
    averaged = ours.AveragedModel(model)
    kept = values_of(averaged.module)
    move(model, 0)
    assert_same(values_of(averaged.module), kept)
    averaged.update_parameters(model)
    assert_same(values_of(averaged.module), values_of(model))


def test_it_follows_a_model_that_changes_its_tensors():
    model, averaged = trained(2)
    reference = copy.deepcopy(averaged)
    model.scale = nn.Parameter(torch.tensor(7.0))
    model.embedding.weight.data = torch.ones(7, 5)
    model.scratch = torch.ones(2)
    averaged.update_parameters(model)
    expected = theirs.AveragedModel(Net(), multi_avg_fn=theirs.get_ema_multi_avg_fn(0.9))
    expected.load_state_dict(reference.state_dict())
    expected.update_parameters(model)
    assert_same(all_of(averaged), all_of(expected))
    # And another averaged module, and a change of what is averaged.
    averaged.module = copy.deepcopy(averaged.module)
    averaged.use_buffers = expected.use_buffers = True
    move(model, 4)
    averaged.update_parameters(model)
    expected.update_parameters(model)
    assert_same(all_of(averaged), all_of(expected))


def test_it_is_freed_at_once():
    gc.collect()
    gc.disable()
    try:
        _, averaged = trained(2)
        gone = weakref.ref(averaged)
        del averaged
        assert gone() is None
    finally:
        gc.enable()


# ---- bad input


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_a_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=r"decay is .*; it is the weight of the old value"):
        ours.get_ema_multi_avg_fn(decay)


def test_wrong_settings():
    with pytest.raises(TypeError, match="decay is a str; pass a number"):
        ours.get_ema_multi_avg_fn("0.9")
    with pytest.raises(AssertionError, match="both avg_fn and multi_avg_fn are given"):
        ours.AveragedModel(Net(), avg_fn=max, multi_avg_fn=max)
    with pytest.raises(TypeError, match="unexpected keyword"):
        ours.AveragedModel(Net(), decay=0.9)


def test_another_model_is_an_error_and_changes_nothing():
    _, averaged = trained(2)
    before = {k: v.clone() for k, v in averaged.state_dict().items()}
    with pytest.raises(ValueError, match="tensors but the model has"):
        averaged.update_parameters(Small())
    other = Net()
    other.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"'scale'.*shape"):
        averaged.update_parameters(other)
    other = Net()
    other.bytes = torch.arange(1, dtype=torch.uint8)  # Would be broadcast.
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'bytes' has shape \[1\] in the model but \[5\]"):
            averaged.update_parameters(other)
    assert_same(averaged.state_dict(), before)


# ---- a run that is killed

NUM_STEPS, SAVED_EVERY = 14, 4


def train(path, killed_at=None):
    torch.set_num_threads(1)
    model = Small()
    averaged = ours.AveragedModel(
        model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    equal = ours.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
    parts = {
        "model": model,
        "averaged": averaged,
        "equal": equal,
        "optimizer": optimizer,
        "scheduler": scheduler,
    }
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        first = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)
    for step in range(first, NUM_STEPS):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        averaged.update_parameters(model)
        if step % 2:
            equal.update_parameters(model)
        if (step + 1) % SAVED_EVERY == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"step": step + 1, **state}, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
    return {
        **{f"model.{k}": v for k, v in model.state_dict().items()},
        **{f"averaged.{k}": v for k, v in averaged.state_dict().items()},
        **{f"equal.{k}": v for k, v in equal.state_dict().items()},
        "lr": torch.tensor(scheduler.get_last_lr(), dtype=torch.float64),
    }


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, one_thread):
    path, killed_at = tmp_path / "checkpoint.pt", 10
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    killed = subprocess.run(
        [sys.executable, __file__, str(path), str(killed_at)],
        env={**os.environ, "PYTHONPATH": paths},
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL
    assert torch.load(path, weights_only=True)["step"] == 8
    assert_same(train(path), train(tmp_path / "other.pt"))


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
