"""What a step's local variables keep across a yield."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import GeneratorType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from composefit.effects import Effect
from composefit.explain.memory import storage_of
from composefit.losses import Loss

_OF_EFFECTS = {Effect.__iter__.__code__, Loss.__iter__.__code__}

# How deep a variable is looked into: a list of distributions, say, holds tensors at the third.
_DEPTH = 4

_NOT_ENTERED = (nn.Module, Optimizer, ModuleType, type)


class Piece(NamedTuple):
    """A tensor that a variable holds: where in memory, and how many bytes."""

    name: str
    place: int
    bytes: int


def variables(generator: GeneratorType[Any, Any, Any] | None) -> Iterator[tuple[str, Any]]:
    """The local variables of a step that stands at a yield, and of helpers that it yields from."""
    inner: object = generator
    while isinstance(inner, GeneratorType):
        if inner.gi_frame is not None and inner.gi_code not in _OF_EFFECTS:
            yield from inner.gi_frame.f_locals.items()
        inner = inner.gi_yieldfrom


def tensors_in(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    """The tensors that a variable holds, directly or in containers and objects."""
    if isinstance(value, Tensor):
        yield value
    elif depth == 0 or isinstance(value, _NOT_ENTERED):
        return
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one, depth - 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for one in value:
            yield from tensors_in(one, depth - 1)
    elif isinstance(value, Loss):
        for term in value.terms:
            yield from tensors_in((term.total, term.weight), depth - 1)
    elif hasattr(value, "__dict__") and not callable(value):
        for one in vars(value).values():
            yield from tensors_in(one, depth - 1)


def kept(generator: GeneratorType[Any, Any, Any] | None, batch: Any) -> list[Piece]:
    """The tensors of the step's own that its variables hold.

    Args:
        generator: the step at its yield; None where it has returned.
        batch: its data, which does not count; nor do parameters.
    """
    data = {storage._cdata for t in tensors_in(batch) if (storage := storage_of(t)) is not None}
    return [
        Piece(name, tensor.data_ptr(), tensor.nbytes)
        for name, value in variables(generator)
        if name != "self" and not isinstance(value, Effect)
        for tensor in tensors_in(value)
        if not isinstance(tensor, nn.Parameter)
        and (storage := storage_of(tensor)) is not None
        and storage._cdata not in data
    ]


def added_up(pieces: Iterable[Piece]) -> dict[str, int]:
    """Variable -> its bytes; what several names or shards hold counts once, for the first."""
    seen: set[tuple[int, int]] = set()
    found: dict[str, int] = {}
    for name, place, size in pieces:
        if size and (place, size) not in seen:
            seen.add((place, size))
            found[name] = found.get(name, 0) + size
    return found
