"""What comes out: records, the JSON file, tables and plots; and what all commands share."""

import argparse
import errno
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch

import fused_ema
from bench.cases import Case
from bench.providers import LIMITS, ONE_THREAD, PLAN, Provider
from bench.timer import Timing

Record = dict[str, Any]

SCHEMA = 1
COLORS = {"kernel": "#0b5fa5", "foreach": "#8fb3d3", "naive": "#d3d9df"}
# A thread that waits for its core holds up all others at the end of each op, and a loop has an op
# a tensor. With one busy program on two cores foreach was seen 20 to 60 times slower.
_OTHERS_SHARE = 0.05

# ---- options


def add_device(parser: argparse.ArgumentParser) -> None:
    """Gives a command its --device: a GPU where there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cpu", "cuda"), help="(%(default)s)")


def device_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> torch.device:
    """The device that was asked for; an error of the command line where there is none."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    return torch.device(args.device)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Gives a command its --json; a place that can't be written is an error before any run."""
    text = "write everything as one JSON object"
    parser.add_argument("--json", type=_json_path, metavar="FILE", help=text)


def add_plot(parser: argparse.ArgumentParser) -> None:
    """Gives a command its --plot; likewise."""
    text = "draw PATH.png and PATH.svg"
    parser.add_argument("--plot", type=_plot_path, metavar="PATH", help=text)


def _json_path(text: str) -> Path:
    _check_writable(Path(text))
    return Path(text)


def _plot_path(text: str) -> Path:
    path = Path(text)
    if not path.name:
        raise argparse.ArgumentTypeError(f"'{text}' is a folder; name the files in it")
    for file in _plot_files(path):
        _check_writable(file)
    return path


def _check_writable(given: Path) -> None:
    """Raises before a run what would end it, and leaves nothing behind."""
    path = Path(os.path.realpath(given))
    made: list[Path] = []
    try:
        for folder in reversed(path.parents):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        if not path.exists():
            path.open("xb").close()
            path.unlink()
        elif path.is_file() or path.is_dir():
            path.open("ab").close()
        elif not os.access(path, os.W_OK):  # A pipe, say: opening it would wait for a reader.
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{str(given)!r} can't be written ({error.strerror}); choose another place"
        ) from error
    finally:
        for folder in reversed(made):
            folder.rmdir()


# ---- records


class Measured(NamedTuple):
    """A provider and what a call of it took.

    Attributes:
        provider: Whose call.
        timing: On the device.
        more_s: In seconds, or None where it wasn't measured. host_us: on the host, what it reads of
            the tensors in its caches; host_cold_us: the same after many other tensors; wall_us:
            from an idle device until it is done, after many other tensors.
    """

    provider: Provider
    timing: Timing
    more_s: dict[str, float | None]


def what(case: Case, op: str, pair: str) -> Record:
    """What a record says of the tensors and of what was done with them."""
    ema_dtype, param_dtype = pair.split("/")
    return {
        "case": case.name,
        "op": op,
        "ema_dtype": ema_dtype,
        "param_dtype": param_dtype,
        "num_tensors": case.num_tensors,
        "num_elements": case.num_elements,
    }


def pair_of(r: Record) -> str:
    """A record's dtype pair as it is written everywhere: ema/param."""
    return f"{r['ema_dtype']}/{r['param_dtype']}"


