import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest

from composefit import checkpoint
from composefit.callbacks import EarlyStopping, ModelCheckpoint
from tests.callbacks.fake import Pair, SteppedTrainer, fit


def looks(callback: EarlyStopping, values: list[float], **given: Any) -> int:
    """How many epochs run before the fit ends."""
    trainer = SteppedTrainer(Path(), callback, **given)
    trainer.begin()
    for done, value in enumerate(values, 1):
        trainer.epoch(val_loss=value)
        if trainer.should_stop:
            return done
    return len(values)


def by_hand(values: list[float], patience: int, min_delta: float, sign: int) -> int:
    """The rule in its plainest form: with sign 1, smaller is better."""
    best, waited = math.inf, 0
    for done, value in enumerate(values, 1):
        if sign * value < best - min_delta:
            best, waited = sign * value, 0
        else:
            waited += 1
            if waited >= patience:
                return done
    return len(values)


@pytest.mark.parametrize(
    ("patience", "min_delta", "mode"),
    list(itertools.product([1, 2, 3], [0.0, 0.15], ["min", "max"])),
)
def test_it_stops_when_the_rule_applied_by_hand_does(patience, min_delta, mode):
    draw = random.Random(patience)
    for _ in range(20):
        values = [round(draw.uniform(0, 1), 2) for _ in range(12)]
        callback = EarlyStopping("val_loss", min_delta, patience, mode=mode)
        sign = 1 if mode == "min" else -1
        assert looks(callback, values) == by_hand(values, patience, min_delta, sign)


