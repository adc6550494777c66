"""Objects that are sent to another process, and come back as themselves.

A pickled object arrives as a copy. Here the sender remembers which objects it has sent, in their
order (`Sent`); the receiver knows its copies by the same numbers (`Mirror`). What goes back names
an object by its number, so that it arrives as the sender's own; and the content of those that have
changed is put into them. After that the sender's objects are as if it had worked on them itself:
lists that the user holds have grown, in place.
"""

from __future__ import annotations

import io
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from composefit.ranks.parcels import Known, Packer

__all__ = ["Mirror", "Sent"]

# What a module has of `nn.Module`: hooks stay as the sender has set them, and what is in the tables
# goes back piece by piece.
_HOOKS = frozenset(name for name in vars(nn.Module()) if "_hook" in name)
_TABLES = ("_parameters", "_buffers", "_modules")

_DEFINITIONS = (type, types.FunctionType)
_DICTS = (dict, OrderedDict, defaultdict, Counter)
_CONTAINERS = (list, set, deque, np.ndarray, *_DICTS)


class Sent:
    """What is sent: containers, tensors, objects with attributes, and functions and classes.

    Attributes:
        objects: the objects, which are known by their places here from then on.
        contents: False to leave out containers.
        definitions_only: remember functions and classes alone.
    """

    def __init__(self, definitions_only: bool = False) -> None:
        self.objects: list[Any] = []
        self.contents = True
        self.definitions_only = definitions_only
        self._numbers: set[int] = set()

    def known(self, obj: Any) -> None:
        """Remember an object that is about to be packed; for `parcels.pack`."""
        if id(obj) in self._numbers or obj is self.objects:
            return
        if _by_value(obj) or (not self.definitions_only and self._has_content(obj)):
            self._numbers.add(id(obj))
            self.objects.append(obj)

    def _has_content(self, obj: Any) -> bool:
        if type(obj) in _CONTAINERS:
            return self.contents
        return isinstance(obj, Tensor) or _is_plain(obj)

    def resolve(self, number: int) -> Any:
        """The object of this number; for `parcels.unpack`."""
        return self.objects[number]

    def apply(self, number: int, content: Any, left_out: set[str]) -> None:
        """Put content that came back into its object.

        Args:
            number: of the object.
            content: as `Mirror.changes` gives it.
            left_out: names of attributes that could not come.
        """
        obj = self.objects[number]
        if isinstance(obj, Tensor):
            _fill(obj, *content)
        elif isinstance(obj, types.FunctionType):
            _rebind(obj, *content)
        elif type(obj) in _CONTAINERS:
            _refill(obj, content)
        elif isinstance(obj, nn.Module):
            _refill_module(obj, content, left_out)
        elif not _keeps_back(type(obj)):
            _replace(vars(obj), content, left_out)
        elif hasattr(obj, "__setstate__"):
            obj.__setstate__(content)
        else:
            _replace(vars(obj), content, left_out | _kept_back(obj))


class Mirror:
    """The copies of what was sent, in the process that has received them.

    Args:
        objects: those of `Sent`, as they have arrived.
        until: those from this number on go back by their number alone, whatever is in them now.

    Attributes:
        special: gives what stands for an object in place of its number; None where nothing does.
        lost: what could not be sent back: the path of an attribute, and why.
    """

    def __init__(self, objects: list[Any], until: int = 0) -> None:
        self._objects = objects
        self._numbers = {id(obj): number for number, obj in enumerate(objects)}
        self._versions = {n: _version(obj) for n, obj in enumerate(objects)}
        self._due: list[int] = []
        self._asked: set[int] = set()
        self._until = until
        self.special: Known = _nothing_special
        self.lost: list[tuple[str, Exception]] = []

    def number(self, obj: Any) -> int | None:
        """The number of a copy, None for what is none; its content is not asked for."""
        return self._numbers.get(id(obj))

    def known(self, obj: Any) -> Any:
        """What stands for an object, a number for a copy; for `parcels.pack`."""
        number = self._numbers.get(id(obj))
        special = self.special(obj)
        if number is None or special is not None:
            return special
        if number < self._until and number not in self._asked:
            self._asked.add(number)
            self._due.append(number)
        return number

    def changes(
        self, roots: Iterable[Any], always: Iterable[Any] = ()
    ) -> Iterator[tuple[int, Any, set[str]]]:
        """The content of the copies that can be reached; to be packed one after another.

        Functions that came along are roots, too: with what they have in closures and in variables
        of the main module.

        Args:
            roots: copies.
            always: tensors that go back whether they seem to have changed or not.

        Yields:
            Number, content, and names of attributes left out.
        """
        sure = {id(tensor) for tensor in always}
        for root in roots:
            self.known(root)
        for obj in self._objects[: self._until]:
            if isinstance(obj, types.FunctionType) and _by_value(obj):
                self.known(obj)
        while self._due:
            number = self._due.pop(0)
            obj = self._objects[number]
            if isinstance(obj, Tensor):
                if id(obj) in sure or _version(obj) != self._versions[number]:
                    yield number, (obj.detach(), obj.requires_grad), set()
            elif not isinstance(obj, type) and (content := _content(obj)) is not None:
                yield number, *self._sendable(content, type(obj).__name__)

    def _sendable(self, content: Any, name: str) -> tuple[Any, set[str]]:
        """Without the parts that cannot be pickled."""
        if self.refusal(content) is None:
            return content, set()
        if isinstance(content, tuple):  # a function's closure and variables
            return tuple(self._sendable(part, name)[0] for part in content), set()
        if not isinstance(content, dict):
            refusals = [self.refusal(item) for item in content]
            self.lost += [(f"an item of a {name}", error) for error in refusals if error]
            pairs = zip(content, refusals, strict=True)
            return type(content)(item for item, error in pairs if error is None), set()
        kept, left_out = {}, set()
        for key, value in content.items():
            if key in _TABLES:
                kept[key], names = self._sendable(value, name)
                left_out |= names
            elif (error := self.refusal(value)) is None:
                kept[key] = value
            else:
                self.lost.append((f"{name}.{key}", error))
                left_out.add(key)
        return kept, left_out

    def refusal(self, value: Any) -> Exception | None:
        """Why a value cannot be sent back; None if it can."""
        try:
            Packer(io.BytesIO(), self.known).dump(value)
        except Exception as error:
            return error
        return None


