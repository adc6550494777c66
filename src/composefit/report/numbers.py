"""Numbers as a reader wants them, and round ones for an axis."""

from __future__ import annotations

import math
from itertools import pairwise


def number(value: float, digits: int = 4) -> str:
    """A value in few digits: plain between 0.001 and 100,000, with an exponent elsewhere.

    Args:
        value: any float.
        digits: significant ones where it is plain; one less with an exponent.

    Example:
        >>> [number(x) for x in (0.123456, -2, 1.5e-5, 1e10, float("inf"), float("nan"))]
        ['0.1235', '-2', '1.5e-5', '1e10', '∞', 'NaN']
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value + 0.0:.{digits}g}" if abs(value) < 1e4 else f"{value:.0f}"
    return _exponent(value, digits - 2)


def count(value: int) -> str:
    """A whole number with its thousands apart.

    Example:
        >>> count(1234567)
        '1,234,567'
    """
    return f"{value:,}"


def short(value: float) -> str:
    """A round number of steps for an axis.

    Example:
        >>> [short(x) for x in (0, 500, 2500, 20000, 1500000, 3e9)]
        ['0', '500', '2,500', '20k', '1.5M', '3B']
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:g}{unit}"
    return f"{value:,g}" if value < 1e6 else f"{value:g}"


def duration(seconds: float) -> str:
    """A time in its two largest units.

    Example:
        >>> [duration(x) for x in (0.42, 75, 4980, 200_000)]
        ['0.4 s', '1 min 15 s', '1 h 23 min', '2 d 7 h']
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for (large, size), (little, part) in pairwise(_UNITS):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {large}" + (f" {rest} {little}" if rest else "")
    return f"{whole} s"


_UNITS = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]


def ticks(low: float, high: float, wanted: int, whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in a range.

    Args:
        low: the range's lower end.
        high: its upper end, above `low`.
        wanted: about how many.
        whole: whole numbers only.

    Example:
        >>> ticks(0, 1, 5), ticks(-3, 12, 4)
        ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 5.0, 10.0])
    """
    step = _step(low, high, wanted, whole)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Rounded, since 3 * 0.2 is 0.6000000000000001.
    digits = max(0, -_power(step))
    return [round(k * step, digits) if digits < 300 else k * step for k in range(first, last + 1)]


def labels(values: list[float]) -> list[str]:
    """What stands beside ticks: the digits in which neighbours differ, for all of them alike.

    Example:
        >>> labels([0.0, 0.5, 1.0]), labels([0.0, 1e-4, 2e-4])
        (['0.0', '0.5', '1.0'], ['0', '1e-4', '2e-4'])
    """
    if len(values) < 2:
        return [number(value) for value in values]
    apart = _power(min(b - a for a, b in pairwise(values)))
    largest = max(abs(values[0]), abs(values[-1]))
    if largest < 1e5 and apart >= -3:
        return [f"{value:.{max(0, -apart)}f}" for value in values]
    return ["0" if v == 0 else _exponent(v, max(0, _power(v) - apart)) for v in values]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in a range; with their doubles and fivefolds where there are few.

    Example:
        >>> log_ticks(0.02, 30), log_ticks(1e-9, 1)
        ([0.1, 1.0, 10.0], [1e-08, 1e-06, 0.0001, 0.01, 1.0])
        >>> log_ticks(0.9, 60)
        [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, -(-(last - first) // 6))
    factors = (1, 2, 5) if math.log10(high) - math.log10(low) < 2.2 else (1,)
    powers = [k for k in range(first, last + 1) if k % stride == 0]
    found = [float(f"{factor}e{power}") for power in powers for factor in factors]
    return [value for value in found if low <= value <= high]


def _step(low: float, high: float, wanted: int, whole: bool) -> float:
    rough = high / wanted - low / wanted  # the difference alone could overflow
    power = 10.0 ** max(-300, math.floor(math.log10(rough)))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= rough * (1 - 1e-9))
    return max(1.0, step) if whole else step


def _power(value: float) -> int:
    return math.floor(math.log10(abs(value)) + 1e-9) if value else 0


def _exponent(value: float, decimals: int) -> str:
    mantissa, _, power = f"{value:.{decimals}e}".partition("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(power)}"
