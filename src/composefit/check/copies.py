"""Copies to try things on: of modules, loaders and batches, the originals staying as they are."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from composefit.data.loaders import CombinedLoader, PerRank, as_loader, one_shot
from composefit.module import LoopModule
from composefit.replicas.rebinding import Rebinding
from composefit.seeding import global_states, restore_global_states

if TYPE_CHECKING:
    from composefit.trainer import Trainer

Value = TypeVar("Value")

_LARGE = 1 << 20  # bytes: data of that size are read, not written, and shared with a loader's copy
_LONG = 1000  # items: of a longer list the items are shared


class Copied(NamedTuple):
    """A module's deep copy.

    Attributes:
        module: the copy.
        memo: by the id of an object of the original, its copy.
        shared: what could not be copied, and is the original's own: attributes by name.
    """

    module: LoopModule
    memo: dict[int, Any]
    shared: list[str]


def copied_module(module: LoopModule, trainer: Trainer | None = None) -> Copied:
    """A deep copy of a module that writes nothing into the original.

    What `copy.deepcopy` refuses or leaves to the original is provided for: tensors with a graph
    (stored activations, old weight norm) are detached, functions and hooks that hold the module or
    a list of it hold the copy's, and what cannot be copied (locks, files) is shared.

    Args:
        module: any; its trainer is not copied.
        trainer: becomes the copy's.
    """
    memo: dict[int, Any] = {} if trainer is None else {id(trainer): trainer}
    for part in module.modules():
        for value in vars(part).values():
            _detach(value, memo, set())
    shared: list[str] = []
    made, memo = _deep_copy(module, memo, shared, type(module).__name__)
    _rebind(made, memo)
    made.trainer = trainer
    return Copied(made, memo, shared)


def to_float64(copied: Copied) -> None:
    """Cast the floating numbers of a copy: parameters, buffers and other tensors it holds."""
    for value in copied.memo.values():
        if isinstance(value, Tensor) and value.is_floating_point() and not is_lazy(value):
            value.grad = None
            value.data = value.data.double()
    copied.module.double()  # what was uninitialised, and what comes later


def copied_batch(batch: Value) -> Value:
    """A batch that a step may write to."""
    made: Value = _deep_copy(batch, {}, [], "batch")[0]
    return made


def first_batches(loader: object, count: int) -> list[Any]:
    """The first batches of a loader, which then stands where it stood, as do its generators.

    Args:
        loader: an iterable of batches that can be iterated again, or a dict of such.
        count: how many; fewer come back where there are fewer.

    Raises:
        TypeError: it is no loader.
        ValueError: a one-shot iterator, of which a batch would be missing afterwards; or no batch.
    """
    found = as_loader(loader, "the loader")
    if (once := one_shot(found)) is not None:
        raise ValueError(
            f"a one-shot iterator ({type(once).__name__}) would lack the batches that are looked "
            "at: give one of its batches, trainer.check(module, next(iterator)), or a loader that "
            "can be iterated again"
        )
    memo: dict[int, Any] = {}
    _share_data(found, memo, set())
    with untouched():
        made = _deep_copy(found, memo, [], "loader")[0]
        iterator = iter(made)
        batches = list(islice(iterator, count))
        del iterator  # ends its workers
    if not batches:
        raise ValueError("the loader gave no batch at all: is the dataset empty?")
    return batches


@contextmanager
def untouched() -> Iterator[None]:
    """Put global generators and torch's default dtype back."""
    states, dtype = global_states(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        restore_global_states(states)


# -- deep copies of what cannot be copied all ------------------------------------------------------


def _deep_copy(
    value: Value, memo: dict[int, Any], shared: list[str], name: str
) -> tuple[Value, dict[int, Any]]:
    """The copy, and the memo with all that was copied."""
    trial = dict(memo)
    try:
        return copy.deepcopy(value, trial), trial
    except Exception:  # whatever an object's own way of being copied raises
        _share(value, memo, shared, name, set())
        return copy.deepcopy(value, memo), memo


def _share(value: Any, memo: dict[int, Any], shared: list[str], name: str, seen: set[int]) -> None:
    """Note in the memo those parts that cannot be copied as their own copies."""
    if id(value) in memo or id(value) in seen:
        return
    seen.add(id(value))
    try:
        copy.deepcopy(value, dict(memo))
        return
    except Exception:
        parts = _parts(value)
    for key, part in parts:
        _share(part, memo, shared, f"{name}.{key}", seen)
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        memo[id(value)] = value
        shared.append(name)


def _parts(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    return list(getattr(value, "__dict__", {}).items())


def _detach(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    """Tensors with a graph, which deepcopy refuses."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            memo[id(value)] = value.detach().clone()
    elif type(value) in (list, tuple, dict) and id(value) not in seen:
        seen.add(id(value))
        for _, part in _parts(value):
            _detach(part, memo, seen)


# -- functions -------------------------------------------------------------------------------------


def _rebind(module: nn.Module, memo: dict[int, Any]) -> None:
    """Functions are not copied: let those that hold the original's parts hold the copy's."""
    rebinding = Rebinding(lambda value: memo.get(id(value), value), extra=(Tensor,))
    rebinding.containers = {
        key: value
        for key, value in memo.items()
        if isinstance(value, list | dict | set) and key != id(memo)
    }
    for part in module.modules():
        state = vars(part)
        for name, value in list(state.items()):
            if isinstance(value, _FUNCTIONS):
                state[name] = rebinding(value)
            elif isinstance(value, dict) and name not in ("_parameters", "_buffers", "_modules"):
                for key, one in list(value.items()):
                    if isinstance(one, _FUNCTIONS):
                        value[key] = rebinding(one)


_FUNCTIONS = (types.FunctionType, types.BuiltinMethodType, partial)


# -- loaders ---------------------------------------------------------------------------------------


def _share_data(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    """Note what a loader's copy has in common with it: large data, but no state."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor | np.ndarray):
        if value.nbytes > _LARGE:
            memo[id(value)] = value
    elif type(value) is list and len(value) > _LONG:
        memo[id(value)] = value.copy()
    elif isinstance(value, DataLoader | CombinedLoader | PerRank | list | tuple | dict) or hasattr(
        value, "__dict__"
    ):
        if isinstance(value, type | types.ModuleType | types.FunctionType):
            return
        for key, part in _parts(value):
            if key == "_iterator":  # its workers
                memo[id(part)] = None
            else:
                _share_data(part, memo, seen)


def is_loader(value: object) -> bool:
    """Whether it gives batches, and is none: not a tensor, a list, or a dict of anything else.

    Example:
        >>> is_loader([torch.ones(2, 3), torch.ones(2)]), is_loader(DataLoader([1, 2]))
        (False, True)
    """
    if isinstance(value, dict):
        return bool(value) and all(map(is_loader, value.values()))
    if isinstance(value, Tensor | np.ndarray | list | tuple | str | bytes):
        return False
    if isinstance(value, DataLoader | CombinedLoader | PerRank):
        return True
    # A batch of a library's own type may be iterable, too: it can be moved, a loader cannot.
    return isinstance(value, Iterable) and not hasattr(value, "to") and not _is_batch(value)


def _is_batch(value: object) -> bool:
    return hasattr(value, "_fields") or hasattr(value, "__array__") or hasattr(value, "keys")
