"""How many samples a batch holds."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from composefit.tree.kinds import SCALARS, Kind, kind_of
from composefit.tree.registry import samples_of
from composefit.tree.structure import Samples, entries, is_unnamed, type_name


def batch_size(batch: Any, dim: int = 0) -> int:
    """The number of samples in a batch, by the rule of `composefit.tree`.

    Args:
        batch: anything a loader gives.
        dim: the dimension of its tensors that counts samples (0 or more).

    Returns:
        The number of samples.

    Raises:
        ValueError: if leaves disagree, if a list that would have to hold samples has another
            length, or if nothing in the batch counts samples.

    Example:
        >>> import torch
        >>> batch_size([torch.zeros(2, 3), torch.zeros(2)])
        2
        >>> batch_size({"image": torch.zeros(4, 3), "label": torch.zeros(5)})
        Traceback (most recent call last):
        ...
        ValueError: batch["image"] has 4 samples, but batch["label"] has 5; ...
    """
    if (flat := flat_size(batch, dim)) is not None:
        return flat
    counts = surest(leaf_counts(batch, "batch", None, dim))
    if not counts:
        raise ValueError(
            f"expected a batch with a tensor that has a dimension {dim}, got a {type_name(batch)} "
            "without one; override LoopModule.batch_size and LoopModule.scatter_batch to say how "
            "many samples it holds and how it is cut"
        )
    for count in [*counts, *leaf_counts(batch, "batch", counts[0].samples, dim)]:
        if count.samples != counts[0].samples:
            raise ValueError(
                f"{counts[0].path} has {counts[0].samples} samples, but {count.path} has "
                f"{count.samples}; expected all tensors of a batch to agree, and lists to hold one "
                "item per sample (only a list of tensors of one size is so many tensors instead). "
                "For samples along another dimension set LoopModule.batch_dim, for a constant use "
                "a tensor without dimensions, for anything else override LoopModule.scatter_batch"
            )
    return counts[0].samples


def flat_size(value: Any, dim: int) -> int | None:
    """The samples of a tensor, or of a list or dict of nothing but tensors that agree; else None.

    Nearly every batch is one, and this takes a microsecond where the general way takes ten.
    """
    if type(value) is Tensor:
        value = (value,)
    elif type(value) is dict:
        value = value.values()
    elif type(value) is not list and type(value) is not tuple:
        return None
    size = None
    for item in value:
        if type(item) is not Tensor or item.ndim <= dim:
            return None
        if size is None:
            size = item.size(dim)  # nested tensors have no shape
        elif item.size(dim) != size:
            return None
    return size


class Count(NamedTuple):
    """What one leaf says about the number of samples."""

    path: str
    samples: int
    doubt: int = 0  # how many lists around the leaf may be samples, which would silence it


def leaf_counts(value: Any, path: str, samples: int | None, dim: int) -> list[Count]:
    """What every leaf says, lists being read for a batch of so many samples, or not yet known."""
    kind = kind_of(value)
    if kind is Kind.LIST:
        return read_list(value, path, samples, dim)[1]
    if kind is Kind.NAMED:
        return [
            count
            for where, child in entries(value, path)
            for count in leaf_counts(child, where, samples, dim)
        ]
    if kind is Kind.ARRAY:
        if value.ndim <= dim:
            return []
        rows = value.shape[dim] if isinstance(value, np.ndarray) else value.size(dim)
        return [Count(path, rows)]
    if kind is Kind.CUSTOM and (custom := samples_of(value)) is not None:
        return [Count(path, custom)]
    return []


def surest(counts: list[Count]) -> list[Count]:
    """The counts with the least doubt."""
    least = min((count.doubt for count in counts), default=0)
    return [count for count in counts if count.doubt == least]


def read_list(
    items: Sequence[Any], path: str, samples: int | None, dim: int
) -> tuple[bool, list[Count]]:
    """Whether a list is one item per sample, and what it says about their number."""
    if isinstance(items, Samples):
        return True, [Count(path, len(items))]
    inside: list[Count] = []
    if not all(type(item) in SCALARS for item in items):
        for where, child in entries(items, path):
            inside += leaf_counts(child, where, samples, dim)
    as_samples = [Count(path, len(items))]
    if not inside:
        # Items of several types, without a tensor, are no ground to call their number a batch's.
        sure = bool(items) and (samples is not None or alike(items))
        return bool(items), as_samples if sure else []
    sizes = {count.samples for count in surest(inside)}
    tensors = all(kind_of(item) is Kind.ARRAY and item.ndim > dim for item in items)
    if len(sizes) == 1 and (tensors or samples is None or sizes == {samples}):
        structure = True
    else:
        structure = len(items) != samples and (len(sizes) == 1 or not alike(items))
    if not structure:
        return True, as_samples
    if tensors or samples is not None:
        return False, inside
    return False, [count._replace(doubt=count.doubt + 1) for count in surest(inside)]


def alike(items: Sequence[Any]) -> bool:
    """Whether items could be samples of one data set: of one type, tensors of one dtype and rank.

    It tells inputs and targets that disagree, a fault, from ragged samples.
    """
    first = items[0]
    if any(type(item) is not type(first) for item in items):
        return False
    if is_unnamed(first):  # images and their targets, say
        inside = [item[0] for item in items if item]
        return not inside or alike(inside)
    if not isinstance(first, Tensor | np.ndarray):
        return True
    return all(item.dtype == first.dtype and item.ndim == first.ndim for item in items)
