"""Values that steps log: reduced over shards, kept on the device until somebody reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from composefit.images import Image
from composefit.logged import Context, Logged, LogOptions, Reduce
from composefit.losses import SUMMED, Loss, describe


class LoggingShard(Protocol):
    """What is read of a shard."""

    context: Context

    @property
    def samples(self) -> int:
        """Its samples; asks the batch where nobody knows yet."""

    def owners(self, metric: Any) -> Any:
        """The owner module's metric for one of the shard's replica."""


class Logs:
    """What was logged in a run: the last step's values, and running means over the epoch.

    A value logged both per step and per epoch is called `loss_step` and `loss_epoch`, as in
    Lightning. A metric's value is that of the epoch so far; it is reset when the epoch ends.
    """

    def __init__(self) -> None:
        self._options: dict[str, LogOptions] = {}
        self._steps: dict[str, _StepValue] = {}
        self._fresh: dict[str, None] = {}  # those of the steps that no logger has got yet
        self._epochs: dict[str, _Running] = {}
        self._finished: dict[str, float] = {}  # the last epoch's
        self._unwritten: dict[str, float] = {}
        self._images: dict[str, Image] = {}

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
        """Take what hooks have logged: it counts once, whatever the samples."""
        for name, logged in logs.items():
            value: _StepValue
            if isinstance(logged.value, Image):
                self._keep_image(name, logged)
                continue
            if isinstance(logged.value, Metric):
                value = _MetricValue(logged.value)
            else:
                weight = 1 if logged.weight is None else logged.weight
                value = _Value([(logged.value, weight)], logged.options.reduce)
            self._put(name, logged.options, value)

    def _add(self, name: str, entries: list[tuple[LoggingShard, Logged]]) -> None:
        first, logged = entries[0]
        options = logged.options
        value = logged.value
        plain = type(value) is float or not isinstance(value, (Metric, Image))
        if not plain and isinstance(value, Metric):
            self._put(name, options, _MetricValue(first.owners(value)))
        elif not plain:  # once, not once per shard
            self._keep_image(name, logged)
        elif len(entries) == 1 and not options.on_epoch:  # nobody needs a weight
            self._options[name] = options
            self._steps[name] = _Value([(value, 1)], options.reduce)
            self._fresh[name] = None
        else:
            weighted = [(one.value, _weight(one, shard, entries)) for shard, one in entries]
            self._put(name, options, _Value(weighted, options.reduce))

    def _put(self, name: str, options: LogOptions, value: _StepValue) -> None:
        self._options[name] = options
        if options.on_step:
            self._steps[name] = value
            self._fresh[name] = None
        if options.on_epoch or isinstance(value, _MetricValue):
            running = self._epochs.get(name)
            if running is None:
                running = self._epochs[name] = _Running(options.reduce)
            # A function is not in a checkpoint: from here on it is known again.
            running.reduce = options.reduce
            running.add(value)

    def _keep_image(self, name: str, logged: Logged) -> None:
        if logged.options.logger:
            self._images[name] = logged.value

    # -- reading -------------------------------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        """Whether something was logged under this name."""
        return name in self._options

    def take_steps(self) -> dict[str, float]:
        """What was logged per step since the last call, for loggers; waits for the device."""
        found, self._fresh = self._fresh, {}
        return {
            self._name(name, "_step"): self._steps[name].read()
            for name in found
            if self._options[name].logger
        }

    def step_values(self) -> dict[str, float]:
        """The last value of everything logged per step, as a logger sees it."""
        return {
            self._name(name, "_step"): value.read()
            for name, value in self._steps.items()
            if self._options[name].logger
        }

    def end_epoch(self, whole: bool = True) -> None:
        """The means over the epoch are known from now on, and a new epoch begins.

        Args:
            whole: False where the epoch was left before its end, and may go on: it keeps its sums.
        """
        values = {name: running.read() for name, running in self._epochs.items()}
        if whole:
            # Not before all are read: one metric may be logged under several names.
            for name, running in self._epochs.items():
                if running.metric is not None:
                    _reset(running.metric.metric)
                    if name in self._steps:
                        self._steps[name] = _Number(values[name])
            self._epochs.clear()
        for name, value in values.items():
            options = self._options[name]
            if options.on_epoch:
                self._finished[name] = value
                if options.logger:
                    self._unwritten[self._name(name, "_epoch")] = value

    def end_loader(self, suffix: str) -> None:
        """The last batch of one of several loaders is done.

        A metric that was logged for this loader has its value, and is empty for the next one: it
        may be the same metric.

        Args:
            suffix: of the names of what was logged for it.
        """
        ended = {name: one for name, one in self._epochs.items() if name.endswith(suffix)}
        metrics = {name: one.metric.metric for name, one in ended.items() if one.metric is not None}
        for name in metrics:
            value = ended[name].end()
            if name in self._steps:
                self._steps[name] = _Number(value)
        for metric in metrics.values():
            _reset(metric)

    def forget_epoch(self) -> None:
        """Leave the epoch that was begun: nothing of it counts."""
        self._epochs.clear()
        self._fresh.clear()
        self._images.clear()

    def take_images(self) -> dict[str, Image]:
        """The pictures that came since the last call, the last of each name."""
        found, self._images = self._images, {}
        return found

    def take_epoch(self) -> dict[str, float]:
        """The means that are known since the last call, for loggers."""
        found, self._unwritten = self._unwritten, {}
        return found

    def epoch_values(self) -> dict[str, float]:
        """The last epoch's values of everything logged per epoch, for loggers."""
        return {
            self._name(name, "_epoch"): value
            for name, value in self._finished.items()
            if self._options[name].logger
        }

    def all_values(self) -> dict[str, float]:
        """Everything known now, as callbacks and schedulers read it; waits for the device.

        Where a value is logged per step and per epoch, its plain name stands for the last epoch's.
        """
        found = {}
        for name, value in self._steps.items():
            found[name] = found[self._name(name, "_step")] = value.read()
        for name, mean in self._finished.items():
            found[name] = found[self._name(name, "_epoch")] = mean
        return found

    def bar_values(self) -> dict[str, float]:
        """What was logged with `prog_bar=True`, in the order in which it first came."""
        found = {}
        for name, options in self._options.items():
            if options.prog_bar and name in self._steps:
                found[self._name(name, "_step")] = self._steps[name].read()
            if options.prog_bar and name in self._finished:
                found[self._name(name, "_epoch")] = self._finished[name]
        return found

    # -- state ---------------------------------------------------------------------------------

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """What is known, and the sums of the epoch so far; waits for the device.

        Args:
            module: of which the logged metrics are parts; they are kept by their names in it.
        """
        metrics = {id(part): name for name, part in module.named_modules()}
        options = {
            name: [one.prog_bar, one.logger, one.on_step, one.on_epoch, _reduce_name(one.reduce)]
            for name, one in self._options.items()
        }
        return {
            "options": options,
            "steps": {name: value.read() for name, value in self._steps.items()},
            "fresh": list(self._fresh),
            "finished": dict(self._finished),
            "epochs": {name: running.state(metrics) for name, running in self._epochs.items()},
        }

    def load_state_dict(self, state: dict[str, Any], module: nn.Module) -> None:
        """Go on from a saved state."""
        parts = dict(module.named_modules())
        self._options = {
            name: LogOptions(bar, logger, on_step, on_epoch, reduce or _Remembered())
            for name, (bar, logger, on_step, on_epoch, reduce) in state["options"].items()
        }
        self._steps = {name: _Number(value) for name, value in state["steps"].items()}
        self._fresh = dict.fromkeys(state["fresh"])
        self._finished = dict(state["finished"])
        self._epochs = {}
        for name, kept in state["epochs"].items():
            running = self._epochs[name] = _Running(self._options[name].reduce)
            running.load(kept, parts)

    def _name(self, name: str, suffix: str) -> str:
        options = self._options[name]
        return name + suffix if options.on_step and options.on_epoch else name


