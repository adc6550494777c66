"""The check: whether a step means the same with its batch whole and cut.

Attributes:
    check: compares the gradients of both, on copies (`checking`).
    CheckReport: what it gives: `Finding`s and `Cause`s (`report`, `causes`).
    Trace: follows a step's samples from operation to operation (`trace`).
"""

from composefit.check.causes import Cause
from composefit.check.checking import check, try_check
from composefit.check.copies import first_batches, is_loader
from composefit.check.report import CheckReport, Finding
from composefit.check.sizes import telling_size
from composefit.check.trace import Event, Trace

__all__ = [
    "Cause",
    "CheckReport",
    "Event",
    "Finding",
    "Trace",
    "check",
    "first_batches",
    "is_loader",
    "telling_size",
    "try_check",
]
