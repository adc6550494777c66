"""`OwnBatches`: a rank's own batches, whose number differs between ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from composefit.data.rows import Rows, Share
from composefit.data.seeding import key_of
from composefit.data.sources import Source

_OWN = 23  # sets these keys apart from all others


class OwnBatches:
    """The batches of one rank, for as long as any rank has some.

    Args:
        source: this rank's.
        name: what the user knows it as, for messages.
        share: which rank of how many.
        agree: whether this rank has a batch -> whether any rank has one; asked before each.
        together: the epoch ends as soon as one rank has no batch.
    """

    digest = 0
    per_rank = True

    def __init__(
        self,
        source: Source,
        name: str,
        share: Share,
        agree: Callable[[bool], bool],
        together: bool,
    ) -> None:
        self.source = source
        self.kind = source.kind
        self.name = name
        self.share = share
        self.agree = agree
        self.together = together
        self._epoch = -1
        self._given = 0  # batches of this rank's own
        self._own = 0  # of them, those that were marked
        # The mark before, from which the last batch can be had again: a rank that has run out
        # needs one to take part with, also when it is resumed.
        self._before: dict[str, Any] = {"own": 0, "source": None}
        self._loaded = False

    def open(self, seed: int, epoch: int, skip: int) -> Iterator[Any]:
        """See `Source`."""
        nothing = object()
        spare: Any = nothing
        if self.share.rank:
            seed = key_of(seed, _OWN, self.share.rank)
        if not (self._loaded and epoch == self._epoch and skip):
            self._own = 0
            self._before = {"own": 0, "source": None}
        self._loaded = False
        self._epoch, self._given = epoch, self._own
        batches = iter(self.source.open(seed, epoch, self._own))
        while True:
            batch = next(batches, nothing)
            here = batch is not nothing
            if self.together:
                if self.agree(not here):
                    return
            elif not self.agree(here):
                return
            if here:
                self._given += 1
                spare = batch
            elif spare is nothing and self._own:
                for again in self._again(seed, epoch):
                    spare = again
            if spare is nothing:
                raise ValueError(
                    f"{self.name} gave no batch at all on rank {self.share.rank}, but other ranks "
                    "have some: each needs at least one an epoch. Divide the data over fewer "
                    "ranks, or in smaller parts"
                )
            yield Rows(spare, None, spare=not here)

    def _again(self, seed: int, epoch: int) -> Iterator[Any]:
        """Of a rank that had run out when its state was saved: the last batches before that."""
        self.source.load_state_dict(self._before["source"], self._before["own"])
        yield from self.source.open(seed, epoch, self._before["own"])

    def mark(self) -> None:
        """See `Source`."""
        if self._given > self._own:
            try:
                state = self.source.state_dict(False)
            except ValueError:  # has none that can be had, which matters only to who saves one
                state = None
            self._before = {"own": self._own, "source": state}
            self.source.mark()
            self._own = self._given

    def end(self) -> None:
        """See `Source`."""
        self.source.end()

    def close(self) -> None:
        """See `Source`."""
        self.source.close()

    def state_dict(self, ended: bool) -> dict[str, Any]:
        """See `Source`."""
        return {
            "epoch": self._epoch,
            "own": self._own,
            "before": self._before,
            "source": self.source.state_dict(ended),
        }

    def load_state_dict(self, state: dict[str, Any], position: int) -> None:
        """See `Source`."""
        self._epoch, self._own, self._before = state["epoch"], state["own"], state["before"]
        self.source.load_state_dict(state["source"], state["own"])
        self._loaded = True
