"""Logging how fast a training is."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, NamedTuple

from composefit.callbacks.callback import Callback
from composefit.callbacks.monitor import check_count


class _Mark(NamedTuple):
    """Where a training was at the end of a step."""

    seconds: float
    steps: int
    batches: int
    samples: int | None


class ThroughputMonitor(Callback):
    """Logs `samples_per_second`, `batches_per_second` (the loader's) and `steps_per_second`.

    Means over the last steps, as they are before a step that loggers get. Fetching batches counts,
    as do hooks and checkpoints; validations do not. Where nobody knows how many samples a batch
    has, `samples_per_second` is left out. The first value comes once two steps are done. Samples
    are those of all ranks; each rank measures with a clock of its own, and what is logged is the
    mean of what they find.

    Args:
        window_size: how many steps to take the mean over.

    Raises:
        TypeError, ValueError: no whole number above zero.
    """

    counts_samples = True

    def __init__(self, window_size: int = 100) -> None:
        check_count("window_size", window_size)
        self.window_size = window_size
        self._begin()

    def _begin(self) -> None:
        self._marks: deque[_Mark] = deque(maxlen=self.window_size + 1)
        self._batches = 0
        self._pause: float | None = None
        self._paused = 0.0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Begin anew."""
        self._begin()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Log what is known, in time for the step that begins here."""
        # Not after the step, when loggers have got its values already.
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0 and len(self._marks) > 1:
            first, last = self._marks[0], self._marks[-1]
            seconds = last.seconds - first.seconds
            if seconds > 0:
                if first.samples is not None and last.samples is not None:
                    module.log("samples_per_second", (last.samples - first.samples) / seconds)
                module.log("batches_per_second", (last.batches - first.batches) / seconds)
                module.log("steps_per_second", (last.steps - first.steps) / seconds)

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note how far it is; the batches of a step end together, and make one mark."""
        if trainer.exception is not None:
            return
        self._batches += 1
        mark = _Mark(
            time.monotonic() - self._paused,
            trainer.global_step,
            self._batches,
            trainer.samples_seen,
        )
        if self._marks and self._marks[-1].steps == mark.steps:
            self._marks.pop()
        self._marks.append(mark)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        """The clock stops."""
        self._pause = time.monotonic()

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """The clock goes on."""
        if self._pause is not None:
            self._paused += time.monotonic() - self._pause
            self._pause = None
