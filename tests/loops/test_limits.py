"""When a fit is over: epochs, steps, time, and who asks to stop."""

import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from composefit import Callback
from composefit.loops import FitLoop, Limits, TrainEpochLoop
from tests.lockstep.steps import data, module, trainer

BATCHES = [data(2, 3, seed=i) for i in range(5)]


def squares(self: Any, x: Tensor) -> Tensor:
    loss: Tensor = self.net(x).square().mean()
    return loss


class Ask(Callback):
    """Asks to stop after the second step."""

    def on_train_batch_end(self, trainer: Any, module: Any) -> None:  # type: ignore[override]
        if trainer.global_step == 2:
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ({}, 2, 0),
        ({"min_epochs": 1}, 5, 1),
        ({"min_epochs": 2}, 10, 2),
        ({"min_epochs": 9}, 15, 3),  # as many as there are
        ({"min_steps": 1}, 2, 0),
        ({"min_steps": 4}, 4, 0),
        ({"min_steps": 5}, 5, 1),
        ({"min_steps": 8}, 8, 1),
        ({"min_steps": 7, "min_epochs": 2}, 10, 2),
        ({"min_steps": 12, "min_epochs": 2}, 12, 2),
        ({"min_epochs": 2, "max_steps": 3}, 3, 0),  # a limit is a limit
        ({"min_steps": 9, "max_epochs": 1}, 5, 1),
    ],
)
def test_who_asks_to_stop_waits_for_the_least_number_of_epochs_and_steps(
    options: dict[str, int], steps: int, epochs: int
) -> None:
    run = trainer(callbacks=Ask(), **{"max_epochs": 3, **options})
    run.fit(module(squares), BATCHES)
    assert (run.global_step, run.current_epoch) == (steps, epochs)


class Clock:
    """Time that passes when a step is done: ten seconds a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("composefit.loops.limits.time.monotonic", lambda: self.now)

    def step(self, module: Any, x: Tensor) -> Tensor:
        self.now += 10.0
        return squares(module, x)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_time": {"seconds": 30}}, 3),
        ({"max_time": "00:00:00:31"}, 4),
        ({"max_time": timedelta(minutes=1, seconds=10)}, 7),
        ({"max_time": timedelta(0)}, 0),
        ({"max_time": {"hours": 1}, "max_epochs": 2}, 10),
        ({"max_time": {"seconds": 30}, "max_steps": 2}, 2),
        # Lightning's timer asks to stop, and so waits for these.
        ({"max_time": {"seconds": 30}, "min_steps": 6}, 6),
        ({"max_time": {"seconds": 30}, "min_epochs": 2}, 10),
    ],
)
def test_time_is_a_limit_between_two_steps(
    options: dict[str, Any], steps: int, clock: Clock
) -> None:
    run = trainer(**{"max_epochs": None, **options})
    run.fit(module(lambda self, x: clock.step(self, x)), BATCHES)
    assert run.global_step == steps


def test_time_counts_from_the_first_run_on_and_only_in_runs(clock: Clock, tmp_path: Path) -> None:
    net = module(lambda self, x: clock.step(self, x))
    first = trainer(max_time={"seconds": 70}, max_steps=4)
    first.fit(net, BATCHES)
    clock.now += 3600.0  # somebody looks at the results
    first.save_checkpoint(tmp_path / "a.ckpt")
    assert first.fit_loop is not None
    assert first.fit_loop.limits.seconds() == 40.0
    second = trainer(max_time={"seconds": 70})
    clock.now += 3600.0
    second.fit(net, BATCHES, ckpt_path=tmp_path / "a.ckpt")
    assert second.global_step == 5  # the end of max_epochs=1
    third = trainer(max_time={"seconds": 70}, max_epochs=9)
    third.fit(net, BATCHES, ckpt_path=tmp_path / "a.ckpt")
    assert third.global_step == 7


def test_a_second_fit_has_all_the_time_again(clock: Clock) -> None:
    run = trainer(max_time={"seconds": 30}, max_epochs=None)
    net = module(lambda self, x: clock.step(self, x))
    for _ in range(2):
        run.fit(net, BATCHES)
        assert run.global_step == 3


def test_limits_by_themselves() -> None:
    assert Limits().reached(10**9, 10**9, False) is False
    assert Limits().reached(0, 0, True) is True
    assert Limits(max_epochs=2).reached(2, 0, False)
    assert not Limits(max_epochs=2).reached(1, 99, False)
    assert Limits(max_steps=0).reached(0, 0, False)
    limits = Limits(max_time=math.inf)
    assert limits.seconds() == 0.0
    with limits.clock():
        before = time.monotonic()
        while time.monotonic() == before:
            pass
        assert limits.seconds() > 0.0
    assert limits.seconds() == limits.elapsed > 0.0


def test_raised_limits_go_on_and_others_warn_that_nothing_is_left(tmp_path: Path) -> None:
    net, whole = module(squares), module(squares)
    trainer(max_steps=7, max_epochs=None).fit(whole, BATCHES)
    file = tmp_path / "a.ckpt"
    run = trainer(max_steps=3, max_epochs=None)
    run.fit(net, BATCHES)
    run.save_checkpoint(file)
    again = trainer(max_steps=3, max_epochs=None)
    with pytest.warns(UserWarning, match=r"nothing is left to train.*step 3.*raise them to go on"):
        again.fit(net, BATCHES, ckpt_path=file)
    assert again.global_step == 3
    trainer(max_steps=7, max_epochs=None).fit(net, BATCHES, ckpt_path=file)
    assert (net.net.weight == whole.net.weight).all()


def test_a_fit_loop_of_ones_own_stops_by_its_own_limits() -> None:
    run = trainer(max_epochs=99)
    loop = FitLoop(TrainEpochLoop(BATCHES), Limits(max_steps=3))
    run.run(loop, module(squares))
    assert (run.global_step, loop.train.batch_idx, run.num_training_batches) == (3, 3, 5)
    loop.limits.max_steps = 7
    run.run(loop, module(squares))  # counts steps from zero, as every training, in the same epoch
    assert (loop.epoch, run.global_step) == (1, 7)
