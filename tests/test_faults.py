"""Faults: no memory, exceptions, killed processes, tensors that move, forks, threads, the exit.

Whatever may end or hang a process runs in one of its own: in a copy of this one (processes.py),
which costs little but knows no threads, or ``in_a_process``, a new one that calls a function here.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import re
import resource
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from nets import Net, assert_same, move, values_of
from processes import Fork, forked, in_a_process, pythons, run_threads
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ema
from fused_ema import EMAManager, _native, schedules
from fused_ema.testing import assert_bits_equal, make_lists

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, fork and limits")

ROOT = Path(__file__).parents[1]
F32 = (torch.float32, torch.float32)
DTYPES = (torch.float32, torch.bfloat16)


def averages_of(ema):
    return {name: tensor.clone() for name, tensor in ema.named_emas()}


class Training:
    """A run with all that a resumed one needs. The data of a step depend on its number alone."""

    PARTS = ("model", "optimizer", "ema")

    def __init__(self, dtype=torch.float32, **settings):
        torch.manual_seed(11)
        self.dtype = dtype
        self.model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
        self.model.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.model.to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.ema = EMAManager(self.model, momentum_fun=schedules.ramp(0.1, 5), **settings)
        self.ema.register_step_post_hook(self.optimizer)

    def batch(self, number):
        generator = torch.Generator().manual_seed(number)
        return torch.randn(16, 6, generator=generator).to(self.dtype)

    def step(self, number):
        self.optimizer.zero_grad()
        self.model(self.batch(number)).float().square().mean().backward()
        self.optimizer.step()
        self.model.steps += 1

    def evaluate(self):
        with self.ema.swapped(), torch.inference_mode():
            return self.model(self.batch(99)).float().square().mean().item()

    def state(self):
        return {name: getattr(self, name).state_dict() for name in self.PARTS}

    def load(self, state):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])

    def results(self):
        counts = {"iteration": self.ema.iteration, "num_updates": self.ema.num_updates}
        found = {f"ema of {name}": tensor for name, tensor in averages_of(self.ema).items()}
        return values_of(self.model) | found | {k: torch.tensor(v) for k, v in counts.items()}


# ---- out of memory


def virtual_bytes():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def with_memory(num_bytes, work):
    """Calls work where about that much memory is left; returns the error, or None."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken, size = [], 1 << 24
    limit = virtual_bytes()
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        while size >= 1 << 12:  # First what the allocator has kept for later.
            try:
                taken.append(bytearray(size))
            except MemoryError:
                size //= 2
        resource.setrlimit(resource.RLIMIT_AS, (limit + num_bytes, hard))
        work()
        return None
    except (MemoryError, RuntimeError) as error:
        return type(error).__name__
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def flat_lists(num_tensors):
    ema = torch.zeros(num_tensors, 4)
    params = torch.ones(num_tensors, 4)
    return list(ema.unbind()), list(params.unbind())


def no_memory_for_a_plan(num_threads):
    # OpenMP ends the process where it can't start a thread, so they are started beforehand.
    torch.set_num_threads(num_threads)
    torch.ones(1 << 20).add_(1)
    ema, params = flat_lists(4000)
    outcomes = []
    for room in range(0, 3 << 20, 1 << 16):
        outcomes.append(with_memory(room, lambda: fused_ema.Plan(ema, params)))
        outcomes.append(with_memory(room, lambda: fused_ema.update_(ema, params, 0.0)))
    assert not any(e.any() for e in ema)
    assert all(p.eq(1).all() for p in params)
    plan = fused_ema.Plan(ema, params)
    plan.update(0.5)
    assert all(e.eq(0.5).all() for e in ema)
    return summary_of(outcomes)


def summary_of(outcomes):
    enough = min(outcomes.count(None), outcomes.count("MemoryError")) >= 5
    return f"{sorted(map(str, set(outcomes)))}, {'enough' if enough else 'too few'} of each"


NOTHING_BUT = "['MemoryError', 'None'], enough of each"


@pytest.mark.parametrize("num_threads", [1, 2])
def test_no_memory_for_a_plan(num_threads):
    where = forked if num_threads == 1 else in_a_process
    assert where(no_memory_for_a_plan, num_threads) == NOTHING_BUT


