"""A replica: a module tree of its own around the owner's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from composefit.replicas.buffers import Buffer
from composefit.replicas.cloning import Cloning
from composefit.replicas.containers import Container, is_copied
from composefit.replicas.metrics import start_metric
from composefit.replicas.naming import path_of
from composefit.replicas.rebinding import Rebinding
from composefit.replicas.twin import STANDARD, Twin, hooks_of, statistics_of

_F = TypeVar("_F")

_ATTEMPTS = 10  # to read the owner: one more than usual for each time that its tree has changed


class Replica:
    """A shallow copy of a module tree.

    It shares parameters, plain attributes and hooks with its owner, and owns the modules
    themselves, their buffers, and shallow copies of their lists, dicts and sets. Whatever refers to
    a module of the tree (registered children, plain attributes, lists, tuples, dicts and sets,
    bound methods, partials, closures, hooks, weak references) refers to the replica's instead;
    modules that are found there and are not registered, such as a teacher hidden in a list, are
    replicated too. A compiled module runs the
    compiled code on the replica. States of torchmetrics metrics start empty.

    Args:
        owner: the root of the tree.
        overrides: attributes that the replica's root has in place of the owner's, or besides them.

    Raises:
        ValueError: a lazy module is not initialised yet.
        TypeError: a scripted module holds buffers, which live in C++ and cannot be divided.

    Example:
        >>> from composefit.replicas import merge
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
        self.twins: dict[int, Twin] = {}  # by the id of the owner's module
        self._known: dict[int, Twin] = {}
        self._pending: list[Twin] = []
        self._buffers: dict[int, Buffer] = {}
        self.containers: dict[int, Container] = {}  # by the id of the owner's list, dict or set
        self._rebind = Rebinding(self._copy_of)
        self._refreshes = 0
        self._wire()
        self.module: nn.Module = self.twins[id(owner)].copy
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
        owners: dict[int, Any] = {id(twin.copy): twin.source for twin in self.twins.values()}
        owners.update((id(buffer.clone), buffer.source) for buffer in self._buffers.values())
        swap = Rebinding(lambda value: owners.get(id(value), value), extra=(Tensor,))
        swap.containers = {id(held.copy): held.source for held in self.containers.values()}
        rebound: _F = swap(function)
        return rebound

    # Structure: which modules there are, and which attributes refer to them.

    def _copy_of(self, module: nn.Module) -> nn.Module:
        twin = self.twins.get(id(module))
        if twin is None:
            if isinstance(module, torch.jit.ScriptModule):
                return _shareable(self._owner, module)
            twin = self._known.get(id(module)) or Twin(module)
            if type(twin.copy) is not type(module):  # parametrizations change a module's class
                object.__setattr__(twin.copy, "__class__", type(module))
            self.twins[id(module)] = twin
            self._pending.append(twin)
        return twin.copy

    def _wire(self) -> None:
        """Walks the owner's tree, keeps the copies that exist and makes those that are missing."""
        self._known |= self.twins
        self.twins = {}
        self._pending.clear()
        self._rebind.forget()
        self._copy_of(self._owner)
        for twin in self._pending:  # grows while modules are found
            self._scan(twin)
        # Not reached if a scan has raised: what is pending has the next refresh wire it all again.
        self._pending.clear()
        self._known = {}
        self.twins[id(self._owner)].extras = self._overrides
        for twin in self.twins.values():  # before hooks are read, which may hold a container
            self._containers_of(twin)

    def _scan(self, twin: Twin) -> None:
        attributes = twin.source.__dict__
        for name, tensor in (*attributes["_parameters"].items(), *attributes["_buffers"].items()):
            if is_lazy(tensor):
                raise ValueError(
                    f"{path_of(self._owner, twin.source, name)} is not initialised yet, and shards "
                    "that run side by side would each initialise it; run one forward first: "
                    "module(batch)"
                )
        twin.statistics = statistics_of(twin.source)
        twin.children = dict(attributes["_modules"])
        twin.modules = {
            name: None if child is None else self._copy_of(child)
            for name, child in twin.children.items()
        }
        twin.skip = len(STANDARD) if tuple(islice(attributes, len(STANDARD))) == STANDARD else 0
        twin.scan(attributes, self._rebind, anew=True)
        for hooks in filter(None, hooks_of(attributes)):
            self._rebind(hooks)  # a hook may be the only one to know a module
        for name in twin.slots:
            self._rebind(getattr(twin.source, name, None))

    def _containers_of(self, twin: Twin) -> dict[str, Container]:
        """Name -> container of which a copy stands in this module's copy."""
        found: dict[str, Container] = {}
        if twin.is_metric:
            return found  # its lists are states
        for name, (value, _) in twin.growing.items():
            held = self.containers.get(id(value))
            if held is None:
                if name in twin.lists or not is_copied(value):
                    continue
                held = self.containers[id(value)] = Container(value)
                self._rebind.containers[id(value)] = held.copy
                self._rebind.forget()  # a function that was rebuilt may hold it
            found[name] = held
        return found

    # State: what the owner's modules hold now.

    def _read(self, within_step: bool) -> bool:
        """Copies the owner's state; False if modules have come or gone and it must be wired."""
        # Writes through `.data` move no version counter. As a rule they begin early and go on:
        # comparing values at refreshes 1, 2, 4, 8, ... finds them at little cost, and where one
        # was found, every refresh does.
        thorough = not self._refreshes & (self._refreshes - 1)
        cloning = Cloning(self._buffers, thorough, within_step)
        metrics: list[Twin] = []
        used: set[int] = set()
        for twin in self.twins.values():
            attributes = twin.source.__dict__
            if attributes["_modules"] != twin.children:
                return False
            if len(attributes) != len(twin.seen) + twin.skip or not all(
                map(is_, islice(attributes.values(), twin.skip, None), twin.seen.values())
            ):
                twin.scan(attributes, self._rebind, anew=False)
            if twin.growing:
                twin.scan_containers(self._rebind)
            hooks = hooks_of(attributes)
            keep = within_step and bool(twin.copy.__dict__)
            if (any(hooks) or any(twin.hooks)) and not keep:
                twin.read_hooks(hooks, self._rebind)
            if self._pending:
                return False
            if keep:
                twin.carry_over(attributes)
                if twin.growing:
                    for name, held in self._containers_of(twin).items():
                        mine = held.renew(twin.rebound.get(name, held.source))
                        if name in twin.changed:
                            twin.copy.__dict__[name] = mine
            else:
                state = attributes | twin.own
                if twin.rebound or twin.extras:
                    state |= twin.rebound | twin.extras
                state["_parameters"] = attributes["_parameters"].copy()
                state["_modules"] = twin.modules.copy()
                if twin.growing:
                    for name, held in self._containers_of(twin).items():
                        state[name] = held.fill(twin.rebound.get(name, held.source))
                        used.add(id(held.source))
                for name in twin.lists:
                    state[name] = list(state[name])
                object.__setattr__(twin.copy, "__dict__", state)
                if twin.slots:
                    twin.read_slots(self._rebind)
                if twin.is_metric:
                    metrics.append(twin)
            if attributes["_buffers"] or twin.buffers:
                cloning.place(twin)
            if twin.changed:
                twin.changed.clear()
        if cloning.anew:  # forget those that the owner has no more
            records = (record for twin in self.twins.values() for record in twin.records.values())
            self._buffers = {id(record.source): record for record in records}
        if not within_step and len(used) != len(self.containers):
            self.containers = {key: self.containers[key] for key in used}
            copies = {key: held.copy for key, held in self.containers.items()}
            self._rebind.containers = copies
        cloning.fill()
        for twin in metrics:
            start_metric(twin)
        return True


def _shareable(owner: nn.Module, module: torch.jit.ScriptModule) -> nn.Module:
    if next(module.buffers(), None) is None:
        return module  # nothing that a forward could write
    raise TypeError(
        f"{path_of(owner, module)} is a scripted module with buffers, which live in C++ and cannot "
        "be replicated; use the Python module it was made from, or, if it is not trained, "
        "torch.jit.freeze(module.eval())"
    )
