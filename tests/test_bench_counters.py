import subprocess

import pytest

from bench.gpu import counters
from bench.gpu.counters import _BASIC, _MORE, RUNS

METRICS = _BASIC | _MORE


def written(rows, metrics):
    """As ncu writes a raw page: its own lines, names, units, then a line a launch."""
    fixed = ["ID", "Process ID", "Kernel Name", "Grid Size"]
    lines = ["==PROF== Connected to process 12", '==PROF== Profiling "tile_loop_kernel" - 0: ...']
    lines.append(",".join(f'"{name}"' for name in (*fixed, *metrics)))
    lines.append(",".join(f'"{unit}"' for unit in ("", "", "", "", *["byte"] * len(metrics))))
    for i, row in enumerate(rows):
        cells = [i, 12, "void tile_loop_kernel<A, B>(C)", "(16384, 1, 1)", *row]
        lines.append(",".join(f'"{cell}"' for cell in cells))
    return "\n".join(lines) + "\n"


def test_read_table():
    text = written([("1,234,567", "12.50"), ("(!) n/a", "3e+02")], ["first.sum", "second.pct"])
    names = {"bytes": "first.sum", "percent": "second.pct", "absent": "third.sum"}
    assert counters.read_table(text, names) == [
        {"bytes": 1234567.0, "percent": 12.5},
        {"percent": 300.0},
    ]


def test_records_say_how_many_bytes_were_too_many():
    rows = [{"bytes_read": 8.8e6, "bytes_written": 4e6} for _ in RUNS]
    records = counters.make_records(rows, 10**6)
    single = records[0]
    assert (single["case"], single["op"], single["bytes"]) == ("single", "update", 12 * 10**6)
    assert single["bytes_moved"] == 12.8e6
    assert single["moved_of_least"] == pytest.approx(12.8 / 12)
    assert records[4]["op"] == "copy"
    assert records[4]["bytes"] == 8 * 10**6


def test_bytes_in_flight_follow_from_the_warps():
    rows = [{"bytes_read": 1.0, "bytes_written": 1.0, "active_warps": 24.0} for _ in RUNS]
    records = counters.make_records(rows, 1000)
    in_flight = {
        (r["op"], r["ema_dtype"], r["param_dtype"]): r["in_flight_kb"]
        for r in records
        if r["case"] == "single"
    }
    # 24 warps of 32 threads, with four vectors of 16 bytes of the wider side each.
    assert in_flight["update", "float32", "float32"] == 96
    assert in_flight["update", "float32", "bfloat16"] == 72
    assert in_flight["copy", "float32", "float32"] == 48
    assert not any("in_flight_kb" in r for r in records if r["case"] != "single")


def test_a_missing_launch_is_an_error():
    with pytest.raises(RuntimeError, match=f"ncu saw 1 launches, expected {len(RUNS)}"):
        counters.make_records([{"bytes_read": 1.0, "bytes_written": 1.0}], 1000)


class Ncu:
    """Stands in for the tool: knows so many metrics, and writes its log."""

    def __init__(self, known):
        self.known = known
        self.commands = []

    def __call__(self, command, **options):
        self.commands.append(command)
        log = command[command.index("--log-file") + 1]
        metrics = command[command.index("--metrics") + 1].split(",")
        if missing := [name for name in metrics if name not in self.known]:
            text = f"==ERROR== Failed to find metric {missing[0]}\n"
        else:
            text = written([[1000.0] * len(metrics) for _ in RUNS], metrics)
        with open(log, "w") as file:
            file.write(text)
        return subprocess.CompletedProcess(command, int(bool(missing)), "", "")


def test_a_gpu_without_some_metrics_shows_the_others(monkeypatch, capsys):
    ncu = Ncu(_BASIC.values())
    monkeypatch.setattr(subprocess, "run", ncu)
    rows = counters._profile_what_is_there("ncu", 1000)
    assert len(ncu.commands) == 2
    assert rows == [dict.fromkeys(_BASIC, 1000.0)] * len(RUNS)
    assert "Failed to find metric" in capsys.readouterr().err
    assert "waves" in counters.table(counters.make_records(rows, 1000)).headers


def test_a_failure_shows_what_ncu_said(monkeypatch):
    def fail(command, **options):
        return subprocess.CompletedProcess(command, 1, "==ERROR== ERR_NVGPUCTRPERM", "no right")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(RuntimeError, match="status 1:\n==ERROR== ERR_NVGPUCTRPERM\nno right"):
        counters._profile_what_is_there("ncu", 1000)