def no_memory_to_follow_a_move(odd_at_first):
    num_tensors = 10_000
    emas, values = torch.zeros(num_tensors, 2, 2), torch.ones(2, num_tensors, 2, 2)
    usual, odd = emas.unbind(), emas.transpose(1, 2).unbind()
    here, there = values[0].unbind(), values[1].unbind()
    ema, params = list(emas.clone().unbind()), list(values[0].clone().unbind())
    first = torch.ones(3)
    outcomes = []
    for room in range(0, 4 << 20, 1 << 17):
        emas.zero_()
        values.fill_(1)
        for tensors, memory in ((ema, odd if odd_at_first else usual), (params, here)):
            for tensor, at in zip(tensors, memory, strict=True):
                tensor.data = at
        plan = fused_ema.Plan([torch.zeros(3), *ema], [first, *params])
        assert plan.describe()[-1]["backend"] == ("foreach" if odd_at_first else "cpu")
        first.data = first.data.clone()
        # The odd pairs become usual ones, or all params move.
        moves = (ema, usual) if odd_at_first else (params, there)
        for tensor, at in zip(*moves, strict=True):
            tensor.data = at
        outcomes.append(with_memory(room, lambda plan=plan: plan.update(0.5)))
        if outcomes[-1] is not None:
            assert not emas.any(), "written before the error"
            plan.update(0.5)
        assert emas.eq(0.5).all(), f"{outcomes[-1]} with {room} bytes"
        # What the update in vain has learnt, the plan must not take for known.
        for index in (num_tensors - 1, num_tensors // 2, 0):
            old = params[index].data
            params[index].data = torch.full((2, 2), 3.0)
            plan.swap()
            error = f"after {outcomes[-1]} with {room} bytes, params[{index + 1}] moved"
            assert old.eq(1).all(), f"{error}: written through the old address"
            assert ema[index].eq(3).all(), error
            plan.swap()
    return summary_of(outcomes)


@pytest.mark.parametrize("odd_at_first", [False, True])
def test_no_memory_to_follow_a_move(odd_at_first):
    assert forked(no_memory_to_follow_a_move, odd_at_first) == NOTHING_BUT


class Wide(nn.Module):
    """Many tensors of every kind, so that what is kept about them needs memory as well."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(5)
        self.many = nn.ParameterList(torch.randn(40).to(dtype) for _ in range(100))
        self.net = Net(dtype)
        for i in range(20):
            self.register_buffer(f"mask{i}", torch.arange(8) % 2 == 0)
            self.register_buffer(f"count{i}", torch.arange(300))

    def move(self):
        with torch.no_grad():
            for tensor in self.state_dict().values():
                tensor.logical_not_() if tensor.dtype == torch.bool else tensor.add_(1)


class Averaged:
    """A model with its manager after one update, and another state of them; ready for any op."""

    def __init__(self, model, is_swapped, **settings):
        self.model = model
        self.ema = EMAManager(model, 0.25, **settings)
        move(model, 1)
        self.ema.update()
        other = copy.deepcopy(model)
        move(other, 2)
        other = EMAManager(other, 0.5, **settings)
        self.state = copy.deepcopy(other.state_dict())
        other.swap()
        self.swapped_state = copy.deepcopy(other.state_dict())
        move(model, 3)
        if is_swapped:
            self.ema.swap()
        self.before = self.all_of_it()

    def all_of_it(self):
        found = values_of(self.model)
        found |= {f"ema of {name}": tensor for name, tensor in averages_of(self.ema).items()}
        raw = self.ema.state_dict()["raw"]
        found |= {f"raw of {name}": tensor.clone() for name, tensor in raw.items()}
        counts = (self.ema.iteration, self.ema.num_updates, self.ema.is_swapped)
        return found | {"counts": torch.tensor(counts)}

    def assert_unchanged(self, but=()):
        found = self.all_of_it()
        assert_same(*({n: t for n, t in ts.items() if n not in but} for ts in (found, self.before)))


# Name to what is done, whether the model is swapped before it, and settings.
COPIED = {"copy_buffers": True}
OPS = {
    "make": (lambda a: EMAManager(a.model, 0.25), False, {}),
    "update": (lambda a: a.ema.update(), False, {}),
    "update and copy": (lambda a: a.ema.update(), False, COPIED),
    "swap in": (lambda a: a.ema.swap(), False, {}),
    "swap out": (lambda a: a.ema.swap(), True, {}),
    "load": (lambda a: a.ema.load_state_dict(a.state), False, {}),
    "load swapped": (lambda a: a.ema.load_state_dict(a.swapped_state), False, {}),
    "refresh": (lambda a: a.ema.refresh(), False, {}),
    "reset": (lambda a: a.ema.reset(), False, {}),
}


def no_memory_for_a_manager(op, dtype):
    call, is_swapped, settings = OPS[op]
    averaged = Averaged(Wide(dtype), is_swapped, **settings)
    for p in averaged.model.many:  # An update, too, has a table to make.
        p.data = p.data.clone()
    # Which a swap out tells of.
    warnings.filterwarnings("ignore", ".*while the model held the ema", UserWarning)
    return "\n".join(
        f"{room} bytes: {forked(one_call_without_memory, averaged, call, room).splitlines()[-1]}"
        for room in (0, *(1 << shift for shift in range(12, 20)), 1 << 26)
    )


def one_call_without_memory(averaged, call, room):
    outcome = with_memory(room, lambda: call(averaged))
    if outcome is not None:
        averaged.assert_unchanged()
        call(averaged)
    return outcome


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_no_memory_for_a_manager(op, dtype):
    lines = forked(no_memory_for_a_manager, op, dtype).splitlines()
    assert [x for x in lines if not re.search(": (None|MemoryError|RuntimeError)$", x)] == []
    assert not lines[0].endswith("None")
    assert lines[-1].endswith("None")


class Memory(TorchDispatchMode):
    """Has no room for the n-th request: a tensor of torch, or the tables of a call of ours."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def request(self, what):
        self.left -= 1
        if self.left == -1:
            raise torch.OutOfMemoryError(f"no memory for {what}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func._schema.returns
        if any(r.alias_info is None and "Tensor" in str(r.type) for r in returned):
            self.request(func)
        return func(*args, **kwargs or {})


class Calls:
    """Stands before the compiled module or one of its plans, and runs `around` for each call."""

    NAMES = ("update_", "swap_", "copy_", "update", "swap", "copy_to_ema", "copy_to_params")

    def __init__(self, real, around):
        self._real, self._around = real, around

    def __getattr__(self, name):
        found = getattr(self._real, name)
        if name in self.NAMES:
            return lambda *args: self._around(name, lambda: found(*args))
        return found


@contextlib.contextmanager
def around_calls(ema, around):
    """Every call of a kernel, of this manager's plan too, as long as there are kernels."""
    if _native.C is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema._tracked.plan, "_plan", Calls(ema._tracked.plan._plan, around))
        patch.setattr(_native, "C", Calls(_native.C, around))
        yield


class NetWithOddPairs(Net):
    """Also params with gaps, which torch's own functions serve, with temporaries of their own."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__(dtype, seed)
        self.odd = nn.Parameter(torch.randn(4, 6).to(dtype)[:, ::2])
        self.odder = nn.Parameter(torch.randn(4, 6).to(dtype)[:, ::3])


@pytest.mark.parametrize(
    ("backend", "make"),
    [("native", Net), ("native", NetWithOddPairs), ("foreach", Net)],
    indirect=["backend"],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_whatever_there_is_no_memory_for(backend, op, dtype, make):
    call, is_swapped, settings = OPS[op]
    undisturbed = Averaged(make(dtype), is_swapped, **settings)
    call(undisturbed)
    # Buffers are copied before the average, so that it is the last to fail.
    copied = [f"ema of {n}" for n, _ in undisturbed.model.named_buffers()]
    copied = copied if op.startswith("update") else []
    changed = []
    for n in range(1000):
        averaged = Averaged(make(dtype), is_swapped, **settings)
        memory = Memory(n)

        def around(name, run, memory=memory):
            memory.request(name)
            run()

        try:
            with around_calls(averaged.ema, around), memory:
                call(averaged)
        except RuntimeError:
            assert memory.left < 0  # Through C++ it may come out without its text.
        if memory.left >= 0:
            break
        try:
            averaged.assert_unchanged(but=copied)
            call(averaged)
            assert_same(averaged.all_of_it(), undisturbed.all_of_it())
        except AssertionError as error:
            changed.append(f"without the {n + 1}. piece of memory: {error}")
    # Without kernels most ops ask for nothing.
    assert n < 999
    assert n > 0 or backend == "foreach" or op == "refresh"  # Which keeps what is the same.
    assert not changed, "\n".join(changed)


# ---- exceptions, and Ctrl-C while a kernel runs


class AbortError(Exception):
    pass


def abort(*args):
    raise AbortError


def abort_on_the_keyboard(*args):
    raise KeyboardInterrupt


def step_with(handle, run, number):
    try:
        run.step(number)
    finally:
        handle.remove()


def in_forward(run, number, how):
    step_with(run.model[3].register_forward_pre_hook(how), run, number)


def in_backward(run, number, how):
    def on_output(module, inputs, output):
        output.register_hook(how)

    step_with(run.model[1].register_forward_hook(on_output), run, number)


def in_optimizer_step(run, number, how):
    step_with(run.optimizer.register_step_pre_hook(how), run, number)


def in_closure(run, number, how):
    run.optimizer.step(how)


def in_evaluation(run, number, how):
    with run.ema.swapped():
        in_forward(run, number, how)


def in_evaluation_in_a_generator(run, number, how):
    def losses():
        with run.ema.swapped(), torch.inference_mode():
            for _ in range(3):
                yield run.model(run.batch(number)).sum().item()

    for _ in losses():
        how()  # Nobody closes the generator but its last reference.


ABORTS = (
    *(in_forward, in_backward, in_optimizer_step, in_closure),
    *(in_evaluation, in_evaluation_in_a_generator),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", [abort, abort_on_the_keyboard])
@pytest.mark.parametrize("where", ABORTS, ids=lambda f: f.__name__)
def test_an_epoch_with_an_exception_in_it_is_the_epoch_without(one_thread, where, how, dtype):
    whole, disturbed = Training(dtype, interval=2), Training(dtype, interval=2)
    for number in range(9):
        if number in (0, 3, 4, 8):
            with pytest.raises((AbortError, KeyboardInterrupt)):
                where(disturbed, 100 + number, how)
            assert not disturbed.ema.is_swapped
        whole.step(number)
        disturbed.step(number)
    assert_same(disturbed.results(), whole.results())
    assert (whole.ema.iteration, whole.ema.num_updates) == (9, 4)
    assert disturbed.evaluate() == whole.evaluate()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["swap in", "swap out", "swapped"])
def test_ctrl_c_while_a_kernel_of_a_swap_runs(op, dtype):
    # The kernel runs to its end, and the interpreter raises as soon as it has the word again.
    lost, n = [], 0
    while True:
        averaged = Averaged(Net(dtype), is_swapped=False)
        ema = averaged.ema
        if op == "swap out":
            ema.swap()
        calls = []

        def around(name, run, calls=calls, n=n):
            run()
            calls.append(name)
            if len(calls) == n + 1:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt), around_calls(ema, around):
            if op == "swapped":
                with ema.swapped():
                    pass
            else:
                ema.swap()
        if len(calls) <= n:
            break
        try:
            assert not (ema.is_swapped and op == "swapped")
            if ema.is_swapped:  # Wherever it stopped, the manager knows what the model holds.
                ema.swap()
            averaged.assert_unchanged()
        except AssertionError as error:
            lost.append(f"in call {n + 1}, {calls[n]}: {error}")
        n += 1
    assert n >= 2
    assert not lost, "\n".join(lost)


# ---- a process killed while it writes a checkpoint


class FatalFile:
    """A file whose writer is killed as soon as that many bytes are written."""

    def __init__(self, file, num_bytes):
        self.file, self.left = file, num_bytes

    def write(self, data):
        if self.left is not None and len(data) > self.left:
            self.file.write(data[: self.left])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.left is not None:
            self.left -= len(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


NUM_SAVES = 16
# After two saves each, these runs are killed in the third: with so much of the file written (a
# share of it), before it gets its name, and right after.
KILLED_AT = (0.0, 0.3, 0.7, 0.99, "before os.replace", "after os.replace")


def save(run, path, within, killed_at=None):
    """The usual pattern: a file under another name, which takes the old one's place at once."""
    with run.ema.swapped() if within else contextlib.nullcontext():
        content = io.BytesIO()
        torch.save(run.state(), content)
        num_bytes = None
        if isinstance(killed_at, float):
            num_bytes = int(len(content.getvalue()) * killed_at)
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            torch.save(run.state(), FatalFile(file, num_bytes))
    if killed_at == "before os.replace":
        os.kill(os.getpid(), signal.SIGKILL)
    os.replace(temporary, path)
    if killed_at == "after os.replace":
        os.kill(os.getpid(), signal.SIGKILL)


def resumed(path, dtype):
    run = Training(dtype)
    if path.exists():
        run.load(torch.load(path, weights_only=True))
        if run.ema.is_swapped:
            run.ema.swap()
    return run


def train_and_be_killed(folder, dtype, within):
    import torch._dynamo  # An optimizer's first step does, and that takes a second.

    path, dtype = Path(folder) / "checkpoint.pt", getattr(torch, dtype)
    saved = []

    def train(killed_at):
        run = resumed(path, dtype)
        for count, number in enumerate(range(int(run.model.steps), NUM_SAVES)):
            run.step(number)
            save(run, path, within, killed_at if count == 2 else None)

    for killed_at in KILLED_AT:
        assert forked(train, killed_at) == "SIGKILL"
        sound = torch.load(path, weights_only=True)
        assert sound["ema"]["is_swapped"] is within
        saved.append(sound["ema"]["iteration"])
    # Two saves each time; the third only where it has taken its place.
    assert saved == [2, 4, 6, 8, 10, 13]
    assert forked(train, None) == "None"

    def compare():
        whole = Training(dtype)
        for number in range(NUM_SAVES):
            whole.step(number)
        assert_same(resumed(path, dtype).results(), whole.results())

    return forked(compare)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_run_killed_while_it_saves_goes_on_bit_for_bit(tmp_path, dtype, within):
    assert in_a_process(train_and_be_killed, str(tmp_path), str(dtype)[6:], within) == "None"


@pytest.mark.parametrize("within", [False, True], ids=["raw", "within swapped()"])
def test_a_truncated_file_loads_nothing(one_thread, tmp_path, within):
    run = Training(torch.bfloat16)
    run.step(0)
    path = tmp_path / "checkpoint.pt"
    with run.ema.swapped() if within else contextlib.nullcontext():
        torch.save(run.ema.state_dict(), path)
    content = path.read_bytes()
    taken = Training(torch.bfloat16)
    taken.step(5)
    before = taken.results()
    for size in (*range(0, len(content), 97), len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises((RuntimeError, OSError, EOFError)):
            taken.ema.load_state_dict(torch.load(path, weights_only=True))
        assert_same(taken.results(), before)
    path.write_bytes(content)
    taken.ema.load_state_dict(torch.load(path, weights_only=True))
    assert taken.ema.is_swapped is within
    assert_same(averages_of(taken.ema), averages_of(run.ema))


# ---- params that are freed, resized or moved


def free(tensor):
    tensor.untyped_storage().resize_(0)


def cut(tensor):
    tensor.untyped_storage().resize_(40)


def freed_params(has_kernels):
    if not has_kernels:
        _native.C = None
    calls = {
        "update_": lambda plan, ema, lists: fused_ema.update_(*lists, 0.5),
        "swap_": lambda plan, ema, lists: fused_ema.swap_(*lists),
        "copy_": lambda plan, ema, lists: fused_ema.copy_(*lists[::-1]),
        "Plan": lambda plan, ema, lists: fused_ema.Plan(*lists),
        "Plan.update": lambda plan, ema, lists: plan.update(0.5),
        "Plan.swap": lambda plan, ema, lists: plan.swap(),
        "Plan.copy_to_ema": lambda plan, ema, lists: plan.copy_to_ema(),
        "Plan.copy_to_params": lambda plan, ema, lists: plan.copy_to_params(),
        "EMAManager.update": lambda plan, ema, lists: ema.update(),
        "EMAManager.swap": lambda plan, ema, lists: ema.swap(),
    }
    model = nn.ParameterList(torch.full((1000,), 2.0) for _ in range(3))
    emas = [torch.zeros(1000) for _ in model]
    plan = fused_ema.Plan(emas, list(model))
    manager = EMAManager(model, 0.5)

    def try_it(call, damage):
        damage(model[1])
        try:
            call(plan, manager, (emas, list(model)))
        except (RuntimeError, ValueError) as error:
            untouched = all(model[i].eq(2).all() for i in (0, 2)) and not any(map(torch.any, emas))
            says_which = re.search(r"\[1\]|'1'", str(error)) is not None
            return "refused" if untouched and says_which else f"changed something, or: {error}"
        return "ran"

    return "\n".join(
        f"{damage.__name__}, {name}: {forked(try_it, call, damage)}"
        for damage in (free, cut)
        for name, call in calls.items()
    )


@pytest.mark.parametrize("has_kernels", [True, False])
def test_a_param_whose_memory_was_freed_or_cut_is_refused(has_kernels):
    found = forked(freed_params, has_kernels).splitlines()
    assert len(found) == 20
    assert [line for line in found if not line.endswith(": refused")] == []


def freed_and_given_back(param):
    # As a sharded module does around each forward.
    values = param.detach().clone()
    storage = param.untyped_storage()
    num_bytes = storage.nbytes()
    storage.resize_(0)
    storage.resize_(num_bytes)
    param.data.copy_(values)


def grown_storage(param):
    storage = param.untyped_storage()
    storage.resize_(storage.nbytes() + 100_000)


def resized_there_and_back(param):
    shape = param.shape
    param.data.resize_(param.numel() * 50)
    param.data.resize_(shape)


def shared_between_processes(param):
    param.data.share_memory_()


def seen_through_other_strides(param):
    param.data = param.data.contiguous(memory_format=torch.channels_last)


MOVES = (
    *(freed_and_given_back, grown_storage, resized_there_and_back),
    *(shared_between_processes, seen_through_other_strides),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("move_of", MOVES, ids=lambda f: f.__name__)
def test_a_manager_follows_params_that_move_all_the_time(backend, move_of, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)).to(dtype)
    twin = copy.deepcopy(model)
    ema, expected = EMAManager(model, 0.25), EMAManager(twin, 0.25)
    for step in range(6):
        for tensor in list(model.state_dict(keep_vars=True).values())[step % 2 :: 2]:
            if tensor.dim() == 4 or move_of is not seen_through_other_strides:
                move_of(tensor)
        for net in (model, twin):
            move(net, step)
        with ema.swapped(), expected.swapped():
            assert_same(model.state_dict(), twin.state_dict())
        ema.update()
        expected.update()
        assert_same(model.state_dict(), twin.state_dict())
        assert_same(ema.named_emas(), averages_of(expected))


def test_params_resized_in_place_are_an_error_until_they_are_back(backend):
    params = [torch.full((30,), 2.0) for _ in range(3)]
    ema = [torch.zeros(30) for _ in params]
    plan = fused_ema.Plan(ema, params)
    for size in (29, 0, 31, 30_000):
        params[1].resize_(size).fill_(7)
        for call in (lambda: plan.update(0.5), plan.swap, plan.copy_to_ema, plan.copy_to_params):
            with pytest.raises(ValueError, match=rf"params\[1\] has shape \[{size}\]"):
                call()
        assert not any(e.any() for e in ema)
        assert params[1].eq(7).all()
        assert params[0].eq(2).all()
    params[1].resize_(30)
    plan.update(0.5)
    assert [e[0].item() for e in ema] == [1.0, 3.5, 1.0]


def test_a_trainer_in_another_thread_that_moves_params_between_the_updates(backend):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(257)) for _ in range(20)]
    ema = [torch.zeros(257) for _ in params]
    plan = fused_ema.Plan(ema, params)
    lock, done = threading.Lock(), threading.Event()

    def train():
        generator = torch.Generator().manual_seed(1)
        for step in range(400):
            with lock:
                for p in params[step % 3 :: 3]:  # The old memory is free, and soon another's.
                    p.data = torch.randn(257, generator=generator)
        done.set()

    def average():
        expected = [e.clone() for e in ema]
        while not done.is_set():
            with lock:
                plan.update(0.25)
                for e, p in zip(expected, params, strict=True):
                    e.lerp_(p.detach(), 0.25)
        for e, want in zip(ema, expected, strict=True):
            assert_bits_equal(e, want)

    run_threads(train, average)


