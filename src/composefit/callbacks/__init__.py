"""What a run does besides training: callbacks."""

from composefit.callbacks.callback import Callback
from composefit.callbacks.early_stopping import EarlyStopping
from composefit.callbacks.ema import EMA
from composefit.callbacks.gradient_norm_monitor import GradientNormMonitor
from composefit.callbacks.lambda_callback import LambdaCallback
from composefit.callbacks.learning_rate_monitor import LearningRateMonitor
from composefit.callbacks.model_checkpoint import ModelCheckpoint
from composefit.callbacks.model_summary import ModelSummary
from composefit.callbacks.prediction_writer import PredictionWriter
from composefit.callbacks.progress_bar import ProgressBar
from composefit.callbacks.throughput_monitor import ThroughputMonitor

__all__ = [
    "EMA",
    "Callback",
    "EarlyStopping",
    "GradientNormMonitor",
    "LambdaCallback",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "PredictionWriter",
    "ProgressBar",
    "ThroughputMonitor",
]
