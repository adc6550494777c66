"""Nested batches: how many samples they hold, and cutting, moving and joining them.

A batch is whatever a loader gives: a tensor, or dicts, lists, tuples, named tuples, dataclasses
and objects around tensors. Which of its parts hold one entry per sample is decided by this rule:

* A **tensor** or NumPy array holds its samples along ``dim``. One without any dimension is
  replicated: every part gets its own copy.
* ``str``, ``bytes``, numbers, ``None``, enum members, dtypes, devices and sizes are
  **replicated**.
* A mapping, a named tuple and a dataclass are **structure**: their values are cut, their type
  is kept.
* A list or tuple is the one case that has two readings, structure or one item per sample:

  1. All items are tensors, with the same size along ``dim``: structure, always. ``[x, y]``, which
     is what ``torch.utils.data.default_collate`` makes of pairs, stays a pair, also in a batch of
     two samples.
  2. All items are tensors whose sizes differ: samples, as many as the list is long.
  3. Other items: structure if everything in them that counts samples counts the batch's number
     of samples, as in ``(x, {"mask": mask}, 7)``; otherwise samples, as in ``["a", "b", "c"]``
     or in a list of one dict per image. An empty list is replicated.

  Samples must be as many as the batch has; a list of any other length is an error.

The batch's number of samples is what the leaves that have one reading say (tensors, and lists read
by 1 and 2); only if there are none, what the lists of rule 3 hold. Leaves that disagree are an
error that names both.

    >>> import torch
    >>> cut({"image": torch.zeros(3, 8), "name": ["a", "b", "c"], "step": 7}, [2, 1])[1]
    {'image': tensor([[0., 0., 0., 0., 0., 0., 0., 0.]]), 'name': ['c'], 'step': 7}
    >>> boxes = [{"box": torch.zeros(5, 4)}, {"box": torch.zeros(2, 4)}, {"box": torch.zeros(0, 4)}]
    >>> [len(part["boxes"]) for part in cut({"label": torch.arange(3), "boxes": boxes}, [2, 1])]
    [2, 1]

Rules 1 and 3 look at sizes, so a list of samples whose sizes happen to agree reads as structure
(images of three channels, say). Where that can be, say what is meant with a type of your own:

    >>> class Samples(list): "One item per sample, whatever the items are."
    >>> _ = samples_of.register(Samples, len)
    >>> @split.register
    ... def _(value: Samples, sizes):
    ...     ends = list(itertools.accumulate(sizes))
    ...     return [Samples(value[end - size : end]) for size, end in zip(sizes, ends)]
    >>> images = Samples([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)])
    >>> [len(part) for part in cut(images, [1, 1])]
    [1, 1]

or override ``LoopModule.scatter_batch``.
"""

import copy
import dataclasses
import enum
import functools
import inspect
import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = [
    "batch_size",
    "cut",
    "even_sizes",
    "join",
    "map_tensors",
    "move",
    "samples_of",
    "shard_sizes",
    "split",
    "tensors",
]

# --------------------------------------------------------------------------------------------------
# What a user may register
# --------------------------------------------------------------------------------------------------


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
        f"expected a type registered with composefit.tree.samples_of, got {_type(value)}; write "
        f"composefit.tree.samples_of.register({type(value).__name__}, function)"
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
        f"{_type(value)} cannot be cut into shards: register how with "
        f"composefit.tree.split.register({type(value).__name__}, function), or override "
        "LoopModule.scatter_batch"
    )


_SAMPLES_OF_ANYTHING = samples_of.dispatch(object)


@samples_of.register
def _(value: PackedSequence) -> int:
    return int(value.batch_sizes[0])


@split.register
def _(value: PackedSequence, sizes: Sequence[int]) -> Sequence[Any]:
    raise TypeError(
        "a PackedSequence interleaves its samples and cannot be cut into shards: give padded "
        "sequences and their lengths in the batch and pack them in training_step, or override "
        "LoopModule.scatter_batch"
    )


# --------------------------------------------------------------------------------------------------
# Kinds of values
# --------------------------------------------------------------------------------------------------


class _Kind(enum.Enum):
    ARRAY = enum.auto()
    CUSTOM = enum.auto()
    PLAIN = enum.auto()
    NAMED = enum.auto()  # structure for certain: its children have names
    LIST = enum.auto()  # structure or samples
    OPAQUE = enum.auto()


_SCALARS: frozenset[type] = frozenset({str, bytes, int, float, bool, type(None)})
_PLAIN: tuple[type, ...] = (
    *_SCALARS,
    numbers.Number,
    enum.Enum,
    np.generic,
    torch.dtype,
    torch.device,
    torch.Size,
)


