"""`report.html`: a run in one file that needs nothing else, neither a network nor a script."""

from composefit.report.configuration import configuration, describe
from composefit.report.environment import environment
from composefit.report.page import write

__all__ = ["configuration", "describe", "environment", "write"]
