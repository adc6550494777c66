"""Nested values: what is in a structure, and the same structure around something else."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any


class Samples(list[Any]):
    """A list of one item per sample, whatever the items are.

    What a plain list means is seen by its items, as `composefit.tree` says; this one leaves nothing
    to guess. For detection, say, where a batch has an image and a dict of boxes for each sample:
    `DataLoader(dataset, 8, collate_fn=lambda rows: [Samples(column) for column in zip(*rows)])`.

    Example:
        >>> from composefit import tree
        >>> tree.cut(Samples([[1, 2], [3, 4], [5, 6]]), [2, 1])
        [[[1, 2], [3, 4]], [[5, 6]]]
    """


def is_structure(value: Any) -> bool:
    """Whether a value may be looked into."""
    return isinstance(value, list | tuple | Mapping) or _is_dataclass(value)


def is_unnamed(value: Any) -> bool:
    """Whether a structure is a plain list or tuple, whose children have no names."""
    unnamed = isinstance(value, list | tuple) and not _is_namedtuple(value)
    return unnamed and not _is_dataclass(value)


def _is_namedtuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def children(value: Any) -> list[Any]:
    """The values in a structure, in the order in which `rebuild` takes them."""
    if isinstance(value, Mapping):
        return [child for _, child in value.items()]
    if _is_dataclass(value) and not _is_namedtuple(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return list(value)


def entries(value: Any, path: str) -> list[tuple[str, Any]]:
    """The `children` of the structure at a path, each with a path of its own."""
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


def rebuild(value: Any, values: Iterable[Any]) -> Any:
    """A structure of the same type, with other children and everything else as it was."""
    if isinstance(value, Mapping):
        items = dict(zip(value, values, strict=True))
        if type(value) is dict:
            return items
        if not isinstance(value, MutableMapping):
            return type(value)(items)  # type: ignore[call-arg]
        # A copy, not a constructor call: keeps a defaultdict's factory and attributes such as
        # those of BatchEncoding, whatever the constructor asks for.
        twin = copy.copy(value)
        for key, child in items.items():
            twin[key] = child
        return twin
    if _is_namedtuple(value):
        return type(value)._make(values)
    if _is_dataclass(value):
        # Not dataclasses.replace: that runs __post_init__ again and refuses init=False fields.
        twin = copy.copy(value)
        for field, child in zip(dataclasses.fields(value), values, strict=True):
            object.__setattr__(twin, field.name, child)  # frozen ones too
        return twin
    return type(value)(values)


def map_children(function: Callable[[Any], Any], value: Any) -> Any:
    """The same structure around `function(child)`, or itself if that is each child itself."""
    old = children(value)
    new = [function(child) for child in old]
    if all(one is other for one, other in zip(new, old, strict=True)):
        return value
    return rebuild(value, new)


def type_name(value: Any) -> str:
    """The qualified name of a value's type, for messages."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