def _kind(value: Any) -> _Kind:
    if type(value) is Tensor:
        return _Kind.ARRAY
    if type(value) in _SCALARS:
        return _Kind.PLAIN
    if samples_of.dispatch(type(value)) is not _SAMPLES_OF_ANYTHING:
        return _Kind.CUSTOM
    if isinstance(value, Tensor | np.ndarray):
        return _Kind.ARRAY
    if isinstance(value, _PLAIN):
        return _Kind.PLAIN
    if not _is_structure(value):
        return _Kind.OPAQUE
    unnamed = isinstance(value, list | tuple) and not _is_namedtuple(value)
    return _Kind.LIST if unnamed and not _is_dataclass(value) else _Kind.NAMED


def _is_structure(value: Any) -> bool:
    return isinstance(value, list | tuple | Mapping) or _is_dataclass(value)


def _is_namedtuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _children(value: Any, path: str) -> list[tuple[str, Any]]:
    """The values in a structure, each with its path, in the order `_rebuild` takes them."""
    if isinstance(value, Mapping):
        return [
            (f'{path}["{key}"]' if isinstance(key, str) else f"{path}[{key!r}]", child)
            for key, child in value.items()
        ]
    if _is_namedtuple(value):
        return [(f"{path}.{n}", child) for n, child in zip(value._fields, value, strict=True)]
    if _is_dataclass(value):
        return [
            (f"{path}.{field.name}", getattr(value, field.name))
            for field in dataclasses.fields(value)
        ]
    return [(f"{path}[{index}]", child) for index, child in enumerate(value)]


def _rebuild(value: Any, children: Iterable[Any]) -> Any:
    """A structure of the same type, with other children and everything else as it was."""
    if isinstance(value, Mapping):
        entries = dict(zip(value, children, strict=True))
        if type(value) is dict:
            return entries
        if not isinstance(value, MutableMapping):
            return type(value)(entries)  # type: ignore[call-arg]
        # A copy, not a constructor call: keeps a defaultdict's factory and attributes such as
        # those of BatchEncoding, whatever the constructor asks for.
        twin = copy.copy(value)
        for key, child in entries.items():
            twin[key] = child
        return twin
    if _is_namedtuple(value):
        return type(value)._make(children)
    if _is_dataclass(value):
        # Not dataclasses.replace: that runs __post_init__ again and refuses init=False fields.
        twin = copy.copy(value)
        for field, child in zip(dataclasses.fields(value), children, strict=True):
            object.__setattr__(twin, field.name, child)  # frozen ones too
        return twin
    return type(value)(children)


def _type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


# --------------------------------------------------------------------------------------------------
# How many samples
# --------------------------------------------------------------------------------------------------


def batch_size(batch: Any, dim: int = 0) -> int:
    """The number of samples in a batch, by the rule at the top of this module.

    Args:
        batch: anything a loader gives.
        dim: the dimension of its tensors that counts samples (0 or more).

    Returns:
        The number of samples.

    Raises:
        ValueError: if leaves disagree, if a list that would have to hold samples has another
            length, or if nothing in the batch counts samples.

    Example:
        >>> batch_size([torch.zeros(2, 3), torch.zeros(2)])
        2
        >>> batch_size({"image": torch.zeros(4, 3), "label": torch.zeros(5)})
        Traceback (most recent call last):
        ...
        ValueError: batch["image"] has 4 samples, but batch["label"] has 5; ...
    """
    if (flat := _flat_size(batch, dim)) is not None:
        return flat
    counts = _surest(_counts(batch, "batch", None, dim))
    if not counts:
        raise ValueError(
            f"expected a batch with a tensor that has a dimension {dim}, got a {_type(batch)} "
            "without one; override LoopModule.batch_size and LoopModule.scatter_batch to say how "
            "many samples it holds and how it is cut"
        )
    for count in [*counts, *_counts(batch, "batch", counts[0].samples, dim)]:
        if count.samples != counts[0].samples:
            raise ValueError(
                f"{counts[0].path} has {counts[0].samples} samples, but {count.path} has "
                f"{count.samples}; expected all tensors of a batch to agree, and lists to hold one "
                "item per sample (only a list of tensors of one size is so many tensors instead). "
                "For samples along another dimension set LoopModule.batch_dim, for a constant use "
                "a tensor without dimensions, for anything else override LoopModule.scatter_batch"
            )
    return counts[0].samples


def _flat_size(value: Any, dim: int) -> int | None:
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


