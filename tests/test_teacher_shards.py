"""A teacher that is sharded as its student is: shard on shard, bit for bit as both whole."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from sharded import SHARDED, Net, all_of, assert_same, by_parts, local, tensor_parallel, whole
from torch.distributed.tensor.debug import CommDebugMode

from fused_ema import EMAManager


def both(shard):
    """Sharded student and teacher, and whole ones of the same values."""
    plain = Net(seed=0), Net(seed=1).requires_grad_(False)
    return tuple(shard(copy.deepcopy(model)) for model in plain), plain


def tensors_of(model):
    return dict([*model.named_parameters(), *model.named_buffers()])


def course(name):
    (student, teacher), (plain, want) = both(SHARDED[name])
    ema = EMAManager(student, 0.25, into=teacher, form="mul_add")
    right = EMAManager(plain, 0.25, into=want, form="mul_add")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    places = [local(t).data_ptr() for _, t in ema.named_emas()]
    for i in range(3):
        x = torch.randn(4, 6, generator=generator)
        with torch.no_grad():  # Leaves what is gathered for it, as evaluations do.
            assert torch.allclose(whole(teacher(x)), want(x), atol=1e-5), (name, i)
        optimizer.zero_grad()
        student(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            for key, tensor in tensors_of(student).items():
                tensors_of(plain)[key].copy_(whole(tensor))
                if not tensor.is_floating_point() or "running" in key:
                    tensors_of(want)[key].copy_(whole(tensors_of(teacher)[key]))
        with CommDebugMode() as sent:
            ema.update()
        right.update()
        assert sent.get_total_counts() == 0
        assert_same(all_of(ema.named_emas()), dict(right.named_emas()), f"{name}, update {i}")
    assert [local(t).data_ptr() for _, t in ema.named_emas()] == places, name
    raw = [local(p).clone() for p in student.parameters()]
    with ema.swapped(), torch.no_grad():
        assert torch.allclose(whole(student(x)), want(x), atol=1e-5), name
    assert all(map(torch.equal, map(local, student.parameters()), raw))
    with torch.no_grad():
        assert torch.allclose(whole(teacher(x)), want(x), atol=1e-5), name


def courses():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*was written since the last update")
        for name in SHARDED:
            if name not in ("mixed precision", "from meta"):  # Other models than the whole one.
                course(name)


def test_every_way_to_shard_both(two):
    two(courses)


def misfits():
    plain = Net(seed=1).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    message = r"'first\.weight' is sharded as .* but the teacher's 'first\.weight' is whole; shard"
    with pytest.raises(ValueError, match=message):
        EMAManager(by_parts(Net()), into=plain)
    with pytest.raises(ValueError, match=r"'first\.weight' is whole but .* is sharded as"):
        EMAManager(Net(), into=by_parts(Net(seed=1).requires_grad_(False)))
    with pytest.raises(ValueError, match=r"'first\.weight' is sharded as .* shard both alike"):
        EMAManager(by_parts(Net()), into=tensor_parallel(copy.deepcopy(plain)))
    assert_same(plain.state_dict(), before, "nothing was written")


def test_sharded_otherwise_is_refused_by_name(two):
    two(misfits)


def resumed(folder):
    def made(start):
        student, teacher = (by_parts(Net(seed=s)) for s in (0, 1))
        teacher.requires_grad_(False)
        return student, teacher, EMAManager(student, 0.25, into=teacher, start=start)

    student, teacher, ema = made("copy")
    with torch.no_grad():
        student.first.weight.add_(1)
    ema.update()
    parts = {"student": student.state_dict(), "teacher": teacher.state_dict(), "ema": ema}
    assert ema.state_dict()["checksums"]["first.weight"] is None
    dcp.save(parts, checkpoint_id=folder)
    other, goes_on, again = made("keep")
    parts = {"student": other.state_dict(), "teacher": goes_on.state_dict(), "ema": again}
    dcp.load(parts, checkpoint_id=folder)
    assert (again.iteration, again.num_updates) == (1, 1)
    assert again.full_state_dict() in ({}, ema.state_dict())
    for manager in (ema, again):
        manager.update()
    assert_same(all_of(goes_on.state_dict()), all_of(teacher.state_dict()), "went on")


def test_a_sharded_run_is_resumed(two, tmp_path):
    two(resumed, str(tmp_path))
