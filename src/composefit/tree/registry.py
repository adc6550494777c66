"""What a user may register: how a type of their own is counted and cut."""

import functools
from collections.abc import Sequence
from typing import Any

from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from composefit.tree.structure import type_name


@functools.singledispatch
def samples_of(value: Any) -> int | None:
    """The number of samples in a value of a registered type; ``None`` replicates it.

    Open to users: ``composefit.tree.samples_of.register(MyType, function)``. A registered
    type is never looked into, whatever it is made of.

    Args:
        value: an object of a registered type.

    Returns:
        Its number of samples, or None for something that every shard gets as it is.

    Raises:
        TypeError: if nobody registered the type.
    """
    raise TypeError(
        f"expected a type registered with composefit.tree.samples_of, got {type_name(value)}; "
        f"write composefit.tree.samples_of.register({type(value).__name__}, function)"
    )


@functools.singledispatch
def split(value: Any, sizes: Sequence[int]) -> Sequence[Any]:
    """Cut a value of a registered type into contiguous parts of these numbers of samples.

    Open to users, beside :func:`samples_of`: ``composefit.tree.split.register(MyType, function)``.

    Args:
        value: an object of a registered type.
        sizes: samples of each part; their sum is ``samples_of(value)``.

    Returns:
        One part per size. Their tensors need version counters of their own (``Tensor.data``), else
        an in-place operation on one part breaks the backward of another.

    Raises:
        TypeError: if nobody registered the type.
    """
    raise TypeError(
        f"{type_name(value)} cannot be cut into shards: register how with "
        f"composefit.tree.split.register({type(value).__name__}, function), or override "
        "LoopModule.scatter_batch"
    )


NOBODY = samples_of.dispatch(object)  # what `samples_of.dispatch` gives for an unregistered type


@samples_of.register
def _(value: PackedSequence) -> int:
    return int(value.batch_sizes[0])


@split.register
def _(value: PackedSequence, sizes: Sequence[int]) -> Sequence[Any]:
    # Its samples are interleaved, the longest first: each part is packed anew, as a copy.
    padded, lengths = pad_packed_sequence(value, batch_first=True)
    columns = (one.split_with_sizes(list(sizes)) for one in (padded.detach(), lengths))
    return [
        pack_padded_sequence(rows, own, batch_first=True, enforce_sorted=False)
        for rows, own in zip(*columns, strict=True)
    ]
