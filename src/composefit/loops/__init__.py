"""Loops: order and counting. They know nothing of devices."""

from composefit.loops.evaluate import EvaluateLoop
from composefit.loops.fit import FitLoop
from composefit.loops.train_epoch import TrainEpochLoop

__all__ = ["EvaluateLoop", "FitLoop", "TrainEpochLoop"]
