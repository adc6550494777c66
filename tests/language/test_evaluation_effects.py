"""Evaluation steps yield every effect but updates; what they return comes in the loaders' order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from composefit import (
    Distributed,
    Gather,
    Gradient,
    Grads,
    LoopModule,
    Mean,
    Once,
    Strategy,
    Sum,
    Update,
)
from composefit.data import CombinedLoader
from tests.lockstep.steps import F64, data, every_strategy, linear, several_shards, trainer
from tests.ranks.pool import RankPool, closing_pools, pool

Make = Callable[[], Strategy]

LONG = [data(7, 3, seed=1), data(4, 3, seed=2), data(3, 3, seed=3)]
SHORT = [data(5, 3, seed=4)]


class Net(LoopModule):
    """Its step for all three evaluations is one that a test writes."""

    def __init__(self, step: Callable[..., Any]) -> None:
        super().__init__()
        self.net = linear(3, 2)
        self.register_buffer("seen", torch.zeros(0, 3, dtype=F64))
        self.__dict__["step"] = step
        self.outputs: list[Any] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, x: Tensor) -> Tensor:
        return self.net(x).square().mean()  # type: ignore[no-any-return]

    def validation_step(self, x: Any, batch_idx: int, dataloader_idx: int) -> Any:
        return self.__dict__["step"](self, x)

    def test_step(self, x: Any, batch_idx: int, dataloader_idx: int) -> Any:
        return self.__dict__["step"](self, x)

    def predict_step(self, x: Any, batch_idx: int, dataloader_idx: int) -> Any:
        return self.__dict__["step"](self, x)

    def on_validation_epoch_end(self, outputs: Any) -> None:  # type: ignore[override]
        self.outputs.append(outputs)

    def on_test_epoch_end(self, outputs: Any) -> None:  # type: ignore[override]
        self.outputs.append(outputs)


def returned(step: Callable[..., Any], strategy: Strategy, loaders: Any, **options: Any) -> Any:
    """What the steps of each evaluation return; the same of all three."""
    net = Net(step)
    fitter = trainer(strategy, **options)
    predicted = fitter.predict(net, loaders)
    for evaluate in (fitter.validate, fitter.test):
        net.seen = net.seen[:0]
        evaluate(net, loaders, verbose=False)
    for collected in net.outputs:
        torch.testing.assert_close(collected, predicted, rtol=0, atol=0)
    assert len(net.outputs) == 2
    return predicted


def by_hand(x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = linear(3, 2)(x)
        return y


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


# -- effects ------------------------------------------------------------------------------------


def similar(self: Any, x: Tensor) -> Iterator[Any]:
    """Compares each row with all of the batch."""
    y = self.net(x)
    every, offset = yield from Gather(y)
    assert not y.requires_grad
    torch.testing.assert_close(every[offset : offset + len(y)], y, rtol=0, atol=0)
    return y @ every.T


def centred(self: Any, x: Tensor) -> Iterator[Any]:
    y = self.net(x)
    centre = (yield from Sum(y[:, 0].sum())) / (yield from Sum(torch.tensor(float(len(y)))))
    mean = yield from Mean(y[:, 0].sum(), len(y))
    torch.testing.assert_close(mean, centre)
    return y[:, 0] - mean


def remembering(self: Any, x: Tensor) -> Iterator[Any]:
    def remember(rows: Tensor) -> int:
        self.seen = torch.cat([self.seen, rows])
        return len(self.seen)

    seen = yield from Once(remember, x)
    assert len(self.seen) == seen  # every shard sees what was written
    return self.net(x) + seen


def remembered(batches: list[Tensor], start: int = 0) -> list[Tensor]:
    found = []
    for x in batches:
        start += len(x)
        found.append(by_hand(x) + start)
    return found


@every_strategy
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_what_a_step_gathers_and_reduces_is_of_the_whole_batch(
    strategy: Make, microbatch_size: int | None
) -> None:
    options = {"microbatch_size": microbatch_size}
    found = returned(similar, strategy(), LONG, **options)
    close(found, [by_hand(x) @ by_hand(x).T for x in LONG])
    found = returned(centred, strategy(), LONG, **options)
    close(found, [by_hand(x)[:, 0] - by_hand(x)[:, 0].mean() for x in LONG])


@every_strategy
def test_once_may_write_what_the_evaluation_keeps(strategy: Make) -> None:
    close(returned(remembering, strategy(), LONG), remembered(LONG))


@every_strategy
def test_what_several_loaders_steps_return_comes_in_their_order(strategy: Make) -> None:
    found = returned(remembering, strategy(), {"long": LONG, "short": SHORT})
    close(found, [remembered(LONG), remembered(SHORT, 14)])


@every_strategy
def test_effects_and_a_logged_mean_go_together(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        similar = yield from Gather(self.net(x))
        self.log("rows", Mean(torch.tensor(float(len(x) * len(similar[0]))), len(x)))

    (found,) = trainer(strategy()).validate(Net(step), LONG, verbose=False)
    assert found["rows"] == pytest.approx(sum(len(x) ** 2 for x in LONG) / 14)


# -- several loaders as one ---------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize(
    ("mode", "rounds"),
    [
        ("min_size", [(0, 0)]),
        ("max_size", [(0, 0), (1, None), (2, None)]),
        ("max_size_cycle", [(0, 0), (1, 0), (2, 0)]),
    ],
)
def test_combined_loaders_are_evaluated_as_one(strategy: Make, mode: str, rounds: Any) -> None:
    def step(self: Any, batch: Any) -> Any:
        rows = self.net(batch["long"])
        other = batch["short"]
        return {"rows": rows, "other": None if other is None else self.net(other)}

    combined = CombinedLoader({"long": LONG, "short": SHORT}, mode)
    expected = [
        {"rows": by_hand(LONG[i]), "other": None if j is None else by_hand(SHORT[j])}
        for i, j in rounds
    ]
    close(returned(step, strategy(), combined), expected)


@every_strategy
def test_sequential_loaders_are_evaluated_one_after_another(strategy: Make) -> None:
    def step(self: Any, batch: Any) -> Any:
        return self.net(batch)

    combined = CombinedLoader({"long": LONG, "short": SHORT}, "sequential")
    found = returned(step, strategy(), combined)
    close(found, [[by_hand(x) for x in LONG], [by_hand(x) for x in SHORT]])


# -- gradients ----------------------------------------------------------------------------------


def saliency(self: Any, x: Tensor) -> Iterator[Any]:
    with torch.enable_grad():
        loss = self.net(x).square().mean()
    found = yield from Gradient({"loss": loss}, wrt=[self.net.weight])
    return x @ found["loss"][0].T


def saliency_by_hand(x: Tensor) -> Tensor:
    net = linear(3, 2)
    (gradient,) = torch.autograd.grad(net(x).square().mean(), [net.weight])
    return x @ gradient.T


@every_strategy
def test_a_step_that_turns_gradients_on_may_ask_for_them(strategy: Make) -> None:
    found = returned(saliency, strategy(), LONG, inference_mode=False)
    close(found, [saliency_by_hand(x) for x in LONG])
    net = Net(saliency)
    trainer(strategy(), inference_mode=False).predict(net, LONG)
    assert all(parameter.grad is None for parameter in net.parameters())


@every_strategy
@pytest.mark.parametrize("inference_mode", [True, False])
def test_without_gradients_the_error_says_what_to_write(
    strategy: Make, inference_mode: bool
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield from Gradient({"loss": self.net(x).square().mean()}, wrt=[self.net.weight])

    steps = [saliency, step] if inference_mode else [step]
    for one in steps:
        with pytest.raises(ValueError, match=r"enable_grad\(\).*inference_mode=False"):
            trainer(strategy(), inference_mode=inference_mode).predict(Net(one), LONG)


@every_strategy
def test_gradients_that_stay_on_across_a_yield_are_refused(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        with torch.enable_grad():
            yield from Gradient({"loss": self.net(x).square().mean()}, wrt=[self.net.weight])

    with pytest.raises(RuntimeError, match=r"grad"):
        trainer(strategy(), inference_mode=False).predict(Net(step), LONG)


@every_strategy
def test_an_optimizers_name_stands_for_nothing_where_nothing_is_trained(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        with torch.enable_grad():
            loss = self.net(x).square().mean()
        yield from Gradient({"loss": loss}, wrt="optimizer")

    with pytest.raises((TypeError, KeyError, ValueError), match=r"wrt=.*parameters"):
        trainer(strategy(), inference_mode=False).predict(Net(step), LONG)


# -- updates ------------------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize(
    "update",
    [
        lambda self, loss: loss,
        lambda self, loss: {"optimizer": loss},
        lambda self, loss: Update({"optimizer": loss}),
        lambda self, loss: {"optimizer": Grads([torch.ones_like(p) for p in self.parameters()])},
        lambda self, loss: {"optimizer": lambda: loss},
    ],
)
def test_an_update_is_refused_at_its_yield(strategy: Make, update: Any) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        loss = self.net(x).square().mean()
        yield update(self, loss)

    for stage in ("validate", "test", "predict"):
        with pytest.raises(TypeError, match=r"yields an update, but nothing is trained") as caught:
            getattr(trainer(strategy()), stage)(Net(step), LONG)
        assert any(frame.name == "step" for frame in caught.traceback)


# -- ranks --------------------------------------------------------------------------------------


@several_shards
def test_shards_that_yield_differently_are_told_here_too(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        if x[0, 0] == LONG[0][0, 0]:
            yield Sum(x.sum())

    with pytest.raises(RuntimeError, match="Sum"):
        trainer(strategy()).predict(Net(step), LONG)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with closing_pools():
        yield pool(2)


def in_a_rank() -> list[Any]:
    def strategy() -> Strategy:
        return Distributed(accelerator="cpu", timeout=60)

    return [
        returned(similar, strategy(), LONG),
        returned(similar, strategy(), LONG, microbatch_size=2),
        returned(centred, strategy(), LONG),
        returned(remembering, strategy(), {"long": LONG, "short": SHORT}),
        returned(saliency, strategy(), LONG, inference_mode=False),
        returned(
            lambda self, batch: [self.net(x) for x in batch if x is not None],
            strategy(),
            CombinedLoader([LONG, SHORT], "max_size"),
        ),
    ]


def test_two_ranks_return_what_one_process_does(two_ranks: RankPool) -> None:
    similarities = [by_hand(x) @ by_hand(x).T for x in LONG]
    for found in two_ranks.run(in_a_rank):
        close(found[0], similarities)
        close(found[1], similarities)
        close(found[2], [by_hand(x)[:, 0] - by_hand(x)[:, 0].mean() for x in LONG])
        close(found[3], [remembered(LONG), remembered(SHORT, 14)])
        close(found[4], [saliency_by_hand(x) for x in LONG])
        rounds = [[LONG[0], SHORT[0]], [LONG[1]], [LONG[2]]]
        close(found[5], [[by_hand(x) for x in batch] for batch in rounds])
