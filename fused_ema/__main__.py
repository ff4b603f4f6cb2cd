"""``python -m fused_ema``: says what is in a checkpoint, and converts it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_ema import _safetensors, formats
from fused_ema._foreach import dtype_name
from fused_ema._format_errors import SeveralAveragesError
from fused_ema._progress import Progress, shown_size
from fused_ema._version import __version__
from fused_ema.formats._files import load
from fused_ema.formats._names import Model, Names, model_of
from fused_ema.formats._source import Source, tensors_of
from fused_ema.posthoc import _cli

_BAD_INPUT = 2


# ---- inspect


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _summary(tensors: Sequence[Tensor]) -> str:
    num_elements = sum(tensor.numel() for tensor in tensors)
    return (
        f"{len(tensors):,} tensors, {num_elements:,} elements, "
        f"{shown_size(sum(map(_num_bytes, tensors)))}"
    )


def _by_dtype(tensors: Sequence[Tensor]) -> list[str]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return [f"{dtype_name(dtype)}: {_summary(group)}" for dtype, group in groups.items()]


def describe(path: Path, found: formats.Found) -> list[str]:
    """What is in a file, line by line.

    Args:
        path: The file, or the folder.
        found: What was found in it.
    """
    files = [path] if path.is_file() else [p for p in path.iterdir() if p.is_file()]
    lines = [
        ("file", f"{path} ({shown_size(sum(file.stat().st_size for file in files))})"),
        ("format", found.format),
    ]
    untracked = [tensor for name, tensor in found.raw.items() if name not in found.ema]
    raw = [tensor for name, tensor in found.raw.items() if name in found.ema]
    for slot, at, tensors in (
        ("ema", found.ema_at, list(found.ema.values())),
        ("raw", found.raw_at, raw),
        ("no average", "", untracked),
    ):
        if not tensors:
            if slot == "raw":
                lines.append((slot, "not in the file"))
            continue
        lines.append((slot, f"{_summary(tensors)}{f', in {at}' if at else ''}"))
        lines += [("", line) for line in _by_dtype(tensors)]
    if found.why:
        lines.append(("told by", found.why))
    for key in ("iteration", "num_updates", "epoch", "momentum"):
        value = getattr(found, key)
        lines.append((key, "not recorded" if value is None else f"{value:.12g}"))
    every = [*found.ema.values(), *found.raw.values()]
    lines.append(("total", _summary(every)))
    return [f"{label:<12}{text}" for label, text in lines]


def _inspect(args: argparse.Namespace) -> None:
    if _cli.is_folder_of_snapshots(args.file):
        print("\n".join(_cli.describe(args.file, args.run, args.profiles)))
        return
    source = _source(args.file, args, numbered=True)
    try:
        found = {"": formats._read(args.file, source)}
    except SeveralAveragesError as several:
        found = {
            name: formats._read(args.file, replace(source, average=name)) for name in several.names
        }
    blocks = []
    for name, one in found.items():
        title = [f"{'average':<12}{name}"] if name else []
        blocks.append("\n".join(title + describe(args.file, one)))
    print("\n\n".join(blocks))


# ---- convert


def _source(path: Path, args: argparse.Namespace, numbered: bool) -> Source:
    return Source(
        path,
        _model_in(args),
        args.prefix,
        args.main,
        numbered,
        args.format,
        key=args.key,
        variant=args.variant,
        average=args.average,
    )


def _model_in(args: argparse.Namespace) -> Model | None:
    path: Path | None = args.model_names
    if path is None:
        return None
    names: Names
    if _safetensors.is_safetensors(path):
        names = _safetensors.map_any(path)[0]
    else:
        with path.open("rb") as file:
            is_binary = b"\0" in file.read(4096)
        if is_binary:
            data = load(path)
            inner = data.get("state_dict", data)
            names = tensors_of(inner, f"'{path}'")
        else:
            lines = path.read_text(encoding="utf-8").splitlines()
            names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise formats.FormatError(f"--model-names: '{path}' has no names")
    return model_of(names, "--model-names")


def _convert(args: argparse.Namespace) -> None:
    if not args.output.parent.is_dir():
        raise formats.FormatError(f"'{args.output.parent}' is no folder")
    if args.to is None and args.output.suffix != ".safetensors":
        raise formats.FormatError(
            f"--to: '{args.output.name}' doesn't say which format to write, as one that ends in "
            f".safetensors does; choose from {', '.join(formats.WRITABLE)}"
        )
    to = args.to or "safetensors"
    origin = _source(args.input, args, numbered=False)
    found = formats._read(args.input, origin)
    given = {
        key: value for key in ("iteration", "momentum") if (value := getattr(args, key)) is not None
    }
    if args.iteration is not None and found.num_updates is None:
        given["num_updates"] = args.iteration
    found = replace(found, **given)
    with Progress(f"writing {args.output.name}") as progress:
        formats._write(args.output, found, to, origin.model, progress, release=True)
    size = shown_size(os.stat(args.output).st_size)
    print(f"wrote {args.output}: {to} of {len(found.ema):,} averages, {size}")


# ---- command line


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """An argparse type: a number of that kind, both ends included."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a number from {low} to {high}, got {text}")
        return value

    return parse


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        "python -m fused_ema",
        description="Says what is in a checkpoint with an average of weights, converts it, and "
        "puts averages of any length together from snapshots. Files are read as data: no code in "
        "them is run.",
    )
    parser.add_argument("--version", action="version", version=f"fused_ema {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--format", choices=formats.FORMATS, metavar="FORMAT", help="instead of recognising it")
    add("--main", choices=("ema", "raw"), help="mmcv: what the model's own names hold in the file")
    add("--key", default="", help="read what is under this key; a.b within keys, a.0 in a list")
    add("--prefix", default="", help="take only names that begin so, without it")
    add("--variant", help="a folder of diffusers: which of its weights, such as fp16")
    add("--average", metavar="NAME", help="of a manager's state that has several averages: which")
    add(
        "--model-names",
        type=Path,
        metavar="FILE",
        help="the model's names: a checkpoint or safetensors file of it, or a text with the "
        "names of its parameters, one a line, in their order",
    )

    inspect = commands.add_parser(
        "inspect",
        parents=[shared],
        help="say what is in a checkpoint, or what can be had of a folder of snapshots",
    )
    inspect.add_argument("file", type=Path, metavar="FILE")
    _cli.add_choice(inspect)
    inspect.set_defaults(run_command=_inspect)

    convert = commands.add_parser(
        "convert",
        parents=[shared],
        help="write it in another format",
        epilog=f"Formats to write: {', '.join(formats.WRITABLE)}.",
    )
    add = convert.add_argument
    add("input", type=Path, metavar="IN")
    add("output", type=Path, metavar="OUT", help="is replaced if it is there")
    add(
        "--to",
        choices=formats.WRITABLE,
        metavar="FORMAT",
        help="may be left out where OUT ends in .safetensors",
    )
    add("--iteration", type=number(int, 0, 2**62), help="where IN doesn't record it")
    add("--momentum", type=number(float, 0, 1), help="where IN doesn't record it: 1 - decay")
    convert.set_defaults(run_command=_convert)

    _cli.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Words after the program's name; None for those it was called with.

    Returns:
        The exit status: 0, or 2 for a file that can't be read or converted, after one line of
        error.
    """
    args = make_parser().parse_args(argv)
    try:
        args.run_command(args)
    except BrokenPipeError:
        # Whoever read the output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, MemoryError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return _BAD_INPUT
    return 0


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:1]) if len(lines) < 2 else f"{lines[0]} {'; '.join(lines[1:9])}"
    more = len(lines) - 9
    if more > 0 and (left := re.fullmatch(r"and ([\d,]+) more", lines[-1])):
        more += int(left[1].replace(",", "")) - 1  # Of a long list not all were in the error.
    return (text or type(error).__name__) + (f"; and {more} more" if more > 0 else "")


if __name__ == "__main__":
    raise SystemExit(main())
