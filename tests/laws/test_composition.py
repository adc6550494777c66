"""Law 1: the parameters are those of the plain full-batch loop, however a step is carried out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from composefit import SingleDevice, Strategy, ThreadDataParallel, Trainer
from composefit.lockstep.backward import Backward
from composefit.testing import assert_same_training
from tests.laws.recipe import EVEN, RAGGED, Recipe
from tests.laws.recipes import RECIPES
from tests.laws.recipes.language import AveragedLanguageModel
from tests.laws.recipes.layers import BatchNormalised
from tests.laws.recipes.supervised import averaged_classifier

STRATEGIES = {
    "one shard": lambda: SingleDevice("cpu"),
    "3 shards": lambda: SingleDevice("cpu", shards=3),
    "2 threads": lambda: ThreadDataParallel(2),
    "3 threads": lambda: ThreadDataParallel(3),
    "4 threads": lambda: ThreadDataParallel(4),
}
SIZES = {"ragged": RAGGED, "even": EVEN}


def compare(recipe: Recipe, sizes: list[int], strategy: Strategy, **changed: Any) -> float:
    given: dict[str, Any] = {"accumulate": (1, 2), "microbatch_sizes": (None, 2), **changed}
    make = given.pop("make", recipe.make)
    by_hand = given.pop("by_hand", recipe.by_hand)
    arguments = {**given, **recipe.arguments}
    return assert_same_training(make, recipe.batches(sizes), [strategy], by_hand, **arguments)


@pytest.mark.parametrize("sizes", ["ragged", pytest.param("even", marks=pytest.mark.full)])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", RECIPES)
def test_parameters_are_those_of_the_loop_by_hand(name: str, strategy: str, sizes: str) -> None:
    assert compare(RECIPES[name], SIZES[sizes], STRATEGIES[strategy]()) <= 1e-10


# -- controls: the bound is missed by what is almost right -----------------------------------------


def test_average_of_the_shards_means_misses_the_bound() -> None:
    with pytest.raises(AssertionError, match=r"differs from the reference, first after step 1 "):
        compare(RECIPES["classifier"], RAGGED, SingleDevice("cpu"), by_hand=averaged_classifier)


def test_token_mean_as_a_plain_loss_misses_the_bound() -> None:
    recipe = RECIPES["token-weighted language model"]
    with pytest.raises(AssertionError, match=r"differs from the reference"):
        compare(recipe, RAGGED, SingleDevice("cpu", shards=3), make=AveragedLanguageModel)


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"token-weighted language model"}))
def test_every_recipe_misses_the_bound_if_shards_weigh_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Backward.begin
    monkeypatch.setattr(Backward, "begin", lambda self, samples: begin(self, [1] * len(samples)))
    with pytest.raises(AssertionError, match=r"differs from the reference"):
        compare(RECIPES[name], RAGGED, SingleDevice("cpu", shards=3), microbatch_sizes=(None,))


def test_batch_norm_couples_samples_and_differs() -> None:
    with pytest.raises(AssertionError, match=r"differs from the reference.*BatchNorm"):
        compare(
            RECIPES["GroupNorm"],
            EVEN,
            SingleDevice("cpu", shards=2),
            make=BatchNormalised,
            accumulate=(1,),
            microbatch_sizes=(None,),
        )


def test_batch_norm_in_one_shard_is_the_loop_by_hand() -> None:
    compare(
        RECIPES["GroupNorm"],
        EVEN,
        SingleDevice("cpu"),
        make=BatchNormalised,
        accumulate=(1,),
        microbatch_sizes=(None,),
    )


# -- shards in a row and in threads ----------------------------------------------------------------


def trained(recipe: Recipe, strategy: Strategy) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = recipe.make().double()
    trainer = Trainer(
        strategy=strategy,
        max_epochs=1,
        seed=0,
        accumulate_grad_batches=2,
        microbatch_size=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **recipe.arguments,
    )
    trainer.fit(module, recipe.batches(RAGGED))
    return module.state_dict()


@pytest.mark.parametrize("name", RECIPES)
def test_shards_in_a_row_are_bitwise_those_in_threads(name: str) -> None:
    in_a_row = trained(RECIPES[name], SingleDevice("cpu", shards=3))
    in_threads = trained(RECIPES[name], ThreadDataParallel(3))
    for key, value in in_a_row.items():
        assert torch.equal(value, in_threads[key]), key
