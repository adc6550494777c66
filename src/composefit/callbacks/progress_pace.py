"""How fast a run goes, and how long it will take."""

from collections import deque
from dataclasses import dataclass, field


@dataclass
class Pace:
    """Speed and time left, from what the clock and the counters said at the last drawings.

    Attributes:
        points: seconds on the clock, batches, and samples (None where nobody counts them).
        started: seconds on the clock when the run began.
        origin: when the time left is counted from, and what was done of each limit then.
        paused: since when nothing that counts is done, as during a validation.
    """

    points: deque[tuple[float, int, int | None]] = field(default_factory=lambda: deque(maxlen=32))
    started: float = 0.0
    origin: tuple[float, list[float]] | None = None
    paused: float | None = None

    def mark(self, now: float, batches: int, samples: int | None) -> None:
        """Note where the counters stand."""
        if not self.points:
            self.started = now
        self.points.append((now, batches, samples))

    def pause(self, now: float, batches: int, samples: int | None) -> None:
        """From now on the counters stand still."""
        self.mark(now, batches, samples)
        self.paused = now

    def resume(self, now: float) -> None:
        """Go on after a pause, which is taken out of every speed."""
        pause = now - (now if self.paused is None else self.paused)
        self.points = deque(((t + pause, b, s) for t, b, s in self.points), self.points.maxlen)
        self.paused = None

    def speed(self) -> str:
        """Samples per second, or batches where samples are not counted; "" if not yet known."""
        if not self.points:
            return ""
        (t0, b0, s0), (t1, b1, s1) = self.points[0], self.points[-1]
        if t1 <= t0 or b1 <= b0:
            return ""
        if s0 is None or s1 is None:
            return f"{_magnitude((b1 - b0) / (t1 - t0))} batches/s"
        return f"{_magnitude((s1 - s0) / (t1 - t0))} samples/s"

    def elapsed(self, now: float) -> float:
        """Seconds since the first mark."""
        return now - self.started

    def left(self, now: float, fractions: list[float]) -> float | None:
        """Seconds until the first of the limits is reached; None if that is not known.

        The origin is the end of the first batch: a resumed fit starts at more than zero, within an
        epoch even, and the first batch (compiling, filling caches) says little about the others.
        """
        if self.origin is None or len(self.origin[1]) != len(fractions):
            return None
        begin, begun = self.origin
        estimates = [
            (now - begin) * max(0.0, 1 - f) / (f - f0)
            for f0, f in zip(begun, fractions, strict=True)
            if f > f0
        ]
        return min(estimates, default=None)


def _magnitude(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
