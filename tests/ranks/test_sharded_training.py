"""The laws under FullySharded, through the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from composefit import LoopModule, SingleDevice, Trainer
from composefit.callbacks import EMA
from composefit.strategies.fully_sharded import FullySharded
from composefit.testing import assert_deterministic, assert_same_training
from tests.laws.recipe import EVEN, RAGGED
from tests.laws.recipes import RECIPES
from tests.ranks.pool import RankPool

SIZES = {"ragged": RAGGED, "even": EVEN}
SAMPLE = [
    "token-weighted language model",
    "GAN, critic first",
    "GAN, one graph for both",
    "WGAN-GP",
    "InfoNCE",
    "MoCo",
    "tied parameters and einsum",
    "channels_last, fused Adam",
    "sparse embedding",
]


def strategy(**arguments: Any) -> FullySharded:
    return FullySharded(accelerator="cpu", timeout=60, **arguments)


def differences(names: list[str], sizes: str, whole_batches: bool) -> dict[str, float]:
    found = {}
    for name in names:
        recipe = RECIPES[name]
        found[name] = assert_same_training(
            recipe.make,
            recipe.batches(SIZES[sizes]),
            [strategy()],
            recipe.by_hand,
            accumulate=(1,) if whole_batches else (1, 2),
            microbatch_sizes=(2,) if whole_batches else (None, 2),
            **recipe.arguments,
        )
    return found


def check(found: list[dict[str, float]]) -> None:
    for of_rank in found:
        assert max(of_rank.values()) <= 1e-10, of_rank
    assert all(of_rank == found[0] for of_rank in found)


def test_two_ranks_train_as_the_loop_by_hand(two_ranks: RankPool) -> None:
    """With two, one or no shards in time on a rank."""
    check(two_ranks.run(differences, SAMPLE, "ragged", True))


@pytest.mark.full
@pytest.mark.parametrize("sizes", SIZES)
def test_every_recipe_in_two_ranks(two_ranks: RankPool, sizes: str) -> None:
    check(two_ranks.run(differences, list(RECIPES), sizes, False))


@pytest.mark.full
@pytest.mark.parametrize("sizes", SIZES)
def test_every_recipe_in_four_ranks(four_ranks: RankPool, sizes: str) -> None:
    check(four_ranks.run(differences, list(RECIPES), sizes, False))


class GAN(LoopModule):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 5)).double()
        self.critic = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()

    def training_step(self, real: torch.Tensor) -> Any:
        fake = self.generator(self.random.normal(len(real), 3, dtype=torch.float64))
        yield {
            "critic": F.softplus(self.critic(fake)).mean() + F.softplus(-self.critic(real)).mean()
        }
        loss = F.softplus(-self.critic(fake)).mean()
        yield {"generator": loss}

    def configure_optimizers(self) -> Any:
        return {
            "critic": torch.optim.Adam(self.critic.parameters(), lr=0.01),
            "generator": torch.optim.Adam(self.generator.parameters(), lr=0.01),
        }


class Plain(GAN):
    """Without torch's own draws, which differ from strategy to strategy."""

    def __init__(self) -> None:
        super().__init__()
        self.generator[1] = nn.Tanh()


def batches() -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(n, 5, generator=draws, dtype=torch.float64) for n in (6, 7, 5, 8, 6, 9)]


def twice() -> bool:
    assert_deterministic(GAN, batches(), strategy(), runs=2, accumulate_grad_batches=2)
    return True


def test_the_same_seed_gives_the_same_bits(two_ranks: RankPool) -> None:
    assert all(two_ranks.run(twice))


# -- checkpoints -----------------------------------------------------------------------------------


def train(under: Any, steps: int, folder: str, resume: str | None = None) -> dict[str, Any]:
    torch.manual_seed(0)
    module = Plain()
    trainer = Trainer(
        strategy=under,
        max_steps=steps,
        seed=0,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, batches(), ckpt_path=resume)
    trainer.save_checkpoint(Path(folder) / f"{steps}.ckpt")
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in module.state_dict().items()
    }


