"""The names that Lightning's users have in their fingers: porting a script changes its imports.

`import lightning as L` becomes `import composefit.lightning as L`, and `import lightning.pytorch as
pl` becomes `import composefit.lightning as pl`. The names are other names for this package's own,
nothing else: what is imported from `lightning.pytorch.callbacks` and `.loggers` is in
`composefit.callbacks` and `composefit.loggers`. Lightning itself is not needed.

`docs/from-lightning.md` says what changes beside the imports.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from composefit import callbacks, loggers
from composefit.callbacks import Callback
from composefit.datamodule import DataModule as LightningDataModule
from composefit.module import LoopModule as LightningModule
from composefit.seeding import seed_everything
from composefit.trainer import Trainer

__all__ = [
    "Callback",
    "LightningDataModule",
    "LightningModule",
    "Trainer",
    "callbacks",
    "loggers",
    "pytorch",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "seed_everything",
]

#: For `L.pytorch.callbacks.ModelCheckpoint` and the like.
pytorch = sys.modules[__name__]

# Nobody else tells the decorators their rank, without which each of their functions raises.
vars(rank_zero_only).setdefault("rank", int(os.environ.get("RANK", "0")))


def __getattr__(name: str) -> Any:
    if name == "Fabric":
        raise AttributeError(
            "composefit has no Fabric: a hand-written loop calls trainer.step(module, [batch]), or "
            "strategy.gradient(loss_fn, module, batch), or wraps its network in "
            "composefit.DataParallel(network, threads=n)"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
