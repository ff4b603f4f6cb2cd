import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as cli
from bench import cases, picture, providers, report, timer
from bench.providers import DTYPE_PAIRS, PROVIDERS, Lists, Provider

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
# As a fraction of |ema| + |param|, for an update in the ema's dtype.
TOLERANCE = {
    torch.float64: 5e-16,
    torch.float32: 2.5e-7,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}
RECORD_FIELDS = {
    *("case", "op", "device", "device_name", "ema_dtype", "param_dtype", "provider"),
    *("num_tensors", "num_elements", "bytes", "ms", "ms_p10", "ms_p90", "gb_per_s", "host_us"),
    *("fraction_of_copy", "torch_version", "torch_cuda", "cache", "kind", "note", "rounds"),
    *("num_threads", "fused_ema_version", "foreach_arguments", "wall_us", "host_cold_us"),
    *("pause_ms", "load"),
}
TINY = ["--cases", "odd", "--max-elements", "5000", "--rounds", "2", "--device", "cpu"]


def odd_lists(pair: str, device: str = "cpu") -> Lists:
    ema, param = providers.split_pair(pair)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1,), (7, 3), (0,), (129,), (2, 5, 5)]
    return Lists(
        [torch.randn(shape, generator=generator).to(device, ema) for shape in shapes],
        [torch.randn(shape, generator=generator).to(device, param) for shape in shapes],
    )


def clone(lists: Lists) -> Lists:
    return Lists([t.clone() for t in lists.ema], [t.clone() for t in lists.params])


# ---- providers


@pytest.mark.parametrize(
    ("op", "ema", "param", "expected"),
    [
        ("update", torch.float32, torch.float32, 12),
        ("update", torch.float32, torch.bfloat16, 10),
        ("update", torch.bfloat16, torch.bfloat16, 6),
        ("update", torch.float64, torch.float64, 24),
        ("swap", torch.float32, torch.float32, 16),
        ("swap", torch.bfloat16, torch.bfloat16, 8),
        ("copy", torch.float32, torch.float32, 8),
        ("copy", torch.float32, torch.bfloat16, 6),
    ],
)
def test_least_bytes_of_1000_elements(op, ema, param, expected):
    assert providers.least_bytes(op, ema, param, 1000) == expected * 1000


def test_bytes_of_a_limit_count_its_flat_pair():
    own_copy = next(p for p in PROVIDERS if p.name == providers.OWN_COPY)
    assert own_copy.bytes_moved("float32/bfloat16", 10) == 80


@pytest.mark.parametrize(
    ("provider", "pair"),
    [
        pytest.param(provider, pair, id=f"{provider.name}-{provider.op}-{pair}")
        for provider in PROVIDERS
        if not provider.only_if_named and not provider.why_not("cpu")
        for pair in DTYPE_PAIRS
        if provider.serves(provider.op, pair)
    ],
)
@pytest.mark.parametrize("momentum", [0.3, 0.8])
def test_provider_does_what_its_op_says(provider, pair, momentum, device):
    lists = provider.target(odd_lists(pair, device))
    before = clone(lists)
    with torch.no_grad():
        call = provider.prepare(lists, momentum)
        if provider.is_captured:
            call = providers.captured([call])
        call()
    for ema, param, old_ema, old_param in zip(
        lists.ema, lists.params, before.ema, before.params, strict=True
    ):
        if provider.op == "update":
            right = old_ema.double() * (1 - momentum) + old_param.double() * momentum
            bound = (old_ema.double().abs() + old_param.double().abs()) * TOLERANCE[ema.dtype]
            assert ((ema.double() - right).abs() <= bound).all()
            assert torch.equal(param, old_param)
        else:
            assert torch.equal(ema, old_param.to(ema.dtype))
            right = old_ema.to(param.dtype) if provider.op == "swap" else old_param
            assert torch.equal(param, right)