GUARD = 64


def moves_without_a_lock():
    # A race by the plan's own words. Torch keeps no tensor from being moved under a call either; so
    # every generation of a param is kept alive, and then each call must see one or the other, and
    # write to nothing else.
    sizes = [5, 300, 5000] * 4

    def generation(value):
        rooms = [torch.full((n + 2 * GUARD,), -1.0) for n in sizes]
        views = [room[GUARD:-GUARD].fill_(value) for room in rooms]
        return rooms, views

    generations = [generation(float(value)) for value in range(1, 9)]
    params = [nn.Parameter(view.detach()) for view in generations[0][1]]
    ema = [torch.ones(n) for n in sizes]
    plan = fused_ema.Plan(ema, params)
    done = threading.Event()

    def train():
        step = 0
        while step < 3000 or plan._plan.num_refreshes < 300:
            step += 1
            for p, view in zip(params, generations[step % 8][1], strict=True):
                p.data = view
        done.set()

    def average():
        while not done.is_set():
            plan.update(1.0)
            for e in ema:
                assert e.eq(e[0]).all(), "one tensor of two generations"
                assert e[0] in range(1, 9)
            plan.copy_to_params()

    run_threads(train, average)
    for rooms, views in generations:
        for room, view in zip(rooms, views, strict=True):
            assert room[:GUARD].eq(-1).all(), "written before a param"
            assert room[-GUARD:].eq(-1).all(), "written after a param"
            assert view.eq(view[0]).all()
            assert view[0] in range(1, 9)


