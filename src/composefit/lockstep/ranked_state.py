"""What a step leaves on a module that each rank has of its own: merged, compared, or put back.

A rank with several shards runs them on replicas, one with a single shard on the module itself. Both
must come to the same: normalisation statistics merge, other buffers must be written alike, and what
a child's forward sets as an attribute ends with the step.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from composefit.lockstep import messages
from composefit.metric_types import Metric, MetricCollection
from composefit.module import LoopModule
from composefit.ranks import World
from composefit.replicas import path_of, statistics_of

#: Buffers up to this size together are looked at for writes that no version counter tells of.
THOROUGH_BYTES = 2**28

#: What a rank without samples says: it has written nothing that counts.
SILENT = -1.0

_Key = tuple[int, str]  # of a buffer: the id of its module, and its name


class Part:
    """A module of the tree, and what is known of it from one step to the next."""

    __slots__ = ("children", "module", "seen", "state", "statistics")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.state = module.__dict__
        self.children = dict(self.state["_modules"])
        self.statistics = frozenset(statistics_of(module))
        self.seen: dict[str, tuple[Any, int]] = {}  # its buffers, and their versions


class Parts:
    """All modules of a tree, walked again only where a module has come or gone.

    Args:
        owner: its root.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.all: list[Part] = []
        self._names: dict[_Key, str] = {}

    def look(self) -> None:
        """Take note of the tree as it is now."""
        for part in self.all:
            if part.state["_modules"] != part.children:
                break
        else:
            if self.all:
                return
        known = {id(part.module): part for part in self.all}
        self.all = [Part(module) for module in self.owner.modules()]
        self._names.clear()
        for part in self.all:
            if (before := known.get(id(part.module))) is not None:
                part.seen = before.seen

    def name(self, key: _Key) -> str | None:
        """The qualified name of a buffer; None for one of a module that is not in the tree."""
        if key not in self._names:
            found = next((part.module for part in self.all if id(part.module) == key[0]), None)
            if found is None:
                return None
            self._names[key] = path_of(self.owner, found, key[1])
        return self._names[key]


