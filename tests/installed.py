"""Installs a wheel into an empty environment and uses it there: python tests/installed.py WHEEL."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import venv
from pathlib import Path
from typing import Any

# What a user's first lines would show: where it lies, what it was built with, and right values.
PROGRAM = textwrap.dedent(
    """
    import json, torch, fused_ema
    model = torch.nn.Linear(300, 70)
    wanted = [p.detach().clone() for p in model.parameters()]
    ema = fused_ema.EMAManager(model, momentum=0.1)
    with torch.no_grad():
        for param, average in zip(model.parameters(), wanted):
            param.add_(1.0)
            average.lerp_(param, 0.1)
    ema.update()
    found = dict(ema.named_emas())
    info = fused_ema.info()
    print(json.dumps({
        "file": fused_ema.__file__,
        "native": info.native,
        "backend": info.backends["cpu"]["float32/float32"],
        "version": info.version,
        "is_equal": all(torch.equal(found[name], average)
                        for (name, _), average in zip(model.named_parameters(), wanted)),
    }))
    """
)


def installed(wheel: Path, folder: Path) -> dict[str, Any]:
    """What the package says of itself in an environment of its own, with this one's torch.

    Args:
        wheel: The file.
        folder: Where the environment is made; a new one, away from the sources.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    places = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", places))
    install = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(packages), str(wheel)], check=True)
    # Behind it, for torch alone: what is found first is what was installed.
    (packages / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    ran = subprocess.run(
        [python, "-W", "error", "-c", PROGRAM],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    if ran.returncode != 0:
        raise RuntimeError(f"{wheel.name} doesn't work where it is installed:\n{ran.stderr}")
    facts: dict[str, Any] = json.loads(ran.stdout)
    if not facts["file"].startswith(str(packages)):
        raise RuntimeError(f"{facts['file']} was imported, not what was installed")
    return facts


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        facts = installed(Path(sys.argv[1]).resolve(), Path(folder) / "environment")
    print(f"{sys.argv[1]}: {facts['version']}, kernels {facts['native']}")
    if not (facts["native"] and facts["is_equal"] and facts["backend"] == "cpu"):
        raise SystemExit(f"not as built: {facts}")