def test_a_trainer_that_moves_params_without_a_lock_harms_no_other_memory():
    assert forked(moves_without_a_lock) == "None"


# ---- forks and spawned processes


def test_a_plan_is_not_pickled(backend):
    # Another process would average copies, and nobody would see it.
    plan = fused_ema.Plan([torch.zeros(3)], [torch.ones(3)])
    for how in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"fused_ema\.Plan.* make a (new )?plan"):
            how(plan)


def in_a_fork(path):
    torch.set_num_threads(2)
    ema, params = make_lists((200_000, 7, 300_001), F32)
    plan = fused_ema.Plan(ema, params)
    plan.update(0.25)  # OpenMP's threads are there now. In a fork they are not.
    assert _native.C.runs_parallel()
    run = Training(torch.bfloat16)

    def work():
        for number in range(1, 4):
            plan.update(0.25)
            plan.swap()
            run.step(number)
        loss = torch.tensor(run.evaluate())
        return run.results() | dict(zip("abcdef", [*ema, *params], strict=True)) | {"loss": loss}

    def work_in_the_fork():
        torch.save(work(), path)

    before = [t.clone() for t in (*ema, *params)], run.results()
    assert forked(work_in_the_fork) == "None"
    for now, then in zip((*ema, *params), before[0], strict=True):
        assert_bits_equal(now, then, "a tensor of the parent")
    assert_same(run.results(), before[1])
    torch.set_num_threads(1)  # Torch's matrix products depend on their number.
    assert_same(torch.load(path), work())
    assert plan._plan.num_refreshes == 0


