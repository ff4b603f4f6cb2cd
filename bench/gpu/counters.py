"""python -m bench counters: what a GPU's hardware counters say about the kernels, by NVIDIA's ncu.

For each operation and kind of list one launch, with caches flushed before it: bytes that memory
moved against the least that the operation must move, how full the multiprocessors were, how much of
each 32-byte sector was used, what warps waited for. These tell the cause of a gap that the
benchmark finds. Times under ncu are no benchmark, and of what is written up to an L2 cache's worth
is still in there when a kernel ends.
"""

import argparse
import csv
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fused_ema
from bench import cases, providers, report, timer
from bench.gpu.c_kernels import Operation
from fused_ema.__main__ import number

MOMENTUM = 0.125
_MAX_ELEMENTS = 2**26
_TIMEOUT_S = 45.0  # Twice that fits the report script's limit.
_WARP_SIZE, _UNROLL = 32, 4

_UPDATE = Operation("update", "lerp", MOMENTUM)
RUNS: tuple[tuple[str, str, Operation], ...] = (
    ("single", "float32/float32", _UPDATE),
    ("single", "float32/bfloat16", _UPDATE),
    ("single", "bfloat16/bfloat16", _UPDATE),
    ("single", "float32/float32", Operation("swap")),
    ("single", "float32/float32", Operation("copy to ema")),
    ("odd", "float32/float32", _UPDATE),
    ("misaligned", "float32/float32", _UPDATE),
    ("misaligned", "float32/bfloat16", _UPDATE),
    ("small", "float32/float32", _UPDATE),
)

# What a record calls it, and ncu's name. The first are on every GPU; without the others, a GPU that
# lacks one would show nothing.
_BASIC = {
    "ns": "gpu__time_duration.sum",
    "bytes_read": "dram__bytes_read.sum",
    "bytes_written": "dram__bytes_write.sum",
    "memory_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "active_warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "waves": "launch__waves_per_multiprocessor",
}
_MORE = {
    "active_warps": "sm__warps_active.avg.per_cycle_active",
    "load_requests": "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum",
    "load_sectors": "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum",
    "store_requests": "l1tex__t_requests_pipe_lsu_mem_global_op_st.sum",
    "store_sectors": "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum",
    "load_sector_use_percent": "smsp__sass_average_data_bytes_per_sector_mem_global_op_ld.pct",
    "store_sector_use_percent": "smsp__sass_average_data_bytes_per_sector_mem_global_op_st.pct",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "l2_percent": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "wait_for_loads": "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
}


def launch_all(max_elements: int) -> None:
    """What runs under ncu: one launch for each of RUNS, in their order."""
    device = torch.device("cuda")
    for case_name, pair, operation in RUNS:
        case = cases.load(case_name, max_elements)
        lists = timer.make_lists(case, pair, device)
        plan = fused_ema.Plan(lists.ema, lists.params)
        calls = {"swap": plan.swap, "copy to ema": plan.copy_to_ema}
        if operation.kind == "update":
            plan.update(MOMENTUM)
        else:
            calls[operation.kind]()
        torch.cuda.synchronize()


def find_ncu() -> str | None:
    """On the PATH, in CUDA_HOME, or where NVIDIA's packages put it."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = os.pathsep.join([os.environ.get("PATH", ""), f"{home}/bin"])
    places = sorted(glob.glob("/opt/nvidia/nsight-compute/*/ncu"), reverse=True)
    return shutil.which("ncu", path=path) or next(iter(places), None)


def profile(ncu: str, metrics: Sequence[str], max_elements: int) -> str:
    """Runs `launch_all` under ncu and returns its table as CSV text.

    Raises:
        RuntimeError: ncu failed, or said nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [
            ncu,
            "--clock-control",
            "none",
            "--csv",
            "--page",
            "raw",
            "--print-units",
            "base",
        ]
        command += ["--kernel-name", "regex:tile_loop_kernel", "--metrics", ",".join(metrics)]
        command += ["--log-file", str(log), sys.executable, "-m", "bench", "counters"]
        command += ["--launch-only", "--max-elements", str(max_elements)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        text = log.read_text() if log.exists() else ""
    if run.returncode or '"ID"' not in text:
        said = "\n".join([text, run.stdout, run.stderr]).strip()
        raise RuntimeError(f"{ncu} failed with status {run.returncode}:\n{said[-2000:]}")
    return text


def read_table(text: str, metrics: dict[str, str]) -> list[dict[str, float]]:
    """A row a launch, by what records call each metric; those that ncu lacks are left out."""
    lines = text[text.index('"ID"') :].splitlines()
    rows = list(csv.DictReader(lines))[1:]  # The first has the units.
    found = []
    for row in rows:
        values = {}
        for name, metric in metrics.items():
            cell = (row.get(metric) or "").replace(",", "")
            if re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d+)?", cell):
                values[name] = float(cell)
        found.append(values)
    return found


