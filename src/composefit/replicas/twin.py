"""A module of the owner's tree and its copy in a replica."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from operator import itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from composefit.metric_types import Metric, MetricCollection
from composefit.replicas.buffers import MISSING, Buffer
from composefit.replicas.rebinding import Rebinding

# What `nn.Module.__init__` puts first into every module's `__dict__`, in this order.
STANDARD = tuple(vars(nn.Module()))

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
hooks_of = itemgetter(*_HOOKS)

_NORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_RNN_LISTS = ("_flat_weights", "_flat_weight_refs")

# Containers up to this length are searched for modules at every refresh, longer ones only where
# they have grown: a list of outputs may hold thousands of tensors.
_SHORT = 32


class Twin:
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
        self.records: dict[str, Buffer] = {}
        self.statistics: tuple[str, ...] = ()
        self.plain = False  # whether there are others
        self.transient: set[str] = set()  # names of non-persistent buffers
        self.own: dict[str, Any] = {name: OrderedDict() for name in _HOOKS}
        self.hooks = hooks_of(self.own)
        self.own["_buffers"] = self.buffers
        self.own["_non_persistent_buffers_set"] = self.transient
        self.is_metric = isinstance(source, (Metric, MetricCollection))
        self.baseline: dict[str, Any] = {}  # a metric's attributes before the step

    def scan(self, attributes: dict[str, Any], rebind: Rebinding, anew: bool) -> None:
        """Rebinds the attributes that are others than the last time, or all of them."""
        seen, self.seen = self.seen, dict(islice(attributes.items(), self.skip, None))
        for name in seen.keys() - self.seen.keys():
            self.rebound.pop(name, None)
            self.growing.pop(name, None)
            self.changed.add(name)
        for name, value in self.seen.items():
            other = value is not seen.get(name, MISSING)
            if (other or anew) and name not in STANDARD:
                if isinstance(value, (list, dict, set)):
                    self.growing[name] = (value, len(value))
                else:
                    self.growing.pop(name, None)
                self._rebind(name, value, rebind)
            if other:
                self.changed.add(name)

    def scan_containers(self, rebind: Rebinding) -> None:
        """Looks into the containers that may have been filled in place."""
        for name, (value, length) in self.growing.items():
            size = len(value)
            grown = size > length and rebind.holds(_last(value, size - length))
            if grown or name in self.rebound or size <= _SHORT:
                self._rebind(name, value, rebind)
            if size != length:
                self.growing[name] = (value, size)

    def _rebind(self, name: str, value: Any, rebind: Rebinding) -> None:
        rebound = rebind.contents(value) if name in self.growing else rebind(value)
        if rebound is not self.rebound.get(name, value):
            self.changed.add(name)
        if rebound is value:
            self.rebound.pop(name, None)
        else:
            self.rebound[name] = rebound

    def read_hooks(self, hooks: Iterable[dict[int, Any]], rebind: Rebinding) -> None:
        """Gives the copy the owner's hooks."""
        for mine, found in zip(self.hooks, hooks, strict=True):
            mine.clear()
            mine.update((key, rebind(hook)) for key, hook in found.items())

    def read_slots(self, rebind: Rebinding) -> None:
        """Gives the copy what is in the source's slots."""
        for name in self.slots:
            value = getattr(self.source, name, MISSING)
            if value is not MISSING:
                object.__setattr__(self.copy, name, rebind(value))
            elif hasattr(self.copy, name):
                object.__delattr__(self.copy, name)

    def carry_over(self, attributes: dict[str, Any]) -> None:
        """Within a step: gives the copy what has changed on the owner, and nothing else."""
        state = self.copy.__dict__
        state["_parameters"] = attributes["_parameters"].copy()
        state["_modules"] = self.modules.copy()
        if self.is_metric or not self.changed:
            return  # a metric's states are the shard's own until they are merged
        for name in self.changed - self.extras.keys():
            if name in self.seen:
                state[name] = self.rebound.get(name, self.seen[name])
            else:
                state.pop(name, None)

    def change(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A statistic at the start of the step and now, or None if it is none here."""
        record, now = self.records.get(name), self.buffers.get(name)
        if record is None or record.before is None or now is None:
            return None
        return record.before, now

    def written(self) -> Iterator[str]:
        """Names of the buffers, statistics left out, that this shard has written."""
        missing = 0
        for name, given in self.given.items():
            record = self.records.get(name)
            if record is not None and record.statistic:
                continue
            now = self.buffers.get(name, MISSING)
            missing += now is MISSING
            if now is not given or (record is not None and record.written()):
                yield name
        if len(self.buffers) + missing != len(self.given):
            yield from (name for name in self.buffers if name not in self.given)


def statistics_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the buffers that merge as weighted means of their changes."""
    declared = getattr(module, "running_statistics", ())
    if not isinstance(declared, tuple) or not all(isinstance(name, str) for name in declared):
        declared = ()
    return (*_NORM_STATISTICS, *declared) if isinstance(module, _NormBase) else declared


def _slots(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the class's slots; what is in them is not in ``__dict__``."""
    names: list[str] = []
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _last(container: Any, count: int) -> Iterable[Any]:
    """The ``count`` items that were added last; all of a set, which has no order."""
    if isinstance(container, dict):
        ends = (reversed(container.keys()), reversed(container.values()))
        return chain.from_iterable(islice(end, count) for end in ends)
    return islice(reversed(container), count) if isinstance(container, list) else container
