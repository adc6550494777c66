"""Recipes of the gallery that generate images, model text, or learn from several losses.

Each reaches its target as its user runs it, its control does not, and its step means the same
however it is carried out; without the effect that lets its samples meet, it does not.
"""

import ast
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from composefit import SingleDevice, Strategy, ThreadDataParallel
from composefit.testing import assert_same_training
from tests.laws.recipe import RAGGED
from tests.laws.recipes.gallery import FOLDER, example
from tests.laws.recipes.gallery_1 import RECIPES, reduced

NAMES = [
    *("dcgan", "wgan_gp", "stylegan2", "cyclegan", "vqgan", "diffusion", "language_model"),
    *("mixture_of_experts", "lora", "distillation", "multitask_pcgrad"),
]
FILES = {recipe: recipe.lower() for recipe in RECIPES} | {
    "WGAN-GP, fresh batches": "wgan_gp",
    "WGAN-GP, one batch": "wgan_gp",
    "VQ-GAN": "vqgan",
    "language model": "language_model",
    "mixture of experts": "mixture_of_experts",
    "PCGrad": "multitask_pcgrad",
}
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "3 shards": lambda: SingleDevice("cpu", shards=3),
    "2 threads": lambda: ThreadDataParallel(2),
}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
SIZES = RAGGED[:6]


def needs(name: str) -> None:
    if name == "lora" and importlib.util.find_spec("transformers") is None:
        pytest.skip("needs Hugging Face Transformers")


# -- as they are run -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_short(name: str) -> None:
    assert len((FOLDER / f"{name}.py").read_text("utf-8").splitlines()) <= 120


@pytest.mark.parametrize("name", NAMES)
def test_step_says_nothing_of_its_execution(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text("utf-8"))
    steps = [n for n in ast.walk(tree) if getattr(n, "name", "") == "training_step"]
    words = {getattr(n, "id", getattr(n, "attr", "")) for step in steps for n in ast.walk(step)}
    assert steps
    forbidden = {"device", "cuda", "to", "rank", "world_size", "distributed", "no_sync"}
    assert not words & (forbidden | {"backward", "zero_grad", "step", "requires_grad"})


@pytest.mark.parametrize("strategy", ["single", "threads"])
@pytest.mark.parametrize("name", NAMES)
def test_recipe_runs_and_its_control_misses_the_target(name: str, strategy: str) -> None:
    needs(name)
    found = example(name).main(strategy, devices=2 if strategy == "threads" else 1, quick=True)
    assert not found.reaches(found.control)
    assert math.isfinite(found.metric)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_recipe_reaches_its_target_as_its_user_runs_it(name: str, tmp_path: Any) -> None:
    needs(name)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", FOLDER / f"{name}.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " (target: " in done.stdout


@pytest.mark.full
def test_five_critic_steps_on_one_batch_reach_the_target_as_well() -> None:
    found = example("wgan_gp").main("single", devices=1, fresh=False)
    assert found.reaches(found.metric)


def test_result_says_what_would_be_enough() -> None:
    result = example("_common").Result
    assert [result(0, 2.0, "lower", 9, "loss").reaches(x) for x in (1, 2, 3)] == [True, True, False]
    assert [result(0, 2.0, "higher", 0, "x").reaches(x) for x in (1, 2, 3)] == [False, True, True]


def test_recipe_that_misses_its_target_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    common = example("_common")
    monkeypatch.setattr(sys, "argv", ["recipe", "--strategy", "single", "--devices", "1"])

    def main(strategy: str, devices: str, quick: bool) -> Any:
        assert (strategy, devices, quick) == ("single", "1", False)
        return common.Result(metric, 0.5, "higher", 0.1, "accuracy")

    metric = 0.4
    with pytest.raises(SystemExit) as missed:
        common.run(main)
    metric = 0.6
    with pytest.raises(SystemExit) as reached:
        common.run(main)
    assert (missed.value.code, reached.value.code) == (True, False)


# -- law 1 -----------------------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize("name", RECIPES)
def test_step_is_the_same_loop_by_hand_under_every_strategy(
    name: str, strategy: Callable[[], Strategy]
) -> None:
    needs(FILES[name])
    recipe = RECIPES[name]
    found = assert_same_training(
        recipe.make,
        recipe.batches(SIZES),
        [strategy()],
        recipe.by_hand,
        accumulate=(1, 2),
        **recipe.arguments,
    )
    assert found <= 1e-10


def differs(name: str, make: Any = None) -> None:
    """The recipe, as its file now is, is another one in three shards than in one."""
    recipe = RECIPES[name]
    with pytest.raises(AssertionError, match="differs from one device and one shard"):
        assert_same_training(
            make or recipe.make, recipe.batches(SIZES), [SingleDevice("cpu", shards=3)]
        )


class OwnRows:
    """Gather that gathers nothing."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return (self.rows, 0)
        yield


class OwnCall:
    """Once that is once for each shard, on its own rows."""

    def __init__(self, function: Any, *rows: Tensor, **_: Any) -> None:
        self.function, self.rows = function, rows

    def __iter__(self) -> Any:
        with torch.no_grad():
            return self.function(*(row.detach() for row in self.rows))
        yield


class OwnGradient:
    """Gradient of the shard's own loss."""

    def __init__(self, losses: dict[str, Tensor], wrt: Any) -> None:
        self.losses, self.wrt = losses, [wrt]

    def __iter__(self) -> Any:
        return {
            name: torch.autograd.grad(loss, self.wrt, retain_graph=True, allow_unused=True)
            for name, loss in self.losses.items()
        }
        yield


