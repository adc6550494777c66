"""What a step may hand over as a loss: a plain tensor, `Mean`, `Sum`, and their arithmetic.

A loss is a sum of terms. Each term keeps its own denominator, since the denominators of different
terms are summed over the shards separately: `Mean + 0.01 * Mean` is a mean over tokens plus a mean
over boxes, whatever the shards held of each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

Number: TypeAlias = "int | float | Tensor"


class Loss:
    """A sum of terms, each reduced over all shards by its own denominator.

    Made by adding `Mean`, `Sum` and plain tensors; a plain tensor counts as a mean over samples.
    """

    __slots__ = ("terms",)

    def __init__(self, terms: tuple[Term, ...]) -> None:
        self.terms = terms

    def __add__(self, other: Loss | Number) -> Loss:
        return Loss(self.terms + as_loss(other, "a term of a loss").terms)

    __radd__ = __add__

    def __mul__(self, factor: Number) -> Loss:
        return Loss(tuple(term.scaled(factor) for term in self.terms))

    __rmul__ = __mul__

    def __neg__(self) -> Loss:
        return self * -1.0

    def __sub__(self, other: Loss | Number) -> Loss:
        return self + (-other)

    def __rsub__(self, other: Loss | Number) -> Loss:
        return (-self) + other

    def __truediv__(self, divisor: Number) -> Loss:
        return self * (1.0 / divisor)

    def __iter__(self) -> Generator[Any, Any, Tensor]:
        """`x = yield from Mean(total, weight)`: reduced over all shards, differentiably."""
        return cast(Tensor, (yield self))

    def detach(self) -> Loss:
        """The same numbers without their graph."""
        return Loss(tuple(Term(term.total.detach(), term.weight) for term in self.terms))

    # Without this a tensor on the left (`tensor + Mean`) would try to convert the Mean itself.
    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        left, right = (*args, None)[:2]
        if isinstance(right, Loss):
            name = function.__name__
            if name in ("add", "__add__"):
                return right + left
            if name in ("mul", "__mul__"):
                return right * left
            if name in ("sub", "__sub__"):
                return right.__rsub__(left)
        return NotImplemented

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms))


class Term:
    """One term of a loss: `total`, to be divided by the denominator summed over all shards.

    `weight` is this shard's part of the denominator; `None` stands for the shard's samples, which
    only the driver knows, and `SUMMED` for a sum, which has no denominator.
    """

    __slots__ = ("total", "weight")

    def __init__(self, total: Tensor, weight: Number | None) -> None:
        self.total = total
        self.weight = weight

    def scaled(self, factor: Number) -> Term:
        """The term times a number; its denominator stays."""
        return Term(self.total * factor, self.weight)

    def __repr__(self) -> str:
        if self.weight is None:
            return f"{self.total.item():.6g} (mean over samples)"
        if self.weight is SUMMED:
            return f"Sum({self.total.item():.6g})"
        return f"Mean({self.total.item():.6g}, {float(self.weight):.6g})"


SUMMED: Tensor = torch.ones(())  # compared by identity: the denominator of a sum


class Mean(Loss):
    """A mean over something other than samples: tokens, boxes, nodes.

    The loss of the whole step is the sum of the totals divided by the sum of the weights, over all
    shards, micro-batches and ranks: exact however unevenly they were cut.

    Args:
        total: 0-dim tensor, the sum over this shard's tokens (boxes, ...).
        weight: how many there are: a number or a 0-dim tensor (no gradient flows into it). Zero is
            allowed on a shard, but not on all of them together: that raises `ValueError`.

    Raises:
        ValueError: `total` or `weight` is not 0-dim, or `weight` is a negative number.

    Example:
        >>> Mean(torch.tensor(6.0), 3) + 0.5 * Mean(torch.tensor(4.0), 2)
        Mean(6, 3) + Mean(2, 2)
    """

    __slots__ = ()

    def __init__(self, total: Number, weight: Number) -> None:
        if isinstance(weight, Tensor):
            if weight.dim():
                raise ValueError(
                    f"Mean expects a 0-dim weight, got shape {tuple(weight.shape)}: "
                    "pass how many there are in all, e.g. mask.sum()"
                )
            # Counts of a narrow type would overflow in the sum over shards.
            weight = _wide(weight.detach())
        elif not isinstance(weight, (int, float)):
            raise TypeError(
                f"Mean expects a number or a 0-dim tensor as weight, got {type(weight).__name__}"
            )
        elif not weight >= 0:
            raise ValueError(f"Mean expects a weight of zero or more, got {weight}")
        super().__init__((Term(scalar(total, "Mean's total"), weight),))

    @classmethod
    def of(cls, mean: Tensor, weight: Number) -> Mean:
        """The same from a library's own mean: `Mean.of(F.cross_entropy(...), mask.sum())`.

        Args:
            mean: 0-dim tensor, the mean over this shard's `weight` tokens. With a weight of zero
                it may be NaN, as torch gives for a mean over nothing; it is then left out.
            weight: as in `Mean`.
        """
        if not isinstance(weight, Tensor) or (weight.device.type == "cpu" and not weight.dim()):
            # Without a graph: zero times the infinite slope of a mean over nothing is NaN.
            return cls(mean * weight if weight else torch.zeros_like(mean), weight)
        # where, not a product alone: NaN times zero is NaN. (Asking a GPU would wait for it.)
        return cls(torch.where(weight > 0, mean, torch.zeros_like(mean)) * weight, weight)


class Sum(Loss):
    """A loss that adds up over shards, micro-batches and ranks.

    Args:
        total: 0-dim tensor, the sum over this shard.

    Raises:
        ValueError: `total` is not 0-dim.
    """

    __slots__ = ()

    def __init__(self, total: Number) -> None:
        super().__init__((Term(scalar(total, "Sum's total"), SUMMED),))


def scalar(value: object, what: str) -> Tensor:
    """`value` as a 0-dim tensor.

    Raises:
        ValueError: the tensor has dimensions.
        TypeError: it is neither a tensor nor a number.
    """
    if not isinstance(value, Tensor):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return torch.tensor(float(value))
        raise TypeError(f"{what} must be a 0-dim tensor, got {describe(value)}")
    if value.dim():
        raise ValueError(
            f"{what} must be a 0-dim tensor, got shape {tuple(value.shape)}: call .mean() on it "
            "(a mean over samples), or write Mean(total, weight) for a mean over anything else"
        )
    return value


def as_loss(value: object, what: str) -> Loss:
    """A plain tensor becomes a mean over samples; a `Loss` stays what it is.

    Raises:
        TypeError: anything else; a float among them, since it carries no gradient.
    """
    if isinstance(value, Loss):
        return value
    if isinstance(value, Tensor):
        return Loss((Term(scalar(value, what), None),))
    if isinstance(value, (int, float)) and value == 0:  # sum() starts with 0
        return Loss(())
    hint = ""
    if isinstance(value, (int, float)):
        hint = " (a Python number has no gradient: was .item() called on the loss?)"
    elif is_function(value):
        hint = " (a function belongs by itself into the update: yield {name: lambda: loss})"
    raise TypeError(f"{what} must be a 0-dim tensor, Mean or Sum, got {describe(value)}{hint}")


def is_function(value: object) -> bool:
    """Whether this is a loss as a function: a lambda, a function, a method, a partial."""
    return inspect.isroutine(value) or isinstance(value, partial)


def describe(value: object) -> str:
    """A value in an error message: its type, and its shape or a short form of it."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if value is None:
        return "None"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _wide(weight: Tensor) -> Tensor:
    if weight.dtype in (torch.float32, torch.float64, torch.int64):
        return weight
    return weight.float() if weight.is_floating_point() else weight.long()