def _weight(logged: Logged, shard: LoggingShard, entries: Sequence[object]) -> float:
    if logged.weight is not None:
        return logged.weight
    # A shard by itself needs no weight here: what counts samples got it when it was logged.
    return shard.samples if len(entries) > 1 else 1


class _StepValue(Protocol):
    def read(self) -> float: ...


def _reset(metric: Metric) -> None:
    """Empty a metric; training may update it next, in place, which inference tensors refuse."""
    with torch.inference_mode(False):
        metric.reset()


def _reduce_name(reduce: Reduce) -> str | None:
    """None for a function, which a checkpoint cannot hold."""
    return reduce if isinstance(reduce, str) else None


class _Remembered:
    """In place of a function that is not known yet in a resumed run: what it came to before."""

    def __init__(self, value: float = math.nan) -> None:
        self.value = value

    def __call__(self, values: Tensor) -> float:
        return self.value


class _Number:
    """A value that is known."""

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value

    def read(self) -> float:
        return self.value


class _Value:
    """One value of each shard and its weight."""

    __slots__ = ("reduce", "weighted")

    def __init__(self, weighted: list[tuple[Any, float]], reduce: Reduce) -> None:
        self.weighted = weighted
        self.reduce = reduce

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
            _Value([one], "mean").read() if isinstance(one[0], Loss) else one[0]
            for one in self.weighted
        ]

    def read(self) -> float:
        if self.reduce in ("mean", "sum"):
            return _mean(*self.totals())
        return _reduced(self.numbers(), self.reduce)