def test_what_it_has_seen_can_be_read():
    callback = EarlyStopping("val_loss", patience=2)
    looks(callback, [0.5, 0.3, 0.4, 0.35, 0.1])
    assert callback.best_score == 0.3
    assert callback.wait_count == 2
    assert callback.stopped_epoch == 3
    assert callback.stopping_reason_message == (
        "val_loss has not improved on 0.3 in the last 2 looks"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_stops_at_once(value):
    assert looks(EarlyStopping("val_loss"), [0.5, value, 0.1]) == 2
    # It is no improvement where it does not stop.
    callback = EarlyStopping("val_loss", check_finite=False, patience=1, mode="max")
    assert looks(callback, [0.5, math.nan, 0.1]) == 2


def test_a_value_past_a_threshold_stops():
    assert looks(EarlyStopping("val_loss", stopping_threshold=0.2), [0.5, 0.2, 0.19, 0.1]) == 3
    assert looks(EarlyStopping("val_loss", divergence_threshold=2.0), [0.5, 2.0, 2.1, 0.1]) == 3
    best = EarlyStopping("val_loss", mode="max", stopping_threshold=0.8)
    assert looks(best, [0.5, 0.8, 0.81, 0.9]) == 3
    bad = EarlyStopping("val_loss", mode="max", divergence_threshold=0.1)
    assert looks(bad, [0.5, 0.1, 0.09, 0.9]) == 3


def test_validations_within_an_epoch_each_count():
    callback = EarlyStopping("val_loss", patience=2)
    trainer = SteppedTrainer(Path(), callback, val_check_interval=0.25)
    trainer.begin()
    for value in (0.5, 0.6, 0.7):
        trainer.step()
        trainer.validate(val_loss=value)
    assert trainer.should_stop


def test_the_moment_can_be_chosen():
    callback = EarlyStopping("val_loss", patience=1, check_on_train_epoch_end=True)
    trainer = SteppedTrainer(Path(), callback, val_check_interval=0.25)
    trainer.begin()
    trainer.step()
    trainer.validate(val_loss=0.5)
    trainer.validate(val_loss=0.6)
    assert callback.best_score == math.inf
    trainer.end_epoch()
    assert callback.best_score == 0.6


@pytest.mark.parametrize(
    "state",
    [
        {"sanity_checking": True},
        {"fast_dev_run": True},
        {"stage": "validate"},
        {"exception": RuntimeError()},
    ],
)
def test_nothing_is_judged_in_a_trial_outside_a_fit_or_after_a_fault(state):
    callback = EarlyStopping("val_loss", patience=0, check_on_train_epoch_end=False)
    trainer = SteppedTrainer(Path(), callback)
    trainer.begin()
    vars(trainer).update(state)
    trainer.validate(val_loss=math.nan)
    assert not trainer.should_stop


def test_a_value_that_was_never_logged_is_an_error_or_skipped():
    with pytest.raises(ValueError, match=r"needs 'val_los', .*logged are \['val_loss'\]"):
        looks(EarlyStopping("val_los"), [0.5])
    assert looks(EarlyStopping("val_los", strict=False, patience=1), [0.5, 0.6, 0.7]) == 3


def test_a_resumed_run_stops_where_an_uninterrupted_one_does(tmp_path):
    values = [0.5, 0.3, 0.4, 0.35, 0.31]
    assert looks(EarlyStopping("val_loss", patience=3), values) == 5
    first = SteppedTrainer(tmp_path, EarlyStopping("val_loss", patience=3), ModelCheckpoint())
    first.begin()
    for value in values[:3]:
        first.epoch(val_loss=value)
    callback = EarlyStopping("val_loss", patience=3)
    second = SteppedTrainer(tmp_path, callback, ModelCheckpoint(), current_epoch=3)
    second.begin(checkpoint.load(tmp_path / "last.ckpt"))
    assert callback.wait_count == 1
    second.epoch(val_loss=values[3])
    assert not second.should_stop
    second.epoch(val_loss=values[4])
    assert second.should_stop
    assert callback.stopped_epoch == 4


def test_it_judges_before_checkpoints_are_written(tmp_path):
    callback = EarlyStopping("val_loss")
    trainer = SteppedTrainer(tmp_path, callback, ModelCheckpoint())
    trainer.begin()
    trainer.epoch(val_loss=0.5)
    saved = checkpoint.load(tmp_path / "last.ckpt")["callbacks"][callback.state_key]
    assert saved["best_score"] == 0.5
    # The trainer refuses the other order.
    assert ModelCheckpoint in EarlyStopping.runs_before
    assert EarlyStopping.saves_state and ModelCheckpoint.saves_state


def test_in_a_run_what_the_module_logs_at_the_end_of_the_epoch_counts(tmp_path):
    class Logging(Pair):
        def on_train_epoch_end(self) -> None:
            self.log("score", [5.0, 3.0, 4.0, 2.0, 1.0][self.current_epoch])

    callback = EarlyStopping("score", patience=1)
    trainer = fit(tmp_path, Logging(), callback, ModelCheckpoint(), max_epochs=5)
    assert trainer.global_step == 3 * 6
    assert callback.stopped_epoch == 2
    state = checkpoint.load(tmp_path / "last.ckpt")["callbacks"][callback.state_key]
    assert state["stopped_epoch"] == 2 and state["best_score"] == 3.0


def test_a_second_fit_begins_anew():
    callback = EarlyStopping("val_loss", patience=1)
    assert looks(callback, [0.1, 0.2, 0.3]) == 2
    assert looks(callback, [0.9, 0.8, 0.7]) == 3


def test_a_second_fold_of_a_run_begins_anew():
    callback = EarlyStopping("val_loss", patience=1)
    trainer = SteppedTrainer(Path(), callback)
    trainer.begin()
    trainer.epoch(val_loss=0.1)
    trainer.begin_fold()
    trainer.epoch(val_loss=0.5)
    assert not trainer.should_stop
    assert callback.best_score == 0.5


def test_verbose_prints_improvements_and_the_end(capsys):
    looks(EarlyStopping("val_loss", patience=1, verbose=True), [0.5, 0.25, 0.75])
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "epoch 0: val_loss improved to 0.5",
        "epoch 1: val_loss improved to 0.25",
        "epoch 2: the fit ends, val_loss has not improved on 0.25 in the last 1 looks",
    ]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"monitor": None}, TypeError, "needs monitor"),
        ({"monitor": "x", "mode": "auto"}, ValueError, "mode must be 'min'"),
        ({"monitor": "x", "patience": -1}, ValueError, "patience must be at least 0"),
        ({"monitor": "x", "patience": 2.0}, TypeError, "patience must be a whole number"),
        ({"monitor": "x", "min_delta": -0.1}, ValueError, "min_delta must not be negative"),
    ],
)
def test_wrong_arguments_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        EarlyStopping(**settings)
