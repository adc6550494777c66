"""Joining what the shards put out."""

import itertools
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from composefit.tree.counting import alike, flat_size, leaf_counts, read_list, surest
from composefit.tree.kinds import Kind, kind_of
from composefit.tree.structure import Samples, entries, rebuild, type_name


def join(
    parts: Sequence[Any],
    dim: int = 0,
    sizes: Sequence[int] | None = None,
    leading: Container[tuple[int, ...]] = (),
) -> Any:
    """Join what the shards put out: the inverse of :func:`cut`. Nothing is averaged.

    Tensors and arrays are concatenated along ``dim``, differentiably; those without any dimension
    are stacked to one entry per part; lists of samples are chained; everything else must be equal
    in all parts and is kept. What the shards of a time-first batch put out may nevertheless count
    samples in its first dimension, as scores do: with ``sizes`` it is seen.

    Args:
        parts: the outputs, of one structure, in the order of the samples.
        dim: the dimension that counts samples (0 or more).
        sizes: the number of samples of each part, where it is known. It settles whether a list is
            structure or samples, by the rule of `composefit.tree`, except that lists as long
            as their parts, of tensors that are not, are samples if they are alike in dtype and
            number of dimensions; without it, each part's own leaves say. Parts of a single sample
            each can leave a list of one container open: it is then read as samples if anything in
            it counts otherwise.
        leading: what the batch's tensors are sized before ``dim``, such as {(points in time,)}.
            It settles along which dimension a tensor is joined that could be along both.

    Returns:
        One output of the same types.

    Raises:
        ValueError: if there are no parts, if they differ in structure or in a value that is no
            tensor, or if a tensor has no dimension to join along.
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
    return _join(list(parts), _Plan(dim, counts, leading), "output")


class _Plan(NamedTuple):
    dim: int
    counts: list[int | None]
    leading: Container[tuple[int, ...]]


def _own_size(part: Any, dim: int) -> int | None:
    if (flat := flat_size(part, dim)) is not None:
        return flat
    sizes = {count.samples for count in surest(leaf_counts(part, "output", None, dim))}
    return sizes.pop() if len(sizes) == 1 else None


def _join(parts: list[Any], plan: _Plan, path: str) -> Any:
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        raise ValueError(
            f"expected {path} to be of one type in all parts, got "
            f"{', '.join(sorted({type_name(part) for part in parts}))}"
        )
    kind = kind_of(first)
    if kind is Kind.ARRAY:
        return _join_arrays(parts, path, _dimension(parts, plan))
    if kind is Kind.PLAIN or all(part is first for part in parts):
        return _same(parts, path)
    if kind is Kind.CUSTOM or kind is Kind.OPAQUE:
        raise TypeError(
            f"{path} is a {type_name(first)}, which cannot be joined; return tensors, or dicts, "
            "lists, tuples, dataclasses of them"
        )
    if kind is Kind.LIST and _are_samples(parts, plan):
        return rebuild(first, itertools.chain.from_iterable(parts))
    rows = [dict(entries(part, path)) for part in parts]
    for row in rows:
        if row.keys() != rows[0].keys():
            raise ValueError(
                f"expected {path} to have the same entries in all parts, got {list(rows[0])} and "
                f"{list(row)}"
            )
    columns = ([row[where] for row in rows] for where in rows[0])
    joined = [_join(column, plan, where) for where, column in zip(rows[0], columns, strict=True)]
    return rebuild(first, joined)


def _are_samples(parts: list[Any], plan: _Plan) -> bool:
    """Whether lists, one of each part, are samples: if one of them can be nothing else."""
    lengths = [len(part) for part in parts]
    if len(set(lengths)) > 1 or isinstance(parts[0], Samples):
        return True
    if None not in plan.counts and lengths != plan.counts:
        return False
    for part, count in zip(parts, plan.counts, strict=True):
        samples, said = read_list(part, "output", count, plan.dim)
        # Unlike a batch's, an output's list of tensors of one size may be samples (rule 1): that is
        # what a single ragged one looks like, where every part has a single sample.
        others = count is not None and alike(part)
        if samples or (others and any(one.samples != count for one in said)):
            return True
    return False


def _dimension(parts: list[Any], plan: _Plan) -> int:
    """Along which arrays hold the samples of their parts: ``dim``, or the first all the same."""

    def counts_samples(dim: int) -> bool:
        pairs = zip(parts, plan.counts, strict=True)
        return all(part.ndim > dim and part.shape[dim] == count for part, count in pairs)

    dim = plan.dim
    if dim and counts_samples(0):
        leads = not plan.leading or tuple(parts[0].shape[:dim]) in plan.leading
        return dim if leads and counts_samples(dim) else 0
    return dim


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
