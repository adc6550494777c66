"""Law 3 for data: stopped anywhere and resumed, the batches are those of a run never stopped."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from composefit.data import Batches
from tests.data.grid import KINDS, PLAIN, batches_of, reloaded, same, scramble, train

CASES = [
    *((name, make, workers) for name, make in KINDS.items() for workers in (0, 2)),
    *((name, make, 0) for name, make in PLAIN.items()),
]
every_kind = pytest.mark.parametrize(
    ("name", "make", "workers"), CASES, ids=[f"{name}-{workers}" for name, _, workers in CASES]
)

# torchdata 0.11 as it is made.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


def begun(make: Callable[[int], Any], workers: int) -> Batches:
    """Of a run in the first process, which seeded what chance has a part in when it is made."""
    torch.manual_seed(3)
    return batches_of(make(workers))


def uninterrupted(make: Callable[[int], Any], workers: int) -> tuple[Any, Any]:
    """The batches of three epochs, and the states on the way in the second."""
    batches = begun(make, workers)
    states = {"start": reloaded(batches.state_dict())}
    found = [train(batches, 0), [], []]
    for batch in batches.epoch(1):
        # One that is not trained on yet is none that the state knows of.
        states[f"before {len(found[1])}"] = reloaded(batches.state_dict())
        found[1].append(batch)
        batches.mark()
        states["last"] = reloaded(batches.state_dict())
    states["after"] = reloaded(batches.state_dict())
    found[2] = train(batches, 2)
    batches.close()
    return found, states


#: A state, how many batches of its epoch were trained on (None: all), and where to go on.
PLACES = [
    ("start", 0, 0),
    ("before 0", 0, 1),
    ("before 3", 3, 1),
    ("last", None, 1),
    ("last", None, 2),  # when the last batch was the last step
    ("after", None, 1),
    ("after", None, 2),
]


@every_kind
def test_the_rest_of_a_run(name: str, make: Callable[[int], Any], workers: int) -> None:
    expected, states = uninterrupted(make, workers)
    # Starting workers takes time: of the places that differ with them.
    for place, done, epoch in PLACES if not workers else [PLACES[i] for i in (2, 3, 4, 6)]:
        scramble()
        batches = batches_of(make(workers), seed=0)
        batches.load_state_dict(states[place])
        for number in range(epoch, 3):
            found, whole = train(batches, number), expected[number]
            if number == states[place]["epoch"]:
                whole = whole[len(whole) if done is None else done :]
            assert same(found, whole), (place, epoch, number)
        batches.close()
