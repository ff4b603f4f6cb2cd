"""python -m bench verdict: what the records of GPU runs say of the project's targets.

Reads JSON files of `python -m bench` and its commands, in any number and order, and prints a line a
target: what was asked, what the worst case of the records shows, and whether that is enough. What
no record speaks of is "not measured". A record whose figure is known to be of something else is
"not fit": it counts for nothing, and is named with the reason. With --markdown also the
tables of the README.

A .jsonl file holds builds of the kernels timed in turn, a line each; with the JSON file that names
those that were chosen, it becomes a table of what they changed.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench import picture, report
from bench.providers import CAPTURED, COMPILED, FLAT_COPY, OWN_COPY, PLAN, TRITON, split_pair
from bench.step import ENOUGH_ROUNDS

Record = report.Record
F32, MIXED, BF16 = "float32/float32", "float32/bfloat16", "bfloat16/bfloat16"
_LARGE_BYTES = 256e6  # Of a list: what an L2 cache has no part in.
_MODELS = ("vit_l16", "sdxl_unet", "llama3_8b")
_STALLED = 2.0  # Times the fastest tenth.
_BEFORE = "before"  # The build that the others are held against.
_SHORT = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
FOREACH = "foreach lerp_"
FLAT_LERP = "flat lerp_"
NAIVE_SWAP = "clone and two copies"


@dataclass(frozen=True)
class Seen:
    """A value, and the case that it was seen in."""

    value: float
    where: str


class Records:
    """What the files hold, by kind.

    Attributes:
        unfit: Records that `ops` lacks, and why each isn't fit to judge.
    """

    def __init__(self, contents: Iterable[dict[str, Any]], only_fit: bool = True) -> None:
        self._contents = list(contents)
        self.ops: list[Record] = []
        self.unfit: list[tuple[Record, str]] = []
        self.launches: list[Record] = []
        self.host: list[Record] = []  # Of `bench host`.
        self.steps: list[dict[str, Any]] = []
        self.environments: list[dict[str, Any]] = []
        for run, content in enumerate(self._contents):
            if content["environment"]["device"] != "cuda":
                continue
            self.environments.append(content["environment"])
            self.steps += content.get("results", [])
            for r in content.get("records", []):
                if "provider" in r and "ms" in r:
                    reason = why_unfit(r) if only_fit else ""
                    if reason:
                        self.unfit.append((r, reason))
                    else:
                        # Two runs may differ by more than what is sought.
                        self.ops.append({"run": run, **r})
                elif "kernels" in r:
                    self.launches.append(r)
                elif "host_us_p50" in r:
                    self.host.append(r)
        self._by_key = {(*_key(r), r["provider"]): r for r in self.ops}

    def unfiltered(self) -> "Records":
        """With those that aren't fit to judge."""
        return Records(self._contents, only_fit=False)

    def find(self, like: Record, provider: str) -> Record | None:
        """The record of another provider on the same tensors, in the same run."""
        return self._by_key.get((*_key(like), provider))

    def beside(self, like: Record) -> list[Record]:
        """The records of all providers on the same tensors, in the same run."""
        return [r for r in self.ops if _key(r) == _key(like)]

    def old_copy(self, like: Record) -> Record | None:
        """The copy of one flat pair in a run whose tables have no FLAT_COPY of their own."""
        flat = {"run": like["run"], "case": "single", "op": "copy", "cache": "cold"}
        flat |= {name: like[name] for name in ("ema_dtype", "param_dtype")}
        return self.find(flat, "naive copy_")

    def plans(
        self,
        op: str,
        pair: str,
        provider: str = PLAN,
        cases: Sequence[str] = (),
        caches: Sequence[str] = ("cold",),
    ) -> list[Record]:
        """Records of that provider, of all cases unless some are named."""
        return [
            r
            for r in self._by_key.values()
            if (r["op"], report.pair_of(r)) == (op, pair)
            and r["provider"] == provider
            and r["cache"] in caches
            and (not cases or r["case"] in cases)
        ]


def _key(r: Record) -> tuple[Any, ...]:
    return r["run"], r["case"], r["op"], report.pair_of(r), r["cache"]


def _list_bytes(r: Record) -> float:
    dtypes = split_pair(report.pair_of(r))
    return float(r["num_elements"] * sum(dtype.itemsize for dtype in dtypes))


