"""What a step leaves on the module of a rank: written alike, merged, or gone with the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composefit import LoopModule, Mean, Once, SingleDevice, Strategy
from tests.ranks.pool import RankPool
from tests.ranks.test_steps import strategy, trainer

# Functions that run in ranks are sent there whole, so they build what they need themselves.


class Child(nn.Module):
    """A layer with a buffer and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(3, 1, dtype=torch.float64)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("table", torch.arange(4.0))
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().mean()


class Net(LoopModule):
    """A child, and steps that a test writes."""

    def __init__(
        self, step: Callable[..., Any], validation: Callable[..., Any] | None = None
    ) -> None:
        super().__init__()
        self.child = Child()
        self.__dict__.update(step=step, validation=validation)

    def training_step(self, batch: Tensor) -> Any:
        return self.__dict__["step"](self, batch)

    def validation_step(self, batch: Tensor) -> Any:
        return self.__dict__["validation"](self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.child.parameters(), lr=0.1)


def data(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 3, dtype=torch.float64, generator=generator) for size in sizes]


def error_of(step: Callable[..., Any], *sizes: int, **arguments: Any) -> tuple[str, int]:
    """What a fit raises, and how many steps it has done."""
    validation = arguments.pop("validation", None)
    fitting = trainer(strategy(), **arguments)
    val = {} if validation is None else {"val_dataloaders": data(8, 8)}
    try:
        fitting.fit(Net(step, validation), data(*sizes), **val)
    except RuntimeError as error:
        return str(error), fitting.global_step
    return "trained", fitting.global_step


# -- buffers ---------------------------------------------------------------------------------------


def rebinds(child: Any, value: Tensor) -> None:
    child.seen = value


def replaces(child: Any, value: Tensor) -> None:
    child._buffers["seen"] = value


def writes_past_the_counter(child: Any, value: Tensor) -> None:
    child.seen.data.copy_(value)


def adds(child: Any, value: Tensor) -> None:
    child.register_buffer("another", value)


def removes(child: Any, value: Tensor) -> None:
    if value > 0:
        del child.seen


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (rebinds, "child.seen"),
        (replaces, "child.seen"),
        (writes_past_the_counter, "child.seen"),
        (adds, "child.another"),
        (removes, "child.seen"),
    ],
)
def test_a_buffer_that_ranks_write_differently_is_named_however_it_is_written(
    two_ranks: RankPool, write: Callable[..., None], name: str
) -> None:
    def work() -> Any:
        def step(self: Any, x: Tensor) -> Any:
            write(self.child, torch.tensor(self.global_rank - 0.5).double())
            return self.child(x)

        return error_of(step, 8, 8)

    for text, steps in two_ranks.run(work):
        assert f"'{name}'" in text
        assert "ranks 0 and 1 differ" in text
        assert steps == 0, "before any weight has changed"


def test_a_buffer_bound_anew_is_found_in_any_step(two_ranks: RankPool) -> None:
    """Also one whose counter stands where that of the one before did."""

    def work() -> Any:
        def step(self: Any, x: Tensor) -> Any:
            if self.global_step == 2:
                value = x.mean().clone()
                while value._version < self.child.seen._version:
                    value.mul_(1)
                self.child.seen = value
            return self.child(x)

        return error_of(step, *[8] * 4)

    for text, steps in two_ranks.run(work):
        assert "'child.seen'" in text
        assert steps == 2


def test_a_write_past_the_counter_that_begins_late_is_found_at_a_power_of_two(
    two_ranks: RankPool,
) -> None:
    def work() -> Any:
        def step(self: Any, x: Tensor) -> Any:
            if self.global_step >= 4:
                self.child.seen.data.copy_(x.mean())
            return self.child(x)

        return error_of(step, *[8] * 10)

    for text, steps in two_ranks.run(work):
        assert "'child.seen'" in text
        assert steps == 7


def test_what_is_written_after_the_last_effect_is_found_with_the_next_message(
    two_ranks: RankPool,
) -> None:
    def work() -> Any:
        def step(self: Any, x: Tensor) -> Any:
            yield self.child(x)
            self.child.seen.copy_(x.mean())

        return error_of(step, 8, 8), error_of(step, 8)

    for (text, steps), (last_text, last_steps) in two_ranks.run(work):
        assert "'child.seen'" in text
        assert steps == 1
        assert "'child.seen'" in last_text, "at the end of the run, where no step follows"
        assert last_steps == 1


def test_what_a_validation_writes_differently_is_found_at_its_end(two_ranks: RankPool) -> None:
    def work() -> Any:
        def step(self: Any, x: Tensor) -> Any:
            return self.child(x)

        def validation(self: Any, x: Tensor) -> None:
            self.child.seen.copy_(x.mean())

        return error_of(step, 8, 8, 8, 8, validation=validation, val_check_interval=2)

    for text, steps in two_ranks.run(work):
        assert "'child.seen'" in text
        assert steps == 2


