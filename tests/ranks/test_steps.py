"""A step over several ranks: what they agree on, what is found where they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composefit import Distributed, LoopModule, Once, SingleDevice, Strategy, Sum, Trainer, Update
from composefit.ranks import reduction
from tests.ranks.pool import RankPool

# Functions that run in ranks are sent there whole, so they build what they need themselves.


def strategy() -> Distributed:
    return Distributed(accelerator="cpu", timeout=30)


def trainer(strategy: Strategy, **arguments: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "seed": 0,
        "max_epochs": 1,
    }
    return Trainer(strategy=strategy, **{**quiet, **arguments})


class Net(LoopModule):
    """A layer, and a step that a test writes."""

    def __init__(self, step: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(3, 1, dtype=torch.float64)
        for name, part in parts.items():
            self.add_module(name, part.double())
        self.__dict__["step"] = step

    def training_step(self, batch: Tensor) -> Any:
        return self.__dict__["step"](self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(samples: int = 8, batches: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(samples, 3, dtype=torch.float64, generator=generator) for _ in range(batches)
    ]


def fit(step: Callable[[Any, Tensor], Any], batches: list[Tensor], **arguments: Any) -> Any:
    parts = arguments.pop("parts", {})
    by = arguments.pop("strategy", None) or strategy()
    module = Net(step, **parts)
    fitting = trainer(by, **arguments)
    fitting.fit(module, batches)
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(found: list[dict[str, Tensor]], expected: dict[str, Tensor], within: float) -> None:
    for of_rank in found:
        assert of_rank.keys() == expected.keys()
        for name, value in expected.items():
            difference = (of_rank[name].double() - value.double()).abs().max()
            assert difference <= within, f"{name}: {difference}"


# -- disagreements ---------------------------------------------------------------------------------


def test_ranks_that_yield_different_effects_all_hear_of_both(two_ranks: RankPool) -> None:
    def work() -> Any:
        def step(self: Any, x: Tensor) -> Any:
            if self.global_rank == 1:
                yield Sum(self.layer(x).sum())
            yield self.layer(x).square().mean()

        return fit(step, data())

    outcomes = two_ranks.outcomes(work)
    for one in outcomes:
        assert one.kind == "RuntimeError", one
        assert "rank 0: step 0, yielded a loss" in one.text, one
        assert "rank 1: step 0, yielded Sum(" in one.text, one
        assert one.text.count("test_steps.py:") >= 2, one


def test_a_rank_that_leaves_out_an_update_is_found_at_the_next_message(two_ranks: RankPool) -> None:
    def work() -> Any:
        def step(self: Any, x: Tensor) -> Any:
            yield self.layer(x).square().mean()
            if self.global_rank == 0:
                yield self.layer(x).abs().mean()

        return fit(step, data(batches=3))

    outcomes = two_ranks.outcomes(work)
    for one in outcomes:
        assert one.kind == "RuntimeError", one
        assert "rank 0: step 0" in one.text, one
        assert "rank 1: step 1" in one.text, one


def test_an_exception_of_one_rank_reaches_the_others_as_such(two_ranks: RankPool) -> None:
    def work() -> Any:
        def step(self: Any, x: Tensor) -> Any:
            if self.global_rank == 1 and self.global_step == 2:
                raise ValueError("of my own")
            return self.layer(x).square().mean()

        return fit(step, data(batches=4))

    first, second = two_ranks.outcomes(work)
    assert (second.kind, "of my own" in second.text) == ("ValueError", True)
    assert "rank 1" in second.text  # in the note on where it was
    assert first.kind == "PeerFailed"
    assert "rank 1 failed with ValueError: of my own" in first.text


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_any_weight_changes(
    two_ranks: RankPool,
) -> None:
    def work() -> Any:
        def step(self: Any, x: Tensor) -> Any:
            loss = self.layer(x).square().mean()
            return loss * float("nan") if self.global_rank == 1 else loss

        module = Net(step)
        before = module.layer.weight.detach().clone()
        try:
            trainer(strategy()).fit(module, data())
        except FloatingPointError:
            return torch.equal(module.layer.weight, before)
        return "trained"

    assert two_ranks.run(work) == [True, True]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_that_asks_to_stop_stops_all(two_ranks: RankPool, rank: int) -> None:
    def work() -> int:
        def step(self: Any, x: Tensor) -> Any:
            if self.global_rank == rank and self.global_step == 1:
                self.trainer.should_stop = True
            return self.layer(x).square().mean()

        module = Net(step)
        module.__class__ = type(
            "Listening", (Net,), {"on_train_batch_end": lambda self, outputs, batch, i: None}
        )
        fitting = trainer(strategy(), max_epochs=3)
        fitting.fit(module, data(batches=5))
        return fitting.global_step

    assert two_ranks.run(work) == [2, 2]


def test_a_signal_on_one_rank_ends_all_at_the_same_step(two_ranks: RankPool) -> None:
    def work() -> Any:
        import os
        import signal

        def step(self: Any, x: Tensor) -> Any:
            if self.global_rank == 1 and self.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.layer(x).square().mean()

        fitting = trainer(strategy(), max_epochs=50)
        try:
            fitting.fit(Net(step), data(batches=5))
        except SystemExit as stop:
            return fitting.global_step, stop.code
        return "went on"

    first, second = two_ranks.run(work)
    assert first == second
    assert first[0] < 5
    assert first[1] == 143


# -- state of the module ---------------------------------------------------------------------------


def test_a_buffer_that_ranks_write_differently_is_named(two_ranks: RankPool) -> None:
    def work() -> Any:
        def step(self: Any, x: Tensor) -> Any:
            self.seen.copy_(x.mean())
            return self.layer(x).square().mean()

        module = Net(step)
        module.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        before = module.layer.weight.detach().clone()
        try:
            trainer(strategy()).fit(module, data())
        except RuntimeError as error:
            return str(error), torch.equal(module.layer.weight, before)
        return "trained", False

    for text, unchanged in two_ranks.run(work):
        assert "'seen'" in text
        assert "Once" in text
        assert unchanged


def test_a_buffer_that_ranks_write_alike_is_fine(two_ranks: RankPool) -> None:
    def work() -> float:
        def step(self: Any, x: Tensor) -> Any:
            self.steps.add_(1)
            return self.layer(x).square().mean()

        module = Net(step)
        module.register_buffer("steps", torch.zeros(()))
        trainer(strategy()).fit(module, data(batches=3))
        return float(module.steps)

    assert two_ranks.run(work) == [3.0, 3.0]


def test_an_attribute_set_in_the_step_is_refused_in_favour_of_once(two_ranks: RankPool) -> None:
    def work() -> Any:
        def step(self: Any, x: Tensor) -> Any:
            self.last = x.mean()
            return self.layer(x).square().mean()

        return fit(step, data())

    outcomes = two_ranks.outcomes(work)
    assert all(one.kind == "RuntimeError" and "Once" in one.text for one in outcomes)


def test_once_gets_the_rows_of_all_ranks_in_sample_order(two_ranks: RankPool) -> None:
    def work() -> Any:
        def step(self: Any, x: Tensor) -> Any:
            def keep(rows: Tensor) -> Tensor:
                self.kept = rows.clone()
                return rows * 2

            doubled = yield Once(keep, x, rows=True)
            assert torch.equal(doubled, x * 2)
            yield self.layer(x).square().mean()

        module = Net(step)
        trainer(strategy(), accumulate_grad_batches=2).fit(module, data(5, batches=2))
        return module.kept

    for kept in two_ranks.run(work):
        assert torch.equal(kept, torch.cat(data(5, batches=2)))


def test_normalisation_statistics_become_those_of_shards_on_one_device(two_ranks: RankPool) -> None:
    def step(self: Any, x: Tensor) -> Any:
        return self.layer(self.norm(x)).square().mean()

    def work() -> Any:
        return fit(step, data(6, batches=3), parts={"norm": nn.BatchNorm1d(3)})

    expected = fit(
        step,
        data(6, batches=3),
        parts={"norm": nn.BatchNorm1d(3)},
        strategy=SingleDevice("cpu", shards=2),
    )
    same(two_ranks.run(work), expected, 1e-12)


def test_a_critic_with_batch_norm_runs_twice_in_one_step(two_ranks: RankPool) -> None:
    def step(self: Any, x: Tensor) -> Any:
        real, fake = self.layer(self.norm(x)), self.layer(self.norm(-x))
        yield (real.square() + fake).mean()
        yield self.layer(self.norm(x)).square().mean()

    def work() -> Any:
        return fit(step, data(6, batches=2), parts={"norm": nn.BatchNorm1d(3)})

    expected = fit(
        step,
        data(6, batches=2),
        parts={"norm": nn.BatchNorm1d(3)},
        strategy=SingleDevice("cpu", shards=2),
    )
    same(two_ranks.run(work), expected, 1e-12)


def test_draws_of_torch_differ_between_ranks_and_repeat(two_ranks: RankPool) -> None:
    def work() -> Any:
        drawn = []

        def step(self: Any, x: Tensor) -> Any:
            drawn.append(torch.rand(2).tolist())
            return self.layer(x).square().mean()

        fit(step, data(batches=2))
        return drawn

    first, second = two_ranks.run(work), two_ranks.run(work)
    assert first == second
    assert first[0] != first[1]


def test_a_hook_that_draws_draws_the_same_on_all_ranks(two_ranks: RankPool) -> None:
    def work() -> Any:
        class Noisy(Net):
            def on_before_optimizer_step(self, optimizer: Any, name: str) -> None:
                assert self.layer.weight.grad is not None
                self.layer.weight.grad.add_(torch.randn_like(self.layer.weight.grad))

        def step(self: Any, x: Tensor) -> Any:
            torch.rand(2 + self.global_rank)
            return self.layer(x).square().mean()

        module = Noisy(step)
        trainer(strategy()).fit(module, data(batches=3))
        return module.layer.weight.detach().clone()

    first, second = two_ranks.run(work)
    assert torch.equal(first, second)


# -- gradients -------------------------------------------------------------------------------------


def test_a_rank_without_samples_takes_part_with_weight_zero(two_ranks: RankPool) -> None:
    def step(self: Any, x: Tensor) -> Any:
        everything = yield Sum(self.layer(x).sum())
        yield self.layer(x).square().mean() + 0.1 * everything

    def work() -> Any:
        return fit(step, [data(4)[0], data(1)[0], data(5)[0]])

    expected = fit(
        step, [data(4)[0], data(1)[0], data(5)[0]], strategy=SingleDevice("cpu", shards=2)
    )
    same(two_ranks.run(work), expected, 1e-14)


def test_heads_that_take_turns_get_their_gradients_and_nothing_else(two_ranks: RankPool) -> None:
    def step(self: Any, x: Tensor) -> Any:
        hidden = self.layer(x)
        head = self.a if self.global_step % 3 else self.b
        yield head(hidden).square().mean()

    def work() -> Any:
        parts = {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1), "unused": nn.Linear(2, 2)}
        return fit(step, data(batches=7), parts=parts)

    torch.manual_seed(0)
    parts = {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1), "unused": nn.Linear(2, 2)}
    expected = fit(step, data(batches=7), parts=parts, strategy=SingleDevice("cpu"))
    same(two_ranks.run(work), expected, 1e-13)


def test_a_parameter_that_only_one_rank_reaches_counts(two_ranks: RankPool) -> None:
    def step(self: Any, x: Tensor) -> Any:
        loss = self.layer(x).square().mean()
        return loss + self.a(x).mean() if (x[:, 0] > 0).all() else loss

    sorted_rows = [batch[batch[:, 0].argsort()] for batch in data(8, batches=3)]
    halves = [torch.cat([-b[:4].abs(), b[4:].abs()]) for b in sorted_rows]

    def work() -> Any:
        torch.manual_seed(0)
        return fit(step, halves, parts={"a": nn.Linear(3, 1)})

    torch.manual_seed(0)
    expected = fit(
        step, halves, parts={"a": nn.Linear(3, 1)}, strategy=SingleDevice("cpu", shards=2)
    )
    same(two_ranks.run(work), expected, 1e-13)


def test_many_buckets_give_the_same_gradients(two_ranks: RankPool) -> None:
    def step(self: Any, x: Tensor) -> Any:
        yield self.deep(x).square().mean()
        yield Update({"optimizer": self.deep(x).abs().mean()})

    def deep() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(*[nn.Linear(3, 3) for _ in range(6)])

    def work() -> Any:
        reduction._FIRST_BYTES = 64
        begin = reduction.GradientReducer.__init__

        def small(self: Any, world: Any, bucket_bytes: int = 100) -> None:
            begin(self, world, bucket_bytes)

        reduction.GradientReducer.__init__ = small  # type: ignore[method-assign]
        try:
            return fit(step, data(batches=4), parts={"deep": deep()})
        finally:
            reduction.GradientReducer.__init__ = begin  # type: ignore[method-assign]
            reduction._FIRST_BYTES = 2**20

    expected = fit(step, data(batches=4), parts={"deep": deep()}, strategy=SingleDevice("cpu"))
    same(two_ranks.run(work), expected, 1e-13)


def test_strategy_gradient_is_that_of_the_whole_batch(two_ranks: RankPool) -> None:
    def work() -> Any:
        torch.manual_seed(5)
        layer = nn.Linear(3, 1, dtype=torch.float64)
        (batch,) = data(7)
        with strategy() as places:
            loss, found = places.gradient(lambda m, x: m(x).square().mean(), layer, batch)
        return loss, found

    torch.manual_seed(5)
    layer = nn.Linear(3, 1, dtype=torch.float64)
    (batch,) = data(7)
    expected = layer(batch).square().mean()
    gradients = torch.autograd.grad(expected, list(layer.parameters()))
    for loss, found in two_ranks.run(work):
        assert torch.allclose(loss, expected, rtol=0, atol=1e-14)
        for one, gradient in zip(found, gradients, strict=True):
            assert torch.allclose(one, gradient, rtol=0, atol=1e-14)