def why_unfit(r: Record) -> str:
    """Why a record's time is that of something else; empty where it can be judged."""
    # A sample says since then how often the GPU ran dry, and a captured call is a node of a graph.
    is_old = "num_dry" not in r
    if is_old and r["provider"] == CAPTURED:
        return "made before captured calls were nodes of one graph: a graph's launch is in it"
    # A stall only adds. While fewer than half of the samples have one, the median is right, however
    # far p90 lies.
    if r["ms"] > _STALLED * r["ms_p10"]:
        when = "made before samples in which the GPU ran dry were taken again; " if is_old else ""
        return (
            f"{when}its median of {r['ms']:.3g} ms is {r['ms'] / r['ms_p10']:.0f} times its p10, "
            f"p90 {r['ms_p90']:.3g}: as where the host stalls"
        )
    return ""


# ---- what is asked


@dataclass(frozen=True)
class Target:
    """One line.

    Attributes:
        what: The line's beginning.
        bound: What is asked of every value.
        unit: Behind a value: "x", "us" or "" for a fraction.
        values: Finds them; none where nothing was measured.
        sign: ">=", "<=" or "=".
    """

    what: str
    bound: float
    unit: str
    values: Callable[[Records], list[Seen]]
    sign: Literal[">=", "<=", "="] = ">="

    def worst(self, records: Records) -> Seen | None:
        """The value that is furthest on the wrong side."""
        return max(self.values(records), key=self._excess, default=None)

    def is_met(self, seen: Seen) -> bool:
        """Whether a value is enough."""
        return self._excess(seen) <= 0

    def _excess(self, seen: Seen) -> float:
        beyond = seen.value - self.bound
        return {">=": -beyond, "<=": beyond, "=": abs(beyond)}[self.sign]


def _fraction_of_copy(op: str, pair: str) -> Callable[[Records], list[Seen]]:
    def values(records: Records) -> list[Seen]:
        return [
            Seen(r["fraction_of_copy"], r["case"])
            for r in records.plans(op, pair)
            if _list_bytes(r) >= _LARGE_BYTES and r["fraction_of_copy"]
        ]

    return values


def _of_flat(op: str, flat: str) -> Callable[[Records], list[Seen]]:
    """Against torch's op on one flat pair of as many elements, byte for byte."""

    def values(records: Records) -> list[Seen]:
        found = []
        for r in records.plans(op, F32):
            other = records.find(r, flat) or (records.old_copy(r) if flat == FLAT_COPY else None)
            if other is not None and _list_bytes(r) >= _LARGE_BYTES:
                found.append(Seen(r["gb_per_s"] / other["gb_per_s"], r["case"]))
        return found

    return values


def _faster_than(
    op: str, pair: str, cases: Sequence[str], *others: str, field: str = "ms"
) -> Callable[[Records], list[Seen]]:
    """Without others: than the fastest way of torch."""

    def values(records: Records) -> list[Seen]:
        found = []
        caches = _ANY_CACHE if field == "host_us" else ("cold",)
        for r in records.plans(op, pair, cases=cases, caches=caches):
            against = [records.find(r, name) for name in others] if others else [_best(records, r)]
            found += [
                Seen(other[field] / r[field], f"{r['case']}, {other['provider']}")
                for other in against
                if other is not None and other[field] and r[field]
            ]
        return found

    return values


def _best(records: Records, like: Record) -> Record | None:
    torch_ways = (r for r in records.beside(like) if r["kind"] == "torch")
    return min(torch_ways, key=lambda r: float(r["ms"]), default=None)


def _large_best(records: Records) -> list[Seen]:
    large = [r["case"] for r in records.plans("update", MIXED) if _list_bytes(r) >= _LARGE_BYTES]
    return _faster_than("update", MIXED, large)(records) if large else []


def _against_aligned(records: Records) -> list[Seen]:
    found = []
    for pair in (F32, MIXED, BF16):
        for case, aligned in (("odd", "even"), ("misaligned", "medium")):
            for r in records.plans("update", pair, cases=(case,)):
                other = records.find({**r, "case": aligned}, PLAN)
                if other is not None:
                    value = r["gb_per_s"] / other["gb_per_s"]
                    found.append(Seen(value, f"{case}, {pair}"))
    return found


# Where a cold rotation would take too many tensors there is only a hot record, and the host's time
# doesn't depend on the GPU's caches.
_ANY_CACHE = ("cold", "hot")


