"""The progress bar: where a run stands, drawn by the thread that trains, at most every 0.1 s."""

import math
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rich import get_console
from rich.console import Console

from composefit.callbacks.callback import Callback
from composefit.callbacks.progress_display import Display, open_display
from composefit.callbacks.progress_pace import Pace
from composefit.callbacks.progress_view import Row, View, clock, known

# Drawing may take at most this part of the time, however slow the terminal or the metrics are.
_DRAWING_SHARE = 0.01


class ProgressBar(Callback):
    """Shows epoch, batches, losses, metrics, speed and time left of a run.

    In a terminal it is a live display (with `rich <https://rich.readthedocs.io>`_): one bar for the
    epoch, under it the numbers, and while validation runs a bar of its own. What is printed
    meanwhile, with ``print`` or ``rich.print``, appears above it. In a notebook it is one output of
    the cell. Where standard output is neither, plain lines come instead: one per epoch, and one
    every ``line_interval`` seconds within a long one, without control characters.

    The numbers are each optimizer's loss at the last step that updated it, and what was logged with
    ``prog_bar=True``; a loss whose optimizer's name is part of a logged name (``critic_loss``)
    leaves its place to that.

    The trainer brings one along for ``enable_progress_bar=True``, and only rank zero shows it. All
    drawing happens in the hooks, on the thread that trains: there is no thread in the background,
    and a step after which nothing is drawn costs one look at the clock. Numbers are asked for
    (which may have to wait for a device) only when they are drawn. A slow display is drawn less
    often, so that drawing takes at most 1 % of the time. A display that can no longer be written
    to, because the terminal is gone, is given up with a warning; training goes on.

    The speed is that of the last few seconds of training, validation left out. The time left is
    that of the whole fit, validation included, up to the first of its limits of epochs, steps and
    time; without a known end there is none. Of a test, a prediction or a validation by itself, it
    is the time of that.

    In a loop of one's own it shows what the loop calls hooks for: between ``on_train_start`` and
    ``on_train_end`` the steps, of ``max_steps`` where that is given.

    Args:
        interval: Seconds between two drawings in place, at least.
        line_interval: Seconds between two plain lines within an epoch, at least.
        console: Where to draw; ``rich.get_console()`` if None.

    Raises:
        ValueError: If an interval is not positive.
    """

    counts_samples = True

    def __init__(
        self,
        interval: float = 0.1,
        line_interval: float = 10.0,
        console: Console | None = None,
    ) -> None:
        for name, seconds in (("interval", interval), ("line_interval", line_interval)):
            if not seconds > 0:
                raise ValueError(
                    f"ProgressBar({name}={seconds!r}): expected a positive number of seconds. "
                    "To have no progress bar, write Trainer(enable_progress_bar=False)."
                )
        self.interval = interval
        self.line_interval = line_interval
        self._console = console
        self._display: Display | None = None
        self._drawn = False  # something, ever
        self._begin()

    def _begin(self) -> None:
        """Nothing is done yet of what is shown."""
        self._due = math.inf  # when to draw next, on the monotonic clock
        self._pace = Pace()
        self._epoch = 0  # the one shown: at the end of a fit the trainer's is one further
        self._epoch_batches = 0  # finished in this epoch
        self._batches = 0  # finished in this fit, or in an evaluation by itself
        self._losses: dict[str, Any] = {}
        self._evaluation = ""  # what it is called; "" outside of one
        self._evaluated = 0  # batches of it, over all loaders
        self._in_fit = False

    # -- training ------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Begin a bar: at zero, or where a resumed epoch was left."""
        self._open(trainer)
        self._in_fit = True
        self._epoch = trainer.current_epoch
        if trainer.fit_loop is not None:
            self._epoch_batches = trainer.fit_loop.train.batch_idx
        if self._display is not None:
            self._pace.mark(time.monotonic(), 0, trainer.samples_seen)
            if self._display.at_once:
                self._draw(trainer)
            self._due = -math.inf  # the first batch starts the clock for the time left

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Start the epoch's bar at zero."""
        self._epoch = trainer.current_epoch
        self._epoch_batches = 0

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw, if it is time to."""
        self._count(batch_idx + 1)
        if outputs:
            self._losses.update(outputs)
        if (now := time.monotonic()) >= self._due:
            self._draw_in_step(trainer, now)

    def _draw_in_step(self, trainer: Any, now: float) -> None:
        if self._pace.origin is None:
            self._pace.origin = (now, self._fractions(trainer))
            if self._display is not None and not self._display.live:
                self._due = now + self._display.interval
                return
        self._draw(trainer)

    @property
    def batch_interval(self) -> float:  # type: ignore[override]
        """Twice as often as it draws, so that a drawing is not late."""
        return min(self.interval, self.line_interval) / 2

    def _count(self, epoch_batches: int) -> None:
        """So many batches of the epoch are done."""
        self._batches += epoch_batches - self._epoch_batches
        self._epoch_batches = epoch_batches

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Write the epoch's line, where lines are written."""
        display = self._display
        if display is None or trainer.exception is not None:
            return
        if trainer.fit_loop is not None:
            self._count(trainer.fit_loop.train.batch_idx)
        if not display.live or time.monotonic() >= self._due:
            self._draw(trainer)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Leave the final state on the screen."""
        if trainer.exception is None and self._display is not None and self._display.live:
            self._draw(trainer, finished=True)
        self._close()

    # -- evaluation ----------------------------------------------------------------------------

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        """Open the bar of validation, by itself if no training is around it."""
        self._begin_evaluation(trainer, "sanity check" if trainer.sanity_checking else "validate")

    def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        """Draw, if it is time to."""
        self._count_evaluated(trainer)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """Close the bar of validation."""
        self._end_evaluation(trainer)

    def on_test_start(self, trainer: Any, module: Any) -> None:
        """Open the bar of a test."""
        self._begin_evaluation(trainer, "test")

    def on_test_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        """Draw, if it is time to."""
        self._count_evaluated(trainer)

    def on_test_end(self, trainer: Any, module: Any) -> None:
        """Leave the final state on the screen."""
        self._end_evaluation(trainer)

    def on_predict_start(self, trainer: Any, module: Any) -> None:
        """Open the bar of a prediction."""
        self._begin_evaluation(trainer, "predict")

    def on_predict_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        """Draw, if it is time to."""
        self._count_evaluated(trainer)

    def on_predict_end(self, trainer: Any, module: Any) -> None:
        """Leave the final state on the screen."""
        self._end_evaluation(trainer)

    def _begin_evaluation(self, trainer: Any, name: str) -> None:
        if self._in_fit:
            self._pace.pause(time.monotonic(), self._batches, trainer.samples_seen)
        else:
            self._open(trainer)
            self._pace.mark(time.monotonic(), 0, None)
        self._evaluation, self._evaluated = name, 0

    def _count_evaluated(self, trainer: Any) -> None:
        # Counted here, since batch_idx starts again with each loader.
        self._evaluated += 1
        if (now := time.monotonic()) >= self._due:
            if not self._in_fit and self._pace.origin is None:
                self._pace.origin = (now, self._fractions(trainer))
            self._draw(trainer)

    def _end_evaluation(self, trainer: Any) -> None:
        if self._in_fit:
            self._evaluation = ""
            self._pace.resume(time.monotonic())
        elif trainer.exception is None and not trainer.sanity_checking:
            # After a sanity check the display goes on with the fit.
            self._draw(trainer, finished=True)
            self._close()

    # -- the end -------------------------------------------------------------------------------

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Leave the last drawing on the screen, and the terminal as it was."""
        display, stopped = self._display, isinstance(exception, (KeyboardInterrupt, SystemExit))
        if stopped and self._in_fit and display is not None and display.live:
            if trainer.fit_loop is not None:
                self._count(trainer.fit_loop.train.batch_idx)
            self._draw(trainer)  # where it was stopped; after a fault nothing may be asked for
        self._close()

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        """Close the display, should an error in another callback have kept it open."""
        self._close()

    # -- the display ---------------------------------------------------------------------------

    def _open(self, trainer: Any) -> None:
        """Show something new, where a display is open already in its place."""
        display = self._display
        self._begin()
        if not trainer.is_global_zero:
            return
        if display is None:
            console = self._console or get_console()
            display = self._display = open_display(console, self.interval, self.line_interval)
        self._due = -math.inf if display.at_once else time.monotonic() + display.interval

    def _close(self) -> None:
        display, self._display = self._display, None
        self._begin()
        if display is not None:
            self._guarded(display.close)

    def _draw(self, trainer: Any, finished: bool = False) -> None:
        display = self._display
        if display is None:
            return
        if trainer.training is not None:  # its hook does not see every step
            self._losses.update(trainer.training.losses)
        start = time.monotonic()
        view = self._view(trainer, start, finished)
        if self._guarded(display.show, view):
            end = time.monotonic()
            # The first one loads what draws, and says nothing of the others.
            share = (end - start) / _DRAWING_SHARE if self._drawn else 0.0
            self._due = end + max(display.interval, share)
            self._drawn = True
        else:
            self._display, self._due = None, math.inf
            with suppress(OSError):
                display.close()

    def _guarded(self, write: Callable[..., None], *arguments: Any) -> bool:
        """Whether it could be written: a terminal that is gone must not end a training."""
        try:
            write(*arguments)
        except OSError as error:
            warnings.warn(f"the progress bar cannot be shown any more: {error!r}", stacklevel=3)
            return False
        return True

    # -- what is shown -------------------------------------------------------------------------

    def _view(self, trainer: Any, now: float, finished: bool) -> View:
        view = View(self._metrics(trainer))
        if self._evaluation:
            total = known(trainer.num_evaluation_batches)
            view.evaluation = Row(self._evaluation, self._evaluated, total)
        if self._in_fit:
            view.training = self._training_row(trainer)
            if not self._evaluation:
                self._pace.mark(now, self._batches, trainer.samples_seen)
        else:
            self._pace.mark(now, self._evaluated, None)
        view.speed = self._pace.speed()
        left = self._pace.left(now, self._fractions(trainer))
        if finished or (left == 0 and not self._evaluation):
            view.time = f"in {clock(self._pace.elapsed(now))}"
        elif left:  # of the last validation only its bar knows
            view.time = f"{clock(left)} left"
        return view

    def _metrics(self, trainer: Any) -> dict[str, float]:
        values = trainer.progress_bar_metrics.items()
        metrics = {name.replace("/dataloader_idx_", "/"): value for name, value in values}
        if not self._losses:
            return metrics
        logged = trainer.logs.bar_values()
        own = {
            name: float(loss)
            for name, loss in self._losses.items()
            if not any(name in other for other in logged)
        }
        return {**own, **metrics}

    def _training_row(self, trainer: Any) -> Row:
        epochs, steps, batches = self._limits(trainer)
        if trainer.fit_loop is None:
            return Row("train", trainer.global_step, steps, " steps")
        label = f"epoch {self._epoch + 1}"
        if epochs is not None:
            label = f"epoch {self._epoch + 1:>{len(str(epochs))}}/{epochs}"
        if steps is not None and (epochs is None or batches is None):
            # Steps are then what ends the fit, and the epoch's bar might never fill.
            return Row(label, trainer.global_step, steps, " steps")
        return Row(label, self._epoch_batches, batches)

    def _fractions(self, trainer: Any) -> list[float]:
        """How much is done, by each of the limits that can end it."""
        if not self._in_fit:
            total = known(trainer.num_evaluation_batches)
            return [self._evaluated / total] if total else []
        fractions = []
        epochs, steps, batches = self._limits(trainer)
        if epochs and batches:
            fractions.append((self._epoch + self._epoch_batches / batches) / epochs)
        if steps:
            fractions.append(trainer.global_step / steps)
        loop = trainer.fit_loop
        if loop is not None and loop.limits.max_time:
            fractions.append(loop.limits.seconds() / loop.limits.max_time)
        return fractions

    def _limits(self, trainer: Any) -> tuple[int | None, int | None, int | None]:
        """Epochs and steps of the fit, batches of an epoch: the loop's, if it has its own."""
        loop = trainer.fit_loop
        if loop is None:
            return None, known(trainer.max_steps), None
        limits = loop.limits
        return known(limits.max_epochs), known(limits.max_steps), known(loop.train.batches.number)