@pytest.mark.parametrize("pair", DTYPE_PAIRS)
def test_every_pair_has_a_naive_and_a_foreach_way(pair):
    for op in providers.OPS:
        families = {p.family for p in providers.choose(op, pair, "cpu", None)}
        assert {"ours", "naive", "foreach", "limit"} <= families


def test_a_provider_of_another_device_says_so():
    captured = next(p for p in PROVIDERS if p.name == providers.CAPTURED)
    assert captured.why_not("cpu") == "runs on cuda only"


def test_absent_package_is_named():
    provider = replace(PROVIDERS[0], module="no_such_package.ema")
    assert provider.why_not("cpu") == "no_such_package is not installed"


# ---- timer


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1.0), (10, 1.4), (50, 3.0), (90, 4.6), (100, 5.0)]
)
def test_percentile(percent, expected):
    assert timer.percentile([3.0, 1.0, 5.0, 2.0, 4.0], percent) == pytest.approx(expected)


def test_percentile_of_one_value():
    assert timer.percentile([7.0], 90) == 7.0


@pytest.mark.parametrize(
    ("data_bytes", "num_tensors", "device_type", "expected"),
    [
        (400, 0, "cpu", 1),
        (399, 0, "cpu", 2),
        (100, 0, "cuda", 2),
        (100, 1, "cpu", 1),
        (100, 1, "cuda", 2),
        (3, 0, "cuda", 0),
    ],
)
def test_num_cold_sets_of_a_100_byte_cache(data_bytes, num_tensors, device_type, expected):
    assert timer.num_cold_sets(data_bytes, num_tensors, 100, device_type) == expected


def test_cache_of_this_machine_is_plausible():
    assert 2**17 <= timer.cache_bytes(CPU) <= 2**33


class FakeClock:
    def __init__(self, log):
        self.log = log

    def seconds(self, calls, host_s=0.0):
        for call in calls:
            call()
        return 1e-3


def test_providers_take_turns_and_walk_through_the_sets():
    log = []
    calls = {
        name: [lambda name=name, s=s: log.append((name, s)) for s in range(4)] for name in "abc"
    }
    timings = timer.interleave(calls, FakeClock(log), seconds=0, rounds=30)
    order = "".join(name for name, _ in log)
    assert order[:6] == "aabbcc"  # Warming up.
    rounds = [order[i : i + 3] for i in range(6, len(order), 3)]
    assert {"".join(sorted(round_)) for round_ in rounds} == {"abc"}
    assert len(set(rounds)) == 6
    assert [s for _, s in log] == [i % 4 for i in range(len(log))]
    assert timings["b"] == timer.Timing(1e-3, 1e-3, 1e-3, 30)


def test_no_time_still_gives_the_least_rounds():
    calls = {"a": [lambda: None]}
    assert timer.interleave(calls, FakeClock([]), seconds=0)["a"].rounds == timer.MIN_ROUNDS


def test_hot_runs_once_before_each_sample():
    log = []
    timer.interleave({"a": [lambda: log.append(1)]}, FakeClock(log), seconds=0, rounds=2, hot=True)
    assert len(log) == 8


@pytest.mark.parametrize("pair", DTYPE_PAIRS)
@pytest.mark.parametrize("op", providers.OPS)
def test_check_finds_a_provider_that_does_nothing(op, pair):
    values = timer.sample(odd_lists(pair))
    assert "the reference says" in timer.check(op, values, values, cli.DEFAULT_MOMENTUM)


@pytest.mark.parametrize("wrong", [float("nan"), 3e-6])
def test_check_finds_the_last_element_of_many_pieces(wrong):
    ones = torch.ones(2**16 + 5)
    after = ones.clone()
    assert timer.check("update", (ones, ones), (after, ones), 0.25) == ""
    after[-1] += wrong
    assert f"ema element {2**16 + 4} is " in timer.check(
        "update", (ones, ones), (after, ones), 0.25
    )


def test_check_finds_a_changed_param():
    ema, params = timer.sample(odd_lists("float32/float32"))
    wrong = params.clone()
    wrong[100] += 1
    assert timer.check("copy", (ema, params), (params, params), 0.25) == ""
    assert "param element 100 " in timer.check("copy", (ema, params), (params, wrong), 0.25)


