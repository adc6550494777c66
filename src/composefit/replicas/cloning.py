"""Reading the owner's buffers into the clones of a replica."""

from __future__ import annotations

from operator import is_

import torch
from torch import Tensor

from composefit.replicas.buffers import MISSING, Buffer
from composefit.replicas.twin import Twin


class Cloning:
    """One reading of the owner's buffers into a replica's clones."""

    def __init__(self, known: dict[int, Buffer], thorough: bool, within_step: bool) -> None:
        """Begins a reading.

        Args:
            known: the buffers that have clones already, by the id of their source.
            thorough: whether written clones are to be found by their values too.
            within_step: whether clones stay in place whose sources are what they were.
        """
        self._known = known
        self._thorough = thorough
        self._within_step = within_step
        # For each source seen so far, its buffer and whether the clone is to be put in place: one
        # under two names stays one.
        self._found: dict[int, tuple[Buffer, bool]] = {}
        self._stale: list[Buffer] = []  # clones still to be filled

    @property
    def anew(self) -> bool:
        """Whether some module's buffers were not those of the last reading."""
        return bool(self._found)

    def place(self, twin: Twin) -> None:
        """Gives a copy its buffers; they have their values after `fill`."""
        if self._within_step or not self._reuse(twin):
            self._read(twin)

    def fill(self) -> None:
        """Copies the owner's values into the clones, without a graph."""
        if not (stale := self._stale):
            return
        with torch.no_grad():
            torch._foreach_copy_([b.clone for b in stale], [b.source for b in stale])
            kept = [(b.before, b.clone) for b in stale if b.before is not None]
            if kept:
                torch._foreach_copy_([before for before, _ in kept], [clone for _, clone in kept])
        for buffer in stale:
            buffer.note()

    def _reuse(self, twin: Twin) -> bool:
        """Puts the same clones into place, if the owner's buffers are the same tensors."""
        theirs = twin.source._buffers
        if theirs.keys() != twin.sources.keys() or not all(
            map(is_, theirs.values(), twin.sources.values())
        ):
            return False
        for record in twin.records.values():
            if not record.fits():
                return False
            if record.dense:
                record.remember(self._thorough)
                self._stale.append(record)
        twin.buffers.clear()
        twin.buffers.update(twin.given)
        if twin.transient != twin.source._non_persistent_buffers_set:
            twin.transient.clear()
            twin.transient.update(twin.source._non_persistent_buffers_set)
        return True

    def _read(self, twin: Twin) -> None:
        """Makes the clones that are missing."""
        if not self._within_step:
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
                if not self._within_step or source is not twin.given.get(name, MISSING):
                    twin.buffers[name] = twin.given[name] = source
                    twin.records.pop(name, None)
                continue
            if id(source) not in self._found:
                self._found[id(source)] = self._record(source, name in twin.statistics)
            record, renewed = self._found[id(source)]
            if renewed:
                twin.buffers[name] = twin.given[name] = record.clone
                twin.records[name] = record

    def _record(self, source: Tensor, statistic: bool) -> tuple[Buffer, bool]:
        record = self._known.get(id(source))
        if record is not None and record.source is not source:
            record = None  # another tensor had this id
        if record is not None and self._within_step and not record.moved():
            return record, False
        if record is None or not record.fits():
            record = Buffer(source, statistic)
        if record.dense:
            record.remember(self._thorough)
            self._stale.append(record)
        return record, True
