"""`Limits`: when a fit is over."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


@dataclass(slots=True)
class Limits:
    """How long a fit goes on. None stands for no limit.

    Attributes:
        max_epochs, max_steps: the end, whichever comes first.
        min_epochs, min_steps: who asks to stop (`trainer.should_stop`) waits for these.
        max_time: seconds of training, those before a resumption included.
        elapsed: seconds of earlier runs.
    """

    max_epochs: int | None = None
    max_steps: int | None = None
    min_epochs: int = 0
    min_steps: int = 0
    max_time: float | None = None
    elapsed: float = 0.0
    _since: float = math.inf

    def start(self) -> None:
        """The clock runs from now on."""
        self._since = time.monotonic()

    def seconds(self) -> float:
        """Of training so far."""
        return self.elapsed + max(0.0, time.monotonic() - self._since)

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
        if asked_to_stop and epochs >= self.min_epochs and steps >= self.min_steps:
            return True
        return self.max_time is not None and self.seconds() >= self.max_time