def test_a_fork_averages_its_own_copy(tmp_path):
    in_a_process(in_a_fork, str(tmp_path / "results.pt"))


def forks_with_threads():
    torch.set_num_threads(2)
    large = [torch.zeros(400_000)], [torch.ones(400_000)]
    small = [torch.zeros(64) for _ in range(5000)], [torch.ones(64) for _ in range(5000)]
    plans = [fused_ema.Plan(*lists) for lists in (large, small)]
    for plan in plans:
        plan.update(0.25)
    assert _native.C.runs_parallel()  # OpenMP's threads are there now

    def with_threads(work):
        torch.set_num_threads(2)
        return work()

    def average():
        for plan in plans:
            plan.update(0.5)
        torch.set_num_threads(1)  # to look at them, torch's way
        return all(t.eq(0.625).all() for t in (*large[0], *small[0]))

    # The first hangs, so its limit is how long this takes.
    works = (lambda: large[0][0].lerp_(large[1][0], 0.5), 4), (average, 40)
    forks = [Fork(lambda work=work: with_threads(work), seconds) for work, seconds in works]
    return " ".join(fork.outcome() for fork in forks)


def test_in_a_fork_that_has_lost_openmp_s_threads_a_plan_runs():
    # GNU's OpenMP waits forever in a fork for the threads it had: torch's own functions hang there
    # until torch.set_num_threads(1).
    assert in_a_process(forks_with_threads) == "SIGALRM True"