def make_records(
    case: Case,
    op: str,
    pair: str,
    cache: str,
    device: torch.device,
    measured: Sequence[Measured],
    pause_ms: float = 0.0,
    load: str = "none",
) -> list[Record]:
    """One record a provider of one table; pause_ms: before each call; load: of timer.LOADS."""
    shared = {
        **what(case, op, pair),
        "title": case.title,
        "device": device.type,
        "device_name": device_name(device),
        "cache": cache,
        "pause_ms": pause_ms,
        "load": load,
        "note": case.note,
        "num_threads": torch.get_num_threads(),
        "torch_version": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "fused_ema_version": fused_ema.__version__,
        "foreach_arguments": foreach_arguments(device),
    }
    records: list[Record] = []
    for provider, timing, more_s in measured:
        num_bytes = provider.bytes_moved(pair, case.num_elements)
        records.append(
            {
                **shared,
                "provider": provider.name,
                "kind": provider.kind,
                "family": provider.family,
                "bytes": num_bytes,
                "ms": timing.median * 1e3,
                "ms_p10": timing.p10 * 1e3,
                "ms_p90": timing.p90 * 1e3,
                "rounds": timing.rounds,
                "num_dry": timing.num_dry,
                "num_dry_kept": timing.num_dry_kept,
                "gb_per_s": num_bytes / timing.median / 1e9,
                **{name: None if s is None else s * 1e6 for name, s in more_s.items()},
            }
        )
    limits = {r["provider"]: r["gb_per_s"] for r in records if r["provider"] in LIMITS}
    limit = max(limits, key=lambda name: limits[name], default=None)
    for record in records:
        record["limit"] = limit
        record["fraction_of_copy"] = record["gb_per_s"] / limits[limit] if limit else None
    return records


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def foreach_arguments(device: torch.device) -> str | None:
    """How many bytes of kernel arguments torch's foreach passes, so how many launches it needs.

    Decided when torch is compiled: 32 KB from torch 2.13 on in its builds for CUDA 13, else 4 KB.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    torch_version = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
    large = torch_version >= (2, 13) and int(torch.version.cuda.split(".")[0]) >= 13
    return "32 KB" if large else "4 KB"


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge the figures, or to measure them again."""
    facts: dict[str, Any] = {
        "device": device.type,
        "device_name": device_name(device),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        # torch's own switch. With 4 KB pages the same call on two tensors of one size may differ by
        # a tenth or two, by where they lie; so may a provider and a limit on its flat pair.
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch_version": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "foreach_arguments": foreach_arguments(device),
        "fused_ema_version": fused_ema.__version__,
        "fused_ema_info": asdict(fused_ema.info()),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device_memory_bytes"] = properties.total_memory
        facts["multiprocessors"] = properties.multi_processor_count
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["l2_bytes"] = properties.L2_cache_size
        facts["nvidia_smi"] = nvidia_smi(device)
    return facts


def nvidia_smi(device: torch.device) -> dict[str, str]:
    """Driver, power and clocks of a GPU, as the driver's own tool tells them; empty without it."""
    names = "uuid,name,driver_version,power.limit,clocks.max.sm,clocks.max.mem,ecc.mode.current"
    command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    gpus = [[value.strip() for value in line.split(",")] for line in told.stdout.splitlines()]
    own = [values for values in gpus if values[0].endswith(uuid)] or (
        gpus if len(gpus) == 1 else []
    )
    # An identity is nobody's business.
    return dict(list(zip(names.split(","), own[0], strict=False))[1:]) if own else {}


def others_cpu_s() -> float:
    """CPU seconds since boot that went to anything but this process; 0 where Linux can't tell."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, first.split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    return busy / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


@contextmanager
def measuring(device: torch.device) -> Iterator[dict[str, Any]]:
    """Prints and yields the environment; on leaving it also has the share of other programs."""
    facts = environment(device)
    print(f"{facts['device_name']}, torch {torch.__version__}, {facts['num_threads']} threads")
    print(fused_ema.info(), flush=True)
    start, others = time.perf_counter(), others_cpu_s()
    yield facts
    cpu_s = (time.perf_counter() - start) * facts["num_cpus"]
    facts["others_cpu_share"] = round(max(0.0, others_cpu_s() - others) / cpu_s, 3)


def warn_of_others(facts: dict[str, Any]) -> None:
    """Says so where other programs took enough of the processors to spoil the figures."""
    if facts["others_cpu_share"] > _OTHERS_SHARE:
        print(
            f"warning: other programs took {facts['others_cpu_share']:.0%} of the processors; "
            "loops over many tensors then look far slower than they are: run it again"
        )


def microseconds(timing: Timing) -> Record:
    """A timing as a record tells it where microseconds are the unit."""
    return {
        "us": timing.median * 1e6,
        "us_p10": timing.p10 * 1e6,
        "us_p90": timing.p90 * 1e6,
        "rounds": timing.rounds,
    }


def write_json(path: Path, facts: dict[str, Any], content: dict[str, Any]) -> None:
    """Writes everything of a run as one JSON object."""
    whole = {"schema": SCHEMA, "environment": facts, **content}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


# ---- command line


def names(known: Sequence[str], what: str) -> Callable[[str], list[str] | None]:
    """An argument that takes known names, separated by commas, or 'all'."""

    def parse(text: str) -> list[str] | None:
        if text == "all":
            return list(known)
        chosen = [name.strip() for name in text.split(",")]
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"unknown {what} {name!r}; choose from {', '.join(known)}"
                )
        return chosen

    return parse


def print_failures(failures: Sequence[str]) -> int:
    """Prints what has failed and returns the exit status."""
    for line in failures:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if failures else 0


@contextmanager
def stoppable(failures: list[str]) -> Iterator[None]:
    """An interrupt ends the `with` as a failure, so that what was measured before it is kept."""
    try:
        yield
    except KeyboardInterrupt:
        failures.append("interrupted: only what was measured until then is here")


# ---- tables


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is aligned left, the others right."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(records: Iterable[Record]) -> list[Table]:
    """One table for each case, op, dtype pair, cache state, pause and load."""
    headers = ("provider", "ms", "p10 - p90", "GB/s", "of copy", "plan is faster", "host us")
    result = []
    for group in groups(records):
        plan = next((r["ms"] for r in group if r["provider"] == PLAN), None)
        rows = tuple(
            (
                r["provider"] + (" (limit)" if r["kind"] == "limit" else ""),
                _digits(r["ms"]),
                f"{_digits(r['ms_p10'])} - {_digits(r['ms_p90'])}",
                _digits(r["gb_per_s"]),
                f"{r['fraction_of_copy']:.0%}" if r["fraction_of_copy"] else "",
                f"{r['ms'] / plan:.2f}x" if plan and r["kind"] != "limit" else "",
                _digits(r["host_us"]) if r["host_us"] is not None else "",
            )
            for r in group
        )
        result.append(Table(_title(group[0]), headers, rows))
    return result


def summary(records: Iterable[Record]) -> Table:
    """The plan against the fastest naive loop, the fastest foreach and the fastest of all torch."""
    headers = (
        "case",
        "op",
        "ema/param",
        "cache",
        "pause",
        "load",
        "plan ms",
        "p90",
        "GB/s",
        "of copy",
        "1 thread",
        "naive",
        "foreach",
        "best torch",
    )
    rows = []
    for group in groups(records):
        plan = next((r for r in group if r["provider"] == PLAN), None)
        if plan is None:
            continue
        naive, foreach = (fastest(group, "family", family) for family in ("naive", "foreach"))
        one = fastest(group, "provider", ONE_THREAD)
        best = fastest(group, "kind", "torch")
        rows.append(
            (
                plan["case"] + (" *" if plan["note"] else ""),
                plan["op"],
                pair_of(plan),
                plan["cache"],
                f"{plan['pause_ms']:g} ms" if plan["pause_ms"] else "",
                plan["load"] if plan["load"] != "none" else "",
                _digits(plan["ms"]),
                _digits(plan["ms_p90"]),
                _digits(plan["gb_per_s"]),
                f"{plan['fraction_of_copy']:.0%}" if plan["fraction_of_copy"] else "",
                *(f"{r['ms'] / plan['ms']:.2f}x" if r else "" for r in (one, naive, foreach, best)),
            )
        )
    return Table("fused_ema plan: how many times faster (* = scaled down)", headers, tuple(rows))


def show(table: Table) -> None:
    """Prints a table, with rich where it is installed."""
    if find("rich"):
        console = importlib.import_module("rich.console").Console()
        if not console.is_terminal:
            console.width = 160  # A log has no width, and rich would cut cells at 80.
        simple = importlib.import_module("rich.box").SIMPLE_HEAD
        rich_table = importlib.import_module("rich.table").Table(box=simple)
        for i, header in enumerate(table.headers):
            rich_table.add_column(header, justify="right" if i else "left", no_wrap=True)
        for row in table.rows:
            rich_table.add_row(*row)
        console.print(table.title, style="bold", markup=False, highlight=False, soft_wrap=True)
        console.print(rich_table)
    else:
        print(plain(table))
    sys.stdout.flush()


def plain(table: Table) -> str:
    """A table as text."""
    rows = [table.headers, *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(["", table.title, lines[0], "-" * len(lines[0]), *lines[1:]])


def headline(records: Sequence[Record]) -> str:
    """The plan's times among these records, and how much faster it is than the best torch way."""
    parts = []
    for group in groups(records):
        plan = next((r for r in group if r["provider"] == PLAN), None)
        best = fastest(group, "kind", "torch")
        if plan is not None:
            faster = f", {best['ms'] / plan['ms']:.2f}x {best['provider']}" if best else ""
            parts.append(f"{_when(plan)} {_digits(plan['ms'])} ms{faster};")
    return " ".join(parts)


def groups(records: Iterable[Record]) -> list[list[Record]]:
    """Records of one list, op, dtype pair, cache state, pause and load, as they follow."""

    def key(r: Record) -> tuple[object, ...]:
        # Records of before there were pauses and loads have neither.
        since = r.get("pause_ms", 0), r.get("load", "none")
        return r["case"], r["op"], pair_of(r), r["cache"], *since

    return [list(group) for _, group in groupby(records, key)]


def _when(r: Record) -> str:
    pause = f", {r['pause_ms']:g} ms pause" if r["pause_ms"] else ""
    load = {"none": "", "cores": ", every core busy"}[r["load"]]
    return f"{r['cache']}{pause}{load}"


def _title(r: Record) -> str:
    note = f", {r['note']}" if r["note"] else ""
    # Which foreach it is decides how many launches it needs.
    foreach = f", foreach with {r['foreach_arguments']}" if r["foreach_arguments"] else ""
    where = f"{r['case']} {r['op']} {pair_of(r)} {_when(r)}{foreach}"
    return f"{where} - {r['title']}{note}: {size(r)} elements"


def size(r: Record) -> str:
    """Of a list, in words."""
    plural = "s" if r["num_tensors"] != 1 else ""
    millions = float(f"{r['num_elements'] / 1e6:.3g}")  # Three digits, never as 1.07e+03.
    return f"{r['num_tensors']:,} tensor{plural}, {millions:,g} M"


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def fastest(group: Sequence[Record], field: str, value: str) -> Record | None:
    """The fastest record whose field has that value."""
    return min((r for r in group if r[field] == value), key=lambda r: float(r["ms"]), default=None)


# ---- plots: what all of them share


def why_no_plot() -> str:
    """Why no plot can be drawn; empty if it can."""
    return "" if find("matplotlib") else "needs matplotlib: pip install matplotlib"


def pyplot() -> Any:
    """matplotlib.pyplot, for files."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    # Ids of an SVG are random otherwise, and every new plot would be a diff of the whole file.
    matplotlib.rcParams["svg.hashsalt"] = "fused_ema"
    return importlib.import_module("matplotlib.pyplot")


def style(axis: Any, values: Literal["x", "y"]) -> None:
    """The look of all plots: no frame, and a grid for the axis that has the values."""
    axis.tick_params(axis="y", length=0)
    axis.grid(True, axis=values, color="#e6e6e6")
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def title(figure: Any, text: str) -> None:
    """The title of a figure, where reading begins."""
    figure.suptitle(text, fontsize=11, fontweight="bold", x=0.02, ha="left")


def save(figure: Any, path: Path) -> list[Path]:
    """Writes and closes a figure: `path`.png and `path`.svg, which it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = _plot_files(path)
    figure.savefig(files[0], dpi=150)
    figure.savefig(files[1], metadata={"Date": None})
    pyplot().close(figure)
    print(f"wrote {', '.join(map(str, files))}")
    return files


def find(package: str) -> ModuleType | None:
    """An optional package, or None where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        return None


def _plot_files(path: Path) -> list[Path]:
    return [path.with_name(path.name + suffix) for suffix in (".png", ".svg")]
