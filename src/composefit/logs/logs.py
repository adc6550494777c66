"""`Logs`: the values of a run's steps, and their means over the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from composefit.images import Image
from composefit.logged import Context, Logged, LogOptions
from composefit.logs import exchange
from composefit.logs.exchange import Entry, options_of, plain_options
from composefit.logs.values import MetricValue, Number, Remembered, Running, StepValue, Value, reset
from composefit.losses import Loss
from composefit.metric_types import Metric
from composefit.ranks import World
from composefit.replicas import RankMetrics


class LoggingShard(Protocol):
    """What is read of a shard."""

    context: Context
    known_samples: int | None

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
        self._steps: dict[str, StepValue] = {}
        self._met: dict[str, Number] = {}  # what ranks have agreed on, of these
        self._fresh: dict[str, None] = {}  # those of the steps that no logger has got yet
        self._epochs: dict[str, Running] = {}
        self._finished: dict[str, float] = {}  # the last epoch's
        self._unwritten: dict[str, float] = {}
        self._images: dict[str, Image] = {}
        # Goes up by two with every step, and is the same on all ranks; what hooks log after a step
        # is one later than the step.
        self._moment = 0

    # -- writing -------------------------------------------------------------------------------

    def add(self, shards: Sequence[LoggingShard]) -> None:
        """Take what the shards of one step have logged.

        Args:
            shards: this rank's; none from a rank that had no samples.
        """
        self._moment += 2
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
        """Take what hooks have logged: it counts once, whatever the samples.

        Hooks run on every rank, and as a rule all log the same: then it is that value, also for
        `reduce_fx="sum"`. Where they differ, it is the mean over the ranks that have logged it, or
        the smallest or largest. A `Mean(total, weight)` and a `Sum(total)` speak for the rank's
        own part alone, and add up.
        """
        for name, logged in logs.items():
            value: StepValue
            if isinstance(logged.value, Image):
                self._keep_image(name, logged)
                continue
            if isinstance(logged.value, Metric):
                value = MetricValue(logged.value)
            else:
                weight = 1 if logged.weight is None else logged.weight
                mine, reduce = logged.value, logged.options.reduce
                own_part = isinstance(mine, Loss) and mine.terms[0].weight is not None
                value = Value([(mine, weight)], reduce, self._moment + 1, not own_part)
            self._put(name, logged.options, value)

    def _add(self, name: str, entries: list[tuple[LoggingShard, Logged]]) -> None:
        first, logged = entries[0]
        options = logged.options
        value = logged.value
        plain = type(value) is float or not isinstance(value, (Metric, Image))
        if not plain and isinstance(value, Metric):
            self._put(name, options, MetricValue(first.owners(value)))
        elif not plain:  # once, not once per shard
            self._keep_image(name, logged)
        elif len(entries) == 1 and not options.on_epoch:  # nobody needs a weight
            self._options[name] = options
            self._steps[name] = Value(
                [(value, 1)], options.reduce, self._moment, False, first.known_samples
            )
            self._fresh[name] = None
        else:
            weighted = [(one.value, _weight(one, shard, entries)) for shard, one in entries]
            self._put(name, options, Value(weighted, options.reduce, self._moment))

    def _put(self, name: str, options: LogOptions, value: StepValue) -> None:
        self._options[name] = options
        if options.on_step:
            self._steps[name] = value
            self._fresh[name] = None
        if options.on_epoch or isinstance(value, MetricValue):
            running = self._running(name, options)
            # A function is not in a checkpoint: from here on it is known again.
            running.reduce = options.reduce
            running.add(value)

    def _keep_image(self, name: str, logged: Logged) -> None:
        if logged.options.logger:
            self._images[name] = logged.value

    # -- ranks ---------------------------------------------------------------------------------

    def exchange(
        self, world: World, metrics: RankMetrics | None = None, whole: bool = False
    ) -> None:
        """Let every rank know what all have logged since the last time; all ranks call it.

        It takes one message, whatever was logged where, and a few more where a metric was logged
        for a step, or a function (`reduce_fx=...`) is known to some ranks only. Values on a device
        are waited for. From then on all ranks read the same until the next exchange, but for names
        that are new since; reading itself sends nothing.

        Args:
            world: the ranks.
            metrics: those of the module; what is logged of them is of all samples afterwards.
            whole: they are to be whole in any case: an epoch ends, or its state is saved.

        Raises:
            ValueError: a metric was logged that is no part of the module.
        """
        mine: dict[str, Entry] = {}
        for name, options in self._options.items():
            entry = exchange.entry_of(options, self._steps.get(name), self._epochs.get(name))
            metric = self._metric(name)
            if entry is None and metric is not None:
                entry = Entry(plain_options(options))
            if entry is not None:
                if metric is not None and metrics is not None:
                    entry.metric = metrics.name_of(metric)
                mine[name] = entry
        everyone = world.gather("what was logged", (mine, list(self._images)))
        logs = [entries for entries, _ in everyone]
        for name in dict.fromkeys(name for entries in logs for name in entries):
            self._take(name, [entries[name] for entries in logs if name in entries], metrics)
        self._images = exchange.images_of_all(world, self._images, [own for _, own in everyone])
        self._tell_functions(world, logs)
        step_metrics = any(one.metric_at for entries in logs for one in entries.values())
        if metrics is not None and (whole or step_metrics):
            metrics.join()
            for name, value in self._steps.items():
                if isinstance(value, MetricValue):  # it would change with the next step
                    self._agree(name, value.read())

    def _metric(self, name: str) -> Metric | None:
        running = self._epochs.get(name)
        return None if running is None or running.metric is None else running.metric.metric

    def _take(self, name: str, entries: list[Entry], metrics: RankMetrics | None) -> None:
        """What the ranks that have logged a name say of it, in rank order."""
        options = self._options.setdefault(name, options_of(entries[0].options))
        value = exchange.latest(entries, options.reduce)
        if value is not None:
            self._agree(name, value)
            self._fresh[name] = None
        given = [entry.epoch for entry in entries if entry.epoch is not None]
        if given:
            self._running(name, options).take(given)
        paths = [entry.metric for entry in entries if entry.metric is not None]
        if paths and metrics is not None:
            own = MetricValue(metrics.named(paths[0]))
            self._running(name, options).add(own)
            if any(entry.metric_at for entry in entries):
                self._steps[name] = own
                self._fresh[name] = None

    def _agree(self, name: str, value: float) -> None:
        self._steps[name] = self._met[name] = Number(value)

    def _settle(self, name: str, value: float) -> None:
        """What a metric has logged for a step is this from now on, though it is empty."""
        self._steps[name] = Number(value)
        if name in self._met:
            self._met[name] = Number(value)

    def _shown(self, name: str) -> StepValue:
        """The value of a step, as ranks have agreed on it; without them, the last."""
        return self._met.get(name) or self._steps[name]

    def _running(self, name: str, options: LogOptions) -> Running:
        running = self._epochs.get(name)
        if running is None:
            running = self._epochs[name] = Running(options.reduce)
        return running

    def _tell_functions(self, world: World, logs: list[dict[str, Entry]]) -> None:
        """Where a function was given on some ranks only, those tell the others what it comes to."""
        functions = {
            name
            for entries in logs
            for name, entry in entries.items()
            if entry.options[-1] is None and entry.metric is None
        }
        if all(name in entries for entries in logs for name in functions):
            return
        mine = {}
        for name in functions:
            if exchange.known(self._options[name].reduce):
                step, running = self._steps.get(name), self._epochs.get(name)
                mine[name] = (
                    None if step is None else step.read(),
                    None if running is None else running.read(),
                )
        found: dict[str, Any] = {}
        for one in world.gather("what functions came to", mine):
            found = {**one, **found}
        for name in functions - mine.keys():
            step_value, value = found[name]
            if step_value is not None:
                self._agree(name, step_value)
            if value is not None:
                self._running(name, self._options[name]).reduce = Remembered(value)

    # -- reading -------------------------------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        """Whether something was logged under this name."""
        return name in self._options

    def take_steps(self) -> dict[str, float]:
        """What was logged per step since the last call, for loggers; waits for the device."""
        found, self._fresh = self._fresh, {}
        return {
            self._name(name, "_step"): self._shown(name).read()
            for name in found
            if self._options[name].logger
        }

    def step_values(self) -> dict[str, float]:
        """The last value of everything logged per step, as a logger sees it."""
        return {
            self._name(name, "_step"): self._shown(name).read()
            for name in self._steps
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
                    reset(running.metric.metric)
                    if name in self._steps:
                        self._settle(name, values[name])
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
                self._settle(name, value)
        for metric in metrics.values():
            reset(metric)

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
        for name in self._steps:
            found[name] = found[self._name(name, "_step")] = self._shown(name).read()
        for name, mean in self._finished.items():
            found[name] = found[self._name(name, "_epoch")] = mean
        return found

    def bar_values(self) -> dict[str, float]:
        """What was logged with `prog_bar=True`, in the order in which it first came."""
        found = {}
        for name, options in self._options.items():
            if options.prog_bar and name in self._steps:
                found[self._name(name, "_step")] = self._shown(name).read()
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
        options = {name: list(plain_options(one)) for name, one in self._options.items()}
        return {
            "options": options,
            "steps": {name: self._shown(name).read() for name in self._steps},
            "fresh": list(self._fresh),
            "finished": dict(self._finished),
            "epochs": {name: running.state(metrics) for name, running in self._epochs.items()},
        }

    def load_state_dict(self, state: dict[str, Any], module: nn.Module) -> None:
        """Go on from a saved state."""
        parts = dict(module.named_modules())
        self._options = {name: options_of(one) for name, one in state["options"].items()}
        self._steps = {name: Number(value) for name, value in state["steps"].items()}
        self._met = {}
        self._fresh = dict.fromkeys(state["fresh"])
        self._finished = dict(state["finished"])
        self._epochs = {}
        for name, kept in state["epochs"].items():
            running = self._epochs[name] = Running(self._options[name].reduce)
            running.load(kept, parts)

    def _name(self, name: str, suffix: str) -> str:
        options = self._options[name]
        return name + suffix if options.on_step and options.on_epoch else name


def _weight(logged: Logged, shard: LoggingShard, entries: Sequence[object]) -> float:
    if logged.weight is not None:
        return logged.weight
    # A shard by itself needs no weight here: what counts samples got it when it was logged.
    return shard.samples if len(entries) > 1 else 1
