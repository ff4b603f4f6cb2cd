"""The average chosen after the training: snapshots, reconstruction, merging.

In training :class:`Snapshots` saves averages now and then. Afterwards :func:`reconstruct` puts the
average of any length together from them, and :func:`merge` merges plain checkpoints. From a shell:
``python -m fused_ema inspect``, ``reconstruct`` and ``sweep``. docs/choosing-an-average.md is for
whoever has never tuned one.
"""

from __future__ import annotations

from fused_ema.posthoc._reconstruct import Reconstruction, merge, reconstruct
from fused_ema.posthoc._snapshots import Snapshots

__all__ = ["Reconstruction", "Snapshots", "merge", "reconstruct"]
