"""What makes a step mean something else once its batch is cut, and what to write instead."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from composefit.check import trace
from composefit.check.state import Written, line_of
from composefit.check.trace import Event

CONTROL_FLOW = "control flow that differs from shard to shard"
BUFFER = "buffer written in the step"
GLOBAL_DRAW = "draw from a global generator"
PYTHON_STATE = "Python state written in the step"
RAISED = "an error once the batch is cut"
SUM = "sum"
TIME_FIRST = "time-first batch"
UNCUT = "batch that cannot be cut"
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a result depends on how a batch is cut.

    Attributes:
        name: what it is, such as `"BatchNorm"` or `"token mean"`.
        instead: the line to write instead, or what to do.
        where: the user's file and line, `"train.py:12"`; None where it is not known.
        module: the part of the module that does it, `"net.1 (BatchNorm2d)"`, or None.
        detail: what was seen.
    """

    name: str
    instead: str
    where: str | None = None
    module: str | None = None
    detail: str = ""

    def __str__(self) -> str:
        place = f" in {self.module}" if self.module else ""
        place += f" at {self.where}" if self.where else ""
        return f"{self.name}{place}{f': {self.detail}' if self.detail else ''}"


_INSTEAD = {
    trace.BATCH_NORM: (
        "nn.GroupNorm(groups, channels), whose statistics are each sample's own; or keep it, and "
        "know that a shard is normalised by itself, as a smaller batch would be"
    ),
    trace.CLASS_WEIGHTS: "Mean.of(loss, class_weights[target].sum())",
    trace.CONTRASTIVE: "everything, offset = yield from Gather(z)",
    trace.DRAW: "self.random.normal(len(x), ...), or .uniform, .integers, .bernoulli",
    trace.NORM: (
        "total = yield from Sum(x.square().sum()), and total.sqrt(); for a norm of each sample, "
        "x.norm(dim=1)"
    ),
    trace.RATIO: "Mean(total, weight) in place of total / weight",
    trace.ROOT: (
        "error = yield from Mean(difference.square().sum(), difference.numel()), and then "
        "error.sqrt()"
    ),
    trace.STATISTICS: (
        "everything, _ = yield from Gather(x), and the statistic of everything; for one number, "
        "mean = yield from Mean(x.sum(), x.numel())"
    ),
    trace.TOKENS: "Mean.of(loss, (target != ignore_index).sum())",
    CONTROL_FLOW: (
        "value = yield from Mean(total, weight) before a condition that depends on the batch; "
        "self.random.shared for a coin"
    ),
    GLOBAL_DRAW: "self.random.uniform(len(x), ...), or self.random.shared for one that all share",
    PYTHON_STATE: "yield from Once(self.method, tensors), and set it in the method",
    BUFFER: "yield from Once(self.method, tensors), and write it in the method",
    RAISED: "see the error",
    SUM: "Sum(loss)",
    TIME_FIRST: "batch_dim = 1 in the class, or a loader that puts samples first",
    UNCUT: "batch_dim = ..., batch_size(self, batch) or scatter_batch(self, batch, n) in the class",
    UNKNOWN: (
        "what is a mean over samples as it is, what is not as Mean(total, weight) or Sum(total); "
        "what lets samples meet behind Gather"
    ),
}

_DETAIL = {
    trace.BATCH_NORM: "in training mode it normalises by the statistics of a shard",
    trace.CLASS_WEIGHTS: "the mean divides by the sum of a shard's class weights",
    trace.CONTRASTIVE: "samples are compared with those of their own shard only",
    trace.DRAW: "torch's own draws are each shard's, so that they differ with the cut",
    trace.NORM: "the norm over the samples of a shard is not linear in them",
    trace.RATIO: "it is divided by what a shard counts by itself",
    trace.ROOT: "the root of a shard's mean is not linear in it",
    trace.STATISTICS: "what a shard's samples have in common depends on which they are",
    trace.TOKENS: "the mean is over the tokens that count, of which shards have unlike numbers",
    CONTROL_FLOW: "the cut step made another number of updates",
    GLOBAL_DRAW: "`random` and numpy.random draw anew in each shard",
    SUM: "the whole batch's loss is the sum of its shards', not their mean",
    TIME_FIRST: "cut along dimension 1 the difference is gone: dimension 0 is no samples'",
}