def forks_beside_updates():
    ema, params = ([torch.full((2_000_000,), x) for _ in range(4)] for x in (0.0, 1.0))
    plan = fused_ema.Plan(ema, params)
    done = threading.Event()

    def average():
        while not done.is_set():
            plan.update(0.25)

    def in_the_fork():
        plan.copy_to_ema()
        return all(torch.equal(e, p) for e, p in zip(ema, params, strict=True))

    thread = threading.Thread(target=average)
    thread.start()
    forks = []
    for _ in range(6):
        time.sleep(0.01)
        forks.append(Fork(in_the_fork, seconds=40))
    done.set()
    thread.join()
    return " ".join(fork.outcome() for fork in forks)


def test_a_fork_while_another_thread_updates_leaves_a_plan_that_runs():
    assert set(forked(forks_beside_updates).split()) == {"True"}


def train_from(states, path):
    torch.set_num_threads(1)
    run = Training()
    # An optimizer takes the tensors themselves, and they are the other process's.
    run.load(states | {"optimizer": copy.deepcopy(states["optimizer"])})
    for number in range(3, 6):
        run.step(number)
    torch.save(run.results(), path)


def test_a_spawned_process_makes_its_own_manager(one_thread, tmp_path):
    run = Training()
    for number in range(3):
        run.step(number)
    before = run.results()
    # Tensors go to the other process as shared memory, and the parent's own move there for it.
    context = torch.multiprocessing.get_context("spawn")
    process = context.Process(target=train_from, args=(run.state(), tmp_path / "results.pt"))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert all(tensor.is_shared() for _, tensor in run.ema.named_emas())
    assert_same(run.results(), before)
    for number in range(3, 6):
        run.step(number)
    assert_same(torch.load(tmp_path / "results.pt"), run.results())


