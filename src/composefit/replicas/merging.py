"""What comes back to the owner from the shards of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from composefit.replicas.buffers import MISSING, same
from composefit.replicas.metrics import merged_metrics
from composefit.replicas.naming import path_of
from composefit.replicas.replica import Replica

_Write = tuple[nn.Module, str, list[Any]]  # a buffer: its module, its name, each shard's value


def differing_buffer(owner: nn.Module, replicas: Sequence[Replica]) -> tuple[str, str] | None:
    """Looks for a buffer that the shards have written differently.

    Normalisation statistics, and buffers that a module declares by the names in its
    ``running_statistics`` tuple, may differ: `merge` averages their changes. Any other one has no
    merged value, and should have been written for all shards at once.

    A write is recognised by the tensor's identity and version counter. Writes through ``.data``
    move no counter: values are compared too at a replica's refreshes 1, 2, 4, 8, ..., and from
    then on wherever such a write was found.

    Args:
        owner: the module that the replicas replicate.
        replicas: one for each shard.

    Returns:
        The buffer's qualified name and how the shards differ, or None if none does.
    """
    return _difference(owner, _writes(replicas))


def merge(owner: nn.Module, replicas: Sequence[Replica], weights: Sequence[float]) -> None:
    """Brings back to the owner what the shards of one step did to their replicas.

    - Statistics of normalisation layers and declared ``running_statistics`` become what they were
      plus the weighted mean of the shards' changes, computed in floating point of at least 32
      bits; integers, such as ``num_batches_tracked``, are rounded, and exact if the shards agree.
    - Another buffer that all shards wrote alike is taken over.
    - Metrics merge by the reductions of their states, in shard order.
    - Lists are extended by what the shards have appended, in shard order, and sets likewise; other
      changes of lists, dicts and sets are dropped.

    Everything is added up in shard order, so that the result is reproducible bit by bit.

    Args:
        owner: the module that the replicas replicate; written in place.
        replicas: one for each shard, each refreshed at the start of the step.
        weights: one for each shard, usually its number of samples.

    Raises:
        ValueError: there are not as many weights as replicas, or they add up to nothing; the
            shards differ in a buffer; a metric has a state that cannot be merged.
    """
    total = math.fsum(weights)
    if len(weights) != len(replicas) or not total > 0:
        raise ValueError(
            f"expected one weight for each of {len(replicas)} replicas, with a positive sum; "
            f"got {list(weights)}"
        )
    writes = list(_writes(replicas))
    found = _difference(owner, writes)
    if found is not None:
        name, difference = found
        raise ValueError(
            f"the buffer {name} cannot be merged: {difference}; write it for all shards at once "
            "in a function given to Once, or, if it is a running mean, declare it by "
            f"running_statistics = ({name.rpartition('.')[2]!r},) on its module"
        )
    metrics = merged_metrics(owner, [replica.twins for replica in replicas])
    with torch.no_grad():
        _merge_statistics(replicas, [weight / total for weight in weights])
        _take_over(owner, replicas, writes)
    for metric, values in metrics:
        for name, value in values.items():
            setattr(metric, name, value)
    for key in replicas[0].containers:
        for replica in replicas:
            if (held := replica.containers.get(key)) is not None:
                held.give_back()


def _writes(replicas: Sequence[Replica]) -> Iterator[_Write]:
    """Module, name and each shard's value of every buffer that some shard has written."""
    found: dict[tuple[int, str], nn.Module] = {}
    for replica in replicas:
        for key, twin in replica.twins.items():
            if twin.plain or len(twin.buffers) != len(twin.given):
                found.update(((key, name), twin.source) for name in twin.written())
    for (key, name), source in found.items():
        yield source, name, [r.twins[key].buffers.get(name, MISSING) for r in replicas]


def _difference(owner: nn.Module, writes: Iterable[_Write]) -> tuple[str, str] | None:
    for source, name, values in writes:
        first = values[0]
        for shard, other in enumerate(values):
            if not same(first, other):
                kinds = [_kind(first), _kind(other)]
                reason = (
                    f"shards 0 and {shard} hold different values"
                    if kinds[0] == kinds[1]
                    else f"shard 0 has {kinds[0]}, shard {shard} has {kinds[1]}"
                )
                return path_of(owner, source, name), reason
    return None


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else "no tensor"


def _merge_statistics(replicas: Sequence[Replica], shares: Sequence[float]) -> None:
    first, *_ = replicas
    groups: dict[Any, dict[int, tuple[Tensor, list[tuple[Tensor, Tensor]]]]] = {}
    for key, twin in first.twins.items():
        for name in twin.statistics:
            target = twin.source._buffers.get(name)
            if target is None:
                continue
            changes = [replica.twins[key].change(name) for replica in replicas]
            found = [change for change in changes if change is not None]
            if len(found) == len(changes):
                group = groups.setdefault((target.dtype, target.device), {})
                group.setdefault(id(target), (target, found))  # a buffer may have two names
    for rows in groups.values():
        targets = [target for target, _ in rows.values()]
        # What the owner holds now, which a hook may have written, plus what the shards changed.
        merged = _flat(targets)
        for shard, share in enumerate(shares):
            before = _flat(changes[shard][0] for _, changes in rows.values())
            after = _flat(changes[shard][1] for _, changes in rows.values())
            merged = merged + (after - before) * share
        if not targets[0].is_floating_point():
            merged.round_()
        torch._foreach_copy_(targets, list(torch._C._nn.unflatten_dense_tensors(merged, targets)))


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """All of them in one, in at least float32; counts in float64, which is exact for them."""
    flat: Tensor = torch._C._nn.flatten_dense_tensors(list(tensors))
    if flat.dtype in (torch.float32, torch.float64):
        return flat
    return flat.float() if flat.is_floating_point() else flat.double()


def _take_over(owner: nn.Module, replicas: Sequence[Replica], writes: list[_Write]) -> None:
    """Gives the owner the buffers that all shards wrote alike."""
    for source, name, (value, *_) in writes:
        mine = source._buffers.get(name, MISSING)
        if same(mine, value):
            continue
        twin = replicas[0].twins[id(source)]
        record = twin.records.get(name)
        if record is not None and record.source is not mine:
            record = None  # the owner has another tensor by now
        if record is not None and record.source_moved():
            raise ValueError(
                f"the buffer {path_of(owner, source, name)} was written by the shards, and since "
                "then on the module itself, in a hook or by an optimizer; write it in one place"
            )
        if value is MISSING:
            source._buffers.pop(name, None)
            source._non_persistent_buffers_set.discard(name)
        elif record is not None and isinstance(value, Tensor) and record.takes(value):
            record.source.copy_(value)
        else:
            source._buffers[name] = None if value is None else value.detach()
            if name in twin.transient:
                source._non_persistent_buffers_set.add(name)
