"""Sums that do not depend on the order in which they are added up, nor on where that is done."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

#: What one `Sums` tells another process: total, weight, numbers.
Plain: TypeAlias = tuple[tuple[float, ...], tuple[float, ...] | None, list[float]]


class Total:
    """A sum: exact as to numbers, so that ranks and resumed runs come to the same bits.

    What is on a GPU is added up there, in double precision, and nobody waits for it.

    Attributes:
        near: floats whose exact sum it is, without what is on a GPU.
        far: a 0-dim tensor on a GPU, or None.
    """

    __slots__ = ("far", "near")

    def __init__(self) -> None:
        self.near: tuple[float, ...] = ()
        self.far: Tensor | None = None

    def add(self, values: Iterable[Any]) -> None:
        """Add numbers and 0-dim tensors."""
        near, far = list(self.near), []
        for value in values:
            if isinstance(value, Tensor) and value.device.type != "cpu":
                far.append(value)
            else:
                near.append(float(value))
        if len(near) > len(self.near):
            self.near = exactly(near)
        if far:
            device = far[0].device
            dtype = torch.float32 if device.type == "mps" else torch.float64
            total = torch.stack([value.to(device, dtype) for value in far]).sum()
            self.far = total if self.far is None else self.far + total

    def settled(self) -> tuple[float, ...]:
        """All of it as numbers; waits for the device."""
        if self.far is not None:
            far, self.far = float(self.far), None
            self.near = exactly([*self.near, far])
        return self.near


class Sums:
    """What a mean, a sum, an extreme or a function of numbers is made of.

    Attributes:
        total: of the values, weighted.
        weight: of the weights; None where nothing was weighted, as in a sum.
        numbers: the values themselves, where a sum does not do.
        any: whether something was added, be it zero.
    """

    __slots__ = ("any", "numbers", "total", "weight")

    def __init__(self) -> None:
        self.total = Total()
        self.weight: Total | None = None
        self.numbers: list[float] = []
        self.any = False

    def add(self, totals: Iterable[Any], weights: Iterable[Any]) -> None:
        """Add values and the weights that are known."""
        self.total.add(totals)
        known = [weight for weight in weights if weight is not None]
        if known:
            self.weight = self.weight or Total()
            self.weight.add(known)

    def plain(self) -> Plain:
        """As numbers; waits for the device."""
        weight = None if self.weight is None else self.weight.settled()
        return self.total.settled(), weight, list(self.numbers)


def together(parts: Iterable[Plain]) -> Plain:
    """All of them, in their order."""
    totals: list[float] = []
    weights: list[float] | None = None
    numbers: list[float] = []
    for total, weight, own in parts:
        totals += total
        numbers += own
        if weight is not None:
            weights = [*(weights or ()), *weight]
    return exactly(totals), None if weights is None else exactly(weights), numbers


def once(parts: Sequence[Plain], reduce: object) -> Plain:
    """What counts once although each of several ranks has said it: their mean.

    Args:
        parts: of the ranks that have said something.
        reduce: "min" and "max" take the numbers of all.
    """
    first = parts[0]
    if all(part == first for part in parts):  # as a rule; and a mean would round
        return first
    count = len(parts)
    total, weight, numbers = together(parts)
    alike = len({len(own) for _, _, own in parts}) == 1
    if reduce not in ("min", "max") and alike:
        columns = zip(*(own for _, _, own in parts), strict=True)
        numbers = [mean_of(exactly(column), (count,)) for column in columns]
    shared = None if weight is None else tuple(part / count for part in weight)
    return tuple(part / count for part in total), shared, numbers


def reduced(plain: Plain, reduce: Any) -> float:
    """What they come to."""
    total, weight, numbers = plain
    if reduce in ("mean", "sum"):
        return mean_of(total, weight)
    found = torch.tensor(numbers, dtype=torch.float64)
    if not isinstance(reduce, str):
        return float(reduce(found))
    # Not Python's min and max: NaN must show.
    return float(found.min() if reduce == "min" else found.max())


def mean_of(total: Sequence[float], weight: Sequence[float] | None) -> float:
    """The total over the weight; without one, the total."""
    numerator = rounded(total)
    if weight is None:
        return numerator
    denominator = rounded(weight)
    return numerator / denominator if denominator else math.nan


def exactly(values: Sequence[float]) -> tuple[float, ...]:
    """As few numbers as possible with exactly the same sum, the rounded one first.

    Source: Shewchuk, "Adaptive Precision Floating-Point Arithmetic", through `math.fsum`.
    """
    parts: list[float] = []
    while True:
        rest = rounded([*values, *(-part for part in parts)])
        if not math.isfinite(rest):
            return (rest,)
        if rest == 0.0:
            return tuple(parts)
        parts.append(rest)


def rounded(values: Sequence[float]) -> float:
    """Their sum, rounded once."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # infinities of both signs, or too large a sum
        return float(sum(values))
