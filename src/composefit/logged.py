"""What a step logs: values with their options, checked where they are logged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from composefit.images import Image
from composefit.losses import Loss, Term, describe
from composefit.metric_types import Metric, MetricCollection
from composefit.random import SampleRandom

#: How several values become one: by name, or a function of a 1-dim tensor of them.
Reduce: TypeAlias = Literal["mean", "sum", "min", "max"] | Callable[[Tensor], Any]

_REDUCTIONS: dict[object, Reduce] = {
    **{name: name for name in ("mean", "sum", "min", "max")},
    **{torch.mean: "mean", torch.sum: "sum", torch.min: "min", torch.max: "max"},
    **{torch.amin: "min", torch.amax: "max", sum: "sum", min: "min", max: "max"},
}


@dataclass(frozen=True, slots=True)
class LogOptions:
    """How a logged value is reduced over an epoch and where it is shown."""

    prog_bar: bool
    logger: bool
    on_step: bool
    on_epoch: bool
    reduce: Reduce = "mean"


@dataclass(slots=True)
class Logged:
    """One value as a shard logged it: `weight` None stands for the shard's samples."""

    value: Any
    weight: float | None
    options: LogOptions


class Context:
    """What a module sees of the step that runs: set by the driver for its duration."""

    __slots__ = ("logs", "random", "samples", "suffix", "training")

    def __init__(
        self, random: SampleRandom | None, samples: Callable[[], int] | None = None
    ) -> None:
        self.random = random
        self.samples = samples
        self.logs: dict[str, Logged] = {}
        self.training = True
        self.suffix = ""  # of names, where several loaders are evaluated


@functools.lru_cache(maxsize=256)
def log_options(
    prog_bar: bool, logger: bool, on_step: bool, on_epoch: bool, reduce_fx: Any
) -> LogOptions:
    """The options of a call of `self.log`; the same object for the same options.

    Raises:
        ValueError: nothing would be logged, or an unknown `reduce_fx`.
    """
    if not on_step and not on_epoch:
        raise ValueError("self.log(on_step=False, on_epoch=False) logs nothing: one must be True")
    if isinstance(reduce_fx, str):  # as in Lightning
        reduce_fx = {"avg": "mean"}.get(reduce_fx.lower(), reduce_fx.lower())
    reduce = _REDUCTIONS.get(reduce_fx, reduce_fx)
    if not callable(reduce) and reduce not in _REDUCTIONS:
        raise ValueError(
            "self.log(reduce_fx=...) must be 'mean', 'sum', 'min', 'max' or a function of a tensor "
            f"of values, got {reduce_fx!r}"
        )
    return LogOptions(prog_bar, logger, on_step, on_epoch, reduce)


def one_term(name: str, loss: Loss) -> Loss:
    """A logged `Mean` or `Sum` without its graph, which would be kept as long as the value."""
    if len(loss.terms) != 1:
        raise ValueError(
            f"self.log({name!r}, ...) expects one Mean or Sum, got {loss!r}: log its terms under "
            "names of their own"
        )
    (term,) = loss.terms
    return Loss((Term(term.total.detach().clone(), term.weight),))


def samples_of(value: object, samples: Callable[[], int]) -> int | None:
    """The weight of a value in an epoch's mean; a size is not asked where nobody needs it."""
    if isinstance(value, (Metric, Image)) or (
        isinstance(value, Loss) and value.terms[0].weight is not None
    ):
        return None
    return samples()


def not_loggable(name: str, value: object) -> TypeError:
    """The error for a value that cannot be logged."""
    hint = ""
    if isinstance(value, MetricCollection):
        hint = ": a collection is several values, write self.log_dict(collection)"
    return TypeError(
        f"self.log({name!r}, ...) expects a number, a 0-dim tensor, Mean, Sum, Image or a "
        f"torchmetrics Metric, got {describe(value)}{hint}"
    )
