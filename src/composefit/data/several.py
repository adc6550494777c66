"""`Several`: the source that a `CombinedLoader` is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from composefit.data.combining import Place, Turns, rounds
from composefit.data.digests import digest
from composefit.data.loaders import CombinedLoader, apart, together
from composefit.data.rows import Rows, Share
from composefit.data.seeding import key_of, pass_of
from composefit.data.sources import Source, digest_of, same_kind


class Several:
    """Several sources as one, each with a position and a state of its own.

    A rank gets its rows of the batch of each. Samples count as the first has them.

    Args:
        loader: says how they are combined.
        sources: name -> source.
        shares: name -> this rank's share of its batches; None for one process.
    """

    kind = "several loaders"

    def __init__(
        self,
        loader: CombinedLoader,
        sources: dict[str, Source],
        shares: dict[str, Share] | None = None,
    ) -> None:
        self.loader = loader
        self.sources = sources
        self.shares = shares
        self.digest = 0
        self._epoch = -1
        self._loaded = False
        self._places = dict.fromkeys(sources, Place())  # as of the last mark
        self._turns: dict[str, Turns] = {}

    @property
    def per_rank(self) -> bool:
        """See `Source`."""
        return any(source.per_rank for source in self.sources.values())

    def open(self, seed: int, epoch: int, skip: int) -> Iterator[Any]:
        """See `Source`."""
        if not (self._loaded and self._epoch == epoch and skip):
            self._places = dict.fromkeys(self.sources, Place())
        self._epoch, self._loaded = epoch, False
        self._turns = {
            name: Turns(
                name,
                partial(self._begin, name, key_of(seed, i), epoch),
                source.end,
                self._places[name],
            )
            for i, (name, source) in enumerate(self.sources.items())
        }
        first = True
        for found in rounds([*self._turns.values()], self.loader.mode):
            if self.shares is not None and first:
                given = [digest_of(self.sources[name], batch) for name, batch in found.items()]
                self.digest = digest(given)
                first = False
            yield self.loader.batch(found) if self.shares is None else self._divided(found)

    def _begin(self, name: str, seed: int, epoch: int, repeat: int, skip: int) -> Iterator[Any]:
        # A source takes note of it when a pass begins: so must what is saved with its state.
        self._places[name] = Place(repeat, skip)
        return self.sources[name].open(seed, pass_of(epoch, repeat), skip)

    def _divided(self, found: dict[str, Any]) -> Any:
        """This rank's rows of the batch of each, where one of them gives no more than rows."""
        assert self.shares is not None
        if not any(isinstance(batch, Rows) for batch in found.values()):
            return self.loader.batch(found)  # they are all cut later, by who knows how to
        rows = {
            name: batch if isinstance(batch, Rows) else _cut(batch, self.shares[name])
            for name, batch in found.items()
        }
        _refuse_halves(rows)
        first = next(iter(rows.values()))
        batch = self.loader.batch({name: one.batch for name, one in rows.items()})
        return Rows(batch, first.sizes, first.spare, first.counted)

    def mark(self) -> None:
        """See `Source`."""
        for name, one in self._turns.items():
            if one.begun and not self._places[name].over:
                self.sources[name].mark()
            self._places[name] = one.place

    def end(self) -> None:
        """See `Source`."""
        for one in self._turns.values():
            one.close()

    def close(self) -> None:
        """See `Source`."""
        for source in self.sources.values():
            source.close()

    def state_dict(self, ended: bool) -> dict[str, Any]:
        """See `Source`."""
        found = {}
        for name, source in self.sources.items():
            place, turns = self._places[name], self._turns.get(name)
            # One that has not begun is at the end of an earlier epoch.
            done = ended or place.over or (turns is not None and not turns.begun)
            found[name] = {
                "kind": source.kind,
                "place": tuple(place),
                "state": source.state_dict(done),
            }
        return {"epoch": self._epoch, "mode": self.loader.mode, "loaders": found}

    def load_state_dict(self, state: dict[str, Any], position: int) -> None:
        """See `Source`."""
        if state["mode"] != self.loader.mode:
            raise ValueError(
                f"the loaders are combined by {self.loader.mode!r}, but those of the state by "
                f"{state['mode']!r}: give the same mode"
            )
        loaders = state["loaders"]
        if set(loaders) != set(self.sources):
            raise ValueError(
                f"the loaders are {', '.join(self.sources)}, but those of the state are "
                f"{', '.join(loaders)}: give the same names"
            )
        self._epoch, self._loaded, self._turns = state["epoch"], True, {}
        for name, source in self.sources.items():
            same_kind(f"the loader {name!r}", source, loaders[name]["kind"])
            place = self._places[name] = Place(*loaders[name]["place"])
            source.load_state_dict(loaders[name]["state"], place.given)


def _cut(batch: Any, share: Share) -> Rows:
    cuts = {name: share.cut(one) for name, one in apart(batch) if one is not None}
    first = next(iter(cuts.values()))
    whole = together(batch, {name: one.batch for name, one in cuts.items()})
    return Rows(whole, first.sizes, first.spare, first.counted)


def _refuse_halves(rows: Mapping[str, Rows]) -> None:
    """Raise ValueError if a rank has rows of one batch but not of another."""
    first, *others = rows
    for name in others:
        counts, sizes = rows[first].sizes, rows[name].sizes
        if counts and sizes and [*map(bool, counts)] != [*map(bool, sizes)]:
            raise ValueError(
                f"the batches of loaders {first!r} and {name!r} hold {sum(counts)} and "
                f"{sum(sizes)} samples, which come to {counts} and {sizes} on the ranks: each rank "
                f"needs some of both. Use batch sizes of at least {len(sizes)} samples or groups, "
                "and drop_last=True where the last batch is smaller"
            )
