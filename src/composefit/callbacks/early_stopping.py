"""Stopping a fit that no longer gets better."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from composefit.callbacks.callback import Callback
from composefit.callbacks.model_checkpoint import ModelCheckpoint
from composefit.callbacks.monitor import (
    Mode,
    agreed_values,
    as_score,
    better,
    check_count,
    check_monitor,
    judges_at_epoch_end,
    never_logged,
    worst,
)


class EarlyStopping(Callback):
    """Ends a fit when a logged value has not improved for some time, or is past a limit.

    The value is looked at where it is known: at the end of each training epoch, or, where
    validations come more or less often than that, at the end of each validation
    (`check_on_train_epoch_end` says which). It runs after the module's own hook, so that what is
    logged there counts, and before checkpoints are written, so that these hold the judgement.

    Args:
        monitor: the name of the logged value.
        min_delta: an improvement is a change by more than this, in the value's units.
        patience: stop after this many looks in a row without one.
        verbose: print improvements, and why the fit ends.
        mode: `"min"` or `"max"`: which values are better.
        strict: whether a value that was never logged is an error, or skipped.
        check_finite: stop when the value is NaN or infinite.
        stopping_threshold: stop once the value is better than this: it is good enough.
        divergence_threshold: stop once the value is worse than this.
        check_on_train_epoch_end: look at the end of the training epoch (True) or of each
            validation (False); None decides as above.

    Attributes:
        wait_count: looks without an improvement so far.
        best_score: the best value so far, a 0-dim tensor.
        stopped_epoch: the epoch, from 0, in which it ended the fit; 0 where it has not.
        stopping_reason_message: why it ended the fit, or None.

    Raises:
        TypeError, ValueError: an argument that cannot be; in a run, with `strict`, a value that
            was never logged.
    """

    # Late, to hear of what the module logs in the same hook; ModelCheckpoint comes later still.
    saves_state = True
    runs_before: ClassVar[tuple[type[Callback], ...]] = (ModelCheckpoint,)

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: Mode = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
    ) -> None:
        check_monitor(monitor, mode)
        if monitor is None:
            raise TypeError("EarlyStopping needs monitor, the name of a logged value: 'val_loss'")
        check_count("patience", patience, least=0)
        if not min_delta >= 0:
            raise ValueError(
                f"min_delta must not be negative, got {min_delta}: it is by how much a value must "
                "improve, in either mode"
            )
        self.monitor = monitor
        self.min_delta = min_delta
        self.patience = patience
        self.verbose = verbose
        self.mode: Mode = mode
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.check_on_train_epoch_end = check_on_train_epoch_end
        self._begin()

    def _begin(self) -> None:
        self._begun = False
        self.wait_count = 0
        self.stopped_epoch = 0
        self.stopping_reason_message: str | None = None
        self.best_score: Tensor = torch.tensor(worst(self.mode), dtype=torch.float64)

    @property
    def state_key(self) -> str:
        """Tells several of them apart, by what they judge."""
        return f"{type(self).__qualname__}{ {'monitor': self.monitor, 'mode': self.mode} }"

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Begin anew with a fit; what is resumed comes back after this."""
        if stage == "fit":
            self._begin()

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Begin anew with a second one in a run, as of a loop over the folds of a data set."""
        if self._begun:
            self._begin()
        self._begun = True

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Look at the value, if it is known by epochs."""
        self._look(trainer, at_epoch_end=True)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """Look at the value, if it is known by validations."""
        self._look(trainer, at_epoch_end=False)

    def _look(self, trainer: Any, at_epoch_end: bool) -> None:
        if trainer.exception is not None or trainer.stage != "fit":
            return
        if trainer.sanity_checking or trainer.fast_dev_run:
            return
        if trainer.fit_loop is not None and trainer.fit_loop.train.interrupted:
            return  # an epoch that was cut short may go on
        if judges_at_epoch_end(trainer, self.check_on_train_epoch_end) is not at_epoch_end:
            return
        known = agreed_values(trainer)
        if self.monitor not in known:
            if self.strict:
                raise never_logged(f"EarlyStopping({self.monitor!r})", [self.monitor], known)
            return
        score = as_score(known[self.monitor])
        reason = self._judge(score)
        if reason is not None:
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason_message = reason
        if self.verbose and trainer.is_global_zero:
            if reason is not None:
                print(f"epoch {trainer.current_epoch}: the fit ends, {reason}")
            elif self.wait_count == 0:
                print(f"epoch {trainer.current_epoch}: {self.monitor} improved to {score:.5g}")

    def _judge(self, score: Tensor) -> str | None:
        """Count, and say why to stop, or None."""
        value, best, name = score.item(), self.best_score.item(), self.monitor
        if self.check_finite and not math.isfinite(value):
            return f"{name} is {value}; the best was {best:.5g}"
        good = self.stopping_threshold
        if good is not None and better(value, good, self.mode):
            return f"{name} = {value:.5g} is better than stopping_threshold={good}"
        bad = self.divergence_threshold
        if bad is not None and better(bad, value, self.mode):
            return f"{name} = {value:.5g} is worse than divergence_threshold={bad}"
        closer = value + self.min_delta if self.mode == "min" else value - self.min_delta
        if better(closer, best, self.mode):
            self.best_score = score
            self.wait_count = 0
            return None
        self.wait_count += 1
        if self.wait_count < self.patience:
            return None
        return f"{name} has not improved on {best:.5g} in the last {self.wait_count} looks"

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far; the settings are the constructor's."""
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        self.best_score = state_dict["best_score"]
        self.stopping_reason_message = state_dict["stopping_reason_message"]