def _device_us(case: str) -> Callable[[Records], list[Seen]]:
    return lambda records: [
        Seen(r["ms"] * 1e3, case) for r in records.plans("update", F32, cases=(case,))
    ]


def _host_us(num_tensors: int, row: str) -> Callable[[Records], list[Seen]]:
    return lambda records: [
        Seen(r["host_us_p50"], row)
        for r in records.host
        if (r["num_tensors"], r["row"]) == (num_tensors, row)
        and (r["cores"], r["cache"]) == ("idle", "hot")
    ]


def _busy_tail(records: Records) -> list[Seen]:
    return [
        Seen(r["host_us_p99"] / r["host_us_p50"], f"{r['num_tensors']:,}, {r['row']}")
        for r in records.host
        if r["cores"] == "busy" and r["row"].startswith("plan")
    ]


def _captured_beyond(records: Records) -> list[Seen]:
    found = []
    for r in records.plans("update", F32, CAPTURED):
        plan = records.find(r, PLAN)
        # Of long kernels two microseconds are far below the spread.
        if plan is not None and plan["ms"] < 0.2:
            found.append(Seen((r["ms"] - plan["ms"]) * 1e3, r["case"]))
    return found


def _launches(what: str) -> Callable[[Records], list[Seen]]:
    return lambda records: [
        Seen(r[what], f"{r['case']} {r['op']}") for r in records.launches if r["provider"] == PLAN
    ]


TARGETS: tuple[Target, ...] = (
    Target("one launch: update, swap, copy", 1, "", _launches("kernels"), "="),
    Target("host synchronisations", 0, "", _launches("waits"), "="),
    Target("update fp32, of copy", 1.00, "", _fraction_of_copy("update", F32)),
    Target("update fp32/bf16, of copy", 0.97, "", _fraction_of_copy("update", MIXED)),
    Target("update fp32/bf16, against best torch", 2.0, "x", _large_best),
    Target("update bf16, of copy", 0.95, "", _fraction_of_copy("update", BF16)),
    Target(
        "update fp32, against foreach", 1.15, "x", _faster_than("update", F32, _MODELS, FOREACH)
    ),
    Target("update fp32, of torch's flat lerp_", 1.00, "", _of_flat("update", FLAT_LERP)),
    Target("swap fp32, of cudaMemcpy", 1.00, "", _of_flat("swap", FLAT_COPY)),
    Target("copy fp32, of cudaMemcpy", 1.00, "", _of_flat("copy", FLAT_COPY)),
    Target("10,000 x 64 on the device", 20, "us", _device_us("small"), "<="),
    Target(
        "10,000 x 64 end to end, against foreach",
        20,
        "x",
        _faster_than("update", F32, ("small",), FOREACH, field="wall_us"),
    ),
    Target("odd sizes and misaligned, of aligned", 0.90, "", _against_aligned),
    Target("swap fp32, of copy", 0.95, "", _fraction_of_copy("swap", F32)),
    Target(
        "swap, against clone and two copies", 1.4, "x", _faster_than("swap", F32, (), NAIVE_SWAP)
    ),
    Target("host time, 500 pairs", 8, "us", _host_us(500, "plan"), "<="),
    Target("host time, 5,000 pairs", 100, "us", _host_us(5000, "plan"), "<="),
    Target("host time, 5,000 emas flat", 60, "us", _host_us(5000, "plan, emas flat"), "<="),
    Target("host time among busy cores, p99 of p50", 3, "x", _busy_tail, "<="),
    Target(
        "host time, against foreach",
        20,
        "x",
        _faster_than("update", F32, ("small_500", "small_5000"), FOREACH, field="host_us"),
    ),
    Target("captured, beyond the bare kernel", 2, "us", _captured_beyond, "<="),
    Target(
        "against Triton",
        1.0,
        "x",
        lambda records: [
            seen
            for pair in (F32, MIXED, BF16)
            for seen in _faster_than("update", pair, (), TRITON)(records)
        ],
    ),
    Target("against compiled foreach", 1.0, "x", _faster_than("update", F32, (), COMPILED)),
)


# ---- what comes out


def lines(records: Records) -> list[tuple[str, ...]]:
    """What, asked, seen, where, verdict."""
    rows: list[tuple[str, ...]] = []
    unfiltered = records.unfiltered()
    for target in TARGETS:
        asked = f"{target.sign} {_shown(target.bound, target.unit)}"
        seen = target.worst(records)
        if seen is None:
            is_there = target.worst(unfiltered) is not None
            rows.append((target.what, asked, "", "", "not fit" if is_there else "not measured"))
        else:
            verdict = "met" if target.is_met(seen) else "MISSED"
            rows.append((target.what, asked, _shown(seen.value, target.unit), seen.where, verdict))
    return rows


