"""What a run does besides training: callbacks, and the three that every trainer brings along."""

from composefit.callbacks.callback import Callback
from composefit.callbacks.last_checkpoint import LastCheckpoint
from composefit.callbacks.model_summary import ModelSummary
from composefit.callbacks.progress_bar import ProgressBar

__all__ = ["Callback", "LastCheckpoint", "ModelSummary", "ProgressBar"]