def test_sample_is_everything_in_order_or_spread_over_large_tensors(monkeypatch):
    lists = Lists([torch.arange(5), torch.zeros(0, dtype=int), torch.arange(5, 105)], [])
    lists.params.extend(-ema for ema in lists.ema)
    monkeypatch.setattr(timer, "_PIECE", 10)
    ema, params = timer.sample(lists)
    assert ema.tolist() == list(range(105))
    monkeypatch.setattr(timer, "_CHECKED_ELEMENTS", 35)
    ema, params = timer.sample(lists)
    assert torch.equal(params, -ema)
    expected = [(0, 5), (5, 15), (35, 45), (65, 75), (95, 105)]
    assert ema.tolist() == [i for low, high in expected for i in range(low, high)]


def test_a_limit_stops_what_takes_longer():
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match=r"it took more than 0\.05 s"), timer.limit(0.05):
        time.sleep(10)
    with timer.limit(10.0):
        pass
    with timer.limit(None):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is handler


# ---- command line


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "new"
    argv = [*TINY, "--ops", "all", "--dtypes", "float32/float32,float32/bfloat16"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timer, "cache_bytes", lambda device: 20_000)  # So that there is a cold run.
        status = cli.main(["ops", *argv, "--json", str(out / "bench.json")])
    return status, json.loads((out / "bench.json").read_text())


def test_run_succeeds_and_describes_itself(whole_run):
    status, content = whole_run
    assert status == 0
    assert content["schema"] == 1
    assert content["environment"]["torch_version"] == torch.__version__
    assert 0 <= content["environment"]["others_cpu_share"] <= 1
    for package in ("timm", "diffusers"):
        if not any(r["provider"].startswith(package) for r in content["records"]):
            assert any(line.startswith(package) for line in content["left_out"])


def test_records_are_complete_and_consistent(whole_run):
    records = whole_run[1]["records"]
    copies = {}
    for r in records:
        if r["provider"] in ("own copy", "flat copy_"):
            key = (r["op"], r["ema_dtype"], r["param_dtype"], r["cache"])
            copies[key] = max(copies.get(key, (0, "")), (r["gb_per_s"], r["provider"]))
    for r in records:
        assert r.keys() >= RECORD_FIELDS
        assert r["note"].endswith("of 400 tensors")
        assert r["rounds"] == 2
        assert r["ms_p10"] <= r["ms"] <= r["ms_p90"]
        assert r["gb_per_s"] == pytest.approx(r["bytes"] / (r["ms"] / 1e3) / 1e9)
        assert r["host_us"] > 0
        copy, limit = copies[r["op"], r["ema_dtype"], r["param_dtype"], r["cache"]]
        assert r["limit"] == limit
        assert r["fraction_of_copy"] == pytest.approx(r["gb_per_s"] / copy)
        assert r["kind"] in ("ours", "torch", "triton", "limit")
        assert r["foreach_arguments"] is None


def test_run_covers_every_op_pair_and_cache_state(whole_run):
    records = whole_run[1]["records"]
    seen = {(r["op"], r["param_dtype"], r["cache"]) for r in records if r["kind"] == "ours"}
    assert seen == {
        (op, dtype, cache)
        for op in ("update", "swap", "copy")
        for dtype in ("float32", "bfloat16")
        for cache in ("cold", "hot")
    }


@pytest.mark.cuda
def test_run_on_a_gpu(tmp_path):
    quick = ",".join(name for name in providers.names() if not name.startswith("compile"))
    argv = [*TINY, "--device", "cuda", "--ops", "all", "--providers", quick]
    assert cli.main([*argv, "--json", str(tmp_path / "bench.json")]) == 0
    records = json.loads((tmp_path / "bench.json").read_text())["records"]
    assert {r["op"] for r in records} == set(providers.OPS)
    for r in records:
        assert r["foreach_arguments"] in ("4 KB", "32 KB")
        assert r["host_us"] > 0
        assert r["gb_per_s"] == pytest.approx(r["bytes"] / (r["ms"] / 1e3) / 1e9)