def _shown(value: float, unit: str) -> str:
    if unit == "us":
        return f"{value:.1f} us"
    return f"{value:.2f}{unit}" if value != int(value) or unit else f"{value:.0f}"


def table(records: Records) -> report.Table:
    """All targets."""
    headers = ("target", "asked", "worst seen", "where", "")
    return report.Table(f"Targets: {described(records)}", headers, tuple(lines(records)))


def described(records: Records) -> str:
    """Which GPU, torch and foreach the figures are of."""
    told = dict.fromkeys(
        f"{e['device_name']}, torch {e['torch_version']} (CUDA {e['torch_cuda']}; its foreach "
        f"passes {e['foreach_arguments']} of arguments)"
        for e in records.environments
    )
    return "; ".join(told) or "no record of a GPU"


def summary(records: Records) -> report.Table:
    """The plan against torch, Triton and the compiled foreach, a row for each list."""
    headers = (
        *("list", "op", "ema/param", "GB/s", "of copy"),
        *("naive", "foreach", "best torch", "Triton", "compiled"),
    )
    rows = []
    for plan in (r for r in records.ops if r["provider"] == PLAN and r["cache"] == "cold"):
        same = records.beside(plan)

        def faster(field: str, value: str, plan: Record = plan, same: list[Record] = same) -> str:
            times = [r["ms"] for r in same if r[field] == value]
            return f"{min(times) / plan['ms']:.2f}x" if times else ""

        note = f", {plan['note'].partition(',')[0]}" if plan["note"] else ""
        rows.append(
            (
                plan["title"] + note,
                plan["op"],
                report.pair_of(plan),
                f"{plan['gb_per_s']:,.0f}",
                f"{plan['fraction_of_copy']:.0%}" if plan["fraction_of_copy"] else "",
                faster("family", "naive"),
                faster("family", "foreach"),
                faster("kind", "torch"),
                faster("provider", TRITON),
                faster("provider", COMPILED),
            )
        )
    return report.Table("fused_ema plan: how many times faster", headers, tuple(rows))


def copy_speed(records: Records) -> str:
    """What the project's own copy kernel reaches on one large flat pair."""
    speeds = [
        r["gb_per_s"] for r in records.ops if r["provider"] == OWN_COPY and r["case"] == "single"
    ]
    return f"own copy kernel: {max(speeds):,.0f} GB/s" if speeds else ""


def step_lines(records: Records) -> list[str]:
    """What averaging adds to a training step, a line for each stack."""
    found = []
    for result in records.steps:
        rows = {r["way"]: r for r in result["rows"]}
        parts = [
            f"{name} {rows[name]['share_of_step']:.2%}"
            for name in ("naive", "foreach", "manager", "side stream", "captured")
            if name in rows
        ]
        rounds = min(r["rounds"] for r in result["rows"])
        noise = f" ({rounds} rounds: the order is noise)" if rounds < ENOUGH_ROUNDS else ""
        found.append(
            f"{result['title']}: of a step of {rows['off']['ms']:.1f} ms, {', '.join(parts)}{noise}"
        )
    return found