class RankedBuffers:
    """The buffers of a module that each rank has of its own: merged, or compared.

    A write is recognised by the tensor's identity and version counter. One through `.data` moves no
    counter: values are looked at too in the steps 1, 2, 4, 8, ..., and always in buffers where such
    a write was found. What is written at a barrier or between steps is not compared, since code
    there runs alike on all ranks.

    Args:
        parts: of the module.
        world: the ranks.
    """

    def __init__(self, parts: Parts, world: World) -> None:
        self.parts = parts
        self.world = world
        self._statistics: list[Tensor] = []
        self._before: list[Tensor] = []
        self._dirty: dict[_Key, Any] = {}  # written in this step; the value it has now
        self._left: set[_Key] = set()  # written before, when nobody asked any more
        self._last: dict[str, int] = {}
        self._sums: dict[int, tuple[Any, int, int]] = {}
        self._behind: set[_Key] = set()
        self._thorough = False
        self._values: dict[_Key, int] = {}
        self._steps = 0

    @property
    def differ(self) -> bool:
        """Whether there are statistics that a step changes on each rank by itself."""
        return bool(self._statistics)

    # -- statistics ----------------------------------------------------------------------------

    def begin(self, training: bool) -> None:
        """Before a step: take note of all buffers."""
        self._left.update(self._dirty)
        self._dirty.clear()
        self._sums.clear()
        self._steps += 1
        statistics: dict[int, Tensor] = {}
        thorough = not self._steps & (self._steps - 1)
        self._values.clear()
        room = THOROUGH_BYTES
        for part in self.parts.all:
            buffers = part.state["_buffers"]
            if not buffers and not part.seen:
                continue
            merges = part.statistics if training or part.module.training else frozenset()
            part.seen = seen = {}
            for name, buffer in buffers.items():
                if name in merges and buffer is not None:
                    statistics.setdefault(id(buffer), buffer)
                    continue
                seen[name] = (buffer, _version(buffer))
                key = id(part.module), name
                if isinstance(buffer, Tensor) and (
                    thorough or key in self._behind or buffer.is_inference()
                ):
                    room -= buffer.numel() * buffer.element_size()
                    if room >= 0:
                        self._values[key] = _crc(buffer)
        self._statistics = list(statistics.values())
        self._before = [buffer.clone() for buffer in self._statistics]

    def end(self, share: float) -> None:
        """After a step: statistics become those before it plus the weighted mean of changes.

        Args:
            share: of this rank's samples in all.
        """
        with torch.no_grad():
            changes = [
                (now - before).to(_wide(now.dtype)) * share
                for now, before in zip(self._statistics, self._before, strict=True)
            ]
            self.world.add_up_(changes)
            for now, before, change in zip(self._statistics, self._before, changes, strict=True):
                total = before.to(change.dtype) + change
                now.copy_(total if now.is_floating_point() else total.round())
        self._before = []

    # -- what must be written alike ------------------------------------------------------------

    def look(self, replicas: Sequence[Any]) -> None:
        """Take note of what this rank's shards have written.

        Args:
            replicas: of this rank's shards with samples; the first one's buffers count, since all
                of them are alike here. Empty where the shard runs on the module itself.
        """
        if not replicas:
            for key, value in self._writes():
                self._dirty[key] = value
        for replica in replicas[:1]:
            for twin in replica.twins.values():
                for name in twin.written():
                    self._dirty[id(twin.source), name] = twin.buffers.get(name)

    def pass_over(self) -> None:
        """What was written since the last look is no shard's."""
        for key, _ in self._writes():
            self._dirty.pop(key, None)
            self._values.pop(key, None)

    def written(self, replicas: Sequence[Any], spare: bool) -> float:
        """A checksum of what was written in this step, and of what nobody has asked for yet.

        Returns:
            0 for nothing, `SILENT` where this rank's shards do not count.
        """
        if spare:
            self._dirty.clear()
            self._left.clear()
            self._last = {}
            return SILENT
        self.look(replicas)
        left = {key: self._now(key) for key in self._left} if self._left else {}
        self._left.clear()
        found: dict[str, int] = {}
        for key, value in (left | self._dirty).items():
            if (name := self.parts.name(key)) is not None:
                found[name] = self._sum(value)
        self._last = found
        total = 0
        for name in sorted(found):
            total = zlib.crc32(f"{name} {found[name]}".encode(), total) or 1
        return float(total)

    def compare(self, checksums: Sequence[float]) -> None:
        """Refuse buffers that ranks wrote differently.

        Args:
            checksums: what `written` gave, on each rank.

        Raises:
            RuntimeError: it names the first and says how to write it.
        """
        if len({value for value in checksums if value != SILENT}) <= 1:
            return
        theirs = self.world.gather("the buffers that the step has written", self._last)
        ranks = [rank for rank, value in enumerate(checksums) if value != SILENT]
        for name in dict.fromkeys(name for rank in ranks for name in theirs[rank]):
            values = [theirs[rank].get(name) for rank in ranks]
            other = next((r for r, v in zip(ranks, values, strict=True) if v != values[0]), None)
            if other is not None:
                raise messages.differing_writes(name, f"ranks {ranks[0]} and {other} differ")

    def take_over(self, source: int, spare: bool) -> None:
        """What the ranks with samples have written becomes so on those without.

        Args:
            source: a rank with samples.
            spare: this one has none.
        """
        values: dict[str, Any] | None = None
        if self.world.rank == source:
            values = {}
            for key in self._dirty:
                if (name := self.parts.name(key)) is not None:
                    value = self._now(key)
                    values[name] = value.detach().cpu() if isinstance(value, Tensor) else value
        found = self.world.gather("the buffers that the step has written", values)[source]
        if not spare:
            return
        with torch.no_grad():
            for name, value in found.items():
                path, _, last = name.rpartition(".")
                module = self.parts.owner.get_submodule(path)
                buffers = module._buffers
                mine = buffers.get(last)
                self._dirty[id(module), last] = None  # to be asked for as on the others
                if isinstance(mine, Tensor) and isinstance(value, Tensor) and _fits(mine, value):
                    mine.copy_(value)
                else:
                    buffers[last] = value if value is None else value.to(self.world.device)

    def _writes(self) -> Iterator[tuple[_Key, Any]]:
        """Buffers of the module itself that were written since the last look, and their values."""
        for part in self.parts.all:
            buffers = part.state["_buffers"]
            if not buffers and not part.seen:
                continue
            seen = part.seen
            for name, (before, version) in list(seen.items()):
                now = buffers.get(name)
                key = id(part.module), name
                if now is not before or _version(now) != version:
                    seen[name] = (now, _version(now))
                    if key in self._values:
                        self._values[key] = _crc(now)
                elif not self._moved(key, now):
                    continue
                yield key, now
            if len(buffers) > len(seen):
                for name, now in buffers.items():
                    if name not in seen and name not in part.statistics:
                        seen[name] = (now, _version(now))
                        yield (id(part.module), name), now

    def _moved(self, key: _Key, now: Any) -> bool:
        """Whether it has other values, with the same version."""
        before = self._values.get(key)
        if before is None:
            return False
        value = _crc(now)
        if value == before:
            return False
        self._values[key] = value
        self._behind.add(key)
        return True

    def _now(self, key: _Key) -> Any:
        for part in self.parts.all:
            if id(part.module) == key[0]:
                return part.state["_buffers"].get(key[1])
        return None

    def _sum(self, value: Any) -> int:
        """Its checksum, computed once for each version."""
        known = self._sums.get(id(value))
        version = _version(value)
        if known is None or known[0] is not value or known[1] != version or version < 0:
            known = self._sums[id(value)] = (value, version, _crc(value))
        return known[2]


