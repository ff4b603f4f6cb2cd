from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from bench import __main__ as cli
from bench import report, train

NUM_STEPS = 75  # Of an epoch: 1200 images by 16.
ENTRIES = tuple(train.make_model(0).state_dict())
QUICK = ["train", "--epochs", "1"]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_images(monkeypatch):
    train_split, test_split = train.load_data()

    def few():
        return (
            train.Data(train_split.images[:96], train_split.digits[:96]),
            train.Data(test_split.images[:50], test_split.digits[:50]),
        )

    monkeypatch.setattr(train, "load_data", few)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "new"
    threads = torch.get_num_threads()
    status = cli.main(
        ["train", "--epochs", "2", "--json", str(out / "t.json"), "--plot", str(out / "t.a")]
    )
    torch.set_num_threads(threads)
    return status, json.loads((out / "t.json").read_text()), out


# ---- what is trained


def test_the_splits_are_all_digits_once():
    (first, second), (again, _) = train.load_data(), train.load_data()
    assert (len(first.images), len(second.images)) == (1200, 597)
    assert first.images.shape[1:] == (1, 8, 8)
    assert set(second.digits.tolist()) == set(range(10))
    assert torch.equal(first.images, again.images)
    for split in (first, second):
        assert len(split.images) == len(split.digits)
        assert split.images.amin() == 0
        assert split.images.amax() == 1
        # Sixteen levels, exact in binary.
        assert torch.equal(split.images * 16, (split.images * 16).round())


def test_a_model_is_its_seed_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    models = [train.make_model(seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    a, b, other = (model.state_dict() for model in models)
    assert train.differences(a, b, "weight") == []
    found = train.differences(a, other, "weight")
    assert found[0].startswith("weight '0.weight': 144 of 144 elements differ")


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.register_buffer("count", torch.tensor(7))


def test_naive_loop_by_hand():
    model = Counter()
    ema = train.NaiveEMA(model, 0.25, interval=2)
    values = []
    for _ in range(4):
        with torch.no_grad():
            model.weight += 4
            model.count += 1
        ema.update()
        values.append(ema.ema["weight"].tolist())
    # Updates at the second and the fourth iteration: 3/4 of the old and 1/4 of 9, 6 and of 17, 14.
    assert values == [[1, -2], [3, 0], [3, 0], [6.5, 3.5]]
    assert ema.ema["count"] == 7
    with ema.swapped():
        assert model.weight.tolist() == [6.5, 3.5]
        assert model.count == 7
        assert ema.ema["weight"].tolist() == [17, 14]
    assert model.weight.tolist() == [17, 14]
    assert model.count == 11
    assert ema.ema["weight"].tolist() == [6.5, 3.5]


class Fixed(nn.Module):
    """Guesses the digit that stands in the image's first pixel, in eval mode only."""

    def forward(self, images):
        guesses = images[:, 0, 0, 0].long()
        return nn.functional.one_hot(guesses if not self.training else 0 * guesses, 10)


def test_accuracy_is_that_of_eval_mode():
    training = train.Training(Fixed(), None, None, torch.Generator())
    images = torch.zeros(4, 1, 8, 8)
    images[:, 0, 0, 0] = torch.tensor([1, 2, 3, 4])
    assert training.accuracy(train.Data(images, torch.tensor([1, 2, 3, 9]))) == 0.75
    assert training.model.training


def test_batches_are_every_image_once_in_a_new_order_each_epoch():
    orders = [
        train.make_trainings(train.Settings(seed=seed))[name]
        for seed, name in ((3, "naive"), (3, "manager"), (4, "naive"))
    ]
    first = [torch.cat(training.batches(100)) for training in orders]
    assert sorted(first[0].tolist()) == list(range(100))
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(first[0], torch.cat(orders[0].batches(100)))
    assert [len(batch) for batch in orders[0].batches(100)] == [16] * 6 + [4]


# ---- the comparison


VALUES = {"a": torch.tensor([1.0, 2.0, -0.0]), "n": torch.tensor(3)}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"a": torch.tensor([1.0, 2.5, -0.0])}, ["x 'a': 1 of 3 elements differ"]),
        ({"a": torch.tensor([1.0, 2.0, 0.0])}, ["x 'a': 1 of 3 elements differ"]),
        ({"a": VALUES["a"].double()}, ["x 'a': torch.float64 against torch.float32"]),
        ({"n": torch.tensor(4)}, ["x 'n': 4 against 3"]),
        ({"b": torch.tensor(0)}, ["x: other names, ['b']"]),
    ],
)
def test_differences_are_named(changed, expected):
    found = train.differences(VALUES, VALUES | changed, "x")
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


