"""Law 3 on several ranks: resumed by any number of them, the samples left are the same."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from composefit.data import Batches
from tests.data.grid import (
    KINDS,
    Augmented,
    Counting,
    batches_of,
    loader,
    reloaded,
    same,
    scramble,
    train,
)
from tests.data.test_ranks import MAPS, STREAMS
from tests.data.world import close, resumed, steps, whole, world

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

#: Starting workers takes time: those of the kinds that differ with them.
WITH_WORKERS = [
    "persistent",
    "own generator",
    "iterable",
    "iterable, persistent",
    "StatefulDataLoader",
    "StatefulDataLoader, iterable",
    "StatefulDataLoader, persistent",
]
every_kind = pytest.mark.parametrize(
    ("name", "workers"),
    [*((name, 0) for name in (*MAPS, *STREAMS)), *((name, 2) for name in WITH_WORKERS)],
)


def alike(a: Any, b: Any) -> bool:
    """Nested states are equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def indices(batches: list[Tensor]) -> list[list[float]]:
    return [batch[:, 0].tolist() for batch in batches]


def rest(batches: Batches) -> list[Tensor]:
    """What one process gets of the epoch that was broken off, and of the next one."""
    found = train(batches, 1) + train(batches, 2)
    batches.close()
    return found


@every_kind
def test_stopped_on_two_ranks_and_resumed_on_more_or_fewer(name: str, workers: int) -> None:
    def make() -> Any:
        return KINDS[name](workers)

    ranks = world(make, 2)
    steps(ranks, 0)
    steps(ranks, 1, 2)
    state = reloaded(ranks[0].state_dict())
    assert alike(state, reloaded(ranks[1].state_dict()))
    assert all(one.rank_state() is None for one in ranks)
    close(ranks)
    torch.manual_seed(3)
    one = batches_of(make())
    expected = [train(one, epoch) for epoch in range(3)]
    one.close()
    left = indices(expected[1][2:] + expected[2])
    for size in (1, 3) if workers else (1, 3, 4):
        scramble()
        again = resumed(make, size, state)
        if size == 1:
            assert same(rest(again[0]), expected[1][2:] + expected[2])
            continue
        found = [whole(given) for given in steps(again, 1) + steps(again, 2)]
        assert indices(found) == left
        close(again)


@every_kind
def test_the_same_ranks_go_on_bitwise(name: str, workers: int) -> None:
    def make() -> Any:
        return KINDS[name](workers)

    ranks = world(make, 3)
    steps(ranks, 0, 3)
    state = reloaded(ranks[0].state_dict())
    close(ranks)
    never_stopped = world(make, 3)
    expected = steps(never_stopped, 0)[3:] + steps(never_stopped, 1)
    close(never_stopped)
    again = resumed(make, 3, state)
    found = steps(again, 0) + steps(again, 1)
    close(again)
    for a, b in zip(expected, found, strict=True):
        assert [rows.sizes for rows in a] == [rows.sizes for rows in b]
        assert same([rows.batch for rows in a], [rows.batch for rows in b])


@pytest.mark.parametrize("name", ["shuffle", "iterable", "iterable with state", "dict"])
def test_a_state_of_one_process_is_that_of_several(name: str) -> None:
    def make() -> Any:
        return KINDS[name](0)

    torch.manual_seed(3)
    one = batches_of(make())
    train(one, 0, 3)
    ranks = world(make, 2)
    steps(ranks, 0, 3)
    assert alike(one.state_dict(), ranks[1].state_dict())


@pytest.mark.parametrize("number", [1, 4])
def test_one_batch_ahead_is_not_lost(number: int) -> None:
    ranks = world(lambda: KINDS["shuffle"](2), 2)
    iterators = [one.epoch(0) for one in ranks]
    for _ in range(number):
        given = [next(iterator) for iterator in iterators]
    state = reloaded(ranks[1].state_dict())  # nothing was trained on
    close(ranks)
    again = resumed(lambda: KINDS["shuffle"](0), 2, state)
    assert same([whole(steps(again)[number - 1])], [whole(given)])


def test_torchdata_loads_some_batches_again_and_their_sizes_are_known() -> None:
    def make() -> Any:
        options = {"snapshot_every_n_steps": 4}
        return loader(Augmented(), 2, StatefulDataLoader, batch_sampler=RAGGED, **options)

    for number in (3, 5):
        ranks = world(make, 2)
        given = steps(ranks, 0, number)
        state = reloaded(ranks[0].state_dict())
        close(ranks)
        again = resumed(make, 2, state)
        given += steps(again, 0)
        close(again)
        assert [whole(one)[:, 0].tolist() for one in given] == RAGGED


RAGGED = [[*range(n, 2 * n)] for n in (1, 5, 2, 7, 3, 1, 4)]

# -- what belongs to a rank ---------------------------------------------------------------------


def counting() -> Any:
    return loader(Counting(), 0, shuffle=True)


def test_a_dataset_with_a_state_has_one_on_each_rank() -> None:
    ranks = world(counting, 3)
    steps(ranks, 0, 3)
    state = reloaded(ranks[0].state_dict())
    assert alike(state, reloaded(ranks[1].state_dict()))
    states = [one.rank_state() for one in ranks]
    never_stopped = world(counting, 3)
    steps(never_stopped, 0)
    expected = [given[i].batch for given in steps(never_stopped, 1) for i in range(3)]
    again = resumed(counting, 3, state, states)
    steps(again, 0)
    assert same([given[i].batch for given in steps(again, 1) for i in range(3)], expected)


def saved_by(size: int) -> tuple[Callable[[], Any], dict[str, Any], list[Any]]:
    ranks = world(counting, size)
    steps(ranks, 0, 2)
    return counting, ranks[0].state_dict(), [one.rank_state() for one in ranks]


@pytest.mark.parametrize(
    ("saved", "size", "said"),
    [
        (2, 3, "was saved by 2 ranks, but there are 3 now"),
        (2, 1, "was saved by 2 ranks, but there is 1 now"),
        (1, 2, "was saved by 1 rank, but there are 2 now"),
    ],
)
def test_another_number_of_ranks_is_refused_with_what_to_do(
    saved: int, size: int, said: str
) -> None:
    make, state, _ = saved_by(saved)
    with pytest.raises(ValueError, match=rf"train .*{said}.*Resume with the same number"):
        resumed(make, size, state)


def test_states_of_the_ranks_are_not_forgotten() -> None:
    make, state, states = saved_by(2)
    (again, _) = resumed(make, 2, state)
    with pytest.raises(ValueError, match="call load_rank_states"):
        next(again.epoch(0))
    with pytest.raises(ValueError, match="saved by 3 ranks, but there are 2"):
        again.load_rank_states([*states, None])
    with pytest.raises(ValueError, match="saved by 1 rank, but there are 2"):
        again.load_rank_states(states[:1])
    again.load_rank_states(states)
    assert len([*again.epoch(0)]) == 4


def test_states_of_ranks_are_nothing_to_a_loader_without_any() -> None:
    (one, _) = world(lambda: [np.zeros(2)], 2)
    one.load_rank_states([None, None])
    one.load_rank_states([])
    assert len([*one.epoch(0)]) == 1
