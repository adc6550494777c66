from pathlib import Path
from typing import Any

import pytest

from composefit.callbacks import ThroughputMonitor
from tests.callbacks.fake import SteppedTrainer


class Clock:
    now = 50.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("composefit.callbacks.throughput_monitor.time", clock)
    return clock


class Timed(SteppedTrainer):
    """Every step takes a given time and trains on 10 samples a loader batch."""

    seconds = 0.5
    clock: Any

    def update(self) -> None:
        self.clock.now += self.seconds
        if self.samples_seen is not None:
            self.samples_seen += 10 * self.window


def test_rates_are_means_over_the_steps_before(clock):
    trainer = Timed(Path(), ThroughputMonitor(), clock=clock, window=2)
    trainer.begin()
    for _ in range(4):
        trainer.step()
    logged = trainer.module.logged
    # Known from the third step on, at both of its batches.
    assert logged["steps_per_second"] == [2.0] * 4
    assert logged["batches_per_second"] == [4.0] * 4
    assert logged["samples_per_second"] == [40.0] * 4


def test_the_mean_is_over_the_last_steps_only(clock):
    trainer = Timed(Path(), ThroughputMonitor(window_size=2), clock=clock)
    trainer.begin()
    for trainer.seconds in (8.0, 8.0, 8.0, 0.5, 1.5, 1.0):
        trainer.step()
    # Before steps 3 to 6: over one step, and then over the two before it.
    assert trainer.module.logged["steps_per_second"] == [1 / 8, 2 / 16, 2 / 8.5, 2 / 2]


def test_time_between_steps_counts_and_validation_does_not(clock):
    trainer = Timed(Path(), ThroughputMonitor(), clock=clock, seconds=1.0)
    trainer.begin()
    trainer.step()
    clock.now += 1.0  # fetching
    trainer.step()
    trainer.call("on_validation_start")
    clock.now += 1000.0
    trainer.call("on_validation_end")
    trainer.step()
    trainer.step()
    assert trainer.module.logged["steps_per_second"] == [1 / 2, 2 / 3]


def test_only_steps_that_loggers_get_are_logged(clock):
    trainer = Timed(Path(), ThroughputMonitor(), clock=clock, log_every_n_steps=3)
    trainer.begin()
    for _ in range(7):
        trainer.step()
    assert len(trainer.module.logged["steps_per_second"]) == 2


def test_without_a_known_number_of_samples_the_other_rates_are_logged(clock):
    trainer = Timed(Path(), ThroughputMonitor(), clock=clock, samples_seen=None)
    trainer.begin()
    for _ in range(3):
        trainer.step()
    assert trainer.module.logged.keys() == {"batches_per_second", "steps_per_second"}


def test_a_second_fit_begins_anew(clock):
    trainer = Timed(Path(), ThroughputMonitor(), clock=clock)
    trainer.begin()
    trainer.step()
    trainer.step()
    clock.now += 1000.0
    trainer.module.logged.clear()
    trainer.begin()
    for _ in range(3):
        trainer.step()
    assert trainer.module.logged["steps_per_second"] == [2.0]


def test_a_step_that_failed_does_not_count(clock):
    callback = ThroughputMonitor()
    trainer = Timed(Path(), callback, clock=clock)
    trainer.begin()
    trainer.step()
    trainer.exception = RuntimeError()
    trainer.step()
    trainer.exception = None
    trainer.call("on_train_batch_start", None, 0)
    assert trainer.module.logged == {}


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (1.5, TypeError)])
def test_wrong_arguments_are_refused(size, error):
    with pytest.raises(error, match="window_size must be"):
        ThroughputMonitor(size)