def view(**changed):
    values = {"a": torch.tensor([1.0])}
    fields = {"raw_accuracy": 0.5, "raw": values, "ema_accuracy": 0.75, "ema": values}
    return train.View(**(fields | {"back": values} | changed))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"ema": {"a": torch.tensor([2.0])}}, ["average 'a': 1 of 1"]),
        ({"back": {"a": torch.tensor([2.0])}}, ["manager: swapped back, weight 'a': 1 of 1"]),
        ({"raw_accuracy": 0.25}, ["raw accuracy: 0.25 against 0.5"]),
        ({"ema_accuracy": 0.25}, ["EMA accuracy: 0.25 against 0.75"]),
        (
            {"raw": {"a": torch.tensor([2.0])}, "ema": {"a": torch.tensor([2.0])}},
            ["the two trainings went apart", "raw weight 'a': 1 of 1"],
        ),
    ],
)
def test_views_that_differ(changed, expected):
    found = train.compare(view(), view(**changed))
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


# ---- a run


def test_the_two_agree_bit_for_bit(whole_run):
    status, content, _ = whole_run
    assert status == 0
    assert content["schema"] == 1
    assert content["environment"]["torch_version"] == torch.__version__
    assert content["environment"]["num_threads"] == 1
    assert content["bits_equal"] is True
    assert content["failures"] == []


def test_settings_are_recorded(whole_run):
    settings = whole_run[1]["settings"]
    state = train.make_model(0).state_dict().values()
    assert settings == {
        **{"epochs": 2, "momentum": 0.02, "interval": 1, "seed": 0},
        **{"form": "mul_add", "ema_dtype": "param", "optimizer": "SGD", "batch_size": 16},
        **{"learning_rate": 0.5, "sgd_momentum": 0.9, "num_trained": 1200, "num_tested": 597},
        **{"num_tensors": len(state), "num_elements": sum(entry.numel() for entry in state)},
    }


def test_accuracies_are_parts_of_the_test_split_and_the_same_in_both(whole_run):
    epochs = whole_run[1]["epochs"]
    assert [r["epoch"] for r in epochs] == [1, 2]
    for r in epochs:
        assert r["bits_equal"] is True
        assert r["naive"] == r["manager"]
        for accuracy in r["manager"].values():
            assert 0 <= accuracy <= 1
            assert accuracy * 597 == pytest.approx(round(accuracy * 597))
    # Ten classes: it has learnt something, raw and averaged, and the two are not the same weights.
    assert epochs[-1]["manager"]["raw_accuracy"] > 0.5
    assert epochs[-1]["manager"]["ema_accuracy"] > 0.5
    assert any(r["manager"]["raw_accuracy"] != r["manager"]["ema_accuracy"] for r in epochs)


def test_times_are_consistent(whole_run):
    content = whole_run[1]
    for name in ("naive", "manager"):
        us = content["ema_us"][name]
        assert us["rounds"] == 2 * NUM_STEPS
        assert 0 < us["us_p10"] <= us["us"] <= us["us_p90"]
        assert 0 < content["ema_share_of_step"][name] < 1
    ratio = content["ema_us"]["naive"]["us"] / content["ema_us"]["manager"]["us"]
    assert content["ratio"] == pytest.approx(ratio)


def test_tables_tell_every_epoch_and_both_ways(whole_run):
    epochs, times = train.tables(whole_run[1])
    figures = whole_run[1]["epochs"][0]["manager"]
    assert epochs.rows[0][:3] == (
        "1",
        f"{figures['raw_accuracy']:.2%}",
        f"{figures['ema_accuracy']:.2%}",
    )
    assert [row[-1] for row in epochs.rows] == ["yes", "yes"]
    assert [row[0] for row in times.rows] == ["naive loop", "fused_ema.EMAManager"]
    assert "20 tensors, 24,285 elements" in times.title


