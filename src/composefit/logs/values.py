"""What one name has logged: at a step, and over an epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from composefit.logged import Reduce
from composefit.logs.sums import Plain, Sums, exactly, once, reduced, together
from composefit.losses import SUMMED, Loss, describe
from composefit.metric_types import Metric


class StepValue(Protocol):
    """The value of a name at a step."""

    def read(self) -> float:
        """As a number; waits for the device."""


class Number:
    """A value that is known."""

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value

    def read(self) -> float:
        """The value."""
        return self.value


class Value:
    """One value of each shard and its weight.

    Args:
        weighted: the values and their weights.
        reduce: how they become one.
        moment: when it was logged; the same on all ranks at the same place of a run.
        by_hook: a hook has logged it: then it counts once, not once per rank.
        samples: of a shard alone in its process, whose value needs no weight here; None where
            nobody had to ask.
    """

    __slots__ = ("by_hook", "moment", "reduce", "samples", "weighted")

    def __init__(
        self,
        weighted: list[tuple[Any, float]],
        reduce: Reduce,
        moment: int,
        by_hook: bool = False,
        samples: int | None = None,
    ) -> None:
        self.weighted = weighted
        self.reduce = reduce
        self.moment = moment
        self.by_hook = by_hook
        self.samples = samples

    def totals(self) -> tuple[Any, Any]:
        """The sum of the totals, and of the weights: None for a plain sum."""
        total: Any = 0.0
        weight: Any = None
        for value, samples in self.weighted:
            if isinstance(value, Loss):
                (term,) = value.terms
                value, own = term.total, term.weight
                if own is SUMMED:
                    total = total + value
                    continue
                if own is not None:
                    total = total + value
                    weight = own if weight is None else weight + own
                    continue
            if self.reduce == "sum":
                total = total + value
                continue
            total = total + value * samples
            weight = samples if weight is None else weight + samples
        return total, weight

    def numbers(self) -> list[Any]:
        """The shards' values, by themselves."""
        return [
            Value([one], "mean", 0).read() if isinstance(one[0], Loss) else one[0]
            for one in self.weighted
        ]

    def weigh(self) -> None:
        """Other ranks have values, too: a shard alone in its process needs its weight."""
        if self.samples is not None:
            ((value, _),) = self.weighted
            self.weighted, self.samples = [(value, self.samples)], None

    def plain(self) -> Plain:
        """What it is made of; waits for the device."""
        if self.reduce not in ("mean", "sum"):
            return (), None, [float(number) for number in self.numbers()]
        total, weight = self.totals()
        return (float(total),), None if weight is None else (float(weight),), []

    def read(self) -> float:
        """As one number; waits for the device."""
        return reduced(self.plain(), self.reduce)


class MetricValue:
    """A torchmetrics metric, whose states were merged over the shards."""

    __slots__ = ("metric",)

    def __init__(self, metric: Metric) -> None:
        self.metric = metric

    def read(self) -> float:
        """What it computes of all that it was updated with.

        Raises:
            ValueError: that is not one number.
        """
        value = self.metric.compute()
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
            return float(value)
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else describe(value)
        raise ValueError(
            f"self.log expects metrics that compute one number, and {type(self.metric).__name__} "
            f"computes {what}: in the hook at the end of the epoch, log the parts of "
            "metric.compute() under names of their own, and call metric.reset()"
        )


class Remembered:
    """In place of a function that is not known (yet) in this process: what it came to."""

    def __init__(self, value: float = math.nan) -> None:
        self.value = value

    def __call__(self, values: Tensor) -> float:
        """The value, whatever the numbers."""
        return self.value


