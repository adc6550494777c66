"""Law 1 over the gallery: how far a recipe ends from where it should, under each strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from composefit import Distributed, FullySharded, LoopModule, SingleDevice, ThreadDataParallel
from composefit.strategies import Strategy
from composefit.testing import assert_same_training
from tests.laws.recipe import RAGGED, Recipe
from tests.laws.recipes import gallery_1, gallery_2
from tests.laws.recipes.gallery import example
from tests.ranks.pool import pool

BOUND = 1e-10


@dataclass(frozen=True)
class Place:
    """Where a recipe is trained.

    Attributes:
        make: builds the strategy, in each of the ranks.
        ranks: how many processes it takes.
    """

    make: Callable[[], Strategy]
    ranks: int = 1


PLACES = {
    "one device": Place(lambda: SingleDevice("cpu")),
    "3 shards in a row": Place(lambda: SingleDevice("cpu", shards=3)),
    "2 threads": Place(lambda: ThreadDataParallel(2)),
    "2 ranks": Place(lambda: Distributed(accelerator="cpu", timeout=60), ranks=2),
    "2 ranks, sharded": Place(lambda: FullySharded(accelerator="cpu", timeout=60), ranks=2),
}

#: Reduced, each with the same training written by hand.
REDUCED: dict[str, Recipe] = {**gallery_1.RECIPES, **gallery_2.RECIPES}


@dataclass(frozen=True)
class Whole:
    """A recipe as it is, but for its length: its networks, data, batches and optimizers.

    Attributes:
        file: its file.
        make: builds the module, of what stands in the file; with GroupNorm in place of BatchNorm.
        steps: how many.
    """

    file: str
    make: Callable[[Any], LoopModule]
    steps: int = 10


#: Those that are random in every step, and that play against each other.
WHOLE = {
    "DCGAN": Whole("dcgan", lambda file: file.DCGAN(norm="group")),
    "WGAN-GP, fresh batches": Whole("wgan_gp", lambda file: file.WGANGP()),
    "WGAN-GP, one batch": Whole("wgan_gp", lambda file: file.WGANGP(fresh=False), steps=3),
    "StyleGAN2": Whole("stylegan2", lambda file: file.StyleGAN2()),
    "CycleGAN": Whole("cyclegan", lambda file: file.CycleGAN()),
    "VQ-GAN": Whole("vqgan", lambda file: file.VQGAN(norm="group", critic_from=2)),
    "diffusion": Whole("diffusion", lambda file: file.Diffusion()),
}


def reduced(name: str, place: str) -> float:
    """The largest difference from the loop by hand: ragged batches, accumulated and not."""
    recipe = REDUCED[name]
    return assert_same_training(
        recipe.make,
        recipe.batches(RAGGED),
        [PLACES[place].make()],
        recipe.by_hand,
        accumulate=(1, 2),
        tolerance=BOUND,
        **recipe.arguments,
    )


def whole(name: str, place: str) -> float:
    """The largest difference from one shard on one device."""
    recipe = WHOLE[name]
    file = example(recipe.file)
    _, loader = file.build()
    batches = list(islice(loader, recipe.steps))
    return assert_same_training(
        lambda: recipe.make(file),
        batches,
        [PLACES[place].make()],
        accumulate=(1, 2),
        tolerance=BOUND,
    )


Measure = Callable[[str, str], float]


def measured(measure: Measure, names: list[str], place: str) -> Mapping[str, float]:
    """A measure of recipes under a strategy; in as many ranks as it takes, which all agree."""
    if PLACES[place].ranks == 1:
        return _measured(measure, names, place)
    first, *others = pool(PLACES[place].ranks).run(_measured, measure, names, place)
    assert all(other == first for other in others), "the ranks differ"
    found: Mapping[str, float] = first
    return found


def _measured(measure: Measure, names: list[str], place: str) -> dict[str, float]:
    return {name: measure(name, place) for name in names}
