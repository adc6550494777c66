"""Law 1 over processes: the parameters are those of the plain full-batch loop."""

from __future__ import annotations

import pytest

from composefit import Distributed, Strategy, ThreadDataParallel
from composefit.testing import assert_same_training
from tests.laws.recipe import EVEN, RAGGED
from tests.laws.recipes import RECIPES
from tests.ranks.pool import RankPool

SIZES = {"ragged": RAGGED, "even": EVEN}
# In every run of the tests; all of them with `make laws`.
SAMPLE = [
    "classifier",
    "token-weighted language model",
    "four denominators in one loss",
    "GAN, critic first",
    "WGAN-GP",
    "GAN with noise of self.random",
    "InfoNCE",
    "MoCo",
    "sparse embedding",
]


def strategy(threads: int) -> Strategy:
    inner = ThreadDataParallel(threads) if threads > 1 else None
    return Distributed(accelerator="cpu", timeout=60, per_process=inner)


def differences(names: list[str], threads: int, sizes: str) -> dict[str, float]:
    """In a rank: each recipe's largest difference from the loop by hand."""
    found = {}
    for name in names:
        recipe = RECIPES[name]
        found[name] = assert_same_training(
            recipe.make,
            recipe.batches(SIZES[sizes]),
            [strategy(threads)],
            recipe.by_hand,
            accumulate=(1, 2),
            microbatch_sizes=(None, 2) if threads == 1 else (None,),
            **recipe.arguments,
        )
    return found


def check(found: list[dict[str, float]]) -> None:
    for of_rank in found:
        assert of_rank
        assert max(of_rank.values()) <= 1e-10, of_rank
    assert all(of_rank == found[0] for of_rank in found)  # bitwise the same on all ranks


def test_two_ranks_train_as_the_loop_by_hand(two_ranks: RankPool) -> None:
    check(two_ranks.run(differences, SAMPLE, 1, "ragged"))


def test_two_ranks_of_two_threads_train_as_the_loop_by_hand(two_ranks: RankPool) -> None:
    check(two_ranks.run(differences, ["GAN, critic first", "InfoNCE", "MoCo"], 2, "ragged"))


@pytest.mark.full
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_recipe_in_two_ranks(two_ranks: RankPool, threads: int, sizes: str) -> None:
    check(two_ranks.run(differences, list(RECIPES), threads, sizes))


@pytest.mark.full
@pytest.mark.parametrize("sizes", SIZES)
def test_every_recipe_in_four_ranks(four_ranks: RankPool, sizes: str) -> None:
    """Ragged batches are smaller than the number of ranks at times: some take part with nothing."""
    check(four_ranks.run(differences, list(RECIPES), 1, sizes))


# -- controls --------------------------------------------------------------------------------------


def _without_weights() -> float:
    from composefit.lockstep.backward import Backward

    begin = Backward.begin
    Backward.begin = lambda self, samples: begin(self, [1] * len(samples))  # type: ignore[method-assign]
    try:
        return differences(["classifier"], 1, "ragged")["classifier"]
    finally:
        Backward.begin = begin  # type: ignore[method-assign]


def test_ranks_that_weigh_the_same_miss_the_bound(two_ranks: RankPool) -> None:
    outcomes = two_ranks.outcomes(_without_weights)
    assert all("differs from the reference" in repr(one) for one in outcomes)
