"""The arguments of a call, in parts: where gradients leave the shards, and what must not change."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from composefit.tree import map_tensors, tensors


class Alias(torch.autograd.Function):
    """The same memory as another tensor of the graph: a point where gradients can be caught.

    Nobody else knows it, so no hook of the user's runs there a second time.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """An own tensor, with a version counter of its own."""
        return tensor.data

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        """Nothing is changed on the way."""
        return cotangent


class Argument(NamedTuple):
    """A tensor among the arguments, and its part in each shard."""

    whole: Tensor
    parts: list[Tensor | None]  # None: it is one of a list of samples, and another shard has it


class Arguments:
    """The arguments of one call, in parts, with the leaves at which their gradients arrive.

    Args:
        batch: the arguments.
        parts: they, cut.
        dim: where samples are.
    """

    def __init__(self, batch: Any, parts: list[Any], dim: int) -> None:
        self.parts = parts
        self.dim = dim
        self.leaves: list[Argument] = []
        self._versions: list[tuple[weakref.ref[Tensor], int]] = []
        self._given = _aligned(batch, parts)
        self._entered: dict[int, Tensor] = {}
        if not torch.is_grad_enabled():
            return
        for argument in self._given:
            if argument.whole.requires_grad:
                self._enter(argument)
        if self._entered:
            swap = self._entered
            self.parts = [map_tensors(lambda t: swap.get(id(t), t), part) for part in parts]

    def _enter(self, argument: Argument) -> None:
        leaves: list[Tensor | None] = []
        for part in argument.parts:
            leaf = None if part is None else part.data.requires_grad_()
            if part is not None and leaf is not None:
                # Not the leaf itself, which nobody may change in place.
                self._entered[id(part)] = Alias.apply(leaf)  # type: ignore[no-untyped-call]
            leaves.append(leaf)
        self.leaves.append(Argument(argument.whole, leaves))

    def note_writes(self) -> None:
        """Tell the arguments' version counters what the shards wrote, and remember them.

        Each part has a counter of its own: a write in one shard must not break the others.

        Raises:
            RuntimeError: a shard wrote to one that requires a gradient: the graph outside, which
                made it, cannot know.
        """
        for whole, parts in self._given:
            if whole.dim() and not whole.is_inference():
                written = (
                    part is not None and part is not whole and _written(part) for part in parts
                )
                if any(written):
                    torch.autograd.graph.increment_version(whole)
        if any(_written(entered) for entered in self._entered.values()):
            raise RuntimeError(
                "the forward changes an argument in place that requires a gradient; DataParallel "
                "cannot tell the graph that made it. Write `x = x.clone()` at the beginning of the "
                "forward, or use an operation that is not in place"
            )
        if torch.is_grad_enabled():
            wholes = [whole for whole, _ in self._given if not whole.is_inference()]
            self._versions = [(weakref.ref(whole), whole._version) for whole in wholes]
        # The graph keeps of the arguments what it needs, no more.
        self._given, self._entered, self.parts = [], {}, []

    def check(self) -> None:
        """Raise if an argument was changed in place since the forward, as autograd does."""
        for reference, version in self._versions:
            whole = reference()
            if whole is not None and whole._version != version:
                raise RuntimeError(
                    "an argument of DataParallel, of shape "
                    f"{tuple(whole.shape)}, has been modified by an inplace operation after the "
                    "forward and before its backward: change a clone of it"
                )


def _written(tensor: Tensor) -> bool:
    return not tensor.is_inference() and tensor._version > 0


def _aligned(batch: Any, parts: Sequence[Any]) -> list[Argument]:
    """Each tensor of a batch with its parts."""
    wholes = list(tensors(batch))
    known = {id(whole) for whole in wholes}
    columns = [list(tensors(part)) for part in parts]
    # An item of a list of samples goes to one shard as it is, all others are cut.
    passed = [{id(t): t for t in column if id(t) in known} for column in columns]
    pieces = zip(*([t for t in column if id(t) not in known] for column in columns), strict=True)
    return [
        Argument(whole, [items.get(id(whole)) for items in passed])
        if any(id(whole) in items for items in passed)
        else Argument(whole, list(next(pieces)))
        for whole in wholes
    ]
