"""python -m bench scale: memory and time of an update for models of many GPUs, on paper.

What is computed: bytes, divided by the number of GPUs and by the GB/s of committed records. The
tables of docs/scale.md are this command's; nothing is measured.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench import report
from bench.gpu import verdict
from bench.providers import PLAN

RECORDS = Path(__file__).parent / "results" / "h200"
MODELS = {"8B": 8e9, "70B": 70e9, "671B": 671e9}
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
GPUS_A_HOST = 8
MEMORY_GB = 141  # Of an H200, by its data sheet.
_MODEL = "llama3_8b"
_PROTOTYPES = "prototypes.jsonl"


class Average(NamedTuple):
    """One way to keep an average.

    Attributes:
        title: Of its rows.
        held_bytes: An element of the average in memory.
        param_bytes: An element of its param.
        moved_bytes: An element that an update reads and writes, of a host ema over the link.
        file: The record of its GB/s, in RECORDS.
        what: The measurement there: a dtype pair of the model's, or a prototype.
        on_host: Whether the average is in the host's memory.
    """

    title: str
    held_bytes: int
    param_bytes: int
    moved_bytes: int
    file: str
    what: str
    on_host: bool = False

    def gb_per_s(self) -> float:
        """The speed in the record."""
        text = (RECORDS / self.file).read_text(encoding="utf-8")
        if self.file == _PROTOTYPES:
            lines = map(json.loads, text.splitlines())
            return float(next(line["gb_per_s"] for line in lines if line.get("what") == self.what))
        ema, param = self.what.split("/")
        wanted = {"case": _MODEL, "op": "update", "provider": PLAN}
        wanted |= {"ema_dtype": ema, "param_dtype": param}
        records = json.loads(text)["records"]
        return float(next(r["gb_per_s"] for r in records if wanted.items() <= r.items()))


AVERAGES = (
    Average("fp32, fp32 params", 4, 4, 12, "3ff6e58/bench.json", "float32/float32"),
    Average("fp32, bf16 params", 4, 2, 10, "3ff6e58/bench.json", "float32/bfloat16"),
    Average("split, bf16 params *", 4, 2, 10, _PROTOTYPES, "update bf16+16 bits from bf16 u2"),
    Average("bf16, bf16 params *", 2, 2, 6, _PROTOTYPES, "update bf16 stochastic philox10 u2"),
    Average(
        "fp32 on the host, fp32 params *",
        4,
        4,
        8,
        _PROTOTYPES,
        "update of a pinned host ema staged, 4 MB a chunk, 3 buffers (bytes over the link)",
        on_host=True,
    ),
)


def rates() -> report.Table:
    """What the other tables are computed of."""
    rows = (
        (
            average.title,
            str(average.held_bytes),
            str(average.moved_bytes),
            f"{average.gb_per_s():,.1f}",
            f"`{average.file}`, {average.what}",
        )
        for average in AVERAGES
    )
    headers = ("average", "bytes held", "bytes moved", "GB/s", "of the record")
    return report.Table("An element, and the speed", headers, tuple(rows))


def memory() -> report.Table:
    """GB of the average, a GPU or a host, by model and number of GPUs."""
    kinds = (
        ("fp32 or split, a GPU", 4, 1),
        ("bf16, a GPU", 2, 1),
        (f"fp32 on the host, a host of {GPUS_A_HOST}", 4, GPUS_A_HOST),
    )
    rows = (
        (model, title, *(_digits(num_elements * size * together / n / 1e9) for n in GPUS))
        for model, num_elements in MODELS.items()
        for title, size, together in kinds
    )
    return report.Table("GB of the average", _headers("GB"), tuple(rows))


def times() -> report.Table:
    """Milliseconds of an update; a dash where average and params don't fit into a GPU."""
    rows = []
    for model, num_elements in MODELS.items():
        for average in AVERAGES:
            held = average.param_bytes + (0 if average.on_host else average.held_bytes)
            rate = average.gb_per_s() * 1e6  # Bytes a millisecond.
            cells = (
                _digits(num_elements / n * average.moved_bytes / rate)
                if num_elements / n * held <= MEMORY_GB * 1e9
                else "-"
                for n in GPUS
            )
            rows.append((model, average.title, *cells))
    return report.Table("Milliseconds of an update", _headers("ms"), tuple(rows))


def _headers(unit: str) -> tuple[str, ...]:
    return ("model", f"average, {unit} on", *(f"{n:,} GPUs" for n in GPUS))


def _digits(value: float) -> str:
    """Three of them."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def main(argv: Sequence[str]) -> int:
    """Prints the tables of docs/scale.md."""
    argparse.ArgumentParser(
        "python -m bench scale",
        description="Memory and time of an update on many GPUs, computed from committed records.",
    ).parse_args(argv)
    print(*map(verdict.markdown, (rates(), memory(), times())), sep="\n\n")
    return 0
