"""Values that steps log: reduced over shards, kept on the device until somebody reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from composefit.losses import SUMMED, Loss, describe
from composefit.module import Context, Logged, LogOptions


class LoggingShard(Protocol):
    """What is read of a shard."""

    context: Context

    @property
    def samples(self) -> int:
        """Its samples; asks the batch where nobody knows yet."""

    def owners(self, metric: Any) -> Any:
        """The owner module's metric for one of the shard's replica."""


class Logs:
    """What was logged in a run: the last step's values, and running means over the epoch."""

    def __init__(self) -> None:
        self._steps: dict[str, _StepValue] = {}
        self._epochs: dict[str, _Running] = {}
        self._finished: dict[str, float] = {}
        self._options: dict[str, LogOptions] = {}

    # -- writing -------------------------------------------------------------------------------

    def add(self, shards: Sequence[LoggingShard]) -> None:
        """Take what the shards of one step have logged."""
        if len(shards) == 1:
            (shard,) = shards
            for name, logged in shard.context.logs.items():
                self._add(name, [(shard, logged)])
            return
        names = dict.fromkeys(name for shard in shards for name in shard.context.logs)
        for name in names:
            entries = [
                (shard, shard.context.logs[name]) for shard in shards if name in shard.context.logs
            ]
            self._add(name, entries)

    def add_hook(self, logs: dict[str, Logged]) -> None:
        """Take what a hook has logged: it counts once, whatever the samples."""
        for name, logged in logs.items():
            self._options[name] = logged.options
            value = _Value(name, [(logged.value, logged.weight or 1)])
            self._put(name, logged.options, value)
        logs.clear()

    def _add(self, name: str, entries: list[tuple[LoggingShard, Logged]]) -> None:
        first, logged = entries[0]
        options = self._options[name] = logged.options
        value = logged.value
        if isinstance(value, (Metric, MetricCollection)):
            self._put(name, options, _MetricValue(first.owners(value)))
        elif len(entries) == 1 and not options.on_epoch:  # nobody needs a weight
            self._steps[name] = _Value(name, [(value, 1)])
        else:
            weighted = [
                (one.value, shard.samples if one.weight is None else one.weight)
                for shard, one in entries
            ]
            self._put(name, options, _Value(name, weighted))

    def _put(self, name: str, options: LogOptions, value: _StepValue) -> None:
        if options.on_step:
            self._steps[name] = value
        if options.on_epoch:
            self._epochs.setdefault(name, _Running(options.on_step)).add(value)

    # -- reading -------------------------------------------------------------------------------

    def step_values(self) -> dict[str, float]:
        """The last value of everything logged per step, for loggers; waits for the device."""
        return {
            self._step_name(name): value.read()
            for name, value in self._steps.items()
            if self._options[name].logger
        }

    def end_epoch(self) -> dict[str, float]:
        """The means over the epoch, for loggers; a new epoch begins."""
        found = {}
        for name, running in self._epochs.items():
            value = running.read()
            self._finished[name] = value
            if running.with_steps:
                self._finished[f"{name}_epoch"] = value
            if self._options[name].logger:
                found[f"{name}_epoch" if running.with_steps else name] = value
        self._epochs.clear()
        return found

    def all_values(self) -> dict[str, float]:
        """Everything known now by its name, as callbacks read it."""
        steps = {name: value.read() for name, value in self._steps.items()}
        return {**steps, **self._finished}

    def bar_values(self) -> dict[str, float]:
        """What was logged with `prog_bar=True`."""
        found = {}
        for name in sorted(name for name, options in self._options.items() if options.prog_bar):
            if name in self._steps:
                found[name] = self._steps[name].read()
            elif name in self._finished:
                found[name] = self._finished[name]
        return found

    def _step_name(self, name: str) -> str:
        running = self._epochs.get(name)
        return f"{name}_step" if running is not None and running.with_steps else name


class _StepValue(Protocol):
    def read(self) -> float: ...


class _Value:
    """One value of each shard and its weight."""

    __slots__ = ("name", "weighted")

    def __init__(self, name: str, weighted: list[tuple[Any, Any]]) -> None:
        self.name = name
        self.weighted = weighted

    def totals(self) -> tuple[Any, Any]:
        """The sum of the totals and of the weights; a weight of 0 stands for a plain sum."""
        total: Any = 0.0
        weight: Any = 0
        for value, samples in self.weighted:
            if isinstance(value, Loss):
                if len(value.terms) != 1:
                    raise ValueError(
                        f"self.log({self.name!r}, ...) expects one Mean or Sum, got {value!r}: log "
                        "its terms under names of their own"
                    )
                (term,) = value.terms
                own = term.total.detach()
                if term.weight is SUMMED:
                    total = total + own
                    continue
                total = total + (own * samples if term.weight is None else own)
                weight = weight + (samples if term.weight is None else term.weight)
            elif isinstance(value, (Tensor, int, float)):
                total = total + value * samples
                weight = weight + samples
            else:
                raise TypeError(
                    f"self.log({self.name!r}, ...) expects a number, a 0-dim tensor, Mean, Sum or "
                    f"a torchmetrics Metric, got {describe(value)}"
                )
        return total, weight

    def read(self) -> float:
        total, weight = self.totals()
        return _number(total) / (_number(weight) or 1.0)


class _MetricValue:
    """A torchmetrics metric, whose states were merged over the shards."""

    __slots__ = ("metric",)

    def __init__(self, metric: Any) -> None:
        self.metric = metric

    def read(self) -> float:
        return _number(self.metric.compute())


class _Running:
    """A mean over an epoch."""

    def __init__(self, with_steps: bool) -> None:
        self.with_steps = with_steps
        self.values: list[_Value] = []
        self.total = 0.0
        self.weight = 0.0
        self.metric: Any = None

    def add(self, value: Any) -> None:
        if isinstance(value, _MetricValue):
            self.metric = value.metric
            return
        self.values.append(value)
        if len(self.values) >= 256:  # so that memory does not grow with the epoch
            self._fold()

    def _fold(self) -> None:
        for value in self.values:
            total, weight = value.totals()
            self.total += _number(total)
            self.weight += _number(weight)
        self.values.clear()

    def read(self) -> float:
        if self.metric is not None:
            value = _number(self.metric.compute())
            self.metric.reset()
            return value
        self._fold()
        return self.total / (self.weight or 1.0)


def _number(value: Any) -> float:
    if isinstance(value, Mapping):
        raise TypeError(
            "a MetricCollection cannot be logged under one name: log its metrics, "
            "self.log_dict(dict(collection.items()))"
        )
    return float(value)
