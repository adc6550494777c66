"""composefit trains PyTorch models: a step says what it means, a strategy how it is carried out."""

from typing import TYPE_CHECKING, Any

from composefit.callbacks import Callback
from composefit.data import CombinedLoader, PerRank
from composefit.data_parallel import DataParallel
from composefit.datamodule import DataModule
from composefit.effects import Effect, Gather, Once
from composefit.images import Image
from composefit.loops import Loop
from composefit.losses import Loss, Mean, Sum
from composefit.module import LoopModule
from composefit.optimizers import OptimizerConfig
from composefit.seeding import seed_everything
from composefit.steps import Step
from composefit.strategies import (
    Distributed,
    MultiGPU,
    SingleDevice,
    Strategy,
    ThreadDataParallel,
)
from composefit.trainer import Trainer
from composefit.updates import Gradient, Grads, Update

if TYPE_CHECKING:
    from composefit.strategies.fully_sharded import FullySharded

__all__ = [
    "Callback",
    "CombinedLoader",
    "DataModule",
    "DataParallel",
    "Distributed",
    "Effect",
    "FullySharded",
    "Gather",
    "Gradient",
    "Grads",
    "Image",
    "Loop",
    "LoopModule",
    "Loss",
    "Mean",
    "MultiGPU",
    "Once",
    "OptimizerConfig",
    "PerRank",
    "SingleDevice",
    "Step",
    "Strategy",
    "Sum",
    "ThreadDataParallel",
    "Trainer",
    "Update",
    "seed_everything",
]


def __getattr__(name: str) -> Any:
    """`FullySharded` when it is asked for: torch's sharding takes a second to import."""
    if name == "FullySharded":
        from composefit.strategies.fully_sharded import FullySharded

        return FullySharded
    raise AttributeError(f"module 'composefit' has no attribute {name!r}")
