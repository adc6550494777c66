"""Metrics: each shard and each rank updates states of its own, which merge by their reductions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from composefit.metric_types import Metric, MetricCollection
from composefit.ranks import World
from composefit.replicas.buffers import MISSING, same
from composefit.replicas.naming import path_of
from composefit.replicas.twin import STANDARD, Twin


@cache
def _bookkeeping() -> frozenset[str]:
    """Torchmetrics' own attributes: those of a metric without a state."""
    from torchmetrics import Metric

    class Bare(Metric):
        def update(self) -> None:
            pass

        def compute(self) -> None:
            pass

    return frozenset(vars(Bare()))


def start_metric(twin: Twin) -> None:
    """Empties a copy's states, without touching lists that it shares with the owner."""
    source, state = twin.source, twin.copy.__dict__
    if isinstance(source, MetricCollection):
        if not source._groups_checked:
            # Members that have equal values after a first update share a state from then on. The
            # few samples of a shard may be equal by chance.
            state.update(_enable_compute_groups=False, _groups={})
    elif isinstance(source, Metric):
        state.update(_empty(source))
        twin.baseline = dict(state)


def merged_metrics(
    owner: nn.Module, shards: Sequence[Mapping[int, Twin]]
) -> list[tuple[Metric, dict[str, Any]]]:
    """The metrics that were updated in shards, and the attributes that they are to have."""
    merged = []
    for key, twin in shards[0].items():
        metric = twin.source
        if twin.is_metric and isinstance(metric, Metric):
            twins = [twins[key] for twins in shards]
            parts = [(vars(one.copy), one.baseline) for one in twins]
            parts = [(state, baseline) for state, baseline in parts if _updated(state, baseline)]
            if parts:
                refuse = partial(_unmergeable, owner, metric, "shards")
                settled = [_settled(metric, *part, refuse) for part in parts]
                states = [vars(metric), *(state for state, _ in parts)]
                merged.append((metric, _merged(metric, states, settled, refuse)))
    return merged


def _empty(metric: Metric) -> dict[str, Any]:
    """What a metric without any update has: states of its own, not shared with any other."""
    found: dict[str, Any] = {}
    for name, default in metric._defaults.items():
        value = getattr(metric, name)
        device = value.device if isinstance(value, Tensor) else None
        found[name] = default.clone().to(device) if isinstance(default, Tensor) else []
    return found | {
        "_update_count": 0,
        "_computed": None,
        "_forward_cache": None,
        "_cache": None,
        "_is_synced": False,
    }


def _updated(state: Mapping[str, Any], baseline: Mapping[str, Any]) -> bool:
    """Whether a metric was updated; wrappers of metrics do not count their updates."""
    return bool(state["_update_count"]) or any(
        value is not baseline.get(name) and name not in _bookkeeping()
        for name, value in state.items()
    )


def _merged(
    metric: Metric,
    states: Sequence[Mapping[str, Any]],
    settled: Sequence[Mapping[str, Any]],
    refuse: Callable[[str], ValueError],
) -> dict[str, Any]:
    """The attributes that a metric is to have.

    Args:
        metric: says how its states merge.
        states: those before, and of each part that was updated.
        settled: of each part, see `_settled`.
        refuse: makes the error.
    """
    merged: dict[str, Any] = {}
    for one in settled:
        for name, value in one.items():
            if not all(_equal(value, other.get(name, MISSING)) for other in settled):
                raise refuse(f"update() changes {name!r}, which is no state")
            merged[name] = value
    counts = [state["_update_count"] for state in states]
    from torchmetrics.utilities import data

    by_stack = (data.dim_zero_max, data.dim_zero_min)
    for name, reduction in metric._reductions.items():
        values = [state[name] for state in states]
        if isinstance(values[0], list) and reduction in (data.dim_zero_cat, None):
            merged[name] = [item for value in values for item in value]
        elif reduction is data.dim_zero_cat:
            merged[name] = torch.cat(values)
        elif reduction is data.dim_zero_sum:
            merged[name] = sum(values[1:], start=values[0])
        elif reduction in by_stack:
            merged[name] = reduction(torch.stack(values))
        elif reduction is data.dim_zero_mean:  # a mean over updates, as torchmetrics has it
            weighted = [value * count for value, count in zip(values, counts, strict=True)]
            merged[name] = sum(weighted[1:], start=weighted[0]) / sum(counts)
        else:
            raise refuse(f"its state {name!r} has no sum, mean, max, min or cat reduction")
    return merged | {"_update_count": sum(counts), "_computed": None}


