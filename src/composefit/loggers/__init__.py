"""Where logged numbers go."""

from composefit.loggers.csv import CSVLogger
from composefit.loggers.logger import Logger

__all__ = ["CSVLogger", "Logger"]
