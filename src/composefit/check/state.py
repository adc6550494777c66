"""Python state that a step writes, which several shards would each write for themselves."""

from __future__ import annotations

import inspect
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from composefit.metric_types import Metric


class Written(NamedTuple):
    """An attribute that was set, or whose items were changed.

    Attributes:
        path: of the module that has it; empty for the root.
        name: of the attribute.
        where: the line of its class that does it, `"model.py:31"`; None where that is not found.
    """

    path: str
    name: str
    where: str | None

    def __str__(self) -> str:
        return ".".join(filter(None, ("self", self.path, self.name)))


@contextmanager
def written(module: nn.Module | None, found: list[Written]) -> Iterator[None]:
    """Note in `found` what is written within; nothing where there is no module.

    Buffers and states of metrics are left out: the driver sees to these.
    """
    if module is None:
        yield
        return
    before = {path: _state(part) for path, part in module.named_modules()}
    yield
    for path, part in module.named_modules():
        old = before.get(path)
        if old is None or isinstance(part, Metric):
            continue
        for name, now in _state(part).items():
            if name not in old or not _same(old[name], now):
                one = Written(path, name, line_of(part, name))
                if one not in found:
                    found.append(one)


_OWN = frozenset(("_parameters", "_buffers", "_modules", "trainer", "_context", "_replica"))


def _state(module: nn.Module) -> dict[str, Any]:
    return {name: _now(value) for name, value in vars(module).items() if name not in _OWN}


def _now(value: Any) -> tuple[Any, Any]:
    """The value, and what would change if it were written to."""
    if isinstance(value, Tensor):
        return value, None if value.is_inference() else value._version
    if isinstance(value, list | deque):
        return value, list(value)
    if isinstance(value, dict):
        return value, list(value.items())
    return value, set(value) if isinstance(value, set) else None


def _same(before: tuple[Any, Any], now: tuple[Any, Any]) -> bool:
    (old, items_before), (new, items_now) = before, now
    if isinstance(old, bool | int | float | str | None):
        return type(old) is type(new) and (old == new or old is new)
    if old is not new:
        return False
    if isinstance(items_before, list):
        same_length = len(items_before) == len(items_now)
        return same_length and all(map(_is, items_before, items_now))
    return bool(items_before == items_now)


def _is(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(map(_is, a, b))
    return a is b or (isinstance(a, int | float | str) and a == b)


_WRITING = r"(append|appendleft|extend|insert|add|update|pop|popleft|clear|\w+_)"


def line_of(part: nn.Module, name: str) -> str | None:
    """The line at which a module's class writes this attribute outside of `__init__`."""
    writes = re.compile(rf"\.{re.escape(name)}\b(\[.*\])?\s*([-+*/|&]?=[^=]|\.{_WRITING}\()")
    for kind in type(part).__mro__:
        for function in vars(kind).values():
            if not inspect.isfunction(function) or function.__name__ == "__init__":
                continue
            try:
                lines, first = inspect.getsourcelines(inspect.unwrap(function))
            except (OSError, TypeError):
                continue
            for i, line in enumerate(lines):
                if writes.search(line):
                    return f"{function.__code__.co_filename}:{first + i}"
    return None