def unfit_lines(records: Records) -> list[str]:
    """What does not count, and why; a line for each provider and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for r, reason in records.unfit:
        where = f"{r['case']} {r['op']} {report.pair_of(r)} {r['cache']}"
        found.setdefault((r["provider"], reason), []).append(where)
    return [
        f"not fit: {name} on {where[0] if len(where) == 1 else f'{len(where)} lists'}: {reason}"
        for (name, reason), where in found.items()
    ]


def builds(chosen: Sequence[Record], runs: Sequence[Sequence[Record]]) -> report.Table:
    """What the chosen builds changed, as the README shows it.

    Args:
        chosen: A row each: title, case, op, pair and build.
        runs: Of builds in turn, a line each. Of two runs of the same, the last counts.

    Raises:
        ValueError: No run has a chosen build, and the one before it on the same list.
    """
    rows = []
    for row in chosen:
        speeds: dict[str, float] = {}
        for run in runs:
            found = {
                line["variant"]: line["gb_per_s"]
                for line in run
                if all(line[name] == row[name] for name in ("case", "op", "pair"))
            }
            if {_BEFORE, row["build"]} <= found.keys():
                speeds = found
        if not speeds:
            what = f"{row['case']} {row['op']} {row['pair']}"
            raise ValueError(f"no run of '{row['build']}' and '{_BEFORE}' on {what}")
        own, before = speeds[row["build"]], speeds[_BEFORE]
        other = speeds.get("torch flat lerp_" if row["op"] == "update" else "torch flat copy_")
        flat = f"{own / other:.3f}" if other else ""
        triton = f"{own / speeds['triton']:.2f}x" if "triton" in speeds else ""
        gain = own / before - 1
        # Two digits, from a tenth on none.
        change = f"{gain:+.0%}" if abs(gain) >= 0.1 else f"{gain:+.1%}"
        rows.append(
            (
                row["title"],
                row["op"].partition(" ")[0],
                "/".join(_SHORT[dtype] for dtype in row["pair"].split("/")),
                f"{before:,.0f}",
                f"{own:,.0f}",
                _bold(change.replace("%", " %"), gain < 0),
                flat,
                _bold(triton, triton.startswith("0.")),
            )
        )
    headers = ("list", "op", "ema/param", "GB/s before", "GB/s", "", "of torch's flat op", "Triton")
    return report.Table("Chosen builds against the one before", headers, tuple(rows))


def _bold(text: str, is_worse: bool) -> str:
    return f"**{text}**" if is_worse else text


def markdown(shown: report.Table) -> str:
    """A table as the README has them."""
    rows = (shown.headers, ("---",) * len(shown.headers), *shown.rows)
    return "\n".join(
        "|".join(["", *(f" {cell} " if cell else " " for cell in row), ""]) for row in rows
    )


def main(argv: Sequence[str]) -> int:
    """Judges records; the exit status is 1 where a target was missed."""
    parser = argparse.ArgumentParser(
        "python -m bench verdict", description="Records of a GPU against the project's targets."
    )
    parser.add_argument(
        "files", type=Path, nargs="+", help="JSON files of python -m bench; or .jsonl of builds"
    )
    parser.add_argument("--markdown", action="store_true", help="tables for the README as well")
    report.add_plot(parser)
    args = parser.parse_args(argv)
    if args.plot and (reason := report.why_no_plot()):
        parser.error(f"--plot {reason}")
    try:
        contents, chosen, runs = read(args.files)
        if bool(chosen) != bool(runs):
            raise ValueError(
                "builds in turn need both: .jsonl files, and the JSON file of those chosen"
            )
        found = [builds(chosen, runs)] if chosen else []
    except ValueError as error:
        parser.error(str(error))
    for shown in found:
        report.show(shown)
    missed = False
    if contents or not found:
        records = Records(contents)
        judged = table(records)
        missed = any(row[-1] == "MISSED" for row in judged.rows)
        report.show(judged)
        for line in (copy_speed(records), *step_lines(records), *unfit_lines(records)):
            if line:
                print(line)
        if args.plot:
            picture.plot(records.ops, args.plot)
        found += [judged, summary(records)]
    if args.markdown:
        print(*map(markdown, found), sep="\n\n")
    return int(missed)


def read(files: Iterable[Path]) -> tuple[list[dict[str, Any]], list[Record], list[list[Record]]]:
    """What the files hold: records with their environment, chosen builds, runs of builds.

    Raises:
        ValueError: A file can't be read, is no JSON, or holds something else.
    """
    contents: list[dict[str, Any]] = []
    chosen: list[Record] = []
    runs: list[list[Record]] = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
            is_run = path.suffix == ".jsonl"
            content = (
                [json.loads(line) for line in text.splitlines()] if is_run else json.loads(text)
            )
        except OSError as error:
            raise ValueError(f"'{path}' can't be read ({error.strerror})") from error
        except ValueError as error:
            what = f"no JSON ({error})" if text.strip() else "empty"
            raise ValueError(f"'{path}' is {what}; pass what a run wrote with --json") from error
        if is_run and content and all(isinstance(r, dict) and "variant" in r for r in content):
            runs.append(content)
        elif isinstance(content, dict) and "chosen" in content:
            chosen += content["chosen"]
        elif isinstance(content, dict) and "device" in (content.get("environment") or ()):
            contents.append(content)
        else:
            raise ValueError(
                f"'{path}' isn't of python -m bench; pass what a run wrote with --json"
            )
    return contents, chosen, runs