def _nothing_special(obj: Any) -> None:
    return None


# -- kinds of objects --------------------------------------------------------------------------


def _by_value(obj: Any) -> bool:
    """Whether a definition is sent along: of the main module, or made within a function."""
    if not isinstance(obj, _DEFINITIONS):
        return False
    return obj.__module__ == "__main__" or "<" in obj.__qualname__


def _is_plain(obj: Any) -> bool:
    """Whether an object is pickled by its attributes."""
    kind: Any = type(obj)
    return (
        hasattr(obj, "__dict__")
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and not isinstance(obj, (*_DEFINITIONS, types.ModuleType, BaseException))
    )


def _keeps_back(kind: type) -> bool:
    """Whether a class says itself what of an object is pickled."""
    own = getattr(kind, "__getstate__", None)
    return own is not None and own is not getattr(object, "__getstate__", None)


def _version(obj: Any) -> int | None:
    if not isinstance(obj, Tensor) or obj.is_inference():
        return None
    return obj._version


# -- content: taken there ----------------------------------------------------------------------


def _content(obj: Any) -> Any:
    """What is in an object, in a new container."""
    if isinstance(obj, types.FunctionType):
        return _variables(obj)
    if isinstance(obj, np.ndarray):
        return obj.copy()
    if type(obj) in _CONTAINERS:
        return (dict if type(obj) in _DICTS else type(obj))(obj)
    attributes: dict[str, Any] = vars(obj)
    keeps_back = _keeps_back(type(obj))
    if keeps_back and not isinstance(obj, nn.Module) and hasattr(obj, "__setstate__"):
        return obj.__getstate__()
    if keeps_back:
        own = _kept_back(obj)
        attributes = {key: value for key, value in attributes.items() if key not in own}
    if not isinstance(obj, nn.Module):
        return dict(attributes)
    content = {key: value for key, value in attributes.items() if key not in _HOOKS}
    return content | {name: dict(content[name]) for name in _TABLES}


def _kept_back(obj: Any) -> set[str]:
    """Attributes that an object pickles otherwise than it has them: they are not for others."""
    state = obj.__getstate__()
    return {key for key, value in vars(obj).items() if state.get(key, _NOTHING) is not value}


_NOTHING = object()


def _variables(function: types.FunctionType) -> tuple[dict[int, Any], dict[str, Any]]:
    """What a function has in its closure, by place; and the main module's variables it knows."""
    closed = {}
    for place, cell in enumerate(function.__closure__ or ()):
        with suppress(ValueError):  # not yet assigned
            closed[place] = cell.cell_contents
    if function.__module__ != "__main__":
        return closed, {}
    known = function.__globals__
    return closed, {k: v for k, v in known.items() if not k.startswith("__")}


# -- content: put in place here ----------------------------------------------------------------


def _fill(tensor: Tensor, value: Tensor, requires_grad: bool) -> None:
    with torch.no_grad():
        if tensor.shape == value.shape and tensor.dtype == value.dtype:
            tensor.copy_(value)
        else:
            tensor.data = value.to(tensor.device)
    if tensor.is_leaf and tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)


def _rebind(
    function: types.FunctionType, closed: dict[int, Any], variables: dict[str, Any]
) -> None:
    for place, value in closed.items():
        cell = (function.__closure__ or ())[place]
        if cell.cell_contents is not value:
            cell.cell_contents = value
    main = vars(sys.modules["__main__"])
    if function.__globals__ is main:
        main.update(variables)


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        container[:] = content
    elif not isinstance(container, np.ndarray):
        container.clear()
        container.extend(content) if isinstance(container, deque) else container.update(content)
    elif (container.shape, container.dtype) == (content.shape, content.dtype):
        container[...] = content


def _replace(attributes: dict[str, Any], content: dict[str, Any], left_out: set[str]) -> None:
    for name in [name for name in attributes if name not in content and name not in left_out]:
        del attributes[name]
    attributes.update({name: value for name, value in content.items() if name not in left_out})


def _refill_module(module: nn.Module, content: dict[str, Any], left_out: set[str]) -> None:
    """Parameters and buffers stay the objects that they are, and where they are."""
    for table in _TABLES:
        own, new = vars(module)[table], content.pop(table)
        for key, value in new.items():
            mine = own.get(key)
            if isinstance(mine, Tensor) and isinstance(value, Tensor) and mine is not value:
                _fill(mine, value.detach(), value.requires_grad)
                new[key] = mine
        _replace(own, new, left_out)
    if _keeps_back(type(module)):
        left_out = left_out | _kept_back(module)
    _replace(vars(module), content, left_out | _HOOKS | set(_TABLES))
