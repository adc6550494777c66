"""F10 to F16b: batches, their samples, and how they are cut."""

import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset, default_collate

from composefit import LoopModule, SingleDevice, Strategy, ThreadDataParallel, tree
from tests.faults.fault import surfaces
from tests.lockstep.steps import (
    data,
    every_strategy,
    linear,
    module,
    several_shards,
    trainer,
    weights,
)


def squares(self: Any, x: Tensor) -> Tensor:
    return self.net(x).square().mean()


def plain_loop(net: nn.Module, windows: list[list[Tensor]]) -> list[Tensor]:
    """What PyTorch makes of it: one SGD step on the mean over all samples of each window."""
    optimizer = SGD(net.parameters(), lr=0.1)
    for window in windows:
        optimizer.zero_grad()
        net(torch.cat(window)).square().mean().backward()
        optimizer.step()
    return weights(net)


# -- F10, F11: loaders that give nothing ---------------------------------------------------------


@pytest.mark.parametrize(
    "loader",
    [[], DataLoader(TensorDataset(data(6, 3)), batch_size=7, drop_last=True)],
    ids=["empty list", "drop_last"],
)
def test_f10_empty_loader(loader: Any) -> None:
    net = module(squares)
    with surfaces(ValueError, "train_dataloaders gave no batch at all", "drop_last=True"):
        trainer().fit(net, loader)
    with surfaces(ValueError, "val_dataloaders gave no batch at all", "drop_last=True"):
        type(net).validation_step = squares
        trainer().validate(net, loader)
    with surfaces(TypeError, "train_dataloaders must be an iterable of batches", "got NoneType"):
        trainer().fit(net, None)


def test_f11_one_shot_iterator_for_several_epochs() -> None:
    net = module(squares)
    before = weights(net)
    words = ("train_dataloaders", "one-shot iterator (generator)", "a DataLoader or a list")
    with surfaces(ValueError, *words):
        trainer(max_epochs=2).fit(net, (data(6, 3) for _ in range(2)))
    with surfaces(ValueError, *words):  # one among several
        trainer(max_epochs=2).fit(net, {"x": [data(6, 3)], "y": (data(6, 3) for _ in range(2))})
    assert all(map(torch.equal, weights(net), before))


def test_f11_one_shot_iterator_is_enough_for_one_epoch_or_a_limit_of_steps() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield data(6, 3)

    for options in ({"max_epochs": 1, "limit_train_batches": 2}, {"max_epochs": None}):
        run = trainer(max_steps=2, **options)
        run.fit(module(squares), endless())
        assert run.global_step == 2


class Exhausted:
    """Gives its batches to whoever iterates first."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        while self.batches:
            yield self.batches.pop()


def test_f11_iterable_that_is_empty_in_epoch_2() -> None:
    run = trainer(max_epochs=3)
    with surfaces(ValueError, "no batch in its epoch 2", "not re-iterable", "a DataLoader or a list"):
        run.fit(module(squares), Exhausted([data(6, 3)] * 2))
    assert run.global_step == 2


# -- F12, F13: samples and shards ----------------------------------------------------------------


@several_shards
@pytest.mark.parametrize("samples", [1, 2])
def test_f12_batch_smaller_than_the_number_of_shards(
    samples: int, strategy: Callable[[], Strategy]
) -> None:
    seen: list[int] = []

    def step(self: Any, x: Tensor) -> Tensor:
        seen.append(len(x))
        return squares(self, x)

    net, x = module(step), data(samples, 3)
    trainer(strategy()).fit(net, [x])
    assert seen == [1] * samples
    expected = plain_loop(module(step).net, [[x]])
    for p, q in zip(weights(net), expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


class Normalised(LoopModule):
    """Cannot train on a shard of one sample."""

    def __init__(self, group: int = 1) -> None:
        super().__init__()
        self.net = nn.Sequential(linear(3, 2), nn.BatchNorm1d(2, dtype=torch.float64))
        self.samples_per_group = group

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)

    def training_step(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x).square().mean()
        return found


@pytest.mark.parametrize(
    "strategy",
    [lambda: ThreadDataParallel(4), lambda: SingleDevice("cpu", shards=4)],
    ids=["threads", "shards"],
)
def test_f12_batch_norm_on_a_shard_of_one(strategy: Callable[[], Strategy]) -> None:
    net = Normalised()
    before = weights(net)
    words = ("Expected more than 1 value per channel", "samples_per_group = 2", "drop_last=True")
    with surfaces(ValueError, *words) as found:
        trainer(strategy()).fit(net, [data(7, 3)])
    assert found.line == "found: Tensor = self.net(x).square().mean()"
    assert "shard 3 (lane 3" in found.notes
    assert all(map(torch.equal, weights(net), before))
    trainer(strategy()).fit(Normalised(group=2), [data(7, 3)])


def test_f12_the_hint_is_for_shards_not_for_a_batch_of_one() -> None:
    with surfaces(ValueError, "Expected more than 1 value per channel") as found:
        trainer().fit(Normalised(), [data(1, 3)])
    assert "samples_per_group" not in found.text


@every_strategy
@pytest.mark.parametrize("accumulate", [1, 2])
def test_f13_ragged_last_batch_and_window(
    accumulate: int, strategy: Callable[[], Strategy]
) -> None:
    batches = [data(n, 3, seed=n) for n in (6, 7, 1)]
    windows = [batches[i : i + accumulate] for i in range(0, 3, accumulate)]
    net = module(squares)
    trainer(strategy(), accumulate_grad_batches=accumulate).fit(net, batches)
    for p, q in zip(weights(net), plain_loop(module(squares).net, windows), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


# -- F14 to F16b: what a batch may be made of ----------------------------------------------------


def cut_into(batch: Any, strategy: Callable[[], Strategy], net: Any = None) -> list[Any]:
    """The parts of a batch that the shards of a step get, in sample order."""
    parts: dict[int, Any] = {}

    def step(self: Any, part: Any) -> None:
        parts[self.random.integers(0, 1, 1).shape[0] and len(parts)] = part

    del step
    found: list[tuple[float, Any]] = []

    def recording(self: Any, part: Any) -> Tensor:
        x = first_tensor(part)
        found.append((x[0, 0].item(), part))
        return self.net(x).mean()

    trainer(strategy()).step(net or module(recording), [batch])
    return [part for _, part in sorted(found, key=lambda pair: pair[0])]
