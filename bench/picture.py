"""The picture of a benchmark: how near to the memory's limit, and how long where that isn't it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.providers import PLAN
from bench.report import COLORS, Record, fastest, groups, pair_of, pyplot, save, size, style

_PLOTTED_PAIRS = ("float32/float32", "float32/bfloat16")
# Of the ema, a tensor on average: with 16 KB a launch for each tensor takes longer than its bytes.
_SMALL_BYTES = 1 << 14
_BAR = 0.26
_ROW_INCHES = 0.62


class _Panel(NamedTuple):
    pair: str
    large: list[list[Record]]
    small: list[list[Record]]


def plot(records: Sequence[Record], path: Path) -> list[Path]:
    """Draws updates, as `path`.png and `path`.svg, which it returns.

    For each list a bar for the kernel, the fastest foreach and the fastest naive loop. Lists of
    large tensors: the share of a plain copy's speed, with how many times faster the kernel is than
    the naive loop. Lists of small ones, where launches take the time: the time of a call, on a
    logarithmic scale. A column a dtype pair.
    """
    plt = pyplot()
    panels = _panels(records)
    # An axis for each kind of list that any column has, of a height by its longest one.
    kinds = [
        kind for kind in ("large", "small") if any(getattr(panel, kind) for panel in panels)
    ] or ["large"]
    rows = {kind: max((len(getattr(p, kind)) for p in panels), default=1) for kind in kinds}
    figure, axes = plt.subplots(
        len(kinds),
        max(1, len(panels)),
        figsize=(
            6.2 * max(1, len(panels)),
            1.1 + sum(0.75 + _ROW_INCHES * count for count in rows.values()),
        ),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": [0.4 + count for count in rows.values()]},
    )
    for column, panel in enumerate(panels):
        for row, kind in enumerate(kinds):
            axis, lists = axes[row][column], getattr(panel, kind)
            if not lists:
                axis.set_axis_off()
                continue
            (_draw_shares if kind == "large" else _draw_times)(axis, lists)
            axis.set_title(f"ema {panel.pair.replace('/', ', params ')}", fontsize=10, loc="left")
            axis.set_ylim(rows[kind] - 0.5, -0.5)  # Bars of one thickness everywhere.
    if panels:
        first = next(lists[0][0] for lists in panels[0][1:] if lists)
        threads = "" if first["device"] == "cuda" else f", {first['num_threads']} threads"
        figure.suptitle(
            f"EMA update on {first['device_name']}{threads}, torch {first['torch_version']}",
            fontsize=11,
            fontweight="bold",
        )
        labelled: dict[str, Any] = {}
        for axis in axes.flat:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                labelled.setdefault(label, handle)
        figure.legend(
            labelled.values(), labelled, loc="outside lower center", ncols=4, frameon=False
        )
    return save(figure, path)


def _panels(records: Sequence[Record]) -> list[_Panel]:
    """By dtype pair, each list once: cold where there is cold."""
    found: dict[str, dict[str, list[Record]]] = {}
    for group in groups(records):
        first = group[0]
        if first["op"] == "update" and any(r["provider"] == PLAN for r in group):
            found.setdefault(pair_of(first), {}).setdefault(first["case"], group)
    chosen = [pair for pair in _PLOTTED_PAIRS if pair in found] or list(found)[:2]
    panels = []
    for pair in chosen:
        large: list[list[Record]] = []
        small: list[list[Record]] = []
        for group in found[pair].values():
            (small if _is_small(group[0]) else large).append(group)
        panels.append(_Panel(pair, large, small))
    return panels


def _is_small(r: Record) -> bool:
    itemsize = 8 if r["ema_dtype"] == "float64" else 4 if r["ema_dtype"] == "float32" else 2
    return bool(r["num_elements"] / r["num_tensors"] * itemsize <= _SMALL_BYTES)


def _draw_shares(axis: Any, lists: Sequence[Sequence[Record]]) -> None:
    """Bars that end where their share of the copy's speed does."""
    for y, group in enumerate(lists):
        bars = _bars(group)
        copy = next((r["gb_per_s"] for r in group if r["kind"] == "limit"), None)
        for at, color, label, record in bars:
            share = record["gb_per_s"] / copy * 100 if copy else 0.0
            axis.barh(y + at, share, _BAR * 0.92, color=color, label=label)
            if record["provider"] == PLAN and (naive := fastest(group, "family", "naive")):
                _write(axis, share, y + at, f"{naive['ms'] / record['ms']:.1f}x")
    axis.axvline(100, color="#222222", linewidth=1.4, label="a plain copy")
    axis.set_xlim(0, max(axis.get_xlim()[1] * 1.08, 115))  # Room for the numbers.
    axis.set_xlabel("% of a plain copy's GB/s (number: times the naive loop)", fontsize=9)
    _finish(axis, lists)


def _draw_times(axis: Any, lists: Sequence[Sequence[Record]]) -> None:
    """Bars as long as a call takes, each with its time."""
    times = [record["ms"] * 1e3 for group in lists for *_, record in _bars(group)]
    start = 10 ** _floor_log10(min(times) / 1.5)
    axis.set_xscale("log")
    for y, group in enumerate(lists):
        for at, color, label, record in _bars(group):
            us = record["ms"] * 1e3
            axis.barh(y + at, us - start, _BAR * 0.92, left=start, color=color, label=label)
            _write(axis, us, y + at, _time(us), record["provider"] == PLAN)
    axis.set_xlim(start, max(times) * 6)
    axis.set_xlabel("us a call, logarithmic: shorter is better", fontsize=9)
    _finish(axis, lists)


def _bars(group: Sequence[Record]) -> list[tuple[float, str, str, Record]]:
    """Where from its row's middle, color, label and record of each bar."""
    arguments = group[0]["foreach_arguments"]
    wanted = {
        "kernel": ("fused_ema", next(r for r in group if r["provider"] == PLAN)),
        "foreach": (
            "torch._foreach" + (f" ({arguments} of arguments)" if arguments else ""),
            fastest(group, "family", "foreach"),
        ),
        "naive": ("naive loop", fastest(group, "family", "naive")),
    }
    return [
        ((i - 1) * _BAR, COLORS[name], label, record)
        for i, (name, (label, record)) in enumerate(wanted.items())
        if record is not None
    ]


def _write(axis: Any, x: float, y: float, text: str, is_kernel: bool = True) -> None:
    axis.annotate(
        text,
        (x, y),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        fontweight="bold" if is_kernel else "normal",
        color=COLORS["kernel"] if is_kernel else "#555555",
        # Legible where it crosses the copy's line.
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
    )


def _finish(axis: Any, lists: Sequence[Sequence[Record]]) -> None:
    axis.set_yticks(range(len(lists)), [_row_label(group[0]) for group in lists], fontsize=8.5)
    style(axis, "x")


def _row_label(r: Record) -> str:
    scaled = f", {r['note'].partition(',')[0]}" if r["note"] else ""
    return f"{r['title']}{scaled}\n{size(r)}"


def _floor_log10(value: float) -> int:
    return len(f"{int(value)}") - 1 if value >= 1 else -1


def _time(us: float) -> str:
    for unit, factor in (("us", 1.0), ("ms", 1e3)):
        if us < 1000 * factor:
            return f"{us / factor:.3g} {unit}"
    return f"{us / 1e6:.3g} s"