def _settled(
    metric: Metric,
    state: Mapping[str, Any],
    baseline: Mapping[str, Any],
    refuse: Callable[[str], ValueError],
) -> dict[str, Any]:
    """Attributes that the first update settles, such as a task, and that are no running state."""
    settled: dict[str, Any] = {}
    for name, value in state.items():
        if name in _bookkeeping() or name in metric._reductions:
            continue
        before = baseline.get(name, MISSING)
        if value is before or _equal(value, before):
            continue
        if before is not None and before is not MISSING:
            raise refuse(f"update() changes {name!r}, which is no state")
        settled[name] = value
    return settled


def _unmergeable(owner: nn.Module, metric: Metric, parts: str, reason: str) -> ValueError:
    name = path_of(owner, metric)
    return ValueError(
        f"the metric {name} ({type(metric).__name__}) cannot be merged from several {parts}: "
        f"{reason}; update it for all shards at once: yield Once(self.{name}.update, ...)"
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return same(a, b)
    return a is b or bool(a == b)


# -- ranks -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Before:
    """A metric that ranks update apart: what all had counted before, and its attributes then."""

    states: dict[str, Any]
    baseline: dict[str, Any]


@dataclass(slots=True)
class _Part:
    """What a rank has counted since, as it travels: tensors on the CPU."""

    states: dict[str, Any]
    settled: dict[str, Any]


class MetricState:
    """What a metric has counted so far, to be put back later."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.states = {name: _copied(state) for name, state in _states(metric).items()}

    def put_back(self) -> None:
        """Forget what it has counted since."""
        for name, value in self.states.items():
            setattr(self.metric, name, value)
        self.metric._computed = None


def _copied(state: Any) -> Any:
    """A tensor may be added to in place; to a list something is appended."""
    if isinstance(state, Tensor):
        return state.clone()
    return list(state) if isinstance(state, list) else state


class RankMetrics:
    """The metrics of a module in a run of several ranks: apart within steps, whole in between.

    Between steps, where hooks and loggers read them and checkpoints are taken, every rank holds
    the same: what all have counted. `part` sets that aside, so that a step counts the rank's own
    samples from nothing, and `join` adds up what was counted since. So nothing counts twice,
    whether a metric is reset or goes on, and each number travels once. A metric that only some
    ranks have updated is merged like any other. A run ends with whole ones, and where it fails,
    with what they were when ranks last met.

    Meanwhile torchmetrics' own synchronisation is off: it would send messages on whichever rank
    calls `compute`, and add up states that are whole. Groups of a `MetricCollection` that are not
    known yet are not looked for: a rank's first samples may suggest others than all samples do.

    Args:
        world: the ranks.
        module: whose metrics they are: its parts, and those in lists and dicts that it and its
            parts have as attributes.

    Example, as a context around a run::

        with RankMetrics(world, module) as metrics:
            metrics.part()      # before each step
            ...
            metrics.join()      # at the end of the epoch
            module.accuracy.compute()  # of all ranks' samples
    """

    def __init__(self, world: World, module: nn.Module) -> None:
        self.world = world
        self.module = module
        self._named: dict[str, Metric] = {}
        self._before: dict[str, _Before] = {}
        self._apart = False
        self._grouping: list[tuple[MetricCollection, Any]] = []

    def __enter__(self) -> Self:
        for part in self.module.modules():
            if isinstance(part, MetricCollection) and not part._groups_checked:
                self._grouping.append((part, part._enable_compute_groups))
                part._enable_compute_groups = False
        self._look()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is None:
            self.join()
        else:  # ranks can no longer meet: as they last did
            for name, before in self._before.items():
                vars(self._named[name]).update(before.states, _computed=None)
            self.forget()
        self._look()
        for metric in self._named.values():
            _give_back(metric)
        for collection, enabled in self._grouping:
            collection._enable_compute_groups = enabled
        self._grouping.clear()

    def _look(self) -> None:
        """Find the metrics that there are now."""
        seen: set[int] = set()
        self._named = {}
        for name, metric in _metrics_of(self.module):
            if id(metric) not in seen:
                seen.add(id(metric))
                self._named[name] = metric
        for metric in self._named.values():
            _silence(metric)

    def part(self) -> None:
        """Before a step: from here on each metric counts this rank's samples, from nothing."""
        if self._apart:
            return
        self._apart = True
        self._look()
        for name, metric in self._named.items():
            self._before[name] = _set_apart(metric)

    def join(self) -> None:
        """Make every metric whole, on every rank; all ranks call it.

        Raises:
            ValueError: a metric's states cannot be merged.
        """
        mine: dict[str, _Part] = {}
        if not self._apart:  # on no rank: all do the same steps
            return
        self._look()
        for name, before in self._before.items():
            metric = self._named.get(name)
            if metric is not None and _updated(vars(metric), before.baseline):
                refuse = partial(_unmergeable, self.module, metric, "ranks")
                settled = _settled(metric, vars(metric), before.baseline, refuse)
                mine[name] = _Part(_travelling(_states(metric)), _travelling(settled))
        everyone = self.world.gather("metrics", mine)
        # Training may update them next, in place, which inference tensors refuse.
        with torch.inference_mode(False), torch.no_grad():
            for name, before in self._before.items():
                metric = self._named.get(name)
                if metric is None:
                    continue
                parts = [one[name] for one in everyone if name in one]
                found = before.states | {"_computed": None}
                if parts:
                    refuse = partial(_unmergeable, self.module, metric, "ranks")
                    states = [before.states, *(_brought(metric, one.states) for one in parts)]
                    told = [_brought(metric, one.settled) for one in parts]
                    found = _merged(metric, states, told, refuse)
                for attribute, value in found.items():
                    setattr(metric, attribute, value)
        self.forget()

    def forget(self) -> None:
        """The metrics hold what they should, the same on all ranks: they were put back."""
        self._before.clear()
        self._apart = False

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within a step, around what every rank does alike, with all ranks' samples.

        What a function given to `Once` counts is counted by every rank, so it is no rank's part.
        It finds what all had counted when they last met.
        """
        parts = {name: _states(self._named[name]) for name in self._before}
        for name, before in self._before.items():
            vars(self._named[name]).update(before.states, _computed=None)
        try:
            yield
        finally:
            for name, states in parts.items():
                metric, before = self._named[name], self._before[name]
                untouched = {one: before.baseline[one] for one in states}
                baseline = {**vars(metric), **untouched}
                self._before[name] = _Before(_states(metric), baseline)
                vars(metric).update(states, _computed=None)

    def name_of(self, metric: Metric) -> str:
        """What a metric is called in the module.

        Raises:
            ValueError: it is no part of it.
        """
        for name, one in self._named.items():
            if one is metric:
                return name
        raise ValueError(
            f"self.log got a {type(metric).__name__} that is no part of "
            f"{type(self.module).__name__}, so ranks do not know what to merge it with: make it "
            "an attribute in __init__, self.metric = ..., or keep it in an nn.ModuleDict"
        )

    def named(self, name: str) -> Metric:
        """The metric of this name."""
        return self._named[name]


class _Silence:
    """In place of torchmetrics' question whether other ranks have parts: no.

    After a run it is asked again, once the metric holds something else than what the run left.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.before = metric.distributed_available_fn
        self.left: list[Any] | None = None  # while a run goes on

    def __call__(self) -> bool:
        if self.left is None or _same_objects(self.left, _held(self.metric)):
            return False
        return bool(self.before())


def _silence(metric: Metric) -> None:
    silence = metric.distributed_available_fn
    if not isinstance(silence, _Silence):
        silence = metric.distributed_available_fn = _Silence(metric)
    silence.left = None


def _give_back(metric: Metric) -> None:
    """Let torchmetrics synchronise again, but for what is whole already."""
    silence = metric.distributed_available_fn
    if not isinstance(silence, _Silence):
        return
    if metric._update_count:
        silence.left = _held(metric)
    else:
        metric.distributed_available_fn = silence.before


def _held(metric: Metric) -> list[Any]:
    """Something of each state that a reset replaces."""
    values = (getattr(metric, name) for name in metric._defaults)
    return [next(iter(one), None) if isinstance(one, list) else one for one in values]


def _same_objects(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _metrics_of(module: nn.Module) -> Iterator[tuple[str, Metric]]:
    """All metrics by name; one that is held twice comes twice."""
    for path, part in module.named_modules():
        if isinstance(part, Metric):
            yield path, part
        for attribute, value in vars(part).items():
            if attribute in STANDARD or not isinstance(value, (list, tuple, dict)):
                continue
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in list(items):
                if isinstance(item, nn.Module):
                    where = f"{path}.{attribute}[{key!r}]".lstrip(".")
                    for inner, metric in item.named_modules():
                        if isinstance(metric, Metric):
                            yield f"{where}.{inner}".rstrip("."), metric


def _set_apart(metric: Metric) -> _Before:
    states = _states(metric)
    vars(metric).update(_empty(metric))
    return _Before(states, dict(vars(metric)))


def _states(metric: Metric) -> dict[str, Any]:
    states = {name: getattr(metric, name) for name in metric._defaults}
    return states | {"_update_count": metric._update_count}


def _travelling(value: Any) -> Any:
    """Without what a tensor is a part of, and on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _travelling(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_travelling(item) for item in value)
    return value


def _brought(metric: Metric, values: dict[str, Any]) -> dict[str, Any]:
    """Where the metric keeps them."""

    def to(value: Any, device: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if type(value) in (list, tuple):
            place = "cpu" if metric.compute_on_cpu else device
            return type(value)(to(item, place) for item in value)
        return value

    return {name: to(value, metric.device) for name, value in values.items()}
