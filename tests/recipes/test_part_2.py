"""Recipes of the gallery that learn representations, policies, few labels, equations and text.

Each reaches its target as its user runs it, its control does not, and its step means the same
however it is carried out; without the effect that lets its samples meet, it does not.
"""

import ast
import math
import os
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from composefit import Mean, SingleDevice, Strategy, ThreadDataParallel
from composefit.lockstep.backward import Backward
from composefit.testing import assert_same_training
from tests.laws.recipe import EVEN, RAGGED
from tests.laws.recipes import gallery_2
from tests.laws.recipes.gallery import FOLDER, example
from tests.laws.recipes.gallery_2 import RECIPES

NAMES = "byol clip dino fixmatch moco pinn ppo sac sam simclr tbptt".split()  # noqa: SIM905
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "3 shards": lambda: SingleDevice("cpu", shards=3),
    "2 threads": lambda: ThreadDataParallel(2),
}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)


# -- as they are run -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_short(name: str) -> None:
    assert len((FOLDER / f"{name}.py").read_text("utf-8").splitlines()) <= 120


@pytest.mark.parametrize("name", NAMES)
def test_step_says_nothing_of_its_execution(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text("utf-8"))
    steps = [n for n in ast.walk(tree) if getattr(n, "name", "") in ("training_step", "improve")]
    words = {getattr(n, "id", getattr(n, "attr", "")) for step in steps for n in ast.walk(step)}
    assert steps
    assert not words & {"device", "cuda", "to", "rank", "world_size", "distributed", "no_sync"}


@pytest.mark.parametrize("strategy", ["single", "threads"])
@pytest.mark.parametrize("name", NAMES)
def test_recipe_runs_and_its_control_misses_the_target(name: str, strategy: str) -> None:
    found = example(name).main(strategy, devices=2 if strategy == "threads" else 1, quick=True)
    assert not found.reaches(found.control)
    assert math.isfinite(found.metric)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_recipe_reaches_its_target_as_its_user_runs_it(name: str, tmp_path: Path) -> None:
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


# -- law 1 -----------------------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize("name", RECIPES)
def test_step_is_that_of_the_loop_by_hand(name: str, strategy: Callable[[], Strategy]) -> None:
    recipe = RECIPES[name]
    batches = recipe.batches(RAGGED)
    assert assert_same_training(recipe.make, batches, [strategy()], recipe.by_hand) <= 1e-10


# -- and what breaks it ----------------------------------------------------------------------------


def train(name: str, sizes: list[int], shards: int) -> None:
    recipe = RECIPES[name]
    strategies = [SingleDevice("cpu", shards=shards)]
    assert_same_training(recipe.make, recipe.batches(sizes), strategies, recipe.by_hand)


def differs(name: str, sizes: list[int] = EVEN, shards: int = 2) -> None:
    with pytest.raises(AssertionError, match="differs from the reference"):
        train(name, sizes, shards)


def own_rows(tensors: Any) -> Generator[Any, Any, Any]:
    """In place of `Gather`: nobody else's."""
    return tensors, 0
    yield


class OwnMean(Mean):
    """In place of a bare `Mean`: that of the shard."""

    def __iter__(self) -> Generator[Any, Any, Tensor]:
        (term,) = self.terms
        return term.total / term.weight
        yield


def by_each(function: Any, *tensors: Tensor) -> Generator[Any, Any, Any]:
    """In place of `Once`: every shard calls it."""
    return function(*tensors)
    yield


@pytest.mark.parametrize(
    ("name", "module"), [("SimCLR", "simclr"), ("CLIP", "clip"), ("PPO", "ppo")]
)
def test_without_gather_it_is_another_step(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example(module), "Gather", own_rows)
    differs(name)


def test_advantages_normalised_by_each_shard_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery_2.PPO, "furthest", 1e9)
    monkeypatch.setattr(gallery_2.ppo, "Mean", OwnMean)
    differs("PPO")


def test_each_shard_by_its_own_distance_would_stop_at_another_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gallery_2.ppo, "Mean", OwnMean)
    with pytest.raises(RuntimeError, match="shard"):
        train("PPO", EVEN, shards=2)


def test_unlabelled_images_weighed_by_labelled_ones_are_another_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gallery_2.fixmatch, "Mean", lambda total, weight: total / weight)
    differs("FixMatch")


@pytest.mark.parametrize(("name", "module"), [("MoCo, of the gallery", "moco"), ("DINO", "dino")])
def test_state_written_by_each_shard_is_an_error(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example(module), "Once", by_each)
    with pytest.raises(RuntimeError, match="Once"):
        train(name, EVEN, shards=2)


@pytest.mark.parametrize(
    "name", ["BYOL", "SAC", "PINN", "truncated back-propagation through time", "SAM"]
)
def test_shards_that_weigh_the_same_are_another_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Backward.begin
    monkeypatch.setattr(Backward, "begin", lambda self, samples: begin(self, [1] * len(samples)))
    differs(name, RAGGED, shards=3)


@pytest.mark.parametrize(
    "name", ["SimCLR", "MoCo, of the gallery", "BYOL", "DINO", "CLIP", "FixMatch"]
)
def test_batch_norm_couples_samples_and_differs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paper = RECIPES[name].make.__base__  # type: ignore[attr-defined]
    init = paper.__init__
    monkeypatch.setattr(paper, "__init__", lambda self, norm, **kw: init(self, "batch", **kw))
    differs(name)
