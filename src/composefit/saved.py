"""Reading a checkpoint, whichever kind it is: a file, or the folder of a sharded training."""

from __future__ import annotations

import os
from typing import Any

from composefit import checkpoint
from composefit.ranks import World


def load(path: str | os.PathLike[str], world: World | None = None) -> dict[str, Any]:
    """A checkpoint, verified, with whole tensors on the CPU; no code in it is run.

    Args:
        path: the file or folder.
        world: the ranks, all of which call this; None: this process reads it by itself.

    Raises:
        See `composefit.checkpoint.load` and `composefit.sharded_checkpoint.load`.
    """
    checkpoint.refuse_address(path)
    path = checkpoint.where(path)
    if not path.is_dir():
        return checkpoint.load(path)
    # Here, since torch's part of it takes a second to import.
    from composefit import sharded_checkpoint

    state: dict[str, Any] = sharded_checkpoint.joined(*sharded_checkpoint.load(path, world=world))
    return state
