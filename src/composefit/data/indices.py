"""`Indices`: stands in a loader for the sampler that says what each batch is made of."""

import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from composefit.data.generators import has_state
from composefit.data.rows import Share, sliceable
from composefit.data.seeding import Keyed, key_of, seed_generators

# What a key is for: the sampler's draws have nothing in common with those of the batches.
_SAMPLER, _BATCH, _START, _WORKERS = range(4)


class Indices:
    """Gives what a loader's sampler gives, with the seeds that go with it.

    Where the sampler may draw from the global generators, and before each batch, these are seeded
    from (seed, epoch, batch): here, or in the worker that loads the batch. So what is drawn does
    not depend on how far ahead the workers are.

    Args:
        sampler: the loader's `batch_sampler`, or its `sampler` where it does not batch.
        always: the sampler may draw from the global generators at any time, not just at first.
        in_workers: batches are loaded in worker processes.
        by_worker: and which one gets which depends on timing.
        seeding: something may draw while a batch is loaded.
        persistent: the workers stay from epoch to epoch.
        share: give this rank's part of each index only. What ranks draw while they load theirs has
            nothing in common. None: all of it.
        workers_alike: the workers of all ranks start with the same seed, which their loader saves.

    Attributes:
        before_iter: called before the sampler is iterated over, or None.
        after_draw: called after each index; what it returns is kept with the index. Or None.
        last: the index of the batch that was taken last, and what was kept with it; or None.
        error: what the sampler raised; iteration ends with it.
    """

    def __init__(
        self,
        sampler: Any,
        *,
        always: bool,
        in_workers: bool,
        by_worker: bool,
        seeding: bool,
        persistent: bool,
        share: Share | None,
        workers_alike: bool,
    ) -> None:
        self.sampler = sampler
        self.always = always
        self.in_workers = in_workers
        self.by_worker = by_worker
        self.seeding = seeding
        self.persistent = persistent
        self.share = share
        # Rank 0 draws what one process alone would.
        self.own = () if share is None or share.rank == 0 else (share.rank,)
        self.workers_own = () if workers_alike else self.own
        self.before_iter: Callable[[], None] | None = None
        self.after_draw: Callable[[], Any] | None = None
        self.begin(0, 0)

    def begin(
        self, seed: int, epoch: int, skip: int = 0, number: int = 0, expected: int | None = None
    ) -> None:
        """Before the loader is iterated over.

        Args:
            seed: of the run.
            epoch: the epoch's number.
            skip: so many indices are passed over.
            number: the number of the first batch, where it is not that of the first index.
            expected: the fingerprint of the last index that is passed over, or None.
        """
        self.key = key_of(seed, epoch)
        self.workers_key = key_of(
            seed if self.persistent else self.key, _WORKERS, *self.workers_own
        )
        self.skip, self.number, self.expected = skip, number, expected
        self.error: Exception | None = None
        self.ahead: deque[tuple[int, Any, Any]] = deque()
        self.last: tuple[Any, Any] | None = None

    def taken(self, number: int) -> None:
        """The batch of this number was handed out."""
        while self.ahead:
            drawn, index, kept = self.ahead.popleft()
            if drawn == number:
                self.last = index, kept
                return

    def __iter__(self) -> Iterator[Any]:
        return IndexIterator(self)

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.sampler, name)  # a loader of its own kind may ask for `batch_size`


class IndexIterator:
    """One pass of `Indices`.

    It has a state since torchdata's StatefulDataLoader asks an iterator of indices for one, and
    replays the others without their seeds.
    """

    def __init__(self, indices: Indices) -> None:
        if indices.before_iter is not None:
            indices.before_iter()
        seed_generators(key_of(indices.key, _START))
        self._indices = indices
        self._iterator = iter(indices.sampler)
        self._drawn = 0
        # What follows is torch's draw of the seed that workers start with.
        seed_generators(indices.workers_key)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        indices = self._indices
        try:
            if self._drawn < indices.skip:
                self.pass_over(indices.skip)
            index = self._draw()
        except StopIteration:
            raise
        except Exception as error:
            # Workers are asked ahead, and the first while they start: the batches before it first.
            indices.error = error
            raise StopIteration from None
        key, number = indices.key, indices.number + self._drawn - 1
        indices.ahead.append((number, index, indices.after_draw and indices.after_draw()))
        if indices.by_worker:
            return Keyed(key, index, by_worker=True)
        if indices.share is not None:
            index = indices.share.take(index)
        if indices.seeding:
            key = key_of(key, _BATCH, number, *indices.own)
            if indices.in_workers:
                return Keyed(key, index)
            seed_generators(key)
        return index

    def _draw(self) -> Any:
        if self._indices.always or self._drawn == 0:
            seed_generators(key_of(self._indices.key, _SAMPLER, self._drawn))
        index = next(self._iterator)
        self._drawn += 1
        return index if self._indices.share is None else sliceable(index)

    def pass_over(self, number: int) -> None:
        """Draw until so many indices are drawn.

        Raises:
            ValueError: there are not as many, or the last is not the expected one.
        """
        indices, index = self._indices, None
        try:
            while self._drawn < number:
                index = self._draw()
        except StopIteration:
            raise _others(indices, f"it gives {self._drawn} batches only") from None
        if indices.expected is not None and indices.expected != fingerprint(index):
            raise _others(indices, f"its batch {number - 1} is now {index}")
        indices.last = index, indices.after_draw and indices.after_draw()

    def state_dict(self) -> dict[str, Any]:
        """The number of indices drawn, and the sampler's own state where it has one."""
        own = self._iterator.state_dict() if has_state(self._iterator) else None
        return {"drawn": self._drawn, "sampler": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; what has none is replayed under the same seeds."""
        own = state["sampler"]
        # torchdata's batches of a sampler without a state know just how many samples there were.
        if own is None or set(own) == {"samples_yielded"}:
            if not has_state(self._indices.sampler):
                self.pass_over(state["drawn"])
        else:
            self._iterator.load_state_dict(own)
        self._drawn = state["drawn"]


class IndicesWithState(Indices):
    """Of a sampler that has a state: this class has one where its sampler has one."""

    def state_dict(self) -> Any:
        """The sampler's state."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Put the sampler's state back."""
        self.sampler.load_state_dict(state)


def fingerprint(index: Any) -> int | None:
    """A number by which an index is known again; of indices that are no numbers or text, None."""
    items = index if isinstance(index, list | tuple) else (index,)
    if all(type(item) in (int, str) for item in items):
        return zlib.crc32(repr(list(items)).encode())
    return None


def _others(indices: Indices, what: str) -> ValueError:
    name = type(getattr(indices.sampler, "sampler", indices.sampler)).__name__
    return ValueError(
        f"the sampler ({name}) does not give the same batches as in the run that is resumed: "
        f"{what}. Has the data changed? What it draws from must be the global generators, or a "
        "generator that it has as an attribute; or give it state_dict and load_state_dict, which "
        "save what it needs to begin the same epoch again"
    )