def test_what_is_written_alike_is_fine_however_a_rank_is_cut(two_ranks: RankPool) -> None:
    """Ranks with two shards, with one, with none; writes in steps, at barriers, by hooks."""

    def step(self: Any, x: Tensor) -> Any:
        def write() -> None:
            self.child.table.add_(1)

        self.child.seen = self.child.seen + 1
        yield Mean(self.child(x).detach() * len(x), len(x))
        self.child.seen.add_(1)
        yield Once(write)
        self.child.table[0] += 1
        yield self.child(x)
        self.child.seen.data.add_(1)

    def validation(self: Any, x: Tensor) -> None:
        self.child.seen.add_(1)

    def fit(strategy: Strategy) -> Any:
        module = Net(step, validation)
        fitting = trainer(strategy, microbatch_size=2, max_epochs=2, check_val_every_n_epoch=2)
        fitting.fit(module, data(8, 3, 1, 2, 8, 5), data(3, 1))
        return {name: value.clone() for name, value in module.state_dict().items()}

    def work() -> Any:
        return fit(strategy())

    expected = fit(SingleDevice("cpu", shards=2))
    for found in two_ranks.run(work):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= 1e-13, name


def test_a_rank_without_samples_takes_over_what_the_others_have_written(
    two_ranks: RankPool,
) -> None:
    def work() -> float:
        def step(self: Any, x: Tensor) -> Any:
            self.child.seen.add_(1)
            return self.child(x)

        module = Net(step)
        trainer(strategy()).fit(module, data(1, 4, 1, 1, 4))
        return float(module.child.seen)

    assert two_ranks.run(work) == [5.0, 5.0]


def test_a_queue_that_once_writes_is_not_read_again_to_be_compared(two_ranks: RankPool) -> None:
    def work() -> list[int]:
        from composefit.lockstep import ranked_state

        read = []
        checksum = ranked_state._crc

        def counting(value: Any) -> int:
            read.append(value)
            return checksum(value)

        def step(self: Any, x: Tensor) -> Any:
            def push(rows: Tensor) -> None:
                self.child.table.copy_(rows[:4, 0])
                if self.global_step == 8:
                    read.clear()

            yield Once(push, x)
            yield self.child(x)

        ranked_state._crc = counting  # type: ignore[assignment]
        try:
            trainer(strategy()).fit(Net(step), data(*[8] * 15))
        finally:
            ranked_state._crc = checksum
        return len(read)

    assert two_ranks.run(work) == [0, 0]


def test_modules_are_walked_again_only_where_one_has_come(two_ranks: RankPool) -> None:
    def work() -> Any:
        from composefit.lockstep import ranked_state

        made = []
        before = ranked_state.Part.__init__

        def counting(self: Any, module: nn.Module) -> None:
            made.append(type(module).__name__)
            before(self, module)

        def step(self: Any, x: Tensor) -> Any:
            if self.global_step == 5:
                made.clear()
            if self.global_step == 8:
                self.child.late = nn.BatchNorm1d(3).double()
            if self.global_step > 8:
                x = self.child.late(x)
            return self.child(x)

        ranked_state.Part.__init__ = counting  # type: ignore[method-assign]
        try:
            module = Net(step)
            trainer(strategy()).fit(module, data(*[8] * 12))
        finally:
            ranked_state.Part.__init__ = before  # type: ignore[method-assign]
        return made, module.child.late.running_mean

    (walked, mean), (_, other) = two_ranks.run(work)
    assert walked == ["Net", "Child", "Linear", "BatchNorm1d"]
    assert torch.equal(mean, other), "its statistics merge from then on"


# -- attributes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch", [None, 1])
def test_an_attribute_that_a_child_sets_is_gone_after_the_step(
    two_ranks: RankPool, microbatch: int | None
) -> None:
    """As where several shards run in one process: it would be another thing on each rank."""

    def work() -> Any:
        seen = []

        def step(self: Any, x: Tensor) -> Any:
            seen.append((self.child.last, hasattr(self.child, "new")))
            self.child.last = self.child.new = len(x)
            yield Mean(x.sum(), len(x))
            assert self.child.last == self.child.new == len(x), "it lives as long as the step"
            yield self.child(x)

        module = Net(step)
        trainer(strategy(), microbatch_size=microbatch).fit(module, data(4, 6))
        return set(seen), module.child.last, hasattr(module.child, "new")

    for found in two_ranks.run(work):
        assert found == ({(None, False)}, None, False)


def test_what_code_at_a_barrier_sets_stays(two_ranks: RankPool) -> None:
    def work() -> Any:
        class Hooked(Net):
            def on_after_optimizer_step(self, optimizer: Any, name: str) -> None:
                self.child.updates = getattr(self.child, "updates", 0) + 1

        def step(self: Any, x: Tensor) -> Any:
            def keep(rows: Tensor) -> None:
                saw.append(self.child.last)
                self.child.kept = len(rows)

            self.child.last = "of this shard"
            yield Once(keep, x)
            assert self.child.kept == 8
            assert self.child.last == "of this shard"
            yield self.child(x)

        saw: list[Any] = []
        module = Hooked(step)
        trainer(strategy()).fit(module, data(8, 8))
        return saw, module.child.last, module.child.kept, module.child.updates

    for found in two_ranks.run(work):
        assert found == ([None, None], None, 8, 2)


def test_a_metric_keeps_what_it_has_counted(two_ranks: RankPool) -> None:
    def work() -> Any:
        from torchmetrics import MeanMetric

        def step(self: Any, x: Tensor) -> Any:
            self.mean(x)
            self.log("mean", self.mean, on_epoch=True)
            return self.child(x)

        module = Net(step)
        module.mean = MeanMetric()
        fitting = trainer(strategy())
        fitting.fit(module, data(8, 6))
        return float(fitting.callback_metrics["mean"])

    expected = float(torch.cat(data(8, 6)).mean())
    for found in two_ranks.run(work):
        assert found == pytest.approx(expected, abs=1e-6)
