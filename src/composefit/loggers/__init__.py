"""Where logged numbers and pictures go."""

from composefit.loggers.csv import CSVLogger
from composefit.loggers.logger import Logger
from composefit.loggers.tensorboard import TensorBoardLogger
from composefit.loggers.wandb import WandbLogger

__all__ = ["CSVLogger", "Logger", "TensorBoardLogger", "WandbLogger"]
