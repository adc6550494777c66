"""Shallow replicas of a module tree, and how what they wrote comes back to their owner.

Shards that run side by side must not write into each other's modules. Each therefore runs on a
`Replica`: a tree of its own around the *same* parameters. Gradients reach the owner's
``Parameter`` objects directly; a forward that sets attributes, registers hooks or writes buffers
changes its own shard only. A step goes

    replica.refresh()                     # begin with what the owner holds now
    ... replica.module(...) ...           # one shard of the step
    differing_buffer(owner, replicas)     # before an update: has a shard written something alone?
    merge(owner, replicas, weights)       # statistics, buffers and metrics return to the owner

Nothing is ever deep-copied, so locks, generators, stored activations and references to a trainer
do no harm. What stays shared with the owner: parameters, tensors that are plain attributes,
containers without modules in them (``self.outputs.append(...)`` reaches the owner), and objects
of other classes, even if they in turn refer to modules.
"""

from __future__ import annotations

import copy
import math
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain, islice
from operator import is_, itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import (
    dim_zero_cat,
    dim_zero_max,
    dim_zero_mean,
    dim_zero_min,
    dim_zero_sum,
)

__all__ = ["Replica", "differing_buffer", "merge"]

_F = TypeVar("_F")
_Write = tuple[nn.Module, str, list[Any]]  # a buffer: its module, its name, each shard's value

_MISSING: Any = object()

_NORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_RNN_LISTS = ("_flat_weights", "_flat_weight_refs")

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
_hooks_of = itemgetter(*_HOOKS)

# What `nn.Module.__init__` puts first into every module's `__dict__`, in this order.
_STANDARD = tuple(vars(nn.Module()))

# Containers up to this length are searched for modules at every refresh, longer ones only where
# they have grown: a list of outputs may hold thousands of tensors.
_SHORT = 32

_ATTEMPTS = 10  # to read the owner: one more than usual for each time that its tree has changed


# --------------------------------------------------------------------------------------------
# Finding modules wherever Python code keeps them


class _Rebinding:
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
        self._open: set[int] = set()  # containers being looked into: they may contain themselves

    def trim(self) -> None:
        """Forgets rebuilt functions if they have become many: hooks may be new at every step."""
        if len(self._functions) > 1000:
            self.forget()

    def forget(self) -> None:
        """Forgets which functions were rebuilt."""
        self._functions.clear()

    def __call__(self, value: Any) -> Any:
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
            return self._container(value)
        return value

    def holds(self, items: Iterable[Any]) -> bool:
        """Whether one of these could be, or could contain, a module."""
        return any(issubclass(kind, self._kinds) for kind in set(map(type, items)))

    def _container(self, value: Any) -> Any:
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
        return _MISSING


# --------------------------------------------------------------------------------------------
# A replica


class _Buffer:
    """A buffer of the owner, its clone in one replica, and what the clone was at the start."""

    def __init__(self, source: Tensor, statistic: bool) -> None:
        self.source = source
        self.statistic = statistic
        self.shape, self.dtype = source.shape, source.dtype
        self.dense = _dense(source)
        self.before: Tensor | None = None
        self.behind = False  # has been written without its version counter moving
        with _counted():
            self.clone = source.detach().clone()
        self.note()

    def note(self) -> None:
        """Remembers the version counters of both."""
        self.source_version = _version(self.source)
        self.version = self.clone._version

    def remember(self, thorough: bool) -> None:
        """Makes room for the clone's values at the start, where they will be asked for."""
        if not (thorough or self.statistic or self.behind):
            self.before = None
        elif self.before is None:
            with _counted():
                self.before = torch.empty_like(self.clone)

    def source_moved(self) -> bool:
        """Whether the owner's has been written since."""
        return _version(self.source) != self.source_version

    def moved(self) -> bool:
        """Whether the owner's has been written since, and not only the clone."""
        if self.source_moved():
            return True
        # `queue.data[...] = ` moves no counter. A statistic's clone moves without one too.
        unwritten = not self.statistic and self.clone._version == self.version
        return unwritten and self.dense and not _same(self.clone, self.source)

    def written(self) -> bool:
        """Whether the shard has written the clone."""
        if self.clone._version != self.version:
            return True
        if self.before is not None and not _same(self.clone, self.before):
            self.behind = True
        return self.behind

    def fits(self) -> bool:
        """Whether the clone can serve again: ``source.data = ...`` may have changed the shape."""
        source = self.source
        if source.shape != self.shape or source.dtype is not self.dtype or source.requires_grad:
            return False
        # A sparse one cannot be copied into, and serves as long as nobody writes it.
        return self.dense or (self.clone._version == self.version and not self.source_moved())

    def takes(self, value: Tensor) -> bool:
        """Whether the owner's can take this value in place."""
        source = self.source
        same = value.shape == source.shape and value.dtype is source.dtype
        return same and value.device == source.device and _dense(value) and _dense(source)


