"""What an effect is, and the effects that let samples meet: `Gather`, `Once`, bare `Mean`/`Sum`.

A step's shards run side by side from yield to yield. An effect is what they yield: each shard
first does its own part in its own worker (`visit`), then, with all shards at the barrier, their
effects are combined and each shard gets its result. The driver knows no effect by name: a new one
is a class with these methods.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.nn import Parameter

from composefit import tree
from composefit.losses import SUMMED, Loss, Term

Result = TypeVar("Result")
Tensors = TypeVar("Tensors", Tensor, tuple[Tensor, ...])
Pull = Callable[[int, Sequence["Tensor | None"]], "list[Tensor | None]"]


class ShardSize(Protocol):
    """What an effect sees of any shard, on this rank or another."""

    @property
    def samples(self) -> int:
        """Its samples; asked of the batch only when somebody wants to know."""


class ShardView(ShardSize, Protocol):
    """What an effect sees of its own shard."""

    def parameters(self, name: str) -> list[Parameter]:
        """The trainable parameters of a named optimizer."""

    def take(
        self, key: str, loss: Loss | Tensor, parameters: list[Parameter], retain_graph: bool
    ) -> None:
        """Take this shard's gradients, now or, after a `Gather`, once all shards are there."""


class Barrier(Protocol):
    """What an effect may do with all shards at the barrier."""

    @property
    def shards(self) -> Sequence[ShardSize]:
        """The shards in sample order, those of other ranks too."""

    def cross(self, sources: list[list[Tensor]], leaves: list[list[Tensor]], pull: Pull) -> None:
        """Let gradients flow back from `leaves` (per shard) to every shard's `sources`.

        `pull(i, cotangents)` gives those of shard i's sources from the sum over all shards'.
        """

    def on_owner(self, functions: Sequence[Callable[..., Any]], *args: Tensor) -> Any:
        """Call a function once, on the owner module; what it writes all shards see afterwards.

        `functions` are those of the shards: the same code, each around its own shard's module.
        """

    def update(
        self,
        losses: dict[str, list[Loss | Tensor]],
        given: Mapping[str, list[Tensor | None]] | None = None,
        functions: Sequence[str] = (),
    ) -> dict[str, Tensor]:
        """Step the named optimizers with the gradients taken, or given; the reduced losses.

        Args:
            losses: name -> its loss in each shard; None in each where there is none.
            given: name -> gradients in place of those taken.
            functions: the names whose loss is a function, which the optimizer may ask again.
        """

    def gradients(self, key: str, whole: bool = True) -> list[Tensor | None]:
        """The gradients taken under `key`, reduced over all shards and unscaled.

        With `whole=False` those of sharded parameters are sharded as these are.
        """

    def reduce(self, losses: Sequence[Loss | Tensor]) -> Tensor:
        """One loss of each shard, reduced to a detached 0-dim tensor."""


class Effect(Generic[Result]):
    """What a step yields; `x = yield from effect` is typed, `x = yield effect` does the same."""

    __slots__ = ()

    def __iter__(self) -> Generator[Effect[Any], Any, Result]:
        return cast(Result, (yield self))

    def agreement(self) -> Hashable:
        """What all shards must agree on: where theirs differ, an error lists each one's."""
        return type(self).__name__

    def visit(self, shard: ShardView) -> None:
        """The shard's own part, in its worker, at the yield."""

    def values(self) -> tuple[Tensor | float, ...]:
        """What other ranks need to know of this shard's: numbers, and tensors that are detached.

        As many for every shard; a tensor's rows may differ, all after dimension 0 may not.
        """
        return ()

    def of_another_rank(self, values: Sequence[Any]) -> Effect[Any]:
        """What stands for the effect of a shard on another rank, of which these are the values.

        A tensor among them requires a gradient where the other's does.
        """
        return self

    def loss_of(self, key: str) -> Tensor | Loss:
        """The loss whose gradients were taken under `key`, of an effect that takes any."""
        raise NotImplementedError

    def combine(self, barrier: Barrier, effects: Sequence[Any]) -> list[Result]:
        """All shards' effects: the result for each, in the same order.

        Shards of other ranks are among them, by what stands for their effects.
        """
        raise NotImplementedError


