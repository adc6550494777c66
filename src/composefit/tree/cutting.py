"""Cutting a batch into shards."""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from composefit.tree.counting import batch_size, flat_size, read_list
from composefit.tree.kinds import Kind, kind_of
from composefit.tree.registry import samples_of, split
from composefit.tree.structure import entries, rebuild, type_name


def cut(batch: Any, sizes: Sequence[int], dim: int = 0) -> list[Any]:
    """Cut a batch into contiguous parts, by the rule of `composefit.tree`.

    Tensors become views of the batch's memory, without a copy, each with a version counter of its
    own: otherwise an in-place operation on one part would break the backward of another. They
    require no gradient. (Sparse COO tensors have no views; their parts are copies.)

    Args:
        batch: anything a loader gives.
        sizes: the number of samples of each part; their sum is the batch's.
        dim: the dimension of its tensors that counts samples (0 or more).

    Returns:
        One batch of the same types per size.

    Raises:
        ValueError: as :func:`batch_size`, and if the sizes do not add up to the batch.
        TypeError: for an object that nobody has said how to cut.

    Example:
        >>> cut([torch.arange(3), ["a", "b", "c"]], [1, 2])
        [[tensor([0]), ['a']], [tensor([1, 2]), ['b', 'c']]]
    """
    samples = batch_size(batch, dim)
    if sum(sizes) != samples or any(size < 0 for size in sizes):
        raise ValueError(
            f"expected sizes that add up to the batch's {samples} samples, got {list(sizes)}"
        )
    return _cut(batch, "batch", list(sizes), samples, dim)


def _cut(value: Any, path: str, sizes: list[int], samples: int, dim: int) -> list[Any]:
    kind = kind_of(value)
    if kind is Kind.ARRAY:
        return _cut_array(value, path, sizes, dim)
    if kind is Kind.CUSTOM:
        return _cut_custom(value, path, sizes)
    if kind is Kind.PLAIN:
        return [value] * len(sizes)
    if kind is Kind.OPAQUE:
        raise TypeError(
            f"{path} is a {type_name(value)}, which cannot be cut into shards; expected tensors, "
            "or dicts, lists, tuples, dataclasses of them. Register the type with "
            "composefit.tree.samples_of and composefit.tree.split, or override "
            "LoopModule.scatter_batch"
        )
    flat = flat_size(value, dim) is not None
    if kind is Kind.LIST and not flat and read_list(value, path, samples, dim)[0]:
        return [rebuild(value, value[rows]) for rows in _rows(sizes)]
    columns = [_cut(child, where, sizes, samples, dim) for where, child in entries(value, path)]
    rows = zip(*columns, strict=True) if columns else [()] * len(sizes)
    return [rebuild(value, row) for row in rows]


def _cut_array(value: Any, path: str, sizes: list[int], dim: int) -> list[Any]:
    if value.ndim == 0:
        # Replicated, but a copy each: an in-place operation of one shard must not reach another.
        value = value.detach() if isinstance(value, Tensor) else value
        return [copy.copy(value) if isinstance(value, np.ndarray) else value.clone() for _ in sizes]
    if value.ndim <= dim:
        raise ValueError(
            f"{path} has shape {tuple(value.shape)} and so no dimension {dim} to count samples; "
            "give it one, or override LoopModule.scatter_batch"
        )
    if isinstance(value, np.ndarray):
        return [value[(slice(None),) * dim + (rows,)] for rows in _rows(sizes)]
    if value.layout is torch.sparse_coo:
        detached = value.detach()
        return [detached.narrow_copy(dim, r.start, r.stop - r.start) for r in _rows(sizes)]
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(
            f"{path} is a {'nested ' if value.is_nested else ''}tensor of layout {value.layout}, "
            "which has no slices that share its memory; give a strided tensor, or override "
            "LoopModule.scatter_batch"
        )
    parts = [part.data for part in value.split(sizes, dim)]
    return parts if type(value) is Tensor else [_as_subclass(part, value) for part in parts]


def _rows(sizes: list[int]) -> list[slice]:
    ends = itertools.accumulate(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _as_subclass(part: Tensor, whole: Tensor) -> Tensor:
    """Keep a tensor subclass and its attributes, which its own slicing may have dropped."""
    if isinstance(whole, torch.nn.Parameter):
        return part
    if type(part) is not type(whole):
        part = part.as_subclass(type(whole))
    for name, attribute in vars(whole).items():
        if not hasattr(part, name):
            setattr(part, name, attribute)
    return part


def _cut_custom(value: Any, path: str, sizes: list[int]) -> list[Any]:
    if samples_of(value) is None:
        return [value] * len(sizes)
    try:
        parts = list(split(value, sizes))
    except Exception as error:
        error.add_note(f"while cutting {path} into {len(sizes)} shards")
        raise
    if len(parts) != len(sizes):
        raise ValueError(
            f"expected composefit.tree.split of {type_name(value)} to return one part for each of "
            f"the {len(sizes)} sizes, got {len(parts)} ({path})"
        )
    return parts