class _Twin:
    """A module of the owner's tree and its copy in one replica."""

    def __init__(self, source: nn.Module) -> None:
        self.source = source
        self.copy: nn.Module = object.__new__(type(source))
        self.slots = _slots(type(source))
        # Setting a weight of an RNN (old weight norm does) writes into these lists.
        self.lists = _RNN_LISTS if isinstance(source, nn.RNNBase) else ()
        self.extras: dict[str, Any] = {}  # the root's overrides
        # The owner's children and other attributes as last seen, and what the copy has instead.
        self.children: dict[str, nn.Module | None] = {}
        self.modules: dict[str, nn.Module | None] = {}
        self.skip = 0  # this many attributes at the front are the standard ones
        self.seen: dict[str, Any] = {}
        self.rebound: dict[str, Any] = {}
        self.changed: set[str] = set()  # names to be carried over within a step
        self.growing: dict[str, tuple[Any, int]] = {}  # containers, and their lengths
        # The owner's buffers, the copy's, and what refresh put there.
        self.sources: dict[str, Tensor | None] = {}
        self.buffers: dict[str, Tensor | None] = {}
        self.given: dict[str, Tensor | None] = {}
        self.records: dict[str, _Buffer] = {}
        self.statistics: tuple[str, ...] = ()
        self.plain = False  # whether there are others
        self.transient: set[str] = set()  # names of non-persistent buffers
        self.own: dict[str, Any] = {name: OrderedDict() for name in _HOOKS}
        self.hooks = _hooks_of(self.own)
        self.own["_buffers"] = self.buffers
        self.own["_non_persistent_buffers_set"] = self.transient
        self.is_metric = isinstance(source, (Metric, MetricCollection))
        self.baseline: dict[str, Any] = {}  # a metric's attributes before the step

    def change(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A statistic at the start of the step and now, or None if it is none here."""
        record, now = self.records.get(name), self.buffers.get(name)
        if record is None or record.before is None or now is None:
            return None
        return record.before, now

    def updated(self) -> bool:
        """Whether this metric was updated; wrappers of metrics do not count their updates."""
        state = self.copy.__dict__
        return bool(state["_update_count"]) or any(
            value is not self.baseline.get(name) and name not in _BOOKKEEPING
            for name, value in state.items()
        )

    def written(self) -> Iterator[str]:
        """Names of the buffers, statistics left out, that this shard has written."""
        missing = 0
        for name, given in self.given.items():
            record = self.records.get(name)
            if record is not None and record.statistic:
                continue
            now = self.buffers.get(name, _MISSING)
            missing += now is _MISSING
            if now is not given or (record is not None and record.written()):
                yield name
        if len(self.buffers) + missing != len(self.given):
            yield from (name for name in self.buffers if name not in self.given)


class Replica:
    """A shallow copy of a module tree.

    It shares parameters, plain attributes and hooks with its owner, and owns the modules
    themselves and their buffers. Whatever refers to a module of the tree (registered children,
    plain attributes, lists, tuples, dicts and sets, bound methods, partials, closures, hooks,
    weak references) refers to the replica's instead; modules that are found there and are not
    registered, such as a teacher hidden in a list, are replicated too. A compiled module runs the
    compiled code on the replica. States of torchmetrics metrics start empty.

    Args:
        owner: the root of the tree.
        overrides: attributes that the replica's root has in place of the owner's, or besides them.

    Raises:
        ValueError: a lazy module is not initialised yet.
        TypeError: a scripted module holds buffers, which live in C++ and cannot be divided.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> replica = Replica(net)
        >>> replica.module[0].weight is net[0].weight
        True
        >>> _ = replica.module(torch.ones(4, 2))
        >>> int(net[1].num_batches_tracked), int(replica.module[1].num_batches_tracked)
        (0, 1)
        >>> merge(net, [replica], [4])
        >>> int(net[1].num_batches_tracked)
        1
    """

    def __init__(self, owner: nn.Module, overrides: Mapping[str, Any] | None = None) -> None:
        self._owner = owner
        self._overrides = dict(overrides or {})
        self._twins: dict[int, _Twin] = {}
        self._known: dict[int, _Twin] = {}
        self._pending: list[_Twin] = []
        self._buffers: dict[int, _Buffer] = {}
        self._rebind = _Rebinding(self._copy_of)
        self._refreshes = 0
        self._wire()
        self.module: nn.Module = self._twins[id(owner)].copy
        self.refresh()

    def refresh(self, *, within_step: bool = False) -> None:
        """Reads the owner anew: attributes, parameters, buffers, hooks, flags, structure.

        Args:
            within_step: take over only what has changed on the owner since the last refresh, and
                keep what this step's forwards have set or written: graphs that are still to be
                walked hold these buffers. Without it the replica starts afresh.

        Raises:
            ValueError: a module was added whose parameters are not initialised yet.
            TypeError: a scripted module with buffers was added.
            RuntimeError: the tree changes while it is read.
        """
        self._refreshes += not within_step
        self._rebind.trim()
        for _ in range(_ATTEMPTS):
            if self._read(within_step):
                return
            self._wire()
        raise RuntimeError(
            f"{type(self._owner).__name__}'s modules keep changing while they are read; add and "
            "replace modules between steps, not in another thread, a property or __eq__"
        )

    def owner_of(self, function: _F) -> _F:
        """Rebinds a function from the replica to the owner.

        Args:
            function: a bound method of any module of the replica, a method of one of its buffers,
                a ``functools.partial``, a function whose closure or defaults hold such modules or
                buffers, or a module itself.

        Returns:
            The same thing around the owner's modules and buffers, or ``function`` itself if it
            holds none of the replica's.
        """
        owners: dict[int, Any] = {id(twin.copy): twin.source for twin in self._twins.values()}
        owners.update((id(buffer.clone), buffer.source) for buffer in self._buffers.values())
        swap = _Rebinding(lambda value: owners.get(id(value), value), extra=(Tensor,))
        rebound: _F = swap(function)
        return rebound

    # Structure: which modules there are, and which attributes refer to them.

    def _copy_of(self, module: nn.Module) -> nn.Module:
        twin = self._twins.get(id(module))
        if twin is None:
            if isinstance(module, torch.jit.ScriptModule):
                return _shareable(self._owner, module)
            twin = self._known.get(id(module)) or _Twin(module)
            if type(twin.copy) is not type(module):  # parametrizations change a module's class
                object.__setattr__(twin.copy, "__class__", type(module))
            self._twins[id(module)] = twin
            self._pending.append(twin)
        return twin.copy

    def _wire(self) -> None:
        """Walks the owner's tree, keeps the copies that exist and makes those that are missing."""
        self._known |= self._twins
        self._twins = {}
        self._pending.clear()
        self._rebind.forget()
        self._copy_of(self._owner)
        for twin in self._pending:  # grows while modules are found
            self._scan(twin)
        # Not reached if a scan has raised: what is pending has the next refresh wire it all again.
        self._pending.clear()
        self._known = {}
        self._twins[id(self._owner)].extras = self._overrides

    def _scan(self, twin: _Twin) -> None:
        attributes = twin.source.__dict__
        for name, tensor in (*attributes["_parameters"].items(), *attributes["_buffers"].items()):
            if is_lazy(tensor):
                raise ValueError(
                    f"{_name(self._owner, twin.source, name)} is not initialised yet, and shards "
                    "that run side by side would each initialise it; run one forward first: "
                    "module(batch)"
                )
        twin.statistics = _statistics(twin.source)
        twin.children = dict(attributes["_modules"])
        twin.modules = {
            name: None if child is None else self._copy_of(child)
            for name, child in twin.children.items()
        }
        twin.skip = len(_STANDARD) if tuple(islice(attributes, len(_STANDARD))) == _STANDARD else 0
        self._scan_attributes(twin, attributes, anew=True)
        for hooks in filter(None, _hooks_of(attributes)):
            self._rebind(hooks)  # a hook may be the only one to know a module
        for name in twin.slots:
            self._rebind(getattr(twin.source, name, None))

    def _scan_attributes(self, twin: _Twin, attributes: dict[str, Any], anew: bool) -> None:
        """Rebinds the attributes that are others than the last time, or all of them."""
        seen, twin.seen = twin.seen, dict(islice(attributes.items(), twin.skip, None))
        for name in seen.keys() - twin.seen.keys():
            twin.rebound.pop(name, None)
            twin.growing.pop(name, None)
            twin.changed.add(name)
        for name, value in twin.seen.items():
            other = value is not seen.get(name, _MISSING)
            if (other or anew) and name not in _STANDARD:
                if isinstance(value, (list, dict, set)):
                    twin.growing[name] = (value, len(value))
                else:
                    twin.growing.pop(name, None)
                self._rebind_attribute(twin, name, value)
            if other:
                twin.changed.add(name)

    def _rebind_attribute(self, twin: _Twin, name: str, value: Any) -> None:
        rebound = self._rebind(value)
        if rebound is not twin.rebound.get(name, value):
            twin.changed.add(name)
        if rebound is value:
            twin.rebound.pop(name, None)
        else:
            twin.rebound[name] = rebound

    def _scan_containers(self, twin: _Twin) -> None:
        """Looks into the containers that may have been filled in place."""
        for name, (value, length) in twin.growing.items():
            size = len(value)
            grown = size > length and self._rebind.holds(_last(value, size - length))
            if grown or name in twin.rebound or size <= _SHORT:
                self._rebind_attribute(twin, name, value)
            if size != length:
                twin.growing[name] = (value, size)

    # State: what the owner's modules hold now.

    def _read(self, within_step: bool) -> bool:
        """Copies the owner's state; False if modules have come or gone and it must be wired."""
        buffers: dict[int, tuple[_Buffer, bool]] = {}
        stale: list[_Buffer] = []
        metrics: list[_Twin] = []
        for twin in self._twins.values():
            attributes = twin.source.__dict__
            if attributes["_modules"] != twin.children:
                return False
            if len(attributes) != len(twin.seen) + twin.skip or not all(
                map(is_, islice(attributes.values(), twin.skip, None), twin.seen.values())
            ):
                self._scan_attributes(twin, attributes, anew=False)
            if twin.growing:
                self._scan_containers(twin)
            hooks = _hooks_of(attributes)
            keep = within_step and bool(twin.copy.__dict__)
            if (any(hooks) or any(twin.hooks)) and not keep:
                for mine, found in zip(twin.hooks, hooks, strict=True):
                    mine.clear()
                    mine.update((key, self._rebind(hook)) for key, hook in found.items())
            if self._pending:
                return False
            if keep:
                _carry_over(twin, attributes)
            else:
                state = attributes | twin.own
                if twin.rebound or twin.extras:
                    state |= twin.rebound | twin.extras
                state["_parameters"] = attributes["_parameters"].copy()
                state["_modules"] = twin.modules.copy()
                for name in twin.lists:
                    state[name] = list(state[name])
                object.__setattr__(twin.copy, "__dict__", state)
                for name in twin.slots:
                    self._read_slot(twin, name)
                if twin.is_metric:
                    metrics.append(twin)
            theirs = attributes["_buffers"]
            if (theirs or twin.buffers) and (
                within_step or not self._reuse_buffers(twin, theirs, stale)
            ):
                self._read_buffers(twin, buffers, stale, within_step)
            if twin.changed:
                twin.changed.clear()
        if buffers:  # forget those that the owner has no more
            records = (record for twin in self._twins.values() for record in twin.records.values())
            self._buffers = {id(record.source): record for record in records}
        self._fill(stale)
        for twin in metrics:
            _start_metric(twin)
        return True

    def _read_slot(self, twin: _Twin, name: str) -> None:
        value = getattr(twin.source, name, _MISSING)
        if value is not _MISSING:
            object.__setattr__(twin.copy, name, self._rebind(value))
        elif hasattr(twin.copy, name):
            object.__delattr__(twin.copy, name)

    def _reuse_buffers(
        self, twin: _Twin, theirs: dict[str, Tensor | None], stale: list[_Buffer]
    ) -> bool:
        """Puts the same clones into place, if the owner's buffers are the same tensors."""
        if theirs.keys() != twin.sources.keys() or not all(
            map(is_, theirs.values(), twin.sources.values())
        ):
            return False
        thorough = self._thorough()
        for record in twin.records.values():
            if not record.fits():
                return False
            if record.dense:
                record.remember(thorough)
                stale.append(record)
        twin.buffers.clear()
        twin.buffers.update(twin.given)
        if twin.transient != twin.source._non_persistent_buffers_set:
            twin.transient.clear()
            twin.transient.update(twin.source._non_persistent_buffers_set)
        return True

    def _read_buffers(
        self,
        twin: _Twin,
        buffers: dict[int, tuple[_Buffer, bool]],
        stale: list[_Buffer],
        within_step: bool,
    ) -> None:
        """Makes the clones that are missing; ``stale`` collects those still to be filled.

        ``buffers`` holds for each of the owner's buffers, seen so far, its record and whether it
        is to be put in place: a buffer under two names stays one.
        """
        if not within_step:
            for held in (twin.buffers, twin.given, twin.records, twin.transient):
                held.clear()
            twin.transient.update(twin.source._non_persistent_buffers_set)
        twin.sources = dict(twin.source._buffers)
        twin.plain = any(
            source is None or name not in twin.statistics for name, source in twin.sources.items()
        )
        for name, source in twin.sources.items():
            # One that requires a gradient is a parameter to somebody: a clone would get none.
            if source is None or source.requires_grad:
                if not within_step or source is not twin.given.get(name, _MISSING):
                    twin.buffers[name] = twin.given[name] = source
                    twin.records.pop(name, None)
                continue
            if id(source) not in buffers:
                statistic = name in twin.statistics
                buffers[id(source)] = self._record(source, statistic, stale, within_step)
            record, renewed = buffers[id(source)]
            if renewed or not within_step:
                twin.buffers[name] = twin.given[name] = record.clone
                twin.records[name] = record

    def _record(
        self, source: Tensor, statistic: bool, stale: list[_Buffer], within_step: bool
    ) -> tuple[_Buffer, bool]:
        record = self._buffers.get(id(source))
        if record is None or record.source is not source or not (record.fits() or within_step):
            record, renewed = _Buffer(source, statistic), True
        else:
            renewed = not within_step or record.moved()
            if renewed and not record.fits():
                record = _Buffer(source, statistic)
        if renewed and record.dense:
            record.remember(self._thorough())
            stale.append(record)
        return record, renewed

    def _thorough(self) -> bool:
        """Whether values are compared in this step, and not only version counters.

        Writes through ``.data`` move no counter. As a rule they begin early and go on: steps 1,
        2, 4, 8, ... find them at little cost, and where one was found, every step looks.
        """
        return not self._refreshes & (self._refreshes - 1)

    def _fill(self, stale: list[_Buffer]) -> None:
        """Copies the owner's values into the clones, without a graph."""
        if not stale:
            return
        with torch.no_grad():
            torch._foreach_copy_([b.clone for b in stale], [b.source for b in stale])
            kept = [(b.before, b.clone) for b in stale if b.before is not None]
            if kept:
                torch._foreach_copy_([before for before, _ in kept], [clone for _, clone in kept])
        for buffer in stale:
            buffer.note()


def _carry_over(twin: _Twin, attributes: dict[str, Any]) -> None:
    """Within a step: what has changed on the owner, and nothing else."""
    state = twin.copy.__dict__
    state["_parameters"] = attributes["_parameters"].copy()
    state["_modules"] = twin.modules.copy()
    if twin.is_metric:
        return  # a shard's states are its own until they are merged
    for name in twin.changed - twin.extras.keys():
        if name in twin.seen:
            state[name] = twin.rebound.get(name, twin.seen[name])
        else:
            state.pop(name, None)


def _slots(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the class's slots; what is in them is not in ``__dict__``."""
    names: list[str] = []
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _statistics(module: nn.Module) -> tuple[str, ...]:
    """Names of the buffers that merge as weighted means of their changes."""
    declared = getattr(module, "running_statistics", ())
    if not isinstance(declared, tuple) or not all(isinstance(name, str) for name in declared):
        declared = ()
    return (*_NORM_STATISTICS, *declared) if isinstance(module, _NormBase) else declared


def _shareable(owner: nn.Module, module: torch.jit.ScriptModule) -> nn.Module:
    if next(module.buffers(), None) is None:
        return module  # nothing that a forward could write
    raise TypeError(
        f"{_name(owner, module)} is a scripted module with buffers, which live in C++ and cannot "
        "be replicated; use the Python module it was made from, or, if it is not trained, "
        "torch.jit.freeze(module.eval())"
    )


def _name(owner: nn.Module, module: nn.Module, name: str = "") -> str:
    paths = (path for path, found in owner.named_modules() if found is module)
    return ".".join(filter(None, (next(paths, type(module).__name__), name))) or "the module"


def _last(container: Any, count: int) -> Iterable[Any]:
    """The ``count`` items that were added last; all of a set, which has no order."""
    if isinstance(container, dict):
        ends = (reversed(container.keys()), reversed(container.values()))
        return chain.from_iterable(islice(end, count) for end in ends)
    return islice(reversed(container), count) if isinstance(container, list) else container


def _counted() -> AbstractContextManager[Any]:
    """Tensors that are made in inference mode have no version counters."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided


def _version(tensor: Tensor) -> float:
    """The version counter; inference tensors have none, and count as always changed."""
    return math.nan if tensor.is_inference() else tensor._version


def _same(a: Any, b: Any) -> bool:
    """Whether two buffers are equal bit by bit, NaN equal to NaN."""
    if a is b:
        return True
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    if a.shape != b.shape or a.dtype is not b.dtype or a.device != b.device:
        return False
    if not (_dense(a) and _dense(b)):
        a, b = a.to_dense(), b.to_dense()
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


# --------------------------------------------------------------------------------------------
# What comes back


def differing_buffer(owner: nn.Module, replicas: Sequence[Replica]) -> tuple[str, str] | None:
    """Looks for a buffer that the shards have written differently.

    Normalisation statistics, and buffers that a module declares by the names in its
    ``running_statistics`` tuple, may differ: `merge` averages their changes. Any other one has no
    merged value, and should have been written for all shards at once.

    A write is recognised by the tensor's identity and version counter. Writes through ``.data``
    move no counter: values are compared too at a replica's refreshes 1, 2, 4, 8, ..., and from
    then on wherever such a write was found.

    Args:
        owner: the module that the replicas replicate.
        replicas: one for each shard.

    Returns:
        The buffer's qualified name and how the shards differ, or None if none does.
    """
    return _difference(owner, _writes(replicas))


def merge(owner: nn.Module, replicas: Sequence[Replica], weights: Sequence[float]) -> None:
    """Brings back to the owner what the shards of one step did to their replicas.

    - Statistics of normalisation layers and declared ``running_statistics`` become what they were
      plus the weighted mean of the shards' changes, computed in floating point of at least 32
      bits; integers, such as ``num_batches_tracked``, are rounded, and exact if the shards agree.
    - Another buffer that all shards wrote alike is taken over.
    - Metrics merge by the reductions of their states, in shard order.

    Everything is added up in shard order, so that the result is reproducible bit by bit.

    Args:
        owner: the module that the replicas replicate; written in place.
        replicas: one for each shard, each refreshed at the start of the step.
        weights: one for each shard, usually its number of samples.

    Raises:
        ValueError: there are not as many weights as replicas, or they add up to nothing; the
            shards differ in a buffer; a metric has a state that cannot be merged.
    """
    total = math.fsum(weights)
    if len(weights) != len(replicas) or not total > 0:
        raise ValueError(
            f"expected one weight for each of {len(replicas)} replicas, with a positive sum; "
            f"got {list(weights)}"
        )
    writes = list(_writes(replicas))
    found = _difference(owner, writes)
    if found is not None:
        name, difference = found
        raise ValueError(
            f"the buffer {name} cannot be merged: {difference}; write it for all shards at once "
            "in a function given to Once, or, if it is a running mean, declare it by "
            f"running_statistics = ({name.rpartition('.')[2]!r},) on its module"
        )
    metrics = _merged_metrics(owner, replicas)
    with torch.no_grad():
        _merge_statistics(replicas, [weight / total for weight in weights])
        _take_over(owner, replicas, writes)
    for metric, values in metrics:
        for name, value in values.items():
            setattr(metric, name, value)


def _writes(replicas: Sequence[Replica]) -> Iterator[_Write]:
    """Module, name and each shard's value of every buffer that some shard has written."""
    found: dict[tuple[int, str], nn.Module] = {}
    for replica in replicas:
        for key, twin in replica._twins.items():
            if twin.plain or len(twin.buffers) != len(twin.given):
                found.update(((key, name), twin.source) for name in twin.written())
    for (key, name), source in found.items():
        yield source, name, [r._twins[key].buffers.get(name, _MISSING) for r in replicas]


def _difference(owner: nn.Module, writes: Iterable[_Write]) -> tuple[str, str] | None:
    for source, name, values in writes:
        first = values[0]
        for shard, other in enumerate(values):
            if not _same(first, other):
                kinds = [_kind(first), _kind(other)]
                reason = (
                    f"shards 0 and {shard} hold different values"
                    if kinds[0] == kinds[1]
                    else f"shard 0 has {kinds[0]}, shard {shard} has {kinds[1]}"
                )
                return _name(owner, source, name), reason
    return None


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else "no tensor"


def _merge_statistics(replicas: Sequence[Replica], shares: Sequence[float]) -> None:
    first, *_ = replicas
    groups: dict[Any, dict[int, tuple[Tensor, list[tuple[Tensor, Tensor]]]]] = {}
    for key, twin in first._twins.items():
        for name in twin.statistics:
            target = twin.source._buffers.get(name)
            if target is None:
                continue
            changes = [replica._twins[key].change(name) for replica in replicas]
            found = [change for change in changes if change is not None]
            if len(found) == len(changes):
                group = groups.setdefault((target.dtype, target.device), {})
                group.setdefault(id(target), (target, found))  # a buffer may have two names
    for rows in groups.values():
        targets = [target for target, _ in rows.values()]
        # What the owner holds now, which a hook may have written, plus what the shards changed.
        merged = _flat(targets)
        for shard, share in enumerate(shares):
            before = _flat(changes[shard][0] for _, changes in rows.values())
            after = _flat(changes[shard][1] for _, changes in rows.values())
            merged = merged + (after - before) * share
        if not targets[0].is_floating_point():
            merged.round_()
        torch._foreach_copy_(targets, list(torch._C._nn.unflatten_dense_tensors(merged, targets)))


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """All of them in one, in at least float32; counts in float64, which is exact for them."""
    flat: Tensor = torch._C._nn.flatten_dense_tensors(list(tensors))
    if flat.dtype in (torch.float32, torch.float64):
        return flat
    return flat.float() if flat.is_floating_point() else flat.double()


def _take_over(owner: nn.Module, replicas: Sequence[Replica], writes: list[_Write]) -> None:
    """Gives the owner the buffers that all shards wrote alike."""
    for source, name, (value, *_) in writes:
        mine = source._buffers.get(name, _MISSING)
        if _same(mine, value):
            continue
        twin = replicas[0]._twins[id(source)]
        record = twin.records.get(name)
        if record is not None and record.source is not mine:
            record = None  # the owner has another tensor by now
        if record is not None and record.source_moved():
            raise ValueError(
                f"the buffer {_name(owner, source, name)} was written by the shards, and since "
                "then on the module itself, in a hook or by an optimizer; write it in one place"
            )
        if value is _MISSING:
            source._buffers.pop(name, None)
            source._non_persistent_buffers_set.discard(name)
        elif record is not None and isinstance(value, Tensor) and record.takes(value):
            record.source.copy_(value)
        else:
            source._buffers[name] = None if value is None else value.detach()
            if name in twin.transient:
                source._non_persistent_buffers_set.add(name)


# --------------------------------------------------------------------------------------------
# Metrics


class _Bare(Metric):
    """A metric without a state: its attributes are torchmetrics' own book-keeping."""

    def update(self) -> None:
        """Does nothing."""

    def compute(self) -> None:
        """Does nothing."""


_BOOKKEEPING = frozenset(vars(_Bare()))


def _start_metric(twin: _Twin) -> None:
    """Empties a copy's states, without touching lists that it shares with the owner."""
    source, state = twin.source, twin.copy.__dict__
    if isinstance(source, MetricCollection):
        if not source._groups_checked:
            # Members that have equal values after a first update share a state from then on. The
            # few samples of a shard may be equal by chance.
            state.update(_enable_compute_groups=False, _groups={})
    elif isinstance(source, Metric):
        for name, default in source._defaults.items():
            value = getattr(source, name)
            device = value.device if isinstance(value, Tensor) else None
            state[name] = default.clone().to(device) if isinstance(default, Tensor) else []
        state.update(
            _update_count=0, _computed=None, _forward_cache=None, _cache=None, _is_synced=False
        )
        twin.baseline = dict(state)


def _merged_metrics(
    owner: nn.Module, replicas: Sequence[Replica]
) -> list[tuple[Metric, dict[str, Any]]]:
    """The metrics that were updated in shards, and the attributes that they are to have."""
    merged = []
    for key, twin in replicas[0]._twins.items():
        metric = twin.source
        if twin.is_metric and isinstance(metric, Metric):
            parts = [replica._twins[key] for replica in replicas]
            parts = [part for part in parts if part.updated()]
            if parts:
                merged.append((metric, _merged_metric(owner, metric, parts)))
    return merged


def _merged_metric(owner: nn.Module, metric: Metric, parts: list[_Twin]) -> dict[str, Any]:
    states = [metric.__dict__, *(part.copy.__dict__ for part in parts)]
    counts = [state["_update_count"] for state in states]
    merged: dict[str, Any] = {}
    for part in parts:
        for name, value in part.copy.__dict__.items():
            if name in _BOOKKEEPING or name in metric._reductions:
                continue
            before = part.baseline.get(name, _MISSING)
            if value is before or _equal(value, before):
                continue
            # An attribute that the first update settles, such as a task, is no running state.
            settled = before is None or before is _MISSING
            others = (other.copy.__dict__.get(name, _MISSING) for other in parts)
            if not settled or not all(_equal(value, other) for other in others):
                raise _unmergeable(owner, metric, f"update() changes {name!r}, which is no state")
            merged[name] = value
    for name, reduction in metric._reductions.items():
        values = [state[name] for state in states]
        if isinstance(values[0], list) and reduction in (dim_zero_cat, None):
            merged[name] = [item for value in values for item in value]
        elif reduction is dim_zero_cat:
            merged[name] = torch.cat(values)
        elif reduction is dim_zero_sum:
            merged[name] = sum(values[1:], start=values[0])
        elif reduction in (dim_zero_max, dim_zero_min):
            merged[name] = reduction(torch.stack(values))
        elif reduction is dim_zero_mean:  # a mean over updates, as torchmetrics has it
            weighted = [value * count for value, count in zip(values, counts, strict=True)]
            merged[name] = sum(weighted[1:], start=weighted[0]) / sum(counts)
        else:
            raise _unmergeable(
                owner, metric, f"its state {name!r} has no sum, mean, max, min or cat reduction"
            )
    return merged | {"_update_count": sum(counts), "_computed": None}


def _unmergeable(owner: nn.Module, metric: Metric, reason: str) -> ValueError:
    name = _name(owner, metric)
    return ValueError(
        f"the metric {name} ({type(metric).__name__}) cannot be merged from several shards: "
        f"{reason}; update it for all shards at once: yield Once(self.{name}.update, ...)"
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return _same(a, b)
    return a is b or bool(a == b)
