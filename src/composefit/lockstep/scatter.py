"""Cutting a loader's batch into shards: over the lanes, and over time into micro-batches."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from composefit import tree
from composefit.data import LoaderBatches
from composefit.data.rows import Rows
from composefit.module import LoopModule


class Part(NamedTuple):
    """What one shard gets.

    `samples` is None where nobody had to ask; `spare` where they are those of another rank, and
    count for nothing.
    """

    lane: int
    batch: Any
    batch_idx: int
    samples: int | None
    spare: bool = False


def counts_its_own_way(module: LoopModule) -> bool:
    """Whether a module says itself how many samples a batch has."""
    return type(module).batch_size is not LoopModule.batch_size


def batch_size(module: nn.Module, batch: Any) -> int:
    """The samples of a batch, as the module counts them.

    Raises:
        ValueError: the batch is empty, or its leaves disagree (see `composefit.tree.batch_size`).
    """
    if isinstance(module, LoopModule) and counts_its_own_way(module):
        size = module.batch_size(batch)
    elif isinstance(batch, LoaderBatches):
        size = batch_size(module, next(iter(batch.values())))
    else:
        size = tree.batch_size(batch, getattr(module, "batch_dim", 0))
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"a batch must hold at least one sample, this one holds {size!r}")
    return size


def scatter(
    module: nn.Module, batch: Any, batch_idx: int, lanes: int, microbatch: int | None
) -> list[Part]:
    """Cut a batch into parts in sample order: contiguous over lanes, then over time.

    Args:
        module: says where samples are (`batch_dim`, `samples_per_group`, `scatter_batch`).
        batch: what the loader gave, on its device.
        batch_idx: its index, which every part keeps.
        lanes: into how many parts to cut in space; fewer where there are fewer samples.
        microbatch: the most samples a part may hold, or None.

    Raises:
        ValueError: `scatter_batch` gave parts that do not hold the batch's samples.
    """
    if lanes == 1 and microbatch is None:
        return [Part(0, batch, batch_idx, None)]
    samples = batch_size(module, batch)
    group = getattr(module, "samples_per_group", 1)
    by_lane = tree.shard_sizes(samples, lanes, microbatch, group)
    sizes = [size for lane in by_lane for size in lane]
    if len(sizes) == 1:
        return [Part(0, batch, batch_idx, samples)]
    own_way = type(module).scatter_batch if isinstance(module, LoopModule) else None
    if isinstance(module, LoopModule) and own_way is not LoopModule.scatter_batch:
        parts = list(module.scatter_batch(batch, len(sizes)))
        sizes = [batch_size(module, part) for part in parts]
        if sum(sizes) != samples:
            raise ValueError(
                f"scatter_batch(batch, n) must return parts that hold the batch's {samples} "
                f"samples together, got parts of {sizes}"
            )
        lane_of = _lanes_of(len(parts), by_lane)
    else:
        parts = _cut(batch, sizes, getattr(module, "batch_dim", 0))
        lane_of = [lane for lane, own in enumerate(by_lane) for _ in own]
    return [
        Part(lane, part, batch_idx, size)
        for lane, part, size in zip(lane_of, parts, sizes, strict=True)
    ]


def rows_of(module: nn.Module, batch: Any, rank: int, ranks: int) -> Rows:
    """The rows that a rank has of a batch which every rank has whole.

    A rank without rows gets those of the first as a spare.
    """
    samples = batch_size(module, batch)
    own_way = type(module).scatter_batch if isinstance(module, LoopModule) else None
    if isinstance(module, LoopModule) and own_way is not LoopModule.scatter_batch:
        parts = list(module.scatter_batch(batch, ranks))
        sizes = [batch_size(module, part) for part in parts]
    else:
        sizes = tree.even_sizes(samples, ranks, getattr(module, "samples_per_group", 1))
        parts = [batch] if len(sizes) == 1 else _cut(batch, sizes, getattr(module, "batch_dim", 0))
    of_ranks = (*sizes, *[0] * (ranks - len(sizes)))
    spare = rank >= len(parts)
    return Rows(parts[0 if spare else rank], of_ranks, spare)


def _lanes_of(count: int, by_lane: list[list[int]]) -> list[int]:
    """Lanes for parts that the module cut itself: as planned, as far as there are parts."""
    planned = [lane for lane, own in enumerate(by_lane) for _ in own]
    if count > len(planned):
        raise ValueError(
            f"scatter_batch(batch, n) must return at most n = {len(planned)} parts, got {count}"
        )
    return planned[:count]


def _cut(batch: Any, sizes: list[int], dim: int) -> list[Any]:
    if not isinstance(batch, LoaderBatches):
        return tree.cut(batch, sizes, dim)
    # Several loaders: each batch is cut by itself, into the same number of parts.
    cuts: dict[str, list[Any]] = {}
    for i, (name, own) in enumerate(batch.items()):
        found = tree.batch_size(own, dim)
        own_sizes = sizes if i == 0 else tree.even_sizes(found, len(sizes))
        if len(own_sizes) < len(sizes):
            raise ValueError(
                f"the batch of loader {name!r} holds {found} samples and cannot be cut into "
                f"{len(sizes)} shards: use a batch size of at least {len(sizes)} there"
            )
        cuts[name] = tree.cut(own, own_sizes, dim)
    return [
        LoaderBatches({name: parts[i] for name, parts in cuts.items()}) for i in range(len(sizes))
    ]
