"""`explain`: the plan of one training step, as a table and as a picture."""

from composefit.explain.plan import Barrier, Coupling, Kept, Part, Plan, Span, Taken
from composefit.explain.rehearsal import QUIET, Rehearsal, at_home, is_first_rank
from composefit.explain.watching import WatchedLockstep

__all__ = [
    "QUIET",
    "Barrier",
    "Coupling",
    "Kept",
    "Part",
    "Plan",
    "Rehearsal",
    "Span",
    "Taken",
    "WatchedLockstep",
    "at_home",
    "is_first_rank",
]
