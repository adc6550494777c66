"""One epoch of training: windows of loader batches, and what is counted."""

from typing import Any

import pytest
import torch
from torch import Tensor

from composefit import Callback
from composefit.loops import TrainEpochLoop
from tests.faults.fault import two
from tests.lockstep.steps import data, every_strategy, module, trainer


class Trace(Callback):
    """Every batch hook and step, with what was counted then."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.calls.append(("start", batch_idx, float(batch[0, 0]), trainer.global_step))

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.calls.append(("end", batch_idx, float(batch[0, 0]), trainer.global_step))


def numbered(n: int) -> list[Tensor]:
    """Batches of two samples that hold their number."""
    return [torch.full((2, 3), float(i), dtype=torch.float64) for i in range(n)]


def indexed(seen: list[Any]) -> Any:
    """A module whose step notes each shard's batch index, and what its batch holds."""

    def step(self: Any, x: Tensor, batch_idx: int) -> Tensor:
        seen.append((self.global_step, batch_idx, float(x[0, 0])))
        return self.net(x).square().mean()

    return module(step)


def test_without_accumulation_a_step_takes_one_batch() -> None:
    trace, seen = Trace(), []
    run = trainer(callbacks=trace)
    run.fit(indexed(seen), numbered(2))
    assert trace.calls == [
        ("start", 0, 0, 0),
        ("end", 0, 0, 1),
        ("start", 1, 1, 1),
        ("end", 1, 1, 2),
    ]
    assert seen == [(0, 0, 0), (1, 1, 1)]


def test_a_window_starts_all_its_batches_steps_once_and_ends_them_all() -> None:
    trace, seen = Trace(), []
    run = trainer(callbacks=trace, accumulate_grad_batches=2)
    run.fit(indexed(seen), numbered(3))
    assert trace.calls == [
        ("start", 0, 0, 0),
        ("start", 1, 1, 0),
        ("end", 0, 0, 1),
        ("end", 1, 1, 1),
        ("start", 2, 2, 1),  # the last window is short
        ("end", 2, 2, 2),
    ]
    assert seen == [(0, 0, 0), (0, 1, 1), (1, 2, 2)]  # a shard's index is its batch's
    assert (run.global_step, run.updates) == (2, {"net": 2})


def test_the_outputs_are_the_reduced_losses() -> None:
    outputs: list[Any] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outs: Any) -> None:  # type: ignore[override]
            outputs.append(outs)

    net = module(lambda self, x: x.mean() + 0 * self.net(x).sum() if x[0, 0] != 1 else None)
    trainer(callbacks=Keep()).fit(net, numbered(3))
    assert [{n: float(v) for n, v in out.items()} for out in outputs] == [
        {"loss": 0},
        {},
        {"loss": 2},
    ]
    assert not any(loss.requires_grad for out in outputs for loss in out.values())


def test_outputs_have_the_names_of_several_optimizers() -> None:
    outputs: list[Any] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outs: Any) -> None:  # type: ignore[override]
            outputs.append(set(outs))

    def step(self: Any, x: Tensor) -> Any:
        yield {"a": self.a(x).mean()}
        if self.global_step:
            yield {"b": self.b(x).mean()}

    trainer(callbacks=Keep()).fit(module(step, **two()), numbered(2))
    assert outputs == [{"a"}, {"a", "b"}]


@pytest.mark.parametrize(
    ("options", "steps", "batches"),
    [
        ({"limit_train_batches": 3}, 3, 3),
        ({"limit_train_batches": 0.5}, 2, 2),
        ({"limit_train_batches": 0.01}, 1, 1),
        ({"limit_train_batches": 1.0}, 5, 5),
        ({"limit_train_batches": 99}, 5, 5),
        ({"limit_train_batches": 3, "accumulate_grad_batches": 2}, 2, 3),
        ({"accumulate_grad_batches": 2}, 3, 5),
        ({"accumulate_grad_batches": 9}, 1, 5),
        ({"max_steps": 2}, 2, 2),
        ({"max_steps": 2, "accumulate_grad_batches": 2}, 2, 4),
        ({"max_steps": 0}, 0, 0),
        ({"max_steps": -1}, 5, 5),
    ],
)
def test_limits_count_loader_batches_and_max_steps_counts_steps(
    options: dict[str, Any], steps: int, batches: int
) -> None:
    seen: list[Any] = []
    run = trainer(**options)
    run.fit(indexed(seen), numbered(5))
    assert run.global_step == steps
    assert [number for _, number, _ in seen] == [*range(batches)]


@every_strategy
def test_a_skipped_step_counts_as_a_step_not_as_an_update(strategy: Any) -> None:
    net = module(lambda self, x: self.net(x).mean() if self.global_step % 3 == 0 else None)
    run = trainer(strategy(), max_steps=4)
    run.fit(net, numbered(9))
    assert (run.global_step, run.updates) == (4, {"net": 2})


def test_a_callback_stops_the_epoch_after_its_step() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any) -> None:  # type: ignore[override]
            trainer.should_stop = trainer.global_step == 2

    run = trainer(callbacks=Stop(), max_epochs=5)
    run.fit(module(lambda self, x: self.net(x).mean()), numbered(9))
    assert (run.global_step, run.current_epoch) == (2, 0)  # the first epoch is not over


def test_its_state_is_the_batches_taken() -> None:
    run = trainer(max_steps=2, accumulate_grad_batches=2)
    batches = [data(4, 3)] * 9
    run.fit(module(lambda self, x: self.net(x).mean()), batches)
    assert run.fit_loop is not None
    state = run.fit_loop.train.state_dict()
    assert (state["epoch"], state["batch_idx"]) == (0, 4)
    other = TrainEpochLoop(batches)
    other.load_state_dict(state)
    assert (other.epoch, other.batch_idx) == (0, 4)


@pytest.mark.parametrize("error", [StopIteration, KeyError])
def test_an_error_of_the_step_does_not_end_the_epoch_in_silence(error: type[Exception]) -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        if self.global_step == 1:
            raise error
        return self.net(x).mean()

    run = trainer()
    with pytest.raises((RuntimeError, KeyError)):
        run.fit(module(step), numbered(4))
    assert run.global_step == 1