class Gather(Effect["tuple[Tensors, int]"], Generic[Tensors]):
    """Concatenate tensors over all shards, micro-batches and ranks, differentiably.

    Args:
        tensors: a tensor of shape (rows, ...), or a tuple of such tensors, gathered together. The
            rows may differ between shards, everything after dimension 0 may not. Tensors that need
            no gradient (labels) come back without one.

    Returns (from the yield):
        `(everything, offset)`: all rows in sample order, shape (all rows, ...), or a tuple of
        such, and the index of this shard's own first row in the first of them. Gradients with
        respect to all rows reach every shard's graph, as if one device had computed everything;
        a double backward through the gathered rows does not.

    Raises:
        TypeError, ValueError: something else than tensors with a dimension 0, or shards whose
            tensors differ in more than the number of rows.

    Example:
        ```python
        z = self.encoder(x)
        everything, offset = yield from Gather(z)
        labels = torch.arange(offset, offset + len(z), device=z.device)
        yield F.cross_entropy(z @ everything.T, labels)
        ```
    """

    __slots__ = ("single", "tensors")

    @overload
    def __init__(self: Gather[Tensor], tensors: Tensor) -> None: ...
    @overload
    def __init__(self: Gather[tuple[Tensor, ...]], tensors: tuple[Tensor, ...]) -> None: ...
    def __init__(self, tensors: Tensor | tuple[Tensor, ...]) -> None:
        self.single = isinstance(tensors, Tensor)
        # Something else in a tuple too, so that it is refused by its own type below.
        group = tensors if isinstance(tensors, (tuple, list)) else (tensors,)
        self.tensors: tuple[Tensor, ...] = tuple(group)
        for tensor in self.tensors:
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"Gather expects a tensor or a tuple of tensors, got {type(tensor).__name__}"
                )
            if tensor.dim() == 0:
                raise ValueError(
                    "Gather expects tensors with rows in dimension 0, got a 0-dim tensor: "
                    "yield Mean(total, weight) or Sum(total) to reduce a number over the shards"
                )
        if not self.tensors:
            raise ValueError("Gather expects at least one tensor, got an empty tuple")

    def agreement(self) -> Hashable:
        """Shapes but for the rows, and dtypes."""
        shapes = tuple((tuple(t.shape[1:]), t.dtype) for t in self.tensors)
        return ("Gather", self.single, shapes)

    def values(self) -> tuple[Tensor, ...]:
        """The tensors."""
        return self.tensors

    def of_another_rank(self, values: Sequence[Any]) -> Gather[Any]:
        """With its tensors."""
        return Gather(tuple(values))

    def combine(self, barrier: Barrier, effects: Sequence[Gather[Any]]) -> list[Any]:
        """Everything for everybody, as leaves whose gradients the barrier takes back."""
        if len(effects) == 1:  # everything is already here: no detour for the graph
            return [(self.tensors[0] if self.single else self.tensors, 0)]
        columns = list(zip(*(effect.tensors for effect in effects), strict=True))
        with torch.no_grad():
            whole = [torch.cat(column) for column in columns]
        differentiable = [any(t.requires_grad for t in column) for column in columns]
        # Leaves share their storage, autograd lets nobody write to them; what has no gradient
        # (labels) may be written to, so each shard gets its own.
        copies = [
            tuple(
                t.data.requires_grad_() if d else t.clone()
                for t, d in zip(whole, differentiable, strict=True)
            )
            for _ in effects
        ]
        starts = [_starts(len(t) for t in column) for column in columns]

        def pull(index: int, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
            return [
                None if c is None else c[start[index] : start[index + 1]]
                for c, start in zip(cotangents, starts, strict=True)
            ]

        if any(differentiable):
            barrier.cross(
                [list(effect.tensors) for effect in effects], [list(c) for c in copies], pull
            )
        offsets = starts[0]
        return [
            (copy[0] if self.single else copy, offset)
            for copy, offset in zip(copies, offsets, strict=False)
        ]

    def __repr__(self) -> str:
        return f"Gather({', '.join(str(tuple(t.shape)) for t in self.tensors)})"


class Once(Effect[Any]):
    """Call a function once per process, at a barrier, on the module itself.

    The one place where a step writes buffers or Python state: queues, centres, image pools, running
    means. It runs without gradients, and draws inside it are the same on every shard.

    Args:
        function: called as `function(*tensors)`; usually a method (`self.enqueue`) or a closure
            over `self`: `self` is the module itself there, not a shard's replica.
        tensors: tensors of shape (rows, ...): gathered from all shards in sample order, detached.
        rows: what to give back: False, the function's result; True, each shard's own rows of it.

    Returns (from the yield):
        The function's result, or with `rows=True` the rows of this shard: as many as it handed in
        of the first tensor, or as it has samples where none was handed in.

    Raises:
        TypeError: `function` cannot be called, or a tensor is none.
        ValueError: with `rows=True`, a result with another number of rows.

    Example:
        ```python
        keys = self.teacher(images)
        yield from Once(self.enqueue, keys)
        ```
    """

    __slots__ = ("function", "rows", "tensors")

    def __init__(self, function: Callable[..., Any], *tensors: Tensor, rows: bool = False) -> None:
        if not callable(function):
            raise TypeError(
                f"Once expects a function and its tensors, Once(self.enqueue, keys), "
                f"got {type(function).__name__}: was it called already?"
            )
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or tensor.dim() == 0:
                raise TypeError(
                    "Once expects tensors with rows in dimension 0 after the function, got "
                    f"{'a 0-dim tensor' if isinstance(tensor, Tensor) else type(tensor).__name__}: "
                    "anything else the function can read from self"
                )
        self.function = function
        self.tensors = tensors
        self.rows = rows

    def agreement(self) -> Hashable:
        """The function's name, and the tensors' shapes but for the rows."""
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return ("Once", name, self.rows, tuple(tuple(t.shape[1:]) for t in self.tensors))

    def values(self) -> tuple[Tensor, ...]:
        """The tensors."""
        return tuple(tensor.detach() for tensor in self.tensors)

    def of_another_rank(self, values: Sequence[Any]) -> Once:
        """With its tensors."""
        return Once(self.function, *values, rows=self.rows)

    def combine(self, barrier: Barrier, effects: Sequence[Once]) -> list[Any]:
        """One call with everybody's rows."""
        columns = zip(*(effect.tensors for effect in effects), strict=True)
        # Detached copies where there is one shard as well: the function may keep or change them.
        gathered = [torch.cat([t.detach() for t in column]) for column in columns]
        result = barrier.on_owner([effect.function for effect in effects], *gathered)
        if not self.rows:
            return [result] * len(effects)
        if self.tensors:
            sizes = [len(effect.tensors[0]) for effect in effects]
        else:
            sizes = [shard.samples for shard in barrier.shards]
        if len(effects) == 1:
            return [result]
        found = tree.batch_size(result)
        if found != sum(sizes):
            raise ValueError(
                f"Once(..., rows=True) expects a row for each of the {sum(sizes)} rows handed in, "
                f"the function returned {found}"
            )
        return tree.cut(result, sizes)

    def __repr__(self) -> str:
        return f"Once({getattr(self.function, '__qualname__', self.function)})"


class Reduce(Effect[Tensor]):
    """A bare `Mean` or `Sum`: reduced over all shards, differentiably, without an update."""

    __slots__ = ("loss",)

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def agreement(self) -> Hashable:
        """What each term is a mean over."""
        return ("Reduce", kinds(self.loss))

    def values(self) -> tuple[Tensor | float, ...]:
        """Total and weight of each term."""
        return numbers_of(self.loss)

    def of_another_rank(self, values: Sequence[Any]) -> Reduce:
        """With its totals and weights."""
        return Reduce(cast(Loss, with_numbers(self.loss, values)))

    def combine(self, barrier: Barrier, effects: Sequence[Reduce]) -> list[Tensor]:
        """The sum of the totals over the sum of the weights, term by term."""
        columns = list(zip(*(effect.loss.terms for effect in effects), strict=True))
        samples = [shard.samples for shard in barrier.shards]
        fractions = [shares([term.weight for term in column], samples) for column in columns]
        if len(effects) == 1:
            return [reduced_loss(columns, fractions)]
        with torch.no_grad():
            reduced = reduced_loss(columns, fractions)
        if not any(term.total.requires_grad for column in columns for term in column):
            return [reduced.clone() for _ in effects]
        copies = [reduced.data.requires_grad_() for _ in effects]

        def pull(index: int, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
            (cotangent,) = cotangents
            if cotangent is None:
                return [None for _ in columns]
            return [cotangent * share[index][0] / share[index][1] for share in fractions]

        sources = [[column[i].total for column in columns] for i in range(len(effects))]
        barrier.cross(sources, [[copy] for copy in copies], pull)
        return copies

    def __repr__(self) -> str:
        return repr(self.loss)


Share = tuple[float, Any]


def kinds(loss: Loss | Tensor) -> tuple[str, ...]:
    """What each term of a loss is: shards can only be added up term by term."""
    if isinstance(loss, Tensor):
        return ("sample mean",)
    return tuple(
        "sample mean" if t.weight is None else "sum" if t.weight is SUMMED else "mean"
        for t in loss.terms
    )


def numbers_of(loss: Loss | Tensor) -> tuple[Tensor | float, ...]:
    """The totals and weights of a loss's terms, as far as they are the shard's own."""
    if isinstance(loss, Tensor):
        return (loss,)
    found: list[Any] = []
    for term in loss.terms:
        found.append(term.total)
        if term.weight is not None and term.weight is not SUMMED:
            found.append(term.weight)
    return tuple(found)


def with_numbers(loss: Loss | Tensor, numbers: Sequence[Any]) -> Loss | Tensor:
    """A loss of the same terms with the totals and weights that `numbers_of` another gave."""
    left = iter(numbers)
    if isinstance(loss, Tensor):
        return cast(Tensor, next(left))
    own = (None, SUMMED)
    return Loss(
        tuple(
            Term(next(left), t.weight if any(t.weight is o for o in own) else next(left))
            for t in loss.terms
        )
    )


def shares(weights: Sequence[Any], samples: Sequence[int]) -> list[Share]:
    """What one term of a loss counts in each shard, as (numerator, denominator).

    The global value of the term is the sum over shards of `total * numerator / denominator`.

    Args:
        weights: the term's weight in each shard (see `composefit.losses.Term`).
        samples: the samples of each shard.

    Raises:
        ValueError: weights that add up to zero: a mean over nothing. On a GPU finding that out
            would take a synchronisation; the result is not finite there, which the check of the
            gradients finds.
    """
    count = len(weights)
    if weights[0] is SUMMED:
        return [(1.0, 1.0)] * count
    if weights[0] is None:
        if count == 1:
            return [(1.0, 1.0)]
        total = sum(samples)
        return [(float(n), total) for n in samples]
    total = sum(weights[1:], start=weights[0])
    on_host = not isinstance(total, Tensor) or total.device.type == "cpu"
    if on_host and total == 0:
        raise ValueError(
            f"the weights of a Mean add up to zero over all shards ({count}): a mean over nothing. "
            "Return None (or end the step) to skip such a batch"
        )
    return [(1.0, total)] * count


def reduced_loss(columns: Sequence[Sequence[Term]], fractions: Sequence[Sequence[Share]]) -> Tensor:
    """The sum over terms and shards; `columns` holds each term's values in the shards."""
    return _sum(
        _sum(
            t.total if n == 1.0 and d is n else t.total * n / d
            for t, (n, d) in zip(column, share, strict=True)
        )
        for column, share in zip(columns, fractions, strict=True)
    )


def _starts(lengths: Iterable[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def _sum(values: Iterable[Tensor]) -> Tensor:
    first, *rest = values
    for value in rest:
        first = first + value
    return first