class _MetricValue:
    """A torchmetrics metric, whose states were merged over the shards."""

    __slots__ = ("metric",)

    def __init__(self, metric: Metric) -> None:
        self.metric = metric

    def read(self) -> float:
        value = self.metric.compute()
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
            return float(value)
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else describe(value)
        raise ValueError(
            f"self.log expects metrics that compute one number, and {type(self.metric).__name__} "
            f"computes {what}: in the hook at the end of the epoch, log the parts of "
            "metric.compute() under names of their own, and call metric.reset()"
        )


class _Running:
    """A mean, sum, smallest or largest value over an epoch, or a function of all values."""

    #: So many values are kept before they are added up: memory does not grow with the epoch.
    KEPT = 256

    def __init__(self, reduce: Reduce) -> None:
        self.reduce = reduce
        self.values: list[_Value] = []
        self.total: Any = 0.0
        self.weight: Any = None
        self.numbers: list[float] = []  # what is neither mean nor sum is made of
        self.metric: _MetricValue | None = None
        self.ended: float | None = None

    def end(self) -> float:
        """The value is what it is now, whatever becomes of the metric."""
        self.ended, self.metric = self.read(), None
        return self.ended

    def add(self, value: Any) -> None:
        if isinstance(value, _MetricValue):
            self.metric = value
            return
        self.values.append(value)
        if len(self.values) >= self.KEPT:
            self._fold()

    def _fold(self) -> None:
        if not self.values:
            return
        if self.reduce in ("mean", "sum"):
            totals, weights = zip(*(value.totals() for value in self.values), strict=True)
            self.total = _sum([self.total, *totals])
            known = [weight for weight in (self.weight, *weights) if weight is not None]
            self.weight = _sum(known) if known else None
        else:
            self.numbers += [float(one) for value in self.values for one in value.numbers()]
            if isinstance(self.reduce, str):  # the smallest or largest so far is enough
                self.numbers = [_reduced(self.numbers, self.reduce)]
        self.values.clear()

    def read(self) -> float:
        if self.ended is not None:
            return self.ended
        if self.metric is not None:
            return self.metric.read()
        self._fold()
        if self.reduce in ("mean", "sum"):
            return _mean(self.total, self.weight)
        return _reduced(self.numbers, self.reduce)

    def state(self, metrics: dict[int, str]) -> dict[str, Any]:
        if self.ended is not None:
            return {"total": self.ended, "weight": None, "numbers": [], "value": self.ended}
        if self.metric is not None:
            return {"metric": metrics.get(id(self.metric.metric))}
        self._fold()
        weight = None if self.weight is None else float(self.weight)
        state = {"total": float(self.total), "weight": weight, "numbers": list(self.numbers)}
        return state if isinstance(self.reduce, str) else {**state, "value": self.read()}

    def load(self, state: dict[str, Any], parts: dict[str, nn.Module]) -> None:
        if "metric" in state:
            part = parts.get(state["metric"])
            if isinstance(part, Metric):
                self.metric = _MetricValue(part)
            return
        self.total, self.weight = state["total"], state["weight"]
        self.numbers = list(state["numbers"])
        if "value" in state:
            self.reduce = _Remembered(state["value"])


def _reduced(numbers: Sequence[Any], reduce: Reduce) -> float:
    """Neither mean nor sum, which are kept as totals."""
    values = [float(number) for number in numbers]
    if not isinstance(reduce, str):
        return float(reduce(torch.tensor(values, dtype=torch.float64)))
    # Not Python's min and max: NaN must show.
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.min() if reduce == "min" else found.max())


def _mean(total: Any, weight: Any) -> float:
    if weight is None:
        return float(total)
    denominator = float(weight)
    return float(total) / denominator if denominator else float("nan")


def _sum(values: Sequence[Any]) -> Any:
    """In double precision; what is on a GPU is added up there, and nobody waits for it."""
    total = 0.0
    far: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor) and value.device.type != "cpu":
            far.append(value)
        else:
            total += float(value)
    if not far:
        return total
    device = far[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.stack([value.to(device, dtype) for value in far]).sum() + total