def test_wrong_provider_fails_the_run_and_is_named(monkeypatch, capsys, tmp_path):
    def prepare(lists, momentum):
        return lambda: torch._foreach_lerp_(lists.ema, lists.params, momentum * 1.01)

    bad = Provider("wrong lerp_", "foreach", "update", prepare)
    monkeypatch.setattr(providers, "PROVIDERS", (*PROVIDERS, bad))
    argv = [*TINY, "--providers", "fused_ema plan,wrong lerp_", "--json", str(tmp_path / "b.json")]
    assert cli.main(argv) == 1
    assert "FAILED: wrong lerp_ on odd update float32/float32: " in capsys.readouterr().err
    records = json.loads((tmp_path / "b.json").read_text())["records"]
    assert {r["provider"] for r in records} == {"fused_ema plan", *providers.LIMITS}


@pytest.mark.parametrize(("family", "status"), [("package", 0), ("ours", 1)])
def test_provider_that_raises(family, status, monkeypatch, capsys):
    def prepare(lists, momentum):
        raise RuntimeError("no such thing\nand a trace")

    bad = Provider("broken", family, "update", prepare)
    monkeypatch.setattr(providers, "PROVIDERS", (*PROVIDERS, bad))
    assert cli.main([*TINY, "--providers", "broken"]) == status
    printed = capsys.readouterr()
    where = printed.err if status else printed.out
    assert "broken on odd update float32/float32: no such thing\n" in where


def test_an_interrupt_keeps_what_was_measured(monkeypatch, capsys, tmp_path):
    def prepare(lists, momentum):
        if lists.ema[0].shape == (4096,):  # In the second case.
            raise KeyboardInterrupt
        return lambda: torch._foreach_lerp_(lists.ema, lists.params, momentum)

    stops = Provider("stops", "foreach", "update", prepare)
    monkeypatch.setattr(providers, "PROVIDERS", (*PROVIDERS, stops))
    argv = [*TINY, "--cases", "odd,medium", "--ops", "update", "--providers", "stops"]
    assert cli.main([*argv, "--json", str(tmp_path / "b.json")]) == 1
    assert "FAILED: interrupted: only what was measured until then" in capsys.readouterr().err
    records = json.loads((tmp_path / "b.json").read_text())["records"]
    assert {r["case"] for r in records} == {"odd"}