class _Count(NamedTuple):
    """What one leaf says about the number of samples."""

    path: str
    samples: int
    doubt: int = 0  # how many lists around the leaf may be samples, which would silence it


def _counts(value: Any, path: str, samples: int | None, dim: int) -> list[_Count]:
    """What every leaf says, lists being read for a batch of so many samples, or not yet known."""
    kind = _kind(value)
    if kind is _Kind.LIST:
        return _read_list(value, path, samples, dim)[1]
    if kind is _Kind.NAMED:
        return [
            count
            for where, child in _children(value, path)
            for count in _counts(child, where, samples, dim)
        ]
    if kind is _Kind.ARRAY:
        if value.ndim <= dim:
            return []
        rows = value.shape[dim] if isinstance(value, np.ndarray) else value.size(dim)
        return [_Count(path, rows)]
    if kind is _Kind.CUSTOM and (custom := samples_of(value)) is not None:
        return [_Count(path, custom)]
    return []


def _surest(counts: list[_Count]) -> list[_Count]:
    least = min((count.doubt for count in counts), default=0)
    return [count for count in counts if count.doubt == least]


def _read_list(
    items: Sequence[Any], path: str, samples: int | None, dim: int
) -> tuple[bool, list[_Count]]:
    """Whether a list is one item per sample, and what it says about their number."""
    inside: list[_Count] = []
    if not all(type(item) in _SCALARS for item in items):
        for where, child in _children(items, path):
            inside += _counts(child, where, samples, dim)
    as_samples = [_Count(path, len(items))]
    if not inside:
        # Items of several types, without a tensor, are no ground to call their number a batch's.
        sure = bool(items) and (samples is not None or _alike(items))
        return bool(items), as_samples if sure else []
    sizes = {count.samples for count in _surest(inside)}
    tensors = all(_kind(item) is _Kind.ARRAY and item.ndim > dim for item in items)
    if len(sizes) == 1 and (tensors or samples is None or sizes == {samples}):
        structure = True
    else:
        structure = len(items) != samples and (len(sizes) == 1 or not _alike(items))
    if not structure:
        return True, as_samples
    if tensors or samples is not None:
        return False, inside
    return False, [count._replace(doubt=count.doubt + 1) for count in _surest(inside)]


def _alike(items: Sequence[Any]) -> bool:
    """Whether items could be samples of one data set: of one type, tensors of one dtype and rank.

    It tells inputs and targets that disagree, a fault, from ragged samples.
    """
    first = items[0]
    if any(type(item) is not type(first) for item in items):
        return False
    if not isinstance(first, Tensor | np.ndarray):
        return True
    return all(item.dtype == first.dtype and item.ndim == first.ndim for item in items)


# --------------------------------------------------------------------------------------------------
# Cutting
# --------------------------------------------------------------------------------------------------


