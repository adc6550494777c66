"""Metrics: each shard updates states of its own, which merge by their reductions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import (
    dim_zero_cat,
    dim_zero_max,
    dim_zero_mean,
    dim_zero_min,
    dim_zero_sum,
)

from composefit.replicas.buffers import MISSING, same
from composefit.replicas.naming import path_of
from composefit.replicas.twin import Twin


class _Bare(Metric):
    """A metric without a state: its attributes are torchmetrics' own book-keeping."""

    def update(self) -> None:
        """Does nothing."""

    def compute(self) -> None:
        """Does nothing."""


_BOOKKEEPING = frozenset(vars(_Bare()))


def start_metric(twin: Twin) -> None:
    """Empties a copy's states, without touching lists that it shares with the owner."""
    source, state = twin.source, twin.copy.__dict__
    if isinstance(source, MetricCollection):
        if not source._groups_checked:
            # Members that have equal values after a first update share a state from then on. The
            # few samples of a shard may be equal by chance.
            state.update(_enable_compute_groups=False, _groups={})
    elif isinstance(source, Metric):
        for name, default in source._defaults.items():
            value = getattr(source, name)
            device = value.device if isinstance(value, Tensor) else None
            state[name] = default.clone().to(device) if isinstance(default, Tensor) else []
        state.update(
            _update_count=0, _computed=None, _forward_cache=None, _cache=None, _is_synced=False
        )
        twin.baseline = dict(state)


def merged_metrics(
    owner: nn.Module, shards: Sequence[Mapping[int, Twin]]
) -> list[tuple[Metric, dict[str, Any]]]:
    """The metrics that were updated in shards, and the attributes that they are to have."""
    merged = []
    for key, twin in shards[0].items():
        metric = twin.source
        if twin.is_metric and isinstance(metric, Metric):
            parts = [twins[key] for twins in shards if _updated(twins[key])]
            if parts:
                merged.append((metric, _merged(owner, metric, parts)))
    return merged


def _updated(twin: Twin) -> bool:
    """Whether this metric was updated; wrappers of metrics do not count their updates."""
    state = twin.copy.__dict__
    return bool(state["_update_count"]) or any(
        value is not twin.baseline.get(name) and name not in _BOOKKEEPING
        for name, value in state.items()
    )


def _merged(owner: nn.Module, metric: Metric, parts: list[Twin]) -> dict[str, Any]:
    merged = _settled(owner, metric, parts)
    states = [metric.__dict__, *(part.copy.__dict__ for part in parts)]
    counts = [state["_update_count"] for state in states]
    for name, reduction in metric._reductions.items():
        values = [state[name] for state in states]
        if isinstance(values[0], list) and reduction in (dim_zero_cat, None):
            merged[name] = [item for value in values for item in value]
        elif reduction is dim_zero_cat:
            merged[name] = torch.cat(values)
        elif reduction is dim_zero_sum:
            merged[name] = sum(values[1:], start=values[0])
        elif reduction in (dim_zero_max, dim_zero_min):
            merged[name] = reduction(torch.stack(values))
        elif reduction is dim_zero_mean:  # a mean over updates, as torchmetrics has it
            weighted = [value * count for value, count in zip(values, counts, strict=True)]
            merged[name] = sum(weighted[1:], start=weighted[0]) / sum(counts)
        else:
            raise _unmergeable(
                owner, metric, f"its state {name!r} has no sum, mean, max, min or cat reduction"
            )
    return merged | {"_update_count": sum(counts), "_computed": None}


def _settled(owner: nn.Module, metric: Metric, parts: list[Twin]) -> dict[str, Any]:
    """Attributes that the first update settles, such as a task, and that are no running state."""
    settled: dict[str, Any] = {}
    for part in parts:
        for name, value in part.copy.__dict__.items():
            if name in _BOOKKEEPING or name in metric._reductions:
                continue
            before = part.baseline.get(name, MISSING)
            if value is before or _equal(value, before):
                continue
            unset = before is None or before is MISSING
            others = (other.copy.__dict__.get(name, MISSING) for other in parts)
            if not unset or not all(_equal(value, other) for other in others):
                raise _unmergeable(owner, metric, f"update() changes {name!r}, which is no state")
            settled[name] = value
    return settled


def _unmergeable(owner: nn.Module, metric: Metric, reason: str) -> ValueError:
    name = path_of(owner, metric)
    return ValueError(
        f"the metric {name} ({type(metric).__name__}) cannot be merged from several shards: "
        f"{reason}; update it for all shards at once: yield Once(self.{name}.update, ...)"
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return same(a, b)
    return a is b or bool(a == b)
