import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from composefit.random.global_generators import GlobalGenerators


@pytest.fixture(autouse=True)
def states_put_back() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    yield
    random.setstate(python)
    np.random.set_state(numpy)


DRAWS: dict[str, Callable[[], object]] = {
    "random": random.random,
    "gauss": lambda: random.gauss(0, 1),
    "shuffle": lambda: random.shuffle([1, 2, 3]),
    "python seed": lambda: random.seed(),
    "rand": lambda: np.random.rand(),
    "randint": lambda: np.random.randint(5),
    "permutation": lambda: np.random.permutation(5),
    "randn": lambda: np.random.randn(),
    "a whole turn of the state": lambda: np.random.bytes(4 * 624),
    "numpy seed": lambda: np.random.seed(8),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_every_draw_is_found(draw: str) -> None:
    generators = GlobalGenerators()
    for _ in range(4):
        before = generators.fingerprint()
        DRAWS[draw]()
        after = generators.fingerprint()
        if "seed" in draw and before == after:
            continue  # the same seed once more
        assert before != after
    assert generators.fingerprint() == after


@pytest.mark.parametrize("cached", [0, 1])
def test_the_second_number_of_a_pair_of_normals_is_found(cached: int) -> None:
    # NumPy keeps it beside the state, which does not change when it is handed out.
    np.random.seed(0)
    for _ in range(cached):
        np.random.standard_normal()
    generators = GlobalGenerators()
    for _ in range(5):
        before = generators.fingerprint()
        np.random.standard_normal()
        assert generators.fingerprint() != before


def test_nothing_else_changes_the_fingerprint() -> None:
    generators = GlobalGenerators()
    before = generators.fingerprint()
    random.Random(0).random()
    np.random.default_rng(0).random()
    np.random.RandomState(0).rand()
    assert generators.fingerprint() == before
    assert GlobalGenerators().fingerprint() == before


def test_another_bit_generator_is_watched_too() -> None:
    original = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        generators = GlobalGenerators()
        before = generators.fingerprint()
        assert generators.fingerprint() == before
        np.random.rand()
        assert generators.fingerprint() != before
    finally:
        np.random.set_bit_generator(original)
