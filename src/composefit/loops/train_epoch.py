"""`TrainEpochLoop`: one epoch of training steps, and the validation within it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from composefit.data import Batches
from composefit.loops.evaluate import EvaluateLoop
from composefit.loops.limits import Limits
from composefit.loops.loop import Loop

if TYPE_CHECKING:
    from composefit.module import LoopModule
    from composefit.trainer import Trainer


class TrainEpochLoop(Loop):
    """Takes loader batches, several for a step where gradients are accumulated.

        on_train_epoch_start
        for each window of loader batches:
            on_train_batch_start, for each of them
            trainer.step(module, window)
            on_train_batch_end, for each of them
            validate, where it is due
            stop between two steps, where the limits or a signal say so
        the means of the epoch
        on_train_epoch_end
        schedulers that count epochs step; the state is saved

    Args:
        loader: batches, as a loader or as `Batches`.
        validate: the loop of one validation, or None.
        val_check_interval: validate every so many loader batches, or this fraction of an epoch;
            1.0 is its end.
        check_val_every_n_epoch: in every n-th epoch only; None counts the batches of
            `val_check_interval` over all epochs.

    Attributes:
        epoch: the epoch that runs, from 0.
        batch_idx: loader batches of this epoch whose steps are done.
        interrupted: the epoch was left before its end, by a limit or a wish to stop.
        limits: when to stop; a `FitLoop` shares its own.

    Raises:
        ValueError: an interval that is longer than the epoch, or a fraction of an epoch whose
            length nobody knows.
    """

    def __init__(
        self,
        loader: Any,
        validate: EvaluateLoop | None = None,
        *,
        val_check_interval: int | float = 1.0,
        check_val_every_n_epoch: int | None = 1,
    ) -> None:
        name = "train_dataloaders"
        self.batches = loader if isinstance(loader, Batches) else Batches(loader, name, None, 2)
        self.validate = validate
        self.val_check_interval = val_check_interval
        self.check_val_every_n_epoch = check_val_every_n_epoch
        self.limits = Limits()
        self.epoch = 0
        self.batch_idx = 0
        self.interrupted = False
        self._total = 0  # loader batches of all epochs
        self._validated = 0  # the value of `_position` at the last validation that was due
        self._ended = False
        self._every = self._interval()

    def run(self, trainer: Trainer, module: LoopModule) -> None:
        """Run one epoch, or what is left of it."""
        call, limits, batches = trainer.call, self.limits, self.batches
        timed = limits.max_time is not None
        last = math.inf if limits.max_steps is None else limits.max_steps
        pause, due = call.batch_interval("train"), 0.0  # of the batch hooks
        heard = trainer.world is not None and pause == 0
        batches.seed = trainer.run_seed
        trainer.num_training_batches = batches.number
        self.interrupted = self._ended = False
        within = self.batch_idx > 0
        with call.span(
            "on_train_epoch_start",
            "on_train_epoch_end",
            settle=lambda: self._settle(trainer),
            begun=within,
        ):
            if self._due():
                self._validate(trainer, module)  # interrupted before, or by what resumes now
            for window in self._windows(trainer):
                first = self.batch_idx
                if pause == 0 or (due < math.inf and time.monotonic() >= due):
                    due = time.monotonic() + pause
                    with call.batch_span("train", window, first) as span:
                        if span.skipped:
                            break
                        span.outputs = trainer.step(module, window, first)
                        self._advance(len(window))
                else:
                    trainer.step(module, window, first)
                    self._advance(len(window))
                trainer.between_steps()
                if self._every < math.inf and self._due():
                    self._validate(trainer, module)
                if heard:  # its hooks may have asked to stop, on one rank or on all
                    trainer.asked_to_stop()
                if (timed or trainer.should_stop or trainer.global_step >= last) and limits.reached(
                    self.epoch, trainer.global_step, trainer.should_stop
                ):
                    self.interrupted = self.batch_idx < batches.number
                    break
            if self.interrupted:
                call("on_train_interrupted")
            if self._due_at_the_end():
                self._validate(trainer, module, counts=not self.interrupted)
            trainer.end_epoch(whole=not self.interrupted)
        if self._ended:
            self.epoch += 1
            self._begin_anew()

    def _settle(self, trainer: Trainer) -> None:
        """After the end hooks, but for those that save: from now on the epoch is over."""
        trainer.settle_epoch()
        self._ended = not self.interrupted

    def _advance(self, batches: int) -> None:
        """Their step is done: a state from now on goes on behind them."""
        self.batch_idx += batches
        self._total += batches
        self.batches.mark()

    def _windows(self, trainer: Trainer) -> Iterator[list[Any]]:
        size = trainer.accumulate_grad_batches
        window: list[Any] = []
        first = True
        try:
            for batch in trainer.profiled("fetch", self.batches.epoch(self.epoch)):
                if first:
                    trainer.compare_streams(self.batches)
                    first = False
                window.append(batch)
                if size == 1 or len(window) == size:
                    yield window
                    window = []
        except Exception:
            # A signal to the whole group of processes has ended the loader's workers, too.
            trainer.between_steps()
            raise
        if window:
            yield window

    def reload(self, loader: Batches, validation: list[Batches]) -> None:
        """Between two epochs: other loaders from now on."""
        self.batches.close()
        self.batches = loader
        if self.validate is not None:
            self.validate.close()
            self.validate.loaders = validation
        self._every = self._interval()

    # -- validation ----------------------------------------------------------------------------

    def _interval(self) -> float:
        """Validate every so many loader batches; infinity: at the end of the epoch."""
        interval, number = self.val_check_interval, self.batches.number
        if self.validate is None or (isinstance(interval, float) and interval == 1.0):
            return math.inf
        if isinstance(interval, float):
            if number == math.inf:
                raise ValueError(
                    f"{self.batches.name} does not say how many batches it has, so "
                    f"val_check_interval={interval} of them is no number: give a whole number"
                )
            return max(1, int(number * interval))
        if interval > number and self.check_val_every_n_epoch is not None:
            raise ValueError(
                f"val_check_interval={interval} is longer than an epoch of {number:.0f} batches: "
                "give at most that, or count over epochs with check_val_every_n_epoch=None"
            )
        return interval

    @property
    def _position(self) -> int:
        return self._total if self.check_val_every_n_epoch is None else self.batch_idx

    def _may_validate(self) -> bool:
        every = self.check_val_every_n_epoch
        return self.validate is not None and (every is None or (self.epoch + 1) % every == 0)

    def _due(self) -> bool:
        if self._every == math.inf or not self._may_validate():
            return False
        return self._position // self._every > self._validated // self._every

    def _due_at_the_end(self) -> bool:
        if self.interrupted:  # the last word on what was trained, whenever it comes
            return self.validate is not None and self._position > self._validated
        return self._every == math.inf and self._may_validate() and not self._validated

    def _validate(self, trainer: Trainer, module: LoopModule, counts: bool = True) -> None:
        assert self.validate is not None
        before = self._validated
        if counts:  # now, since what is saved at its end goes on after it
            self._validated = max(1, self._position)
        try:
            self.validate.run(trainer, module)
        except BaseException:
            self._validated = before  # it comes again when this is resumed
            raise

    # -- state ---------------------------------------------------------------------------------

    def _begin_anew(self) -> None:
        self.batch_idx = 0
        self._ended = False
        if self.check_val_every_n_epoch is not None:
            self._validated = 0

    def close(self) -> None:
        """End the loader's workers."""
        super().close()
        self.batches.close()

    def state_dict(self) -> dict[str, Any]:
        """Epoch, loader batches of it that are done, and what their loader needs to go on."""
        counting_on = self.check_val_every_n_epoch is None
        return {
            **super().state_dict(),
            "epoch": self.epoch + self._ended,
            "batch_idx": 0 if self._ended else self.batch_idx,
            "total": self._total,
            "validated": 0 if self._ended and not counting_on else self._validated,
            "batches": self.batches.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        super().load_state_dict(state)
        self.epoch = state["epoch"]
        self.batch_idx = state["batch_idx"]
        self._total = state["total"]
        self._validated = state["validated"]
        self.batches.load_state_dict(state["batches"])
