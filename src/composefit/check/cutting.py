"""Cutting a batch into shards of unlike sizes, where a strategy makes them as even as it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from composefit import tree
from composefit.check.sizes import telling_size
from composefit.data.loaders import LoaderBatches, LoaderList, apart, together
from composefit.lockstep.scatter import Part, batch_size
from composefit.module import LoopModule

#: As `composefit.lockstep.scatter.scatter`.
Scatter = Callable[[nn.Module, Any, int, int, int | None], list[Part]]


class TooSmallError(ValueError):
    """There are too few samples to cut."""


def unevenly(
    module: nn.Module, batch: Any, batch_idx: int, lanes: int, _: int | None
) -> list[Part]:
    """Two parts, about two thirds and the rest; three that a module with `scatter_batch` cuts.

    A weight that is forgotten, such as the samples of a shard, shows between such parts.

    Args:
        module: says where samples are.
        batch: what the loader gave, on its device.
        batch_idx: its index.
        lanes: those of the strategy; the parts are spread over them.

    Raises:
        TooSmallError: there are too few samples to cut.
        ValueError: where samples are is not to be told.
    """
    samples = batch_size(module, batch)
    group = getattr(module, "samples_per_group", 1)
    if samples < 2 * group:
        raise TooSmallError(
            f"a batch of {samples} sample{'s' * (samples > 1)} cannot be cut into two shards"
            + (f" of at least samples_per_group = {group}" if group > 1 else "")
            + ": give the check a larger one"
        )
    parts = _own_way(module, batch, samples) or _cut(module, batch, samples, group)
    return [
        Part(i % lanes, part, batch_idx, batch_size(module, part)) for i, part in enumerate(parts)
    ]


def _own_way(module: nn.Module, batch: Any, samples: int) -> list[Any]:
    if not isinstance(module, LoopModule):
        return []
    if getattr(type(module), "scatter_batch", None) is LoopModule.scatter_batch:
        return []
    return list(module.scatter_batch(batch, min(3, samples)))


def _cut(module: nn.Module, batch: Any, samples: int, group: int) -> list[Any]:
    dim = getattr(module, "batch_dim", 0)
    if not isinstance(batch, LoaderBatches | LoaderList):
        first = telling_size(samples, group, module, batch, dim)
        return tree.cut(batch, [first, samples - first], dim)
    halves: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, own in apart(batch):
        if own is None:
            continue
        found = tree.batch_size(own, dim)
        if found < 2:
            raise TooSmallError(
                f"the batch of loader {name!r} holds {found} sample, which cannot be cut into two "
                "shards: give the check a larger one"
            )
        first = telling_size(found, group if found >= 2 * group else 1, module, own, dim)
        parts = tree.cut(own, [first, found - first], dim)
        for half, part in zip(halves, parts, strict=True):
            half[name] = part
    return [together(batch, half) for half in halves]
