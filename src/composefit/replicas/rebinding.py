"""Finding modules wherever Python code keeps them, and putting others in their place."""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from operator import is_
from typing import Any

from torch import nn

_UNASSIGNED: Any = object()


class Rebinding:
    """Rebuilds a value around other modules, wherever it holds one.

    Looks into methods, partials, closures and defaults of functions, weak references, and
    list, tuple, dict and set containers. A value without a module in it is returned itself.
    """

    _KINDS = (
        nn.Module,
        list,
        tuple,
        dict,
        set,
        frozenset,
        partial,
        types.FunctionType,
        types.MethodType,
        types.BuiltinMethodType,
        weakref.ReferenceType,
    )

    def __init__(self, swap: Callable[[Any], Any], extra: tuple[type, ...] = ()) -> None:
        """Prepares a rebinding.

        Args:
            swap: gives the replacement of a module (or of an instance of ``extra``).
            extra: further types that are handed to ``swap``.
        """
        self._swap = swap
        self._leaves = (nn.Module, *extra)
        self._kinds = (*self._KINDS, *extra)
        self._functions: dict[int, tuple[Any, Any]] = {}
        #: By the id of a list, dict or set: what stands in its place.
        self.containers: dict[int, Any] = {}
        self._open: set[int] = set()  # containers being looked into: they may contain themselves

    def trim(self) -> None:
        """Forgets rebuilt functions if they have become many: hooks may be new at every step."""
        if len(self._functions) > 1000:
            self.forget()

    def forget(self) -> None:
        """Forgets which functions were rebuilt."""
        self._functions.clear()

    def __call__(self, value: Any) -> Any:
        """The value around other modules, or itself if it holds none that is swapped."""
        kind = type(value)
        if not issubclass(kind, self._kinds):
            return value
        if issubclass(kind, self._leaves):
            return self._swap(value)
        if issubclass(kind, types.FunctionType):
            return self._function(value)
        if issubclass(kind, types.MethodType):
            target = self(value.__self__)
            same = target is value.__self__
            return value if same else types.MethodType(value.__func__, target)
        if issubclass(kind, types.BuiltinMethodType):
            target = self(value.__self__)
            return value if target is value.__self__ else getattr(target, value.__name__)
        if issubclass(kind, partial):
            return self._partial(value)
        if kind is weakref.ReferenceType:
            target = value()
            found = self(target)
            return value if found is target else weakref.ref(found)
        if issubclass(kind, (list, tuple, dict, set, frozenset)):
            own = self.containers.get(id(value))
            return self.contents(value) if own is None else own
        return value

    def holds(self, items: Iterable[Any]) -> bool:
        """Whether one of these could be, or could contain, a module."""
        return any(issubclass(kind, self._kinds) for kind in set(map(type, items)))

    def contents(self, value: Any) -> Any:
        """A container around other items, even if something else stands in its place elsewhere."""
        flat = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        if id(value) in self._open or not self.holds(flat):
            return value
        self._open.add(id(value))
        try:
            items = list(flat)
            found = [self(item) for item in items]
        finally:
            self._open.discard(id(value))
        if all(map(is_, items, found)):
            return value
        rebuilt: Any = copy.copy(value)
        if isinstance(value, dict):
            half = len(value)
            rebuilt.clear()
            rebuilt.update(zip(found[:half], found[half:], strict=True))
            return rebuilt
        if isinstance(value, list):
            rebuilt[:] = found
            return rebuilt
        make = getattr(value, "_make", type(value))  # a namedtuple takes its fields apart
        return make(found)

    def _partial(self, value: partial[Any]) -> partial[Any]:
        parts = (value.func, value.args, value.keywords)
        found = tuple(self(part) for part in parts)
        if all(map(is_, parts, found)):
            return value
        function, args, keywords = found
        rebuilt = type(value)(function, *args, **keywords)
        rebuilt.__dict__.update(self(value.__dict__))
        return rebuilt

    def _function(self, function: types.FunctionType) -> Any:
        known = self._functions.get(id(function))
        if known is not None:
            return known[1]
        # While this one is open, a function that leads back to it keeps the original.
        self._functions[id(function)] = (function, function)
        cells = function.__closure__ or ()
        contents = [_content(cell) for cell in cells]
        found = [self(content) for content in contents]
        extras = (function.__defaults__, function.__kwdefaults__, function.__dict__)
        found_extras = [self(extra) for extra in extras]
        if all(map(is_, contents, found)) and all(map(is_, extras, found_extras)):
            return function
        rebuilt = types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            None,
            # Cells without a module stay the same cells, so that `nonlocal` still reaches them.
            tuple(
                cell if new is old and old is not function else types.CellType(new)
                for cell, old, new in zip(cells, contents, found, strict=True)
            ),
        )
        for cell, old in zip(rebuilt.__closure__ or (), contents, strict=True):
            if old is function:  # a recursive local function calls itself by its own cell
                cell.cell_contents = rebuilt
        rebuilt.__defaults__, rebuilt.__kwdefaults__ = found_extras[0], found_extras[1]
        rebuilt.__dict__.update(found_extras[2])
        rebuilt.__qualname__, rebuilt.__doc__ = function.__qualname__, function.__doc__
        rebuilt.__module__ = function.__module__
        rebuilt.__annotations__ = function.__annotations__
        self._functions[id(function)] = (function, rebuilt)
        return rebuilt


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that is not assigned yet
        return _UNASSIGNED