# ---- threads


def test_two_threads_with_different_work_on_one_plan():
    # Whatever their order, each call is one for the whole list: tensors that began alike stay so.
    ema = [torch.zeros(3000) for _ in range(30)]
    params = [torch.ones(3000) for _ in ema]
    plan = fused_ema.Plan(ema, params)
    facts = plan.describe()

    def update():
        for _ in range(1500):
            plan.update(0.25)

    def swap():
        for _ in range(1501):
            plan.swap()

    def describe():
        for _ in range(1500):
            assert plan.describe() == facts

    run_threads(update, swap, describe)
    for tensors in (ema, params):
        for tensor in tensors:
            assert tensor.eq(tensors[0][0]).all()
    assert ema[0][0] + params[0][0] != 1  # They were updated at all.


def test_threads_with_plans_of_their_own(backend):
    # Each with emas of its own; all read the same params, as managers of one model do. Large enough
    # for several OpenMP threads in each.
    torch.manual_seed(0)
    params = [torch.randn(n) for n in (70_000, 3, 1000)]
    lists = [[torch.zeros_like(p) for p in params] for _ in range(4)]

    def work(index):
        plan = fused_ema.Plan(lists[index], params)
        for _ in range(50):
            plan.update(0.1 * (index + 1))
            if index % 2:
                fused_ema.update_(lists[index], params, 0.5)

    run_threads(*(lambda index=index: work(index) for index in range(4)))
    for index, ema in enumerate(lists):
        for e, p in zip(ema, params, strict=True):
            expected = torch.zeros_like(p)
            for _ in range(50):
                expected.lerp_(p, 0.1 * (index + 1))
                if index % 2:
                    expected.lerp_(p, 0.5)
            assert_bits_equal(e, expected)


def describes_beside_moves():
    param = torch.ones(4)
    plan = fused_ema.Plan([torch.zeros(4)], [param])
    facts, done = plan.describe(), threading.Event()
    here_and_there = param.data, param.data.clone()

    def train():
        while plan._plan.num_refreshes < 100_000 and not done.is_set():
            for memory in here_and_there:
                param.data = memory
                plan.update(0.5)
        done.set()

    def describe():
        try:
            while not done.is_set():
                assert plan.describe() == facts
        finally:
            done.set()

    run_threads(train, describe)


def test_describe_while_another_thread_s_call_follows_a_move():
    assert forked(describes_beside_moves) == "None"


def test_describe_beside_a_plan_that_calls_python():
    # A wrapper's update needs the interpreter in the middle of the call.
    from torch.testing._internal.two_tensor import TwoTensor

    ema = [torch.zeros(4), TwoTensor(torch.zeros(4), torch.zeros(4))]
    params = [torch.ones(4), TwoTensor(torch.ones(4), torch.ones(4))]
    plan = fused_ema.Plan(ema, params)
    facts = plan.describe()
    done = threading.Event()

    def update():
        for _ in range(200):
            plan.update(0.25)
        done.set()

    def describe():
        while not done.is_set():
            assert plan.describe() == facts

    run_threads(update, describe, describe)
    assert_bits_equal(ema[1].b, ema[0])