def cut(batch: Any, sizes: Sequence[int], dim: int = 0) -> list[Any]:
    """Cut a batch into contiguous parts, by the rule at the top of this module.

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
    kind = _kind(value)
    if kind is _Kind.ARRAY:
        return _cut_array(value, path, sizes, dim)
    if kind is _Kind.CUSTOM:
        return _cut_custom(value, path, sizes)
    if kind is _Kind.PLAIN:
        return [value] * len(sizes)
    if kind is _Kind.OPAQUE:
        raise TypeError(
            f"{path} is a {_type(value)}, which cannot be cut into shards; expected tensors, or "
            "dicts, lists, tuples, dataclasses of them. Register the type with "
            "composefit.tree.samples_of and composefit.tree.split, or override "
            "LoopModule.scatter_batch"
        )
    flat = _flat_size(value, dim) is not None
    if kind is _Kind.LIST and not flat and _read_list(value, path, samples, dim)[0]:
        return [_rebuild(value, value[rows]) for rows in _rows(sizes)]
    columns = [_cut(child, where, sizes, samples, dim) for where, child in _children(value, path)]
    rows = zip(*columns, strict=True) if columns else [()] * len(sizes)
    return [_rebuild(value, row) for row in rows]


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
            f"expected composefit.tree.split of {_type(value)} to return one part for each of the "
            f"{len(sizes)} sizes, got {len(parts)} ({path})"
        )
    return parts


# --------------------------------------------------------------------------------------------------
# Sizes
# --------------------------------------------------------------------------------------------------


def even_sizes(samples: int, parts: int, group: int = 1) -> list[int]:
    """Sizes of contiguous parts, as even as groups allow, larger ones first, none empty.

    Parts are cut at multiples of ``group`` only. Samples left over beyond the last whole group stay
    in the last part, so that none holds less than a group, unless there is not even one.

    Args:
        samples: how many there are.
        parts: how many parts are wanted; fewer come back where there are fewer groups.
        group: samples that stay together.

    Returns:
        The number of samples of each part.

    Raises:
        ValueError: if ``parts`` or ``group`` is less than one, or ``samples`` less than zero.

    Example:
        >>> even_sizes(7, 3), even_sizes(2, 4), even_sizes(7, 4, group=2)
        ([3, 2, 2], [1, 1], [2, 2, 3])
    """
    _at_least(0, samples=samples)
    _at_least(1, parts=parts, group=group)
    if samples == 0:
        return []
    groups, rest = divmod(samples, group)
    parts = max(1, min(parts, groups))
    few, larger = divmod(groups, parts)
    sizes = [(few + 1) * group] * larger + [few * group] * (parts - larger)
    sizes[-1] += rest
    return sizes


def shard_sizes(
    samples: int, lanes: int, microbatch: int | None, group: int = 1
) -> list[list[int]]:
    """Sizes of the micro-batches of each lane, contiguous over the lanes in order.

    Args:
        samples: how many there are.
        lanes: places that work side by side (threads, devices); those left without samples are
            left out.
        microbatch: the most samples a micro-batch may hold; None for one per lane.
        group: samples that stay together. What is left over beyond the last whole group may have
            to be a micro-batch by itself, where ``microbatch`` leaves no room for it.

    Returns:
        For each lane that has any, the number of samples of each of its micro-batches.

    Raises:
        ValueError: if ``microbatch`` is less than ``group``, or as :func:`even_sizes`.

    Example:
        >>> shard_sizes(10, 2, microbatch=2)
        [[2, 2, 1], [2, 2, 1]]
    """
    lane_sizes = even_sizes(samples, lanes, group)
    if microbatch is None:
        return [[size] for size in lane_sizes]
    _at_least(1, microbatch=microbatch)
    if microbatch < group:
        raise ValueError(
            f"expected a microbatch of at least one group of {group} samples, got {microbatch}; "
            "raise microbatch_size or lower LoopModule.samples_per_group"
        )
    return [_capped_sizes(size, microbatch, group) for size in lane_sizes]


def _capped_sizes(samples: int, most: int, group: int) -> list[int]:
    groups, rest = divmod(samples, group)
    parts = -(-groups // (most // group))
    # The second try makes room for the rest in the last part.
    for wanted in (parts, parts + 1):
        if wanted and max(sizes := even_sizes(samples, wanted, group)) <= most:
            return sizes
    return [*even_sizes(samples - rest, max(parts, 1), group), rest]


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"expected {name} of at least {least}, got {value}")


# --------------------------------------------------------------------------------------------------
# Moving
# --------------------------------------------------------------------------------------------------


def move(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Bring the tensors of a batch to a device, without waiting for the copy.

    Objects with a ``to`` method of their own are asked to move themselves (mappings are not: their
    values are moved, since a ``to`` such as BatchEncoding's changes the loader's object). NumPy
    arrays stay what and where they are.

    Args:
        batch: anything a loader gives.
        device: where to.
        dtype: what floating-point tensors become; integers, booleans and complex numbers, and
            objects that move themselves, keep theirs.

    Returns:
        A batch of the same types; the very same object if nothing had to change.

    Example:
        >>> batch = [torch.zeros(2), torch.arange(2)]
        >>> move(batch, torch.device("cpu")) is batch
        True
        >>> [x.dtype for x in move(batch, torch.device("cpu"), torch.float64)]
        [torch.float64, torch.int64]
    """
    if dtype is None and device.type == "cpu" and _on_cpu(batch):
        return batch
    return _move(batch, device, dtype)


def _on_cpu(batch: Any) -> bool:
    """Whether a batch is a tensor, or a list or dict of nothing else, on the CPU; a quick look."""
    if type(batch) is Tensor:
        return batch.is_cpu
    if type(batch) is dict:
        batch = batch.values()
    elif type(batch) is not list and type(batch) is not tuple:
        return False
    for item in batch:  # noqa: SIM110 (all() takes twice as long)
        if type(item) is not Tensor or not item.is_cpu:
            return False
    return True