class Running:
    """A mean, sum, smallest or largest value over an epoch, or a function of all values.

    Where there are ranks, each keeps what it has added since they last met apart from what all
    had added by then, so that nothing counts twice.

    Args:
        reduce: how values become one.

    Attributes:
        values: not added up yet.
        own: of the steps of this process.
        hooks: what its hooks have logged.
        before: what all ranks had added when they last met; of a checkpoint.
        shared: ranks meet: what they have not told each other yet does not show.
        metric: what it stands for, where that is a metric.
        ended: its value, once that is final.
    """

    #: So many values are kept before they are added up: memory does not grow with the epoch.
    KEPT = 256

    def __init__(self, reduce: Reduce) -> None:
        self.reduce = reduce
        self.values: list[Value] = []
        self.own = Sums()
        self.hooks = Sums()
        self.before: Plain = ((), None, [])
        self.shared = False
        self.metric: MetricValue | None = None
        self.ended: float | None = None

    def end(self) -> float:
        """The value is what it is now, whatever becomes of the metric."""
        self.ended, self.metric = self.read(), None
        return self.ended

    def add(self, value: Any) -> None:
        """Take a step's value, or the metric that it is."""
        if isinstance(value, MetricValue):
            self.metric = value
            return
        self.values.append(value)
        if len(self.values) >= self.KEPT:
            self._fold()

    def _fold(self) -> None:
        if not self.values:
            return
        for sums, by_hook in ((self.own, False), (self.hooks, True)):
            values = [value for value in self.values if value.by_hook is by_hook]
            if not values:
                continue
            sums.any = True
            if self.reduce in ("mean", "sum"):
                totals, weights = zip(*(value.totals() for value in values), strict=True)
                sums.add(totals, weights)
            else:
                sums.numbers += [float(one) for value in values for one in value.numbers()]
                sums.numbers = self._fewest(sums.numbers)
        self.values.clear()

    def _fewest(self, numbers: list[float]) -> list[float]:
        """The smallest or largest so far is enough."""
        if not isinstance(self.reduce, str) or not numbers:
            return numbers
        return [reduced(((), None, numbers), self.reduce)]

    def plain(self) -> Plain:
        """All that it is made of; waits for the device."""
        self._fold()
        if self.shared:
            return self.before
        return together([self.before, self.own.plain(), self.hooks.plain()])

    def read(self) -> float:
        """Its value so far; waits for the device."""
        if self.ended is not None:
            return self.ended
        if self.metric is not None:
            return self.metric.read()
        return reduced(self.plain(), self.reduce)

    # -- ranks ---------------------------------------------------------------------------------

    def give(self) -> tuple[Plain | None, Plain | None]:
        """What steps and hooks of this rank have added since the last call, for `take`."""
        self._fold()
        own, hooks = self.own, self.hooks
        self.own, self.hooks = Sums(), Sums()
        return own.plain() if own.any else None, hooks.plain() if hooks.any else None

    def take(self, given: Sequence[tuple[Plain | None, Plain | None]]) -> None:
        """What all ranks gave, in rank order."""
        steps = [own for own, _ in given if own is not None]
        hooks = [own for _, own in given if own is not None]
        parts = [self.before, *steps, *([once(hooks, self.reduce)] if hooks else [])]
        total, weight, numbers = together(parts)
        self.before = total, weight, self._fewest(numbers)
        self.shared = True

    # -- state ---------------------------------------------------------------------------------

    def state(self, metrics: dict[int, str]) -> dict[str, Any]:
        """Plain data for a checkpoint; a metric is its name."""
        if self.ended is not None:
            return {"total": self.ended, "weight": None, "numbers": [], "value": self.ended}
        if self.metric is not None:
            return {"metric": metrics.get(id(self.metric.metric))}
        total, weight, numbers = self.plain()
        # The first number is the rounded sum; the rest makes it exact.
        state = {
            "total": total[0] if total else 0.0,
            "weight": None if weight is None else (weight[0] if weight else 0.0),
            "rest": [list(total[1:]), list((weight or ())[1:])],
            "numbers": numbers,
        }
        return state if isinstance(self.reduce, str) else {**state, "value": self.read()}

    def load(self, state: dict[str, Any], parts: dict[str, nn.Module]) -> None:
        """Take back what `state` gave."""
        if "metric" in state:
            part = parts.get(state["metric"])
            if isinstance(part, Metric):
                self.metric = MetricValue(part)
            return
        rest, of_weight = state.get("rest", ((), ()))
        weight = state["weight"]
        self.before = (
            exactly([state["total"], *rest]),
            None if weight is None else exactly([weight, *of_weight]),
            list(state["numbers"]),
        )
        if "value" in state:
            self.reduce = Remembered(state["value"])


def reset(metric: Metric) -> None:
    """Empty a metric; training may update it next, in place, which inference tensors refuse."""
    with torch.inference_mode(False):
        metric.reset()
