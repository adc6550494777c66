"""How several loaders make one: which of them give a batch, round for round."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Final, NamedTuple

MODES: Final = ("min_size", "max_size_cycle", "max_size", "sequential")

END: Final = object()


class Place(NamedTuple):
    """Where a loader is in an epoch: its pass, the batches it has given in it, and its end."""

    repeat: int = 0
    given: int = 0
    over: bool = False


class Turns:
    """One loader's part of an epoch: one pass, or several.

    Args:
        name: the loader's.
        begin: `begin(repeat, skip)` starts a pass, without so many batches.
        end: the pass is over, or is given up.
        place: where to go on.

    Attributes:
        place: where it is.
        begun: it has started a pass here.
    """

    def __init__(
        self,
        name: str,
        begin: Callable[[int, int], Iterator[Any]],
        end: Callable[[], None],
        place: Place,
    ) -> None:
        self.name = name
        self.place = place
        self.begun = False
        self._begin = begin
        self._end = end
        self._batches: Iterator[Any] | None = None

    def next(self) -> Any:
        """The next batch of this pass, or `END`."""
        place = self.place
        if place.over:
            return END
        if self._batches is None:
            self.begun = True
            self._batches = self._begin(place.repeat, place.given)
        batch = next(self._batches, END)
        if batch is END:
            self.place = place._replace(over=True)
            self.close()
        else:
            self.place = place._replace(given=place.given + 1)
        return batch

    def next_of_any_pass(self) -> Any:
        """The next batch; at the end of a pass another one begins.

        Raises:
            ValueError: it gives none.
        """
        batch = self.next()
        if batch is END:
            self.place = Place(self.place.repeat + 1)
            batch = self.next()
        if batch is END:
            raise ValueError(
                f"the loader {self.name!r} is to begin anew until the longest has ended, and gave "
                "no batch: it is empty, or can be iterated only once. Pass something that can be "
                "iterated again, such as a DataLoader or a list"
            )
        return batch

    def close(self) -> None:
        """Leave nothing of the pass running."""
        batches, self._batches = self._batches, None
        if batches is None:
            return
        if isinstance(batches, Generator):
            batches.close()
        self._end()


def rounds(turns: Sequence[Turns], mode: str) -> Iterator[dict[str, Any]]:
    """What the loaders of an epoch give, one round after another: name -> batch."""
    if mode == "sequential":
        for one in turns:
            while (batch := one.next()) is not END:
                yield {one.name: batch}
    elif mode == "min_size":
        while len(found := _until_an_end(turns)) == len(turns):
            yield found
    elif mode == "max_size":
        while found := _present(turns):
            yield found
    else:
        # The longest is the one that has not come around when all others have. They are not asked
        # before it is known to go on: starting a pass may start workers.
        while found := _present([one for one in turns if not one.place.repeat]):
            yield {
                one.name: found[one.name] if one.name in found else one.next_of_any_pass()
                for one in turns
            }


def _until_an_end(turns: Sequence[Turns]) -> dict[str, Any]:
    found = {}
    for one in turns:
        if (batch := one.next()) is END:
            break
        found[one.name] = batch
    return found


def _present(turns: Sequence[Turns]) -> dict[str, Any]:
    found = {one.name: one.next() for one in turns}
    return {name: batch for name, batch in found.items() if batch is not END}
