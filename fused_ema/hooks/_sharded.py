"""Folders of torch.distributed.checkpoint, written and read by all processes of a sharded run."""

from __future__ import annotations

import os
import shutil
from typing import Any


def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Whether a save into it has ended: .metadata is written last."""
    return os.path.isfile(os.path.join(folder, ".metadata"))


def save(state: dict[str, Any], folder: str, is_main: bool) -> None:
    """Saves a state so that the folder is complete, or as it was before.

    Args:
        state: As of ``torch.distributed.checkpoint.save``.
        folder: The same on all processes; what it holds is replaced.
        is_main: Whether this process renames; one does.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict_saver import save as save_all

    temporary = f"{folder}.tmp"
    if is_main:  # Of a save that was killed.
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()
    save_all(state, checkpoint_id=temporary)
    if is_main:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    dist.barrier()


def load(state: dict[str, Any], folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads what a state names, in place; returns it.

    Raises:
        ValueError: Something isn't there, or can't be read or doesn't fit: the same on all
            processes. What the state holds may have been written then.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load as load_all

    try:
        load_all(state, checkpoint_id=folder)
    except CheckpointException as error:  # No Exception: what this is gets past everybody.
        raise ValueError(str(error)) from error
    return state
