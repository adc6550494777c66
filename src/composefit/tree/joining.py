"""Joining what the shards put out."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from composefit.tree.counting import flat_size, leaf_counts, read_list, surest
from composefit.tree.kinds import Kind, kind_of
from composefit.tree.structure import entries, rebuild, type_name


def join(parts: Sequence[Any], dim: int = 0, sizes: Sequence[int] | None = None) -> Any:
    """Join what the shards put out: the inverse of :func:`cut`. Nothing is averaged.

    Tensors and arrays are concatenated along ``dim``, differentiably; those without any dimension
    are stacked to one entry per part; lists of samples are chained; everything else must be equal
    in all parts and is kept.

    Args:
        parts: the outputs, of one structure, in the order of the samples.
        dim: the dimension that counts samples (0 or more).
        sizes: the number of samples of each part, where it is known. It settles whether a list is
            structure or samples, by the rule of `composefit.tree`, except that lists as long
            as their parts, of tensors that are not, are samples; without it, each part's own
            leaves say. Parts of a single sample each can leave a list of one container open: it
            is then read as samples if anything in it counts otherwise.

    Returns:
        One output of the same types.

    Raises:
        ValueError: if there are no parts, or if they differ in structure or in a value that is no
            tensor.
        TypeError: for an object that nobody has said how to join.

    Example:
        >>> join([{"y": torch.zeros(2), "loss": torch.tensor(1.0), "names": ["a", "b"], "k": 3},
        ...       {"y": torch.ones(1), "loss": torch.tensor(2.0), "names": ["c"], "k": 3}])
        {'y': tensor([0., 0., 1.]), 'loss': tensor([1., 2.]), 'names': ['a', 'b', 'c'], 'k': 3}
    """
    if not parts:
        raise ValueError("expected at least one part to join, got none")
    if sizes is None:
        counts: list[int | None] = [_own_size(part, dim) for part in parts]
    elif len(sizes) == len(parts):
        counts = list(sizes)
    else:
        raise ValueError(f"expected one size for each of {len(parts)} parts, got {len(sizes)}")
    return _join(list(parts), counts, "output", dim)


def _own_size(part: Any, dim: int) -> int | None:
    if (flat := flat_size(part, dim)) is not None:
        return flat
    sizes = {count.samples for count in surest(leaf_counts(part, "output", None, dim))}
    return sizes.pop() if len(sizes) == 1 else None


def _join(parts: list[Any], counts: list[int | None], path: str, dim: int) -> Any:
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        raise ValueError(
            f"expected {path} to be of one type in all parts, got "
            f"{', '.join(sorted({type_name(part) for part in parts}))}"
        )
    kind = kind_of(first)
    if kind is Kind.ARRAY:
        return _join_arrays(parts, path, dim)
    if kind is Kind.PLAIN or all(part is first for part in parts):
        return _same(parts, path)
    if kind is Kind.CUSTOM or kind is Kind.OPAQUE:
        raise TypeError(
            f"{path} is a {type_name(first)}, which cannot be joined; return tensors, or dicts, "
            "lists, tuples, dataclasses of them"
        )
    if kind is Kind.LIST and _are_samples(parts, counts, dim):
        return rebuild(first, itertools.chain.from_iterable(parts))
    rows = [dict(entries(part, path)) for part in parts]
    for row in rows:
        if row.keys() != rows[0].keys():
            raise ValueError(
                f"expected {path} to have the same entries in all parts, got {list(rows[0])} and "
                f"{list(row)}"
            )
    columns = ([row[where] for row in rows] for where in rows[0])
    joined = [
        _join(column, counts, where, dim) for where, column in zip(rows[0], columns, strict=True)
    ]
    return rebuild(first, joined)


def _are_samples(parts: list[Any], counts: list[int | None], dim: int) -> bool:
    """Whether lists, one of each part, are samples: if one of them can be nothing else."""
    lengths = [len(part) for part in parts]
    if len(set(lengths)) > 1:
        return True
    if None not in counts and lengths != counts:
        return False
    for part, count in zip(parts, counts, strict=True):
        samples, said = read_list(part, "output", count, dim)
        # Unlike a batch's, an output's list of tensors of one size may be samples (rule 1): that is
        # what a single ragged one looks like, where every part has a single sample.
        if samples or (count is not None and any(one.samples != count for one in said)):
            return True
    return False


def _join_arrays(parts: list[Any], path: str, dim: int) -> Any:
    ranks = {part.ndim for part in parts}
    if ranks == {0}:
        return torch.stack(parts) if isinstance(parts[0], Tensor) else np.stack(parts)
    if len(ranks) > 1 or max(ranks) <= dim:
        raise ValueError(
            f"expected {path} to have a dimension {dim} to join along in all parts, got shapes "
            f"{', '.join(str(tuple(part.shape)) for part in parts)}"
        )
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, dim)
    return np.concatenate(parts, axis=dim)


def _same(parts: list[Any], path: str) -> Any:
    first = parts[0]
    for part in parts[1:]:
        both_nan = first != first and part != part
        if not (part is first or part == first or both_nan):
            raise ValueError(
                f"expected {path} to be equal in all parts, got {first!r} and {part!r}; return a "
                "tensor, which is joined"
            )
    return first