def test_managers_of_different_models_in_different_threads(one_thread):
    # Who is swapped is known to all managers; that must not get in the way of the others.
    def averaged(num_params):
        model = nn.ParameterList(torch.zeros(2) for _ in range(num_params))
        ema = EMAManager(model, 0.25)
        with torch.no_grad():
            for param in model:
                param.fill_(1)
        return ema

    others, ema = [averaged(300) for _ in range(3)], averaged(1)
    done = threading.Event()

    def evaluate(other):
        while not done.is_set():
            with other.swapped():
                pass

    def train():
        try:
            for _ in range(100_000):
                ema.update()
        finally:
            done.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        run_threads(train, *(lambda other=other: evaluate(other) for other in others))
    finally:
        sys.setswitchinterval(interval)
    assert ema.num_updates == 100_000
    for other in others:
        assert all(average.eq(0).all() for _, average in other.named_emas())


def test_a_copy_into_a_model_that_another_manager_has_swapped():
    # Its tensors are that manager's averages.
    model = Net()
    fast, slow = EMAManager(model, 0.5), EMAManager(model, 0.1)
    move(model, 0)
    for ema in (fast, slow):
        ema.update()
    averages, raw = averages_of(fast), values_of(model)
    with fast.swapped(), pytest.raises(RuntimeError, match="holds the ema of another manager"):
        slow.copy_to(model)
    assert_same(model.state_dict(), raw)
    assert_same(fast.named_emas(), averages)


# ---- the exit of the interpreter


AT_EXIT = """
import atexit, gc, types
from torch import nn
gc.disable()  # Cycles are left for the end.

class Run:
    def __init__(self, dtype):
        self.model = nn.Sequential(nn.Linear(30, 30), nn.BatchNorm1d(30)).to(dtype)
        self.ema = fused_ema.EMAManager(self.model, 0.5)
        params = list(self.model.parameters())
        self.plan = fused_ema.Plan([p.detach().float() + 1 for p in params], params)

    def use(self):
        self.plan.update(0.5)
        self.plan.describe()
        self.ema.update()
        with self.ema.swapped():
            return self.ema.num_updates

class Cycle(Run):
    def __init__(self):
        # Nothing is set aside while swapped: where a view is made so late, torch itself aborts.
        super().__init__(torch.float32)
        self.model.cycle = self
        self.model.ema = self.ema

    def __del__(self):
        print("deleted", self.use())

run = Run(torch.bfloat16)
model, ema, plan = run.model, run.ema, run.plan
module = types.ModuleType("module")
module.run = Run(torch.bfloat16)
fused_ema.somewhere = Run(torch.float32)
Cycle()
kept = Cycle()
swapped = [Run(dtype) for dtype in (torch.bfloat16, torch.float32)]
for one in swapped:
    one.ema.swap()
atexit.register(lambda: print("atexit", run.use()))
torch.set_num_threads(2)
large = fused_ema.Plan([torch.zeros(200_000)], [torch.ones(200_000)])
large.update(0.5)
"""

OPEN_SWAPPED = """
import fused_ema, torch
from torch import nn

model = nn.Linear(3, 3)
ema = fused_ema.EMAManager(model, 0.5)

def evaluate():
    with ema.swapped():
        yield

evaluation = evaluate()
next(evaluation)
"""

IN_A_DAEMON = """
import os, sys, threading, time
import fused_ema, torch

torch.set_num_threads(1)
ema, params = [torch.zeros(100)] , [torch.ones(100)]
plan = fused_ema.Plan(ema, params)
update = {call}

def work():
    while True:
        update()

threading.Thread(target=work, daemon=True).start()
time.sleep(0.1)
"""


def test_plans_and_managers_at_exit():
    orders = "import torch, fused_ema", "import fused_ema, torch"
    for status, stdout, stderr in pythons(*(order + AT_EXIT for order in orders)):
        assert (status, stderr) == (0, "")
        assert sorted(stdout.splitlines()) == ["atexit 1", "deleted 1", "deleted 1"]


def test_the_exit_of_a_run_that_is_still_swapped():
    assert pythons(OPEN_SWAPPED) == [(0, "", "")]


ABORTED = "terminate called without an active exception"


def test_a_daemon_thread_that_updates_at_exit():
    # Before Python 3.14 a daemon thread that comes back from a call without the GIL is ended in a
    # way that C++ takes for an error: the process aborts, from torch's functions as well.
    calls = "torch._foreach_lerp_(ema, params, 0.5)", "plan.update(0.5)"
    by_torch, by_plan = pythons(*(IN_A_DAEMON.format(call=f"lambda: {call}") for call in calls))
    ended, aborted = (0, "", ""), (-signal.SIGABRT, "", f"{ABORTED}\n")
    assert by_torch in ((ended, aborted) if sys.version_info < (3, 14) else (ended,))
    assert by_plan in (ended, by_torch)
