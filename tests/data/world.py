"""What tests of several ranks share: all ranks of a world in one process, which go in step."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from composefit.data import Batches, Rows
from tests.data.grid import reloaded, scramble


class Agreement:
    """`agree` of every rank of a world, where it is known how many batches each has an epoch."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers
        self.asked = [0] * len(numbers)

    def begin(self, position: int = 0) -> None:
        self.asked = [position] * len(self.numbers)

    def of(self, rank: int) -> Callable[[bool], bool]:
        def agree(here: bool) -> bool:
            number, self.asked[rank] = self.asked[rank], self.asked[rank] + 1
            assert here == (number < self.numbers[rank])
            return any(number < one for one in self.numbers)

        return agree


def world(
    make: Callable[[], Any],
    size: int,
    seed: int = 7,
    agreement: Agreement | None = None,
    **options: Any,
) -> list[Batches]:
    """The `Batches` of each rank, as in processes of their own: each has its own loader."""
    found = []
    for rank in range(size):
        torch.manual_seed(3)  # of what is seeded when it is made
        loader = make()
        scramble()
        agree = agreement.of(rank) if agreement else None
        found.append(Batches(loader, "train", epochs=9, ranks=(rank, size), agree=agree, **options))
        found[-1].seed = seed
    return found


def steps(ranks: list[Batches], epoch: int = 0, number: int | None = None) -> list[list[Any]]:
    """All or so many batches of an epoch on every rank, each trained on: what each rank got."""
    found = []
    iterators: list[Iterator[Any]] = [one.epoch(epoch) for one in ranks]
    nothing = object()
    while number is None or len(found) < number:
        given = [next(iterator, nothing) for iterator in iterators]
        ended = [one is nothing for one in given]
        assert all(ended) or not any(ended), "ranks got different numbers of batches"
        if all(ended):
            break
        found.append(given)
        for one in ranks:
            one.mark()
    for iterator in iterators:
        iterator.close()  # type: ignore[attr-defined]
    return found


def whole(given: list[Rows]) -> Tensor:
    """The world's batch, of the rows of all ranks; they say truly how many these are."""
    sizes = given[0].sizes
    assert sizes is not None
    for rank, rows in enumerate(given):
        assert rows.sizes == sizes
        assert rows.spare == (sizes[rank] == 0)
        assert len(rows.batch) == sizes[rank] or rows.spare
    return torch.cat([rows.batch for rows in given if not rows.spare])


def close(ranks: list[Batches]) -> None:
    for one in ranks:
        one.close()


def resumed(
    make: Callable[[], Any],
    size: int,
    state: dict[str, Any],
    states: list[Any] | None = None,
    agreement: Agreement | None = None,
) -> list[Batches]:
    """In another process, or other processes."""
    ranks = world(make, size, seed=0, agreement=agreement)
    for one in ranks:
        one.load_state_dict(reloaded(state))
        if states is not None:
            one.load_rank_states([reloaded(one) for one in states])
    return ranks
