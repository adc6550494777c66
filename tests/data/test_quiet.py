"""Iterables that draw late, or not at all: fetched at little cost, and repeated all the same."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from composefit.data import Batches
from composefit.data.seeding import PYTHON, TORCH

DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: torch.rand(()).item(),
    "a normal of torch's": lambda: torch.randn(()).item(),
    "as many words as torch's generator has": lambda: torch.rand(624)[0].item(),
    "numpy": lambda: float(np.random.rand()),
    "a normal of NumPy's": lambda: float(np.random.randn()),
    "as many words as NumPy's generator has": lambda: float(np.random.rand(312)[0]),
    "random": random.random,
    "a normal of random's": lambda: random.gauss(0.0, 1.0),
    "as many words as random's generator has": lambda: max(random.random() for _ in range(312)),
    "shuffle": lambda: random.sample(range(1000), 3)[0] / 1024,
}
every_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


class Late:
    """Ten batches; from the fifth on it draws, and what it has drawn adds up in the iterator."""

    def __init__(self, draw: Callable[[], float], first: int = 5) -> None:
        self.draw, self.first = draw, first

    def __iter__(self) -> Iterator[float]:
        total = 0.0
        for number in range(10):
            if number >= self.first:
                total += self.draw()
            yield number + total


def states() -> tuple[Any, ...]:
    numpy: Any = np.random.get_state(legacy=False)
    key = numpy["state"]["key"].tobytes(), numpy["state"]["pos"], numpy["has_gauss"], numpy["gauss"]
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), key


def taken(batches: Batches, epoch: int, between: Callable[[], object]) -> list[float]:
    found = []
    for batch in batches.epoch(epoch):
        found.append(batch)
        batches.mark()
        between()
    return found


def nothing() -> None: ...


def draw_from_all() -> None:
    torch.rand(3)
    np.random.rand(3)
    random.random()


@every_draw
@pytest.mark.parametrize("between", [nothing, draw_from_all])
@pytest.mark.parametrize("stop", [3, 5, 6, 9])
def test_an_epoch_that_begins_to_draw_late_is_resumed_bitwise(
    draw: Callable[[], float], between: Callable[[], object], stop: int
) -> None:
    whole = Batches(Late(draw), "train")
    expected = [taken(whole, epoch, between) for epoch in range(2)]
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    broken = Batches(Late(draw), "train")
    for number, _ in enumerate(broken.epoch(0), start=1):
        broken.mark()
        if number == stop:
            break
        between()
    # As a checkpoint does it: the state, and the process's own generators.
    state, kept = broken.state_dict(), (torch.get_rng_state(), np.random.get_state())
    python = random.getstate()
    between()
    resumed = Batches(Late(draw), "train")
    draw_from_all()
    resumed.load_state_dict(state)
    torch.set_rng_state(kept[0])
    np.random.set_state(kept[1])
    random.setstate(python)
    between()
    del expected  # of another state of the process's generators
    got = [taken(resumed, epoch, between) for epoch in range(2)]

    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    again = Batches(Late(draw), "train")
    first = taken(again, 0, between)
    assert got[0] == first[stop:]
    assert got[1] == taken(again, 1, between)
    assert len({batch % 1 for batch in first[5:]}) > 1  # it has drawn


@every_draw
def test_the_processs_own_generators_are_as_before_each_fetch(draw: Callable[[], float]) -> None:
    before = states()
    for _ in Batches(Late(draw), "train").epoch(0):
        assert states() == before


def test_a_normal_that_is_kept_in_the_process_is_not_taken_by_the_iterable() -> None:
    np.random.randn()
    random.gauss(0.0, 1.0)
    torch.randn(())
    before = states()
    for draw in (np.random.randn, lambda: random.gauss(0.0, 1.0), lambda: torch.randn(()).item()):
        for _ in Batches(Late(draw), "train").epoch(0):  # type: ignore[arg-type]
            assert states() == before


def test_the_fast_way_is_there() -> None:
    """On CPython with this torch; elsewhere all is right, and slower."""
    assert PYTHON.fast
    assert TORCH.fast