def make_records(rows: Sequence[dict[str, float]], max_elements: int) -> list[report.Record]:
    """The rows of RUNS with what is known of each.

    Raises:
        RuntimeError: There is another number of rows.
    """
    if len(rows) != len(RUNS):
        raise RuntimeError(f"ncu saw {len(rows)} launches, expected {len(RUNS)}")
    records = []
    for (case_name, pair, operation), row in zip(RUNS, rows, strict=True):
        case = cases.load(case_name, max_elements)
        least = providers.least_bytes(operation.op, *providers.split_pair(pair), case.num_elements)
        moved = row["bytes_read"] + row["bytes_written"]
        in_flight = {}
        if "active_warps" in row and case_name == "single":  # Elsewhere not all tiles are full.
            in_flight["in_flight_kb"] = row["active_warps"] * _warp_bytes(operation, pair) / 1024
        records.append(
            {
                **report.what(case, operation.op, pair),
                "bytes": least,
                "bytes_moved": moved,
                "moved_of_least": moved / least,
                **in_flight,
                **row,
            }
        )
    return records


def _warp_bytes(operation: Operation, pair: str) -> int:
    """What a warp of a full tile has asked for before its first store (csrc/tiles.h)."""
    ema, param = (dtype.itemsize for dtype in providers.split_pair(pair))
    reads_ema = operation.kind in ("update", "swap", "copy to params")
    reads_param = operation.kind != "copy to params"
    vector = 16 * reads_ema + 16 * param // ema * reads_param
    return _WARP_SIZE * _UNROLL * vector


def table(records: Sequence[report.Record]) -> report.Table:
    """What of it fits a line."""
    columns = {
        "memory_percent": "memory %",
        "active_warps_percent": "warps %",
        "in_flight_kb": "KB in flight",
        "registers": "registers",
        "waves": "waves",
        "load_sector_use_percent": "load use %",
        "store_sector_use_percent": "store use %",
        "l2_hit_percent": "L2 hits %",
        "wait_for_loads": "load waits",
    }
    rows = tuple(
        (
            f"{r['case']} {r['op']} {report.pair_of(r)}",
            f"{r['moved_of_least']:.3f}",
            *(f"{r[name]:.4g}" if name in r else "" for name in columns),
        )
        for r in records
    )
    return report.Table(
        "Hardware counters, one cold launch each", ("run", "bytes", *columns.values()), rows
    )


def main(argv: Sequence[str]) -> int:
    """Profiles the kernels; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m bench counters",
        description="Bytes moved, occupancy, sector use and stalls of the kernels, by ncu.",
    )
    add = parser.add_argument
    add("--max-elements", type=number(int, 1), default=_MAX_ELEMENTS, help="(%(default)s)")
    add("--launch-only", action="store_true", help=argparse.SUPPRESS)
    report.add_json(parser)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU here, and only a GPU has counters")
    if args.launch_only:
        launch_all(args.max_elements)
        return 0
    ncu = find_ncu()
    if ncu is None:
        parser.error("no ncu here: it comes with NVIDIA's Nsight Compute")
    with report.measuring(torch.device("cuda")) as facts:
        records = make_records(_profile_what_is_there(ncu, args.max_elements), args.max_elements)
    report.show(table(records))
    if args.json:
        content: dict[str, Any] = {"metrics": _BASIC | _MORE, "records": records}
        report.write_json(args.json, facts, content)
    return 0


def _profile_what_is_there(ncu: str, max_elements: int) -> list[dict[str, float]]:
    metrics = _BASIC | _MORE
    try:
        return read_table(profile(ncu, list(metrics.values()), max_elements), metrics)
    except RuntimeError as error:
        if "metric" not in str(error).lower():
            raise
        print(f"some metrics are missing here: {error}", file=sys.stderr)
        return read_table(profile(ncu, list(_BASIC.values()), max_elements), _BASIC)
