"""Nested values tensor by tensor."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from composefit.tree.kinds import Kind, kind_of
from composefit.tree.structure import children, map_children


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a nested value, in the order in which `map_tensors` meets them.

    Objects of registered types (`samples_of`) and of unknown ones are not looked into.

    Example:
        >>> import torch
        >>> [len(x) for x in tensors({"x": torch.zeros(2), "rest": (torch.zeros(3), "name", 7)})]
        [2, 3]
    """
    if isinstance(value, Tensor):
        yield value
    elif kind_of(value) in (Kind.NAMED, Kind.LIST):
        for child in children(value):
            yield from tensors(child)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same structure with each tensor replaced by `function(tensor)`.

    Args:
        function: gives the replacement, or the tensor itself.
        value: anything; see `tensors` for what is looked into.

    Returns:
        A value of the same types; the very same object if nothing was replaced.

    Example:
        >>> import torch
        >>> map_tensors(len, {"x": torch.zeros(2), "rest": (torch.zeros(3), "name", 7)})
        {'x': 2, 'rest': (3, 'name', 7)}
    """
    if isinstance(value, Tensor):
        return function(value)
    if kind_of(value) not in (Kind.NAMED, Kind.LIST):
        return value
    return map_children(lambda child: map_tensors(function, child), value)