# Where several were seen, what explains most comes first; a norm or a statistic that was computed
# of others is named for what it is, not for the root or quotient in it.
_ORDER = (
    trace.DRAW,
    trace.BATCH_NORM,
    trace.CLASS_WEIGHTS,
    trace.TOKENS,
    trace.CONTRASTIVE,
    trace.NORM,
    trace.STATISTICS,
    trace.RATIO,
    trace.ROOT,
)


def cause(
    name: str, where: str | None = None, module: str | None = None, detail: str | None = None
) -> Cause:
    """A cause of a known kind."""
    return Cause(
        name, _INSTEAD[name], where, module, _DETAIL.get(name, "") if detail is None else detail
    )


def of_events(events: Iterable[Event], first: str | None, step: str | None) -> list[Cause]:
    """One cause for each kind of event, most likely first, with the place of its first one.

    Args:
        events: those that a loss depends on.
        first: a kind that is known to be one by other means.
        step: where the step is, for a kind of which no event was seen.
    """
    by_kind: dict[str, list[Event]] = {}
    for event in events:
        by_kind.setdefault(event.kind, []).append(event)
    if first is not None:
        by_kind.setdefault(first, [])
    kinds = sorted(by_kind, key=lambda kind: (kind != first, _rank(kind)))
    return [_of_kind(kind, by_kind[kind]) if by_kind[kind] else cause(kind, step) for kind in kinds]


def _rank(kind: str) -> int:
    return _ORDER.index(kind) if kind in _ORDER else -1


def _of_kind(kind: str, events: Sequence[Event]) -> Cause:
    # Where several layers do it, the first one stands for all.
    modules = list(dict.fromkeys(event.module for event in events if event.module))
    module = modules[0] if modules else None
    if len(modules) > 1:
        module = f"{module} and {len(modules) - 1} more"
    return cause(kind, events[0].where, module)


def of_error(error: Exception, user: str | None, module: nn.Module) -> Cause:
    """The cause that an error of the cut step speaks of: its message says what to write.

    Args:
        error: it did not come with the whole batch.
        user: the file of the user's step.
        module: whose step has raised it.
    """
    text = str(error)
    name = next((kind for pattern, kind in _MESSAGES if re.search(pattern, text)), RAISED)
    attribute = re.match(r"(?:del )?self\.(\w+)", text)
    if name == PYTHON_STATE and attribute and attribute[1] in module._buffers:
        name = BUFFER
    where = None
    for frame in traceback.extract_tb(error.__traceback__):
        if user is None or frame.filename == user:
            where = f"{frame.filename}:{frame.lineno}"
    if where is None and (buffer := re.search(r"buffer '([\w.]+)'", text)):
        path, _, attribute_name = buffer[1].rpartition(".")
        where = line_of(module.get_submodule(path), attribute_name)
    return Cause(name, _INSTEAD[name], where, None, f"{type(error).__name__}: {text}")


_MESSAGES = (
    (r"into buffer ", BUFFER),
    (r"self\.\w+ (=|in a step)|del self\.", PYTHON_STATE),
    (r"written into parameter", PYTHON_STATE),
    (r"Expected more than 1 (value|spatial)", trace.BATCH_NORM),
    (r"from Python's `random` or NumPy's", GLOBAL_DRAW),
    (r"shards of this step disagree", CONTROL_FLOW),
)


def of_state(one: Written) -> Cause:
    """Of an attribute that changes what the next step computes."""
    detail = f"{one} is set by one step and read by the next, but each shard sets its own"
    return cause(PYTHON_STATE, one.where, one.path or None, detail)
