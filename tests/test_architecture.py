"""docs/architecture.md: each module on its floor, and every import leads down."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fused_ema"
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def floors():
    """The number of each module's floor, from the bottom up: 'hooks.*' stands for a folder."""
    drawing = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)[1]
    lines = [line for line in drawing.splitlines() if line.strip()]
    return {
        name: number
        for number, line in enumerate(reversed(lines))
        for name in line.partition("|")[2].split()
    }


def floor_of(module):
    found = FLOORS.get(module, FLOORS.get(module.partition(".")[0] + ".*"))
    assert found is not None, f"'{module}' isn't in the drawing of docs/architecture.md"
    return found


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported(path):
    """What a module imports of the package when it is loaded, by the names of the drawing."""
    found = set()
    tree = ast.parse(path.read_text())
    in_functions = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if node in in_functions:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] != "fused_ema":
                continue
            # The longest part of it that is a module; what else it names is in there.
            while len(parts) > 1 and not is_module(parts[1:]):
                parts.pop()
            found.add(".".join(parts[1:]))
    return found - {""}


def is_module(parts):
    path = PACKAGE.joinpath(*parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


FLOORS = floors()
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_lead_down(path):
    own = name_of(path)
    for other in imported(path):
        if (
            other.partition(".")[0] == own.partition(".")[0]
            and f"{own.partition('.')[0]}.*" in FLOORS
        ):
            continue  # Of the same folder.
        assert floor_of(other) < floor_of(own), f"{own} imports {other}, which isn't below it"


def test_the_drawing_names_what_there_is():
    for name in FLOORS:
        assert is_module(name.removesuffix(".*").split(".")), name


def test_the_reader_sees_imports():
    assert {"manager", "formats", "_state"} <= imported(PACKAGE / "state.py")
    assert "formats._names" in imported(PACKAGE / "state.py")