class LoneAttributes:
    """Attributes that a rank's only shard sets on the module's children: gone after the step.

    A replica, on which a shard runs where a rank has several, is dropped with what its forwards
    have set. Here they are put back: what is kept from step to step must not depend on how many
    shards a rank has, nor be another thing on each rank. Metrics keep what they have counted.

    Args:
        parts: of the module.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._of: list[Part] = []
        self._states: list[dict[str, Any]] = []
        self._aside: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def begin(self) -> None:
        """Before a step."""
        parts = self.parts
        if self._of is not parts.all:
            self._of = parts.all
            counting = {
                id(inner)
                for part in parts.all
                if isinstance(part.module, Metric | MetricCollection)
                for inner in part.module.modules()
            }
            if isinstance(parts.owner, LoopModule):  # which refuses them itself
                counting.add(id(parts.owner))
            self._states = [p.state for p in parts.all if id(p.module) not in counting]
        self._note()

    def _note(self) -> None:
        self._before = [(state, state.copy()) for state in self._states]

    def end(self) -> None:
        """After a step."""
        self._take()
        self._before = []

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around a barrier: its code sees the module without them, and what it sets is kept."""
        self._aside = self._take()
        try:
            yield
        finally:
            self._note()
            self._put(self._aside)
            self._aside = []

    @contextmanager
    def back_in(self) -> Iterator[None]:
        """Within `aside`: a part of the step runs again, and sees and sets them."""
        self._note()
        self._put(self._aside)
        try:
            yield
        finally:
            self._aside = self._take()

    @staticmethod
    def _put(own: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        for state, changes in own:
            for name, value in changes.items():
                if value is _GONE:
                    state.pop(name, None)
                else:
                    state[name] = value

    def _take(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Put the module back as it was; returns what was set, for each module."""
        found = []
        for state, before in self._before:
            if len(state) == len(before) and all(map(is_, state.values(), before.values())):
                continue
            changes = {n: v for n, v in state.items() if v is not before.get(n, _GONE)}
            changes |= {name: _GONE for name in before if name not in state}
            found.append((state, changes))
            state.clear()
            state.update(before)
        return found


_GONE: Any = object()


def _crc(value: Any) -> int:
    """A checksum of a buffer's numbers, shape and dtype."""
    if not isinstance(value, Tensor):
        return 1
    dense = value.detach() if value.layout is torch.strided else value.detach().to_dense()
    flat = dense.contiguous().reshape(-1).view(torch.uint8)
    kind = f"{tuple(value.shape)} {value.dtype}".encode()
    return zlib.crc32(flat.cpu().numpy().data, zlib.crc32(kind))


def _version(value: Any) -> int:
    """Its version counter; -1 where it has none."""
    if not isinstance(value, Tensor) or value.is_inference():
        return -1
    return value._version


def _fits(mine: Tensor, value: Tensor) -> bool:
    return mine.shape == value.shape and mine.dtype is value.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float64