def test_plot_is_written_and_the_same_every_time(whole_run, tmp_path):
    _, content, out = whole_run
    again = train.plot(content, tmp_path / "new" / "again")
    assert [path.name for path in again] == ["again.png", "again.svg"]
    assert (out / "t.a.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "t.a.svg").read_text() == again[1].read_text()


def test_interval_times_only_steps_with_an_update(few_images, tmp_path, capsys):
    path = tmp_path / "t.json"
    assert cli.main(["train", "--epochs", "3", "--interval", "4", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["ema_us"]["naive"]["rounds"] == 18 // 4
    assert content["bits_equal"] is True
    assert "after each of 3 epochs" in capsys.readouterr().out


# ---- faults


def failing_run(tmp_path, capsys):
    path = tmp_path / "t.json"
    assert cli.main([*QUICK, "--json", str(path)]) == 1
    content = json.loads(path.read_text())
    assert content["bits_equal"] is False
    assert content["epochs"][0]["bits_equal"] is False
    printed = capsys.readouterr()
    assert "bits agree:" not in printed.out
    failed = [line.removeprefix("FAILED: ") for line in printed.err.splitlines()]
    assert failed == content["failures"]
    return failed


def test_another_momentum_is_found_in_every_average(few_images, monkeypatch, tmp_path, capsys):
    original = train.NaiveEMA.__init__

    def init(self, model, momentum, interval=1):
        original(self, model, momentum * 1.0001, interval)

    monkeypatch.setattr(train.NaiveEMA, "__init__", init)
    failed = failing_run(tmp_path, capsys)
    for name in ENTRIES:
        assert any(f"average '{name}': " in line for line in failed) == (
            "num_batches_tracked" not in name
        )


@pytest.mark.parametrize("name", ["0.weight", "4.running_var", "7.num_batches_tracked"])
def test_one_changed_element_is_named(name, few_images, monkeypatch, tmp_path, capsys):
    original = train.NaiveEMA.swap

    def swap(self):
        flat = self.ema[name].view(-1)
        # The smallest change there is, before and after each swap alike.
        flat[-1] = flat[-1] + 1 if name.endswith("tracked") else flat[-1].nextafter(flat[-1] + 1)
        original(self)

    monkeypatch.setattr(train.NaiveEMA, "swap", swap)
    failed = failing_run(tmp_path, capsys)
    assert failed[0].startswith(f"epoch 1, average '{name}': ")
    assert all(f"'{name}'" in line for line in failed if "accuracy" not in line)


def test_a_swap_that_does_not_bring_the_weights_back(few_images, monkeypatch, tmp_path, capsys):
    def swap(self):
        for name, entry in self.entries.items():
            entry.copy_(self.ema[name])

    monkeypatch.setattr(train.NaiveEMA, "swap", swap)
    failed = failing_run(tmp_path, capsys)
    assert any("naive: swapped back, weight '0.weight': " in line for line in failed)
    assert not any("manager: swapped back" in line for line in failed)


def test_trainings_that_go_apart_are_told_from_wrong_averages(
    few_images, monkeypatch, tmp_path, capsys
):
    original, seeds = train.make_model, iter((0, 1))
    monkeypatch.setattr(train, "make_model", lambda seed: original(next(seeds)))
    failed = failing_run(tmp_path, capsys)
    assert failed[0].startswith("epoch 1, the two trainings went apart")
    assert failed[1].startswith("epoch 1, raw weight '0.weight': ")


# ---- command line


@pytest.mark.parametrize(
    ("argv", "installed", "message"),
    [
        ([], (), "the digits come with scikit-learn: pip install scikit-learn"),
        (["--plot", "x"], ("sklearn",), "--plot needs matplotlib: pip install matplotlib"),
    ],
)
def test_a_missing_package_stops_before_training(argv, installed, message, monkeypatch, capsys):
    original = report.find
    monkeypatch.setattr(report, "find", lambda name: original(name) if name in installed else None)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*QUICK, *argv])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--momentum", "1"], "expected a number from 1e-06 to 0.999, got 1"),
        (["--epochs", "0"], "expected a number from 1 to inf, got 0"),
        (["--interval", "76"], "--interval 76: there are only 75 steps"),
    ],
)
def test_bad_argument(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*QUICK, *argv])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_of_the_default_command_names_it(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "python -m bench train" in capsys.readouterr().out
