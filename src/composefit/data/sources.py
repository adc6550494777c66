"""Sources: what any loader is to `Batches`, one class for each kind."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any, Protocol

from composefit.data.digests import digest
from composefit.data.quiet import Quiet, set_states
from composefit.data.rows import Rows
from composefit.data.seeding import GeneratorsKept, key_of, seed_generators

_ITEM = 17  # sets these keys apart from those of a DataLoader that the iterable may have inside


class Source(Protocol):
    """Batches of one epoch after another, from any position of an epoch.

    Attributes:
        kind: what it is, in words; a state is for the same kind only.
        digest: of the first batch of the epoch, before a rank's rows were taken of it, if these are
            all that it gives.
    """

    kind: str
    digest: int

    @property
    def per_rank(self) -> bool:
        """The state is this rank's alone."""

    def open(self, seed: int, epoch: int, skip: int) -> Iterator[Any]:
        """The batches of an epoch but for the first `skip`, which were trained on.

        After `load_state_dict`, that is the epoch that was saved or a later one.
        """

    def mark(self) -> None:
        """All that was handed out has been trained on: a state is as of now."""

    def end(self) -> None:
        """The epoch is over, or is given up: nothing of it is left running."""

    def close(self) -> None:
        """Nothing is left running at all."""

    def state_dict(self, ended: bool) -> dict[str, Any]:
        """The state as of the last mark; `ended` if no batch of the epoch is left."""

    def load_state_dict(self, state: dict[str, Any], position: int) -> None:
        """Continue with the next `open` from a saved state, behind `position` batches."""


class Items:
    """A list or tuple of batches."""

    kind = "a list"
    digest = 0
    per_rank = False

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def open(self, seed: int, epoch: int, skip: int) -> Iterator[Any]:
        """See `Source`."""
        return islice(self.items, skip, None)

    def mark(self) -> None:
        """See `Source`."""

    def end(self) -> None:
        """See `Source`."""

    def close(self) -> None:
        """See `Source`."""

    def state_dict(self, ended: bool) -> dict[str, Any]:
        """See `Source`."""
        return {}

    def load_state_dict(self, state: dict[str, Any], position: int) -> None:
        """See `Source`."""


class Iterated(Items):
    """Anything that can be iterated over; what it draws is seeded batch by batch.

    A position in it is found again by iteration, or in a sequence by its index.
    """

    kind = "an iterable"

    #: So many batches of an epoch show whether it draws random numbers.
    TRIAL = 2

    def __init__(self, items: Iterable[Any]) -> None:
        self.iterable = items
        self._kept = GeneratorsKept()
        self._draws = False
        self._late: dict[str, Any] | None = None  # where it began to, if later than the trial

    def open(self, seed: int, epoch: int, skip: int) -> Iterator[Any]:
        """See `Source`."""
        kept, key = self._kept, key_of(seed, epoch, _ITEM)
        iterator: Iterator[Any]
        # An __iter__ of its own may give another order than its indices.
        indexed = getattr(type(self.iterable), "__iter__", None) in _ITERATES_BY_INDEX
        with kept:
            seed_generators(key)
            if indexed and skip:
                iterator = _from(self.iterable, skip)
            else:
                iterator = iter(self.iterable)
                for number in range(skip):
                    self._seed(key, epoch, number)
                    if next(iterator, kept) is kept:
                        return
        quiet = Quiet()
        try:
            for number in count(skip):
                if self._draws or number < self.TRIAL or not quiet.ready():
                    with kept:
                        self._seed(key, epoch, number)
                        before = None if self._draws else kept.look()
                        batch = next(iterator, kept)
                        self._draws = self._draws or kept.look() != before
                else:
                    batch = next(iterator, kept)
                    if quiet.drew():
                        self._draws = True
                        self._late = {"epoch": epoch, "number": number, **quiet.before}
                if batch is kept:
                    return
                yield batch
        finally:
            if self.iterable is not iterator and isinstance(iterator, Generator):
                iterator.close()  # its `finally` runs now, even if a traceback holds on to it

    def _seed(self, key: int, epoch: int, number: int) -> None:
        seed_generators(_numbered(key, number))
        late = self._late
        if late is not None and (late["epoch"], late["number"]) == (epoch, number):
            set_states(late)

    def state_dict(self, ended: bool) -> dict[str, Any]:
        """See `Source`."""
        return {"draws": self._draws, "late": self._late}

    def load_state_dict(self, state: dict[str, Any], position: int) -> None:
        """See `Source`."""
        self._draws, self._late = state["draws"], state["late"]


def _numbered(key: int, number: int) -> int:
    return (key + number) % 2**64


_ITERATES_BY_INDEX = (Sequence.__iter__, list.__iter__, tuple.__iter__, range.__iter__)


def _from(items: Any, position: int) -> Iterator[Any]:
    for index in count(position):
        try:
            item = items[index]
        except IndexError:
            return
        yield item


class OwnState(Iterated):
    """A loader, not torch's, with `state_dict` and `load_state_dict`.

    Its state is taken at every mark; after it was loaded, iteration must go on behind the batches
    handed out before, or where the state is that of the end of an epoch, begin the next one.
    """

    kind = "a loader with a state of its own"

    def __init__(self, items: Any) -> None:
        super().__init__(items)
        self._state: Any = None
        self._loaded = False  # and not iterated over since
        self._earlier = False  # it has not come to the end of its epoch, but may be there

    def open(self, seed: int, epoch: int, skip: int) -> Iterator[Any]:
        """See `Source`."""
        kept, key = self._kept, key_of(seed, epoch, _ITEM)
        earlier, self._earlier, self._loaded = self._earlier, True, False
        with kept:
            seed_generators(key)
            iterator = iter(self.iterable)
        for number in count(skip):
            with kept:
                seed_generators(_numbered(key, number))
                batch = next(iterator, kept)
                if batch is kept and earlier and number == 0:
                    # It was at the end of the earlier epoch, and came to it only now.
                    iterator = iter(self.iterable)
                    batch = next(iterator, kept)
            if batch is kept:
                self._earlier = False
                return
            yield batch

    def mark(self) -> None:
        """See `Source`."""
        self._state = copy.deepcopy(self.iterable.state_dict())  # type: ignore[attr-defined]

    def state_dict(self, ended: bool) -> dict[str, Any]:
        """See `Source`."""
        if ended and not self._loaded:
            self.mark()
        return {"loader": self._state}

    def load_state_dict(self, state: dict[str, Any], position: int) -> None:
        """See `Source`."""
        self._state = state["loader"]
        self._earlier = self._loaded = True
        if self._state is not None:
            self.iterable.load_state_dict(copy.deepcopy(self._state))  # type: ignore[attr-defined]


def digest_of(source: Source, batch: Any) -> int:
    """The digest of an epoch's first batch, which this source has given."""
    return source.digest if isinstance(batch, Rows) else digest(batch)


def same_kind(name: str, source: Source, kind: str) -> None:
    """Raise ValueError if a state is that of another kind of loader."""
    if kind != source.kind:
        raise ValueError(
            f"{name} is {source.kind}, but the state is that of {kind}: pass a loader like the "
            "one that was saved"
        )