def train_sharded(steps: int, folder: str, resume: str | None = None) -> dict[str, Any]:
    return train(strategy(), steps, folder, resume)


def apart(a: dict[str, Any], b: dict[str, Any]) -> float:
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in b)


def test_a_sharded_training_goes_on_in_one_process_and_back(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    alone = train(SingleDevice("cpu"), 6, str(tmp_path / "alone"))
    two_ranks.run(train_sharded, 2, folder)
    train(SingleDevice("cpu"), 4, folder, f"{folder}/2.ckpt")
    resumed, other = two_ranks.run(train_sharded, 6, folder, f"{folder}/4.ckpt")
    assert apart(resumed, alone) < 1e-10
    assert all(torch.equal(resumed[name], other[name]) for name in resumed)


def test_a_sharded_training_goes_on_bit_by_bit(two_ranks: RankPool, tmp_path: Path) -> None:
    through, _ = two_ranks.run(train_sharded, 6, str(tmp_path / "through"))
    two_ranks.run(train_sharded, 3, str(tmp_path))
    resumed, _ = two_ranks.run(train_sharded, 6, str(tmp_path), f"{tmp_path}/3.ckpt")
    assert all(torch.equal(through[name], resumed[name]) for name in through)


@pytest.mark.full
def test_a_sharded_training_goes_on_in_another_number_of_ranks(
    two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path
) -> None:
    through, _ = two_ranks.run(train_sharded, 6, str(tmp_path / "through"))
    two_ranks.run(train_sharded, 2, str(tmp_path))
    four_ranks.run(train_sharded, 4, str(tmp_path), f"{tmp_path}/2.ckpt")
    resumed, _ = two_ranks.run(train_sharded, 6, str(tmp_path), f"{tmp_path}/4.ckpt")
    assert apart(resumed, through) < 1e-10


# -- averages --------------------------------------------------------------------------------------


class Scaled(Plain):
    """With a weight that has no dimension to cut, and so stays whole beside those that are."""

    def __init__(self) -> None:
        super().__init__()
        self.generator.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def training_step(self, real: torch.Tensor) -> Any:
        yield {"critic": self.critic(real * self.scale).pow(2).mean()}

    def configure_optimizers(self) -> Any:
        parameters = [*self.critic.parameters(), self.scale]
        return {"critic": torch.optim.Adam(parameters, lr=0.01)}


def averages(under: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    module, average = Scaled(), EMA(0.5)
    Trainer(
        strategy=under,
        callbacks=[average],
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    ).fit(module, batches())
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in average.averaged_state_dict(module).items()
    }


def test_weights_that_are_cut_and_weights_that_are_whole_are_averaged_together(
    two_ranks: RankPool,
) -> None:
    expected = averages(SingleDevice("cpu"))
    for found in two_ranks.run(lambda: averages(strategy())):
        assert apart(found, expected) < 1e-10


# -- faults ----------------------------------------------------------------------------------------


class Blowing(Plain):
    """The gradient of one row of one weight is not finite, from the third step on."""

    def training_step(self, real: torch.Tensor) -> Any:
        loss = self.critic(real).pow(2).mean()
        if self.global_step == 2:
            loss = loss + 0 * self.critic[0](real)[:, -1].sum().sub(1e400).clamp(max=0).sqrt()
        yield {"critic": loss}


def blown() -> tuple[str, bool]:
    torch.manual_seed(0)
    module = Blowing()
    trainer = Trainer(
        strategy=strategy(),
        max_steps=4,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    try:
        trainer.fit(module, batches())
    except FloatingPointError as error:
        finite = all(p.full_tensor().isfinite().all() for p in module.parameters())
        return str(error), finite
    return "", False


def test_a_gradient_that_is_not_finite_stops_every_rank(two_ranks: RankPool) -> None:
    for message, finite in two_ranks.run(blown):
        assert "the update of 'critic' in step 2 is not finite" in message
        assert finite
