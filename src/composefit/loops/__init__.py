"""Loops: order and counting. They know nothing of devices."""

from composefit.loops.evaluate import EvaluateLoop
from composefit.loops.fit import FitLoop
from composefit.loops.limits import Limits
from composefit.loops.loop import Loop
from composefit.loops.predict import PredictLoop
from composefit.loops.train_epoch import TrainEpochLoop

__all__ = ["EvaluateLoop", "FitLoop", "Limits", "Loop", "PredictLoop", "TrainEpochLoop"]
