"""`PerRank`: batches of each rank's own, more of them on one than on another."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from composefit.data import Batches, LoaderBatches, PerRank
from composefit.data.loaders import in_order, one_shot
from tests.data.grid import Augmented, Continuing, Counting, Loaded, drawn, loader, reloaded, same
from tests.data.world import Agreement, close, resumed, steps, world

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

SAMPLES = [9, 3, 6]  # of each rank
NUMBERS = [5, 2, 3]  # batches of two


class Part(IterableDataset[Tensor]):
    """A rank's own part of a stream; what it draws shows in its samples."""

    def __init__(self, rank: int, samples: list[int] = SAMPLES) -> None:
        self.rank = rank
        self.samples = samples

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        return (drawn(100 * self.rank + i) for i in range(first, self.samples[self.rank], step))


class PartWithState(Part):
    """Goes on where it was."""

    next = 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.next < self.samples[self.rank]:
            self.next += 1
            yield drawn(100 * self.rank + self.next - 1)
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class PartThatContinues(Continuing, PartWithState):
    """A rank's own part."""


class PartLoader(Loaded):
    """A loader with a state, no DataLoader."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < self.number:
            self.position += 1
            yield drawn(self.position)
        self.position = 0


class Mapped(Augmented):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def __len__(self) -> int:
        return SAMPLES[self.rank]


def generators_of(rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(rank)


#: How each rank makes its loader.
KINDS: dict[str, Callable[[int], Any]] = {
    "stream": lambda r: loader(Part(r), 0, batch_size=2),
    "stream, worker": lambda r: loader(Part(r), 1, batch_size=2),
    "stream, persistent": lambda r: loader(Part(r), 1, batch_size=2, persistent_workers=True),
    "stream with state": lambda r: loader(PartWithState(r), 0, batch_size=2),
    "StatefulDataLoader": lambda r: loader(
        PartThatContinues(r), 0, StatefulDataLoader, batch_size=2
    ),
    "StatefulDataLoader, worker": lambda r: loader(
        PartThatContinues(r), 1, StatefulDataLoader, batch_size=2
    ),
    "map": lambda r: loader(Mapped(r), 0, batch_size=2, shuffle=True),
    "map, generator": lambda r: loader(
        Mapped(r), 0, batch_size=2, shuffle=True, generator=generators_of(r)
    ),
    "list": lambda r: [torch.full((2,), 10.0 * r + i) for i in range(NUMBERS[r])],
    "iterable": lambda r: Draws(NUMBERS[r]),
    "loader with state": lambda r: PartLoader(NUMBERS[r]),
}


class Draws:
    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[Tensor]:
        return (drawn(i) for i in range(self.number))


def made(name: str) -> Callable[[], Any]:
    """Makes the loaders of all ranks, in turn."""
    made = iter(range(10**6))
    return lambda: PerRank(KINDS[name](next(made) % 3))


def ranks_of(name: str) -> tuple[list[Batches], Agreement]:
    agreement = Agreement(NUMBERS)
    return world(made(name), 3, agreement=agreement), agreement


def epoch(ranks: list[Batches], agreement: Agreement, number: int, of: int | None = None) -> Any:
    agreement.begin()
    return steps(ranks, number, of)


@pytest.mark.parametrize("name", KINDS)
def test_every_batch_of_each_rank_comes_once_and_spare_ones_until_all_have_run_out(
    name: str,
) -> None:
    ranks, agreement = ranks_of(name)
    for number in range(2):
        given = epoch(ranks, agreement, number)
        assert len(given) == max(NUMBERS)
        assert agreement.asked == [max(NUMBERS) + 1] * 3
        for rank, mine in enumerate(NUMBERS):
            rows = [g[rank] for g in given]
            assert [one.spare for one in rows] == [False] * mine + [True] * (5 - mine)
            assert all(one.sizes is None for one in rows)
            assert all(one.batch is rows[mine - 1].batch for one in rows[mine:])
            if "list" not in name:
                draws = torch.cat([r.batch.flatten()[-1:] for r in rows[:mine]]).tolist()
                assert len(set(draws)) == mine
    close(ranks)


@pytest.mark.parametrize("name", ["stream", "stream, worker", "map"])
def test_ranks_draw_differently_and_rank_0_as_one_process(name: str) -> None:
    ranks, agreement = ranks_of(name)
    given = epoch(ranks, agreement, 0)
    close(ranks)
    one = Batches(KINDS[name](0), "train")
    one.seed = 7
    assert same([g[0].batch for g in given], [*one.epoch(0)])
    one.close()
    draws = torch.cat([row.batch[:, 1:] for g in given for row in g if not row.spare])
    assert len(set(draws.flatten().tolist())) == draws.numel() == 3 * sum(SAMPLES)


def places() -> Iterator[tuple[str, int]]:
    for name in KINDS:
        for place in (1, 2, 3, 4, 5, 6):  # 6: the epoch is over, and has been seen to be
            if "worker" not in name or place in (2, 4):
                yield name, place


@pytest.mark.parametrize(("name", "place"), [*places()])
def test_stopped_and_resumed_every_rank_gets_what_it_would_have_got(name: str, place: int) -> None:
    ranks, agreement = ranks_of(name)
    expected = [epoch(ranks, agreement, number) for number in range(3)]
    close(ranks)
    ranks, agreement = ranks_of(name)
    epoch(ranks, agreement, 0)
    epoch(ranks, agreement, 1, place)
    state, states = ranks[0].state_dict(), [one.rank_state() for one in ranks]
    close(ranks)
    agreement = Agreement(NUMBERS)
    again = resumed(made(name), 3, state, states, agreement)
    agreement.begin(place)
    left = steps(again, 1)
    assert agreement.asked[0] == 6 or place == 6
    found = [left, epoch(again, agreement, 2)]
    close(again)
    for a, b in zip([expected[1][place:], expected[2]], found, strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert [row.spare for row in x] == [row.spare for row in y]
            assert same([row.batch for row in x], [row.batch for row in y])


def test_several_batches_to_a_step_and_a_state_that_is_saved_as_it_was_loaded() -> None:
    ranks, agreement = ranks_of("map, generator")
    expected = epoch(ranks, agreement, 0)
    ranks, agreement = ranks_of("map, generator")
    iterators = [one.epoch(0) for one in ranks]
    for number in range(4):
        for one, iterator in zip(ranks, iterators, strict=True):
            next(iterator)
            if number % 2:
                one.mark()
    state, states = ranks[0].state_dict(), [one.rank_state() for one in ranks]
    agreement = Agreement(NUMBERS)
    again = resumed(made("map, generator"), 3, state, states, agreement)
    assert str([one.rank_state() for one in again]) == str(states)
    agreement.begin(4)
    (left,) = steps(again, 0)
    assert same([row.batch for row in left], [row.batch for row in expected[4]])


def test_a_rank_that_never_had_a_batch_is_an_error_that_says_so() -> None:
    parts = [[torch.zeros(1)], []]
    agreement = Agreement([1, 0])
    waiting = iter(parts)
    zero, one = world(lambda: PerRank(next(waiting)), 2, agreement=agreement)
    assert not next(zero.epoch(0)).spare
    with pytest.raises(ValueError, match=r"train gave no batch at all on rank 1, but other ranks"):
        next(one.epoch(0))


def test_no_batch_on_any_rank_is_an_empty_loader() -> None:
    for one in world(lambda: PerRank([]), 2, agreement=Agreement([0, 0])):
        with pytest.raises(ValueError, match="train gave no batch at all: is the dataset empty"):
            next(one.epoch(0))


def test_how_long_an_epoch_is_nobody_knows_but_by_a_limit() -> None:
    ranks, _ = ranks_of("list")
    assert [one.number for one in ranks] == [math.inf] * 3
    assert len(PerRank([1, 2])) == 2
    agreement = Agreement(NUMBERS)
    limited = world(made("list"), 3, agreement=agreement, limit=4)
    assert [one.number for one in limited] == [4] * 3
    assert len(steps(limited, 0)) == 4
    assert agreement.asked == [4] * 3  # nobody asks for what nobody wants
    with pytest.raises(TypeError, match="does not say how many"):
        len(PerRank(Draws(2)))


def test_in_a_dict_the_epoch_ends_with_the_shortest_on_any_rank() -> None:
    class Shortest(Agreement):
        def of(self, rank: int) -> Callable[[bool], bool]:
            def agree(missing: bool) -> bool:
                number, self.asked[rank] = self.asked[rank], self.asked[rank] + 1
                assert missing == (number >= self.numbers[rank])
                return number >= min(self.numbers)

            return agree

    waiting = iter(range(9))

    def make() -> Any:
        own = [torch.full((2,), float(i)) for i in range(NUMBERS[next(waiting)])]
        return {"own": PerRank(own), "all": loader(range(40), 0)}

    ranks = world(make, 3, agreement=Shortest(NUMBERS))
    given = steps(ranks, 0)
    assert len(given) == min(NUMBERS)
    assert ranks[0].number == 10
    for number, rows in enumerate(given):
        assert all(type(row.batch) is LoaderBatches for row in rows)
        assert all(row.sizes is None and not row.spare for row in rows)
        assert [row.batch["own"][0].item() for row in rows] == [number] * 3
        assert [row.batch["all"].tolist() for row in rows] == [
            [4 * number, 4 * number + 1],
            [4 * number + 2],
            [4 * number + 3],
        ]
    assert ranks[0].state_dict()["source"] is None
    assert ranks[0].rank_state() is not None


def test_a_dict_is_resumed_with_the_ranks_own_part_of_it() -> None:
    def in_dict(size: int) -> Callable[[], Any]:
        waiting = iter(range(size))

        def make() -> Any:
            rank = next(waiting)
            own = [torch.full((1,), 10.0 * rank + i) for i in range(3)]
            return {"own": PerRank(own), "all": loader(Augmented(), 0, shuffle=True)}

        return make

    class Never(Agreement):
        def of(self, rank: int) -> Callable[[bool], bool]:
            return lambda missing: missing

    ranks = world(in_dict(2), 2, agreement=Never([3, 3]))
    given = steps(ranks, 0, 2)
    state, states = ranks[0].state_dict(), [one.rank_state() for one in ranks]
    given += steps(resumed(in_dict(2), 2, state, states, Never([3, 3])), 0)
    expected = steps(world(in_dict(2), 2, agreement=Never([3, 3])), 0)
    for a, b in zip(given, expected, strict=True):
        assert same([row.batch for row in a], [row.batch for row in b])


def test_a_sampler_that_divides_the_samples_is_at_home_here() -> None:
    samplers = [DistributedSampler(range(8), 2, rank, shuffle=True) for rank in range(2)]
    waiting = iter(samplers)
    ranks = world(
        lambda: PerRank(loader(range(8), 0, sampler=next(waiting))), 2, agreement=Agreement([1, 1])
    )
    (given,) = steps(ranks, 0)
    assert sorted(torch.cat([rows.batch for rows in given]).tolist()) == [*range(8)]
    assert [one.fingerprint() for one in ranks] == [0.0, 0.0]


def test_a_dataset_whose_state_is_in_its_workers_can_be_trained_on() -> None:
    (one, _) = world(lambda: PerRank(loader(Counting(), 1)), 2, agreement=Agreement([6, 6]))
    iterator = one.epoch(0)
    for _ in range(3):
        next(iterator)
        one.mark()
    with pytest.raises(ValueError, match="use torchdata's StatefulDataLoader"):
        one.rank_state()
    one.close()


def test_what_cannot_be_a_ranks_own_loader() -> None:
    with pytest.raises(TypeError, match=r"got dict; in a dict of loaders write it around each"):
        PerRank({"a": [1]})
    with pytest.raises(TypeError, match="got int"):
        PerRank(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give Batches a function agree"):
        Batches(PerRank([1]), "train", ranks=(0, 2))
    with pytest.raises(TypeError, match="train is a list of loaders"):
        Batches([PerRank([1])], "train")
    once = iter([1])
    assert one_shot(PerRank(once)) is once
    shuffled = PerRank(loader(Augmented(), 0, shuffle=True))
    assert next(iter(in_order(shuffled)))[:, 0].tolist() == [0, 1, 2, 3]


def test_with_one_process_it_changes_nothing() -> None:
    batches = Batches({"a": PerRank([1, 2])}, "train")
    assert batches.number == 2
    assert [*batches.epoch()] == [{"a": 1}, {"a": 2}]
    assert reloaded(batches.state_dict())["ranks"] is None