def _move(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if type(value) in _SCALARS:
        return value
    if isinstance(value, Tensor | PackedSequence):
        data = value if isinstance(value, Tensor) else value.data
        to: Any = value.to
        if dtype is None or not data.is_floating_point():
            return to(device=device, non_blocking=True)
        return to(device=device, dtype=dtype, non_blocking=True)
    if callable(getattr(type(value), "to", None)) and not isinstance(value, Mapping):
        return value.to(device, **_non_blocking(type(value)))
    if not _is_structure(value):
        return value
    children = [child for _, child in _children(value, "")]
    moved = [_move(child, device, dtype) for child in children]
    if all(new is old for new, old in zip(moved, children, strict=True)):
        return value
    return _rebuild(value, moved)


def _non_blocking(kind: type[Any]) -> dict[str, bool]:
    """The keyword, for classes whose ``to`` takes it."""
    try:
        parameters = inspect.signature(kind.to).parameters.values()
    except ValueError:  # some methods written in C have no signature
        return {}
    takes = any(p.name == "non_blocking" or p.kind is p.VAR_KEYWORD for p in parameters)
    return {"non_blocking": True} if takes else {}


# --------------------------------------------------------------------------------------------------
# Joining
# --------------------------------------------------------------------------------------------------


def join(parts: Sequence[Any], dim: int = 0, sizes: Sequence[int] | None = None) -> Any:
    """Join what the shards put out: the inverse of :func:`cut`. Nothing is averaged.

    Tensors and arrays are concatenated along ``dim``, differentiably; those without any dimension
    are stacked to one entry per part; lists of samples are chained; everything else must be equal
    in all parts and is kept.

    Args:
        parts: the outputs, of one structure, in the order of the samples.
        dim: the dimension that counts samples (0 or more).
        sizes: the number of samples of each part, where it is known. It settles whether a list is
            structure or samples, by the rule at the top of this module, except that lists as long
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
    if (flat := _flat_size(part, dim)) is not None:
        return flat
    sizes = {count.samples for count in _surest(_counts(part, "output", None, dim))}
    return sizes.pop() if len(sizes) == 1 else None


def _join(parts: list[Any], counts: list[int | None], path: str, dim: int) -> Any:
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        raise ValueError(
            f"expected {path} to be of one type in all parts, got "
            f"{', '.join(sorted({_type(part) for part in parts}))}"
        )
    kind = _kind(first)
    if kind is _Kind.ARRAY:
        return _join_arrays(parts, path, dim)
    if kind is _Kind.PLAIN or all(part is first for part in parts):
        return _same(parts, path)
    if kind is _Kind.CUSTOM or kind is _Kind.OPAQUE:
        raise TypeError(
            f"{path} is a {_type(first)}, which cannot be joined; return tensors, or dicts, lists, "
            "tuples, dataclasses of them"
        )
    if kind is _Kind.LIST and _are_samples(parts, counts, dim):
        return _rebuild(first, itertools.chain.from_iterable(parts))
    rows = [dict(_children(part, path)) for part in parts]
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
    return _rebuild(first, joined)


def _are_samples(parts: list[Any], counts: list[int | None], dim: int) -> bool:
    """Whether lists, one of each part, are samples: if one of them can be nothing else."""
    lengths = [len(part) for part in parts]
    if len(set(lengths)) > 1:
        return True
    if None not in counts and lengths != counts:
        return False
    for part, count in zip(parts, counts, strict=True):
        samples, said = _read_list(part, "output", count, dim)
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


# --------------------------------------------------------------------------------------------------
# Tensor by tensor
# --------------------------------------------------------------------------------------------------


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a nested value, in the order in which `map_tensors` meets them.

    Objects of registered types (`samples_of`) and of unknown ones are not looked into.

    Example:
        >>> [len(x) for x in tensors({"x": torch.zeros(2), "rest": (torch.zeros(3), "name", 7)})]
        [2, 3]
    """
    if isinstance(value, Tensor):
        yield value
    elif _kind(value) in (_Kind.NAMED, _Kind.LIST):
        for _, child in _children(value, ""):
            yield from tensors(child)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same structure with each tensor replaced by `function(tensor)`.

    Args:
        function: gives the replacement, or the tensor itself.
        value: anything; see `tensors` for what is looked into.

    Returns:
        A value of the same types; the very same object if nothing was replaced.

    Example:
        >>> map_tensors(len, {"x": torch.zeros(2), "rest": (torch.zeros(3), "name", 7)})
        {'x': 2, 'rest': (3, 'name', 7)}
    """
    if isinstance(value, Tensor):
        return function(value)
    if _kind(value) not in (_Kind.NAMED, _Kind.LIST):
        return value
    children = [child for _, child in _children(value, "")]
    mapped = [map_tensors(function, child) for child in children]
    if all(new is old for new, old in zip(mapped, children, strict=True)):
        return value
    return _rebuild(value, mapped)
