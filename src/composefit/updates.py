"""`Update`: the effect that steps optimizers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from composefit.effects import Barrier, Effect, ShardView, kinds, numbers_of, with_numbers
from composefit.losses import Loss, as_loss, describe


class Update(Effect["dict[str, Tensor]"]):
    """Update the named optimizers with these losses, now; `yield {name: loss}` in full.

    Several names are one simultaneous update: every gradient is taken and found finite before
    anything steps. Gradients are those of the named optimizer's parameters only: nothing else gets
    one, so nothing needs freezing or detaching.

    Args:
        losses: name of an optimizer -> its loss: a 0-dim tensor (a mean over the shard's samples),
            `Mean`, `Sum`, or a sum of those.
        retain_graph: keep the graph for a later update that goes through the same part of it, as in
            `torch.autograd.grad`.

    Returns (from the yield):
        name -> the loss, reduced over all shards, micro-batches and ranks, detached, 0-dim.

    Raises:
        TypeError: `losses` is no dict, a name is no string, a loss is none.
        ValueError: no loss at all, a loss that is not 0-dim, a name without an optimizer.

    Example:
        ```python
        scores = self.critic(fake)
        yield Update({"generator": real_loss(scores)}, retain_graph=True)
        yield {"critic": fake_loss(scores)}
        ```
    """

    __slots__ = ("losses", "retain_graph")

    def __init__(self, losses: Mapping[str, Tensor | Loss], retain_graph: bool = False) -> None:
        if type(losses) is not dict and not isinstance(losses, Mapping):
            raise TypeError(f"Update expects {{name: loss, ...}}, got {describe(losses)}")
        if not losses:
            raise ValueError("Update expects at least one {name: loss}, got an empty dict")
        self.losses: dict[str, Tensor | Loss] = dict(losses)
        for name, loss in self.losses.items():
            if type(loss) is not Tensor or loss.dim():
                self.losses[name] = as_loss(loss, f"the loss of {name!r}" if name else "the loss")
        self.retain_graph = retain_graph

    def agreement(self) -> Hashable:
        """The names, in their order."""
        losses = tuple((name, kinds(loss)) for name, loss in self.losses.items())
        return ("Update", losses, self.retain_graph)

    def visit(self, shard: ShardView) -> None:
        """Take this shard's gradients."""
        last = len(self.losses) - 1
        for i, (name, loss) in enumerate(self.losses.items()):
            # Losses of one update often share a graph: it must live until the last of them.
            retain = self.retain_graph or i < last
            shard.take(name, loss, shard.parameters(name), retain)
            # Of a loss whose gradient is taken nothing may keep the graph.
            self.losses[name] = loss.detach()

    def values(self) -> tuple[Tensor | float, ...]:
        """Total and weight of each term of each loss."""
        return tuple(number for loss in self.losses.values() for number in numbers_of(loss))

    def of_another_rank(self, values: Sequence[Any]) -> Update:
        """With its totals and weights."""
        left, losses = list(values), {}
        for name, loss in self.losses.items():
            own, left = left[: (count := len(numbers_of(loss)))], left[count:]
            losses[name] = with_numbers(loss, own)
        return Update(losses, self.retain_graph)

    def loss_of(self, key: str) -> Tensor | Loss:
        """That of the named optimizer."""
        return self.losses[key]

    def combine(self, barrier: Barrier, effects: Sequence[Update]) -> list[Any]:
        """Step with the total gradients."""
        reduced = barrier.update(_columns(effects))
        if len(effects) == 1:
            return [reduced]
        # Each shard may write to what it gets.
        return [{name: loss.clone() for name, loss in reduced.items()} for _ in effects]

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{name!r}: loss" for name in self.losses) + "}"


class OnlyUpdate(Update):
    """A bare loss, where there is one optimizer: the reduced loss itself comes back."""

    __slots__ = ()

    def combine(self, barrier: Barrier, effects: Sequence[Update]) -> list[Any]:
        """As `Update`, with the loss by itself."""
        (reduced,) = barrier.update(_columns(effects)).values()
        return [reduced] if len(effects) == 1 else [reduced.clone() for _ in effects]

    def __repr__(self) -> str:
        return "a loss"


def _columns(effects: Sequence[Update]) -> dict[str, list[Tensor | Loss]]:
    """Name -> its loss in each shard."""
    return {name: [effect.losses[name] for effect in effects] for name in effects[0].losses}


class Gradient(Effect["dict[str, list[Tensor | None]]"]):
    """Reduced, unscaled gradients without a step; what `Strategy.gradient` runs."""

    __slots__ = ("loss", "parameters", "retain_graph")

    def __init__(self, loss: Tensor | Loss, parameters: list[Any]) -> None:
        self.loss = loss if type(loss) is Tensor else as_loss(loss, "the loss")
        if isinstance(self.loss, Tensor) and self.loss.dim():
            as_loss(self.loss, "the loss")
        self.parameters = parameters

    def visit(self, shard: ShardView) -> None:
        """Take this shard's gradients."""
        shard.take("loss", self.loss, self.parameters, retain_graph=False)
        self.loss = self.loss.detach()

    def values(self) -> tuple[Tensor | float, ...]:
        """Total and weight of each term of the loss."""
        return numbers_of(self.loss)

    def of_another_rank(self, values: Sequence[Any]) -> Gradient:
        """With its totals and weights."""
        return Gradient(with_numbers(self.loss, values), self.parameters)

    def loss_of(self, key: str) -> Tensor | Loss:
        """The loss."""
        return self.loss

    def combine(self, barrier: Barrier, effects: Sequence[Gradient]) -> list[Any]:
        """The reduced loss and gradients."""
        loss = barrier.reduce([effect.loss for effect in effects])
        return [(loss, barrier.gradients("loss"))] * len(effects)

    def __repr__(self) -> str:
        return "a loss"
