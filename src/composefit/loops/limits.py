"""`Limits`: when a fit is over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class Limits:
    """How long a fit goes on. None stands for no limit.

    Attributes:
        max_epochs, max_steps: the end, whichever comes first.
        min_epochs, min_steps: `max_time`, and who asks to stop (`trainer.should_stop`), wait for
            these.
        max_time: seconds of training, those before a resumption included.
        elapsed: seconds of training before the clock was started.
        now: reads a clock, in seconds; ranks share one.
    """

    max_epochs: int | None = None
    max_steps: int | None = None
    min_epochs: int = 0
    min_steps: int = 0
    max_time: float | None = None
    elapsed: float = 0.0
    now: Callable[[], float] = time.monotonic
    _since: float = math.inf

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Within it the time of training runs; elsewhere it stands still."""
        self._since = self.now()
        try:
            yield
        finally:
            self.elapsed, self._since = self.seconds(), math.inf

    def seconds(self) -> float:
        """Of training so far."""
        return self.elapsed + max(0.0, self.now() - self._since)

    def reached(self, epochs: int, steps: int, asked_to_stop: bool) -> bool:
        """Whether to stop now.

        Args:
            epochs: those that are over.
            steps: those done.
            asked_to_stop: `trainer.should_stop`.
        """
        if self.max_steps is not None and steps >= self.max_steps:
            return True
        if self.max_epochs is not None and epochs >= self.max_epochs:
            return True
        if epochs < self.min_epochs or steps < self.min_steps:
            return False
        return asked_to_stop or (self.max_time is not None and self.seconds() >= self.max_time)
