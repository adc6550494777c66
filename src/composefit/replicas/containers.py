"""Lists, dicts and sets that are attributes of modules: each shard has copies of its own."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from operator import is_
from typing import Any

from composefit.replicas.buffers import MISSING

_COPIED = frozenset((list, dict, set, OrderedDict, defaultdict, Counter))

# Longer dicts and sets are tables to look things up in, a vocabulary say, and stay shared.
_LONG = 10_000


def is_copied(value: Any) -> bool:
    """Whether each shard gets a copy; classes of the user's may not be copied so easily."""
    return type(value) in _COPIED and (type(value) is list or len(value) <= _LONG)


class Container:
    """A container of the owner's and its shallow copy in one replica.

    The copy is the same object at every step, because functions may hold it.
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        self.copy: Any = source.copy()
        self.copy.clear()
        self.before: Any = self.copy.copy()  # what the copy was given
        self.mixed = False  # whether it holds modules: then its items are not the owner's

    def fill(self, value: Any) -> Any:
        """The copy, with these items."""
        self.before = value.copy()
        self.copy.clear()
        _add(self.copy, value)
        self.mixed = value is not self.source
        return self.copy

    def renew(self, value: Any) -> Any:
        """The copy, with what is new in these items besides what the shard has written."""
        before, mine = self.before, self.copy
        if isinstance(mine, list):
            if len(value) == len(before) and all(map(is_, value, before)):
                return mine
            mine[:] = [*value, *self.added()]
        elif isinstance(mine, dict):
            for key in before.keys() - value.keys():
                mine.pop(key, None)
            for key, item in value.items():
                if before.get(key, MISSING) is not item:
                    mine[key] = item
        else:
            mine -= before - value
            mine |= value - before
        self.before = value.copy()
        self.mixed = value is not self.source
        return mine

    def added(self) -> Any:
        """What the shard has appended to a list, or added to a set, and has not changed else."""
        before, mine = self.before, self.copy
        if isinstance(mine, set):
            return mine - before
        if isinstance(mine, list) and len(mine) > len(before) and all(map(is_, before, mine)):
            return mine[len(before) :]
        return ()

    def give_back(self) -> None:
        """Adds to the owner's what the shard has added."""
        if not self.mixed and not isinstance(self.copy, dict):
            _add(self.source, self.added())


def _add(container: Any, items: Any) -> None:
    if isinstance(container, list):
        container.extend(items)
    else:
        container.update(items)
