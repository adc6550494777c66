"""Cutting a loader's batch into shards: over the lanes, and over time into micro-batches."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from composefit import tree
from composefit.data import LoaderBatches, LoaderList
from composefit.data.loaders import apart, together
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


def cuts_its_own_way(module: nn.Module) -> bool:
    """Whether a module cuts batches itself."""
    return isinstance(module, LoopModule) and (
        type(module).scatter_batch is not LoopModule.scatter_batch
    )


def batch_size(module: nn.Module, batch: Any) -> int:
    """The samples of a batch, as the module counts them.

    Raises:
        ValueError: the batch is empty, or its leaves disagree (see `composefit.tree.batch_size`).
    """
    if isinstance(module, LoopModule) and counts_its_own_way(module):
        size = module.batch_size(batch)
    elif isinstance(batch, LoaderBatches | LoaderList):
        size = batch_size(module, next(own for _, own in apart(batch) if own is not None))
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
    parts, sizes = _parts(module, batch, samples, sizes)
    if microbatch is not None and max(sizes) > microbatch:
        raise ValueError(
            f"no shard may hold more than microbatch_size={microbatch} samples, and "
            f"scatter_batch(batch, n) returned parts of {sizes}: return all n parts, as even as "
            "they can be"
        )
    # Parts that the module has cut itself may be fewer: as planned, as far as there are some.
    lane_of = [lane for lane, own in enumerate(by_lane) for _ in own][: len(parts)]
    return [
        Part(lane, part, batch_idx, size)
        for lane, part, size in zip(lane_of, parts, sizes, strict=True)
    ]


def rows_of(module: nn.Module, batch: Any, rank: int, ranks: int) -> Rows:
    """The rows that a rank has of a batch which every rank has whole.

    A rank without rows gets those of the first as a spare.
    """
    samples = batch_size(module, batch)
    sizes = tree.even_sizes(samples, ranks, getattr(module, "samples_per_group", 1))
    parts = [batch]
    if len(sizes) > 1:
        parts, sizes = _parts(module, batch, samples, sizes)
    of_ranks = (*sizes, *[0] * (ranks - len(sizes)))
    spare = rank >= len(parts)
    return Rows(parts[0 if spare else rank], of_ranks, spare)


def _parts(
    module: nn.Module, batch: Any, samples: int, sizes: list[int]
) -> tuple[list[Any], list[int]]:
    """A batch in parts of these sizes, or those that the module makes of it in as many parts."""
    if not isinstance(module, LoopModule) or not cuts_its_own_way(module):
        return _cut(batch, sizes, getattr(module, "batch_dim", 0)), sizes
    parts = list(module.scatter_batch(batch, len(sizes)))
    if not 0 < len(parts) <= len(sizes):
        raise ValueError(
            f"scatter_batch(batch, n) must return at most n = {len(sizes)} parts, got {len(parts)}"
        )
    try:
        found = [batch_size(module, part) for part in parts]
    except (TypeError, ValueError) as error:
        error.add_note(f"in one of the {len(parts)} parts that scatter_batch(batch, n) returned")
        raise
    if sum(found) != samples:
        raise ValueError(
            f"scatter_batch(batch, n) must return parts that hold the batch's {samples} "
            f"samples together, got parts of {found}"
        )
    return parts, found


def _cut(batch: Any, sizes: list[int], dim: int) -> list[Any]:
    if not isinstance(batch, LoaderBatches | LoaderList):
        return tree.cut(batch, sizes, dim)
    # Several loaders: each batch is cut by itself, into the same number of parts.
    cuts: dict[str, list[Any]] = {}
    for name, own in apart(batch):
        if own is None:  # a loader that is at its end
            continue
        found = tree.batch_size(own, dim)
        own_sizes = tree.even_sizes(found, len(sizes)) if cuts else sizes
        if len(own_sizes) < len(sizes):
            raise ValueError(
                f"the batch of loader {name!r} holds {found} samples and cannot be cut into "
                f"{len(sizes)} shards: use a batch size of at least {len(sizes)} there, and "
                "drop_last=True where the last batch is smaller"
            )
        cuts[name] = tree.cut(own, own_sizes, dim)
    return [
        together(batch, {name: parts[i] for name, parts in cuts.items()}) for i in range(len(sizes))
    ]