class OwnMean:
    """Mean that is a plain loss: a mean over whatever the shard holds."""

    def __new__(cls, total: Tensor, weight: Tensor) -> Any:
        return total / weight.clamp(min=1)

    @staticmethod
    def of(mean: Tensor, weight: Tensor) -> Tensor:
        return mean.nan_to_num()


@pytest.mark.filterwarnings("ignore:.*ignore_index.*:UserWarning")  # which says so too
@pytest.mark.parametrize("name", ["language model", "mixture of experts", "LoRA"])
def test_mean_over_characters_as_a_plain_loss_differs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(FILES[name])
    monkeypatch.setattr(example(FILES[name]), "Mean", OwnMean)
    differs(name)


def test_experts_are_not_balanced_without_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example("mixture_of_experts"), "Gather", OwnRows)
    differs("mixture of experts")


def test_gradient_surgery_in_an_order_of_each_shard_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, file = RECIPES["PCGrad"], example("multitask_pcgrad")
    surgery = file.TwoDigits.surgery

    def by_each(self: Any, *tasks: Any) -> Any:
        return [g * (1 + torch.rand(())) for g in surgery(self, *tasks)]

    monkeypatch.setattr(file.TwoDigits, "surgery", by_each)
    with pytest.raises(RuntimeError, match="different Grads for 'trunk'"):
        assert_same_training(recipe.make, recipe.batches(SIZES), [SingleDevice("cpu", shards=3)])


def test_balance_of_each_shard_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example("vqgan"), "Gradient", OwnGradient)
    differs("VQ-GAN")


@pytest.mark.parametrize(
    ("name", "state"),
    [("StyleGAN2", "path_mean"), ("CycleGAN", "pool_a"), ("VQ-GAN", "book")],
)
def test_state_written_by_each_shard_is_an_error_that_names_once(
    name: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example(FILES[name]), "Once", OwnCall)
    recipe = RECIPES[name]
    with pytest.raises(RuntimeError, match=rf"(?s){state}.*Once"):
        assert_same_training(recipe.make, recipe.batches(SIZES), [SingleDevice("cpu", shards=3)])


@pytest.mark.parametrize(
    ("name", "file", "make"),
    [
        ("DCGAN", "dcgan", lambda f: f.DCGAN(4)),
        ("VQ-GAN", "vqgan", lambda f: f.VQGAN(8, critic_from=2)),
    ],
)
def test_batch_norm_couples_samples_and_differs(name: str, file: str, make: Any) -> None:
    rates = {"dcgan": {"critic": 0.05, "generator": 0.05}, "vqgan": {"coder": 0.05, "critic": 0.05}}
    differs(name, reduced(file, make, **rates[file]))


@pytest.mark.parametrize("name", ["DCGAN", "WGAN-GP, fresh batches", "StyleGAN2", "diffusion"])
def test_noise_of_the_shard_differs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def normal(self: Any, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    monkeypatch.setattr("composefit.random.samples.SampleRandom.normal", normal)
    differs(name)


# -- their parts -----------------------------------------------------------------------------------


def test_pool_keeps_as_many_images_as_it_may_and_loses_none() -> None:
    torch.manual_seed(0)
    pool = example("cyclegan").ImagePool(4)
    images = torch.arange(20.0)[:, None, None, None].expand(-1, 1, 8, 8)
    out = torch.cat([pool.exchange(part) for part in images.split(5)])
    assert torch.equal(out[:4], images[:4])  # while there is room
    everything = torch.cat([out[4:], pool.images])[:, 0, 0, 0]
    assert torch.equal(everything.sort().values, torch.arange(20.0))
    assert not torch.equal(out, images)


def test_codes_are_running_means_of_what_chose_them() -> None:
    book = example("vqgan").Codebook(2, 1)
    book.codes.copy_(torch.tensor([[0.0], [10.0]]))
    book.counts.fill_(1.0)
    z = torch.tensor([[1.0], [3.0], [8.0]])
    codes, chosen = book(z.view(1, 1, 3, 1).expand(1, 1, 3, 2))
    assert chosen.tolist() == [[[0, 0], [0, 0], [1, 1]]]
    assert codes.flatten().tolist() == [0.0, 0.0, 0.0, 0.0, 10.0, 10.0]
    book.follow(z, torch.tensor([0, 0, 1]), decay=0.5)
    assert book.counts.tolist() == [1.5, 1.0]
    # (old count x old code + sum of the new) / new count, each with half of the weight
    assert book.codes.flatten().tolist() == pytest.approx([2.0 / 1.5, 9.0])


def test_code_that_nothing_chooses_begins_anew_at_a_place_of_the_batch() -> None:
    book = example("vqgan").Codebook(2, 1)
    book.follow(torch.tensor([[5.0]]), torch.tensor([0]), decay=0.5)
    # One is the place that chose it; the other is close to it, and not the same.
    assert book.codes.flatten().tolist() == pytest.approx([5.0, 5.0], abs=0.1)
    assert book.codes[0] != book.codes[1]


def test_spread_is_that_within_groups_of_four() -> None:
    x = torch.randn(7, 2, 3, 3)
    found = example("stylegan2").Spread()(x)
    assert torch.equal(found[:, :2], x)
    for group in (slice(0, 4), slice(4, 7)):
        expected = x[group].std(0, correction=0).mean()
        assert torch.allclose(found[group, 2], expected.expand(len(x[group]), 3, 3), atol=1e-6)


def test_lora_begins_as_the_layer_and_leaves_it_as_it_is() -> None:
    needs("lora")
    layer = torch.nn.Linear(6, 5)
    module = example("lora").LoRA(layer, rank=2)
    x = torch.randn(3, 6)
    assert torch.equal(module(x), layer(x))
    thin = sum(p.numel() for p in module.parameters()) - sum(p.numel() for p in layer.parameters())
    assert thin == 2 * (6 + 5)
