"""Curves as SVG paths, in a box that is stretched to whatever size it is shown at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

#: The box that paths are drawn in, in units of its view box.
WIDTH, HEIGHT = 1200, 600

#: Columns of the box: more points than first, lowest, highest and last of one cannot be seen.
COLUMNS = 300


@dataclass(frozen=True)
class Scale:
    """From values to places on an axis.

    Args:
        low: the value at its beginning; above 0 where it is logarithmic.
        high: the value at its end.
        log: whether equal distances are equal ratios.
    """

    low: float
    high: float
    log: bool = False

    def place(self, values: Numbers) -> Numbers:
        """Values as parts of the axis: 0 at its beginning, 1 at its end, NaN where not finite."""
        low, high = self.ends
        with np.errstate(all="ignore"):
            values = np.log10(values) if self.log else values
            # Of halves, since the distance of two large values can overflow.
            found = (values / 2 - low / 2) / (high / 2 - low / 2)
        return np.where(np.isfinite(values), found, np.nan)

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends, as logarithms where it is logarithmic."""
        return (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)

    @classmethod
    def around(cls, values: Numbers) -> Scale:
        """A linear axis with a margin; from zero on where zero is near."""
        finite = values[np.isfinite(values)]
        if not len(finite):
            return cls(0.0, 1.0)
        low, high = float(finite.min()), float(finite.max())
        margin = high / 20 - low / 20
        if margin <= max(abs(low), abs(high), 1e-300) * 1e-9:  # as good as constant
            margin = max(abs(low), abs(high)) / 10 or 1.0
        bottom = 0.0 if 0 <= low < 0.4 * high else low - margin
        largest = float(np.finfo(np.float64).max)
        return cls(max(bottom, -largest), min(high + margin, largest))

    @classmethod
    def around_log(cls, values: Numbers) -> Scale | None:
        """A logarithmic axis with a margin, for positive values over two decades or more."""
        finite = values[np.isfinite(values)]
        if not len(finite) or finite.min() <= 0:
            return None
        low, high = math.log10(finite.min()), math.log10(finite.max())
        if high - low < 2:
            return None
        margin = (high - low) / 20
        return cls(10 ** max(low - margin, -307.0), 10 ** min(high + margin, 308.0), log=True)


def line(x: Numbers, y: Numbers) -> str:
    """A curve that breaks where `y` is not finite.

    Args:
        x: places on the axis, (points,), from 0 to 1, not falling.
        y: the same, (points,), or NaN.

    Returns:
        The data of an SVG path; a point between two gaps is a line without length, which round
        ends make visible.

    Example:
        >>> line(np.array([0.0, 0.5, 1.0]), np.array([0.0, 1.0, 0.5]))
        'M0 600L600 0L1200 300'
    """
    drawn = []
    for part in _parts(y):
        kept = _thinned(x[part], y[part])
        places = _places(x[part][kept], y[part][kept])
        drawn.append("M" + "L".join(places) + ("h0" if len(places) == 1 else ""))
    return "".join(drawn)


def dots(x: Numbers, y: Numbers) -> str:
    """A dot at every point, as lines without length."""
    finite = np.isfinite(y)
    return "".join(f"M{place}h0" for place in _places(x[finite], y[finite]))


def band(x: Numbers, low: Numbers, high: Numbers) -> str:
    """The area between two curves, in the parts where both are finite."""
    drawn = []
    for part in _parts(low + high):
        kept = _thinned(x[part], high[part]) | _thinned(x[part], low[part])
        there = _places(x[part][kept], high[part][kept])
        back = _places(x[part][kept], low[part][kept])[::-1]
        drawn.append("M" + "L".join(there + back) + "Z")
    return "".join(drawn)


def marks(x: Numbers, values: Numbers) -> str:
    """A dot for every value that is not finite: infinities at their end of the axis, NaN below."""
    bad = ~np.isfinite(values)
    columns = np.round(x[bad] * COLUMNS) / COLUMNS
    heights = np.where(np.isposinf(values[bad]), 1.0, 0.0)
    return "".join(f"M{place}h0" for place in dict.fromkeys(_places(columns, heights)))


def _places(x: Numbers, y: Numbers) -> list[str]:
    across = np.round(x * WIDTH).astype(np.int64).tolist()
    down = np.round((1 - y) * HEIGHT).astype(np.int64).tolist()
    return [f"{a} {b}" for a, b in zip(across, down, strict=True)]


def _parts(y: Numbers) -> Iterator[slice]:
    """The stretches of finite values."""
    edges = np.flatnonzero(np.diff(np.isfinite(y).astype(np.int8), prepend=0, append=0))
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield slice(begin, end)


def _thinned(x: Numbers, y: Numbers) -> NDArray[np.bool_]:
    """Which points are drawn: of each column the first, lowest, highest and last.

    Source: U. Jugel et al., M4: A Visualization-Oriented Time Series Data Aggregation (2014).
    """
    if len(x) <= 4 * COLUMNS:
        return np.ones(len(x), dtype=np.bool_)
    kept = np.zeros(len(x), dtype=np.bool_)
    begins = np.flatnonzero(np.diff(np.floor(x * COLUMNS), prepend=-1.0))
    for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(x)], strict=True):
        column = y[begin:end]
        kept[[begin, begin + int(column.argmin()), begin + int(column.argmax()), end - 1]] = True
    return kept