def test_a_provider_that_takes_too_long_is_left_out(monkeypatch, capsys):
    def prepare(lists, momentum):
        return lambda: time.sleep(10)

    slow = Provider("slow", "compile", "update", prepare, limit_s=0.05)
    monkeypatch.setattr(providers, "PROVIDERS", (*PROVIDERS, slow))
    assert cli.main([*TINY, "--providers", "slow"]) == 0
    printed = capsys.readouterr().out
    assert "left out: slow on odd update float32/float32: it took more than 0.05 s" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cases", "resnet51"], "unknown case 'resnet51'; choose from resnet50, "),
        (["--providers", "naive"], "unknown provider 'naive'; choose from fused_ema plan, "),
        (["--ops", "update,move"], "unknown op 'move'; choose from update, swap, copy"),
        (["--dtypes", "int8/int8"], "unknown dtype pair 'int8/int8'; choose from float32/"),
        (["--momentum", "1.5"], "expected a number from 0 to 1, got 1.5"),
        (["--rounds", "no"], "expected a number from 1 to inf, got no"),
    ],
)
def test_bad_argument_names_the_choices(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--list"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in (*cases.names(), *providers.names(), *DTYPE_PAIRS):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("launches", "torch sees no CUDA GPU here, and only a GPU has launches to count"),
        ("counters", "torch sees no CUDA GPU here, and only a GPU has counters"),
        ("variants", "torch sees no CUDA GPU here; --build-only needs none"),
    ],
)
def test_commands_for_a_gpu_say_so(command, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        cli.main([command])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def children():
    return Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()


def test_a_run_after_pauses_and_beside_a_load_says_so(tmp_path, monkeypatch, capsys):
    log = []
    monkeypatch.setattr(time, "sleep", lambda s: log.append((s, len(children()))))
    before = children()
    argv = [
        *TINY,
        "--pause-ms",
        "0,3",
        "--load",
        "none,cores",
        "--json",
        str(tmp_path / "new.json"),
    ]
    assert cli.main(argv) == 0
    assert children() == before
    records = json.loads((tmp_path / "new.json").read_text())["records"]
    assert {r["cache"] for r in records if r["pause_ms"] or r["load"] != "none"} == {"hot"}
    plan = [(r["pause_ms"], r["load"]) for r in records if r["provider"] == providers.PLAN]
    assert plan == [(0, "none"), (0, "cores"), (3, "none"), (3, "cores")]
    assert providers.ONE_THREAD in {r["provider"] for r in records}
    num_cores = len(os.sched_getaffinity(0))
    assert set(log) == {(3e-3, len(before)), (3e-3, len(before) + num_cores)}
    out = capsys.readouterr().out
    assert "odd update float32/float32 hot, 3 ms pause, every core busy - " in out


def test_a_pause_is_before_what_is_timed_and_calls_are_single(monkeypatch):
    log = []
    clock = [0.0]
    monkeypatch.setattr(time, "sleep", lambda s: log.append(s) or clock.__setitem__(0, 5.0))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    call = partial(log.append, "call")
    assert timer.CpuClock(0.02).seconds([call]) == 0.0
    assert log == [0.02, "call"]
    log.clear()
    timer.interleave({"a": [call]}, timer.CpuClock(), seconds=0, rounds=7, max_calls=1)
    assert log.count("call") == 2 + 7  # two to see how long one takes


def test_the_plan_on_one_thread_gives_torch_its_threads_back(monkeypatch):
    seen = []
    plan = SimpleNamespace(update=lambda momentum: seen.append(torch.get_num_threads()))
    monkeypatch.setattr(providers.fused_ema, "Plan", lambda ema, params: plan)
    (provider,) = (p for p in PROVIDERS if p.name == providers.ONE_THREAD)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        provider.prepare(odd_lists("float32/float32"), 0.5)()
        assert (seen, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_default_jobs_update_every_case_and_reach_every_op(device_type):
    jobs = cli.plan_jobs(None, None, None, device_type)
    assert len(set(jobs)) == len(jobs)
    updated = {job.case for job in jobs if job.op == "update" and job.pair == "float32/float32"}
    assert updated == set(cases.names())
    assert {job.op for job in jobs} == set(providers.OPS)
    changes = [a[:2] != b[:2] for a, b in pairwise(jobs)]
    assert sum(changes) + 1 == len({job[:2] for job in jobs})  # Tensors are made once a pair.


def test_jobs_that_find_no_time_are_left_out_by_name(capsys):
    argv = ["--cases", "odd", "--max-elements", "5000", "--device", "cpu", "--seconds", "0"]
    assert cli.main(argv) == 0
    assert "left out: odd update float32/float32: no time left" in capsys.readouterr().out


def test_jobs_with_ops_or_dtypes_are_every_combination():
    assert cli.plan_jobs(["odd"], ["swap"], None, "cpu") == [
        cli.Job("odd", "float32/float32", "swap", pause_ms=0, load="none")
    ]
    jobs = cli.plan_jobs(["odd"], None, None, "cpu", pauses_ms=[0, 20], loads=["none", "cores"])
    assert [(job.op, job.pause_ms, job.load) for job in jobs] == [
        ("update", 0, "none"),
        ("update", 0, "cores"),
        ("update", 20, "none"),
        ("update", 20, "cores"),
    ]
    assert len(cli.plan_jobs(None, list(providers.OPS), list(DTYPE_PAIRS), "cpu")) == (
        len(cases.names()) * 3 * len(DTYPE_PAIRS)
    )


def test_case_that_memory_cannot_hold_is_left_out_by_name(capsys):
    argv = ["--cases", "llama3_8b", "--ops", "swap", "--memory-gb", "1.5", "--device", "cpu"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "left out: llama3_8b float32/float32: needs " in out
    assert "even scaled down, 1.5 are free" in out


# ---- report


def test_cpu_time_of_others_is_all_but_idle_and_our_own(monkeypatch):
    stat = "cpu  1000 10 500 90000 70 5 5 100 0 0\ncpu0 1 2 3\n"
    monkeypatch.setattr(Path, "read_text", lambda self: stat)
    monkeypatch.setattr(report.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(report.os, "times", lambda: (2.0, 1.0, 0.5, 0.25, 99.0))
    assert report.others_cpu_s() == pytest.approx(16.2 - 3.75)


def test_plain_table():
    table = report.Table("title", ("name", "ms"), (("plan", "1.5"), ("a", "10")))
    assert report.plain(table).splitlines() == [
        "",
        "title",
        "name   ms",
        "---------",
        "plan  1.5",
        "a      10",
    ]


def test_titles_say_which_foreach_it_was(whole_run):
    records = whole_run[1]["records"]
    on_a_gpu = [{**r, "foreach_arguments": "4 KB"} for r in records]
    assert ", foreach with 4 KB - " in report.tables(on_a_gpu)[0].title
    assert "foreach" not in report.tables(records)[0].title


def test_tables_without_rich(whole_run, monkeypatch, capsys):
    monkeypatch.setattr(report, "find", lambda package: None)
    for table in report.tables(whole_run[1]["records"]):
        report.show(table)
    assert "own copy (limit)" in capsys.readouterr().out


def test_tables_with_rich(whole_run, capsys):
    pytest.importorskip("rich")
    report.show(report.summary(whole_run[1]["records"]))
    assert "best torch" in capsys.readouterr().out


def test_summary_compares_with_the_fastest():
    shared = {"case": "odd", "op": "update", "ema_dtype": "float32", "param_dtype": "float32"}
    shared |= {"cache": "cold", "note": "", "gb_per_s": 10.0, "fraction_of_copy": 0.9}
    shared |= {"pause_ms": 0.0, "load": "none"}
    rows = [
        ("fused_ema plan", "ours", "ours", 2.0),
        ("fused_ema plan on one thread", "ours", "ours", 3.0),
        ("slow loop", "naive", "torch", 9.0),
        ("loop", "naive", "torch", 8.0),
        ("foreach", "foreach", "torch", 5.0),
        ("package", "package", "torch", 4.0),
        ("own copy", "limit", "limit", 1.0),
    ]
    records = [
        {**shared, "provider": name, "family": family, "kind": kind, "ms": ms, "ms_p90": 2 * ms}
        for name, family, kind, ms in rows
    ]
    paused = [{**r, "cache": "hot", "pause_ms": 20.0, "load": "cores"} for r in records]
    what = "odd", "update", "float32/float32"
    figures = "2", "4", "10", "90%", "1.50x", "4.00x", "2.50x", "2.00x"
    assert report.summary(records + paused).rows == (
        (*what, "cold", "", "", *figures),
        (*what, "hot", "20 ms", "cores", *figures),
    )
    assert report.headline(records) == "cold 2 ms, 2.00x package;"
    assert report.headline(paused) == "hot, 20 ms pause, every core busy 2 ms, 2.00x package;"


@pytest.mark.parametrize(
    ("torch_version", "cuda", "expected"),
    [
        ("2.13.0+cu130", "13.0", "32 KB"),
        ("2.13.0+cu126", "12.6", "4 KB"),
        ("2.11.0+cu130", "13.0", "4 KB"),
        ("2.13.0+cpu", None, None),
    ],
)
def test_foreach_arguments(torch_version, cuda, expected, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert report.foreach_arguments(torch.device("cuda")) == expected
    assert report.foreach_arguments(CPU) is None


def test_plot_is_written_and_the_same_every_time(whole_run, tmp_path):
    pytest.importorskip("matplotlib")
    records = whole_run[1]["records"]
    first = picture.plot(records, tmp_path / "a.b" / "bench")
    again = picture.plot(records, tmp_path / "again")
    assert [path.name for path in first] == ["bench.png", "bench.svg"]
    assert first[0].read_bytes().startswith(b"\x89PNG")
    assert first[1].read_text().endswith("</svg>\n")
    assert first[1].read_text() == again[1].read_text()


def test_plot_without_matplotlib_stops_before_measuring(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(report, "find", lambda package: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*TINY, "--plot", str(tmp_path / "bench")])
    assert stopped.value.code == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


def test_dry_samples_of_rounds_are_counted_and_a_replay_counts_for_its_nodes():
    class Clock:
        num_dry = num_dry_kept = 0

        def seconds(self, calls, host_s=0.0):
            self.num_dry += 3
            self.num_dry_kept += 1
            return 1.0

    replay = providers.Replay(None, (lambda: None,) * 10)
    found = timer.interleave({"a": [lambda: None], "b": [replay]}, Clock(), seconds=0, rounds=3)
    assert found["a"].median == 1.0
    assert found["b"].median == 0.1
    assert found["a"].num_dry == found["b"].num_dry == 9  # Not those of the warm-up.
    assert found["a"].num_dry_kept == found["b"].num_dry_kept == 3


@pytest.mark.parametrize(
    ("dry", "host_s", "num_dry", "num_dry_kept"),
    [
        ([False], 0.0, 0, 0),
        ([True, False], 0.0, 1, 0),
        ([True, True, False], 0.0, 2, 0),
        ([True, True, True], 0.0, 3, 1),
        ([True], 1.0, 1, 1),  # No spinning holds the stream for a host that slow.
    ],
)
def test_a_sample_in_which_the_gpu_ran_dry_is_taken_again(
    dry, host_s, num_dry, num_dry_kept, monkeypatch
):
    class Event:
        def record(self):
            pass

        def synchronize(self):
            pass

        def query(self):
            return dry[len(calls) - 1]

        def elapsed_time(self, end):
            return 1000.0 * len(calls)

    calls, spins = [None], []
    monkeypatch.setattr(timer, "_event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", spins.append)
    clock = timer.CudaClock()
    calls.clear()
    spins.clear()
    # The last sample's time, with as many seconds as there were samples.
    assert clock.seconds([lambda: calls.append(None)], host_s) == len(dry)
    assert len(spins) == len(calls) == len(dry)
    assert (clock.num_dry, clock.num_dry_kept) == (num_dry, num_dry_kept)
    assert spins == sorted(set(spins))  # Each time it spins for longer.


@pytest.mark.parametrize(("num_sets", "num_nodes"), [(1, 10), (3, 12), (10, 10), (64, 64)])
def test_a_chain_has_ten_nodes_and_more_over_all_sets(num_sets, num_nodes, monkeypatch):
    monkeypatch.setattr(providers, "captured", lambda calls: calls)
    calls = [partial(int) for _ in range(num_sets)]
    nodes = providers.chain(calls)
    assert len(nodes) == num_nodes
    assert set(nodes) == set(calls)


def test_of_a_captured_provider_the_replay_is_checked(monkeypatch):
    lists = odd_lists("float32/float32", "cpu")
    provider = next(p for p in PROVIDERS if p.name == providers.CAPTURED)
    right = replace(provider, prepare=providers._naive_lerp)
    monkeypatch.setattr(providers, "captured", lambda calls: calls[0])
    with torch.no_grad():
        assert cli.prepare_checked(right, [lists], 0.3)[1] == ""
        monkeypatch.setattr(providers, "captured", lambda calls: lambda: None)
        assert "update: ema element 0 is " in cli.prepare_checked(right, [lists], 0.3)[1]
