"""Gradients of all shards together: weighed, added up over time in each lane, then over the lanes.

A shard's gradient is taken as soon as it yields, so that its graph is gone before the next shard in
time runs. Its weight must then be known: that of a sample mean is, since the cut is; that of a
`Mean` is not, so it gets a backward of its own, whose sum is divided once all weights are there.
After a `Gather` gradients need every shard, and all are taken at the barrier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from composefit.effects import Share, reduced_loss, shares
from composefit.lockstep import gradients
from composefit.lockstep.contract import Lanes
from composefit.lockstep.crossings import Crossing, Roots, pull_back
from composefit.lockstep.gradients import Gradients
from composefit.losses import SUMMED, Loss, Term, as_loss
from composefit.ranks.reduction import Sending

if TYPE_CHECKING:
    from composefit.lockstep.ranked import Ranks


class Place(Protocol):
    """What is asked of a shard here."""

    index: int
    lane: int
    spare: bool

    @property
    def samples(self) -> int:
        """Its samples."""


_ALONE = [1]


class Backward:
    """The gradients of one step.

    Args:
        places: the strategy.
        scale_of: the loss scale of a key, or None.
    """

    def __init__(
        self,
        places: Lanes,
        scale_of: Callable[[str], Tensor | None],
    ) -> None:
        self.places = places
        self.scale_of = scale_of
        self.sums: list[dict[tuple[str, int], Gradients]] = [{} for _ in range(places.lanes)]
        self.parameters: dict[str, list[Parameter]] = {}
        self.weights: dict[str, list[list[Any]]] = {}
        self.waiting: dict[str, dict[Place, tuple[Loss, bool]]] = {}
        self.crossings: list[Crossing] = []
        self.samples: list[int] = [1]
        self.total_samples = 1
        self.ranks: Ranks | None = None
        self.lone = True  # no other shard is on this rank
        self._reductions: dict[str, Sending] = {}
        self._constants: dict[Any, Tensor] = {}

    def begin(self, samples: list[int]) -> None:
        """A new step, with this many samples in each shard."""
        self.samples = samples
        self.total_samples = sum(samples)

    def begin_alone(self) -> None:
        """A new step with one shard: its samples do not matter, and nobody has asked for them."""
        self.samples = _ALONE
        self.total_samples = 1

    def end(self) -> None:
        """Drop whatever is left of a step."""
        for sums in self.sums:
            sums.clear()
        self.parameters.clear()
        self.weights.clear()
        self.waiting.clear()
        self.crossings.clear()
        self._reductions.clear()

    # -- at the yield, in the shard's worker ---------------------------------------------------

    def take(
        self,
        shard: Place,
        key: str,
        loss: Loss | Tensor,
        parameters: list[Parameter],
        retain_graph: bool,
    ) -> None:
        """Take a shard's gradients now, or note that they are to be taken at the barrier."""
        self.parameters[key] = parameters
        leaves = self.places.leaves(parameters)
        if self.crossings:
            found = self.waiting.setdefault(key, {})
            found[shard] = (as_loss(loss, "the loss"), retain_graph)
            return
        if self.ranks is not None and self.lone:
            self._take_and_send(self.ranks, shard, key, loss, leaves, retain_graph)
            return
        if shard.spare:
            self._walk_in_vain(as_loss(loss, "the loss"), leaves, retain_graph)
            return
        if isinstance(loss, Tensor):
            cotangent = self._cotangent(loss, self._by_samples(shard), key)
            self._add(shard.lane, key, 0, [loss], [cotangent], leaves, retain_graph)
            return
        parts = self._parts(shard, key, loss)
        for i, (number, root) in enumerate(parts):
            retain = retain_graph or i < len(parts) - 1
            self._add(shard.lane, key, number, root.outputs, root.cotangents, leaves, retain)

    def _take_and_send(
        self,
        ranks: Ranks,
        shard: Place,
        key: str,
        loss: Loss | Tensor,
        leaves: list[Parameter],
        retain_graph: bool,
    ) -> None:
        """A rank's only shard: gradients go to the other ranks as they come."""
        if self.places.together or self.places.device.type != "cpu":
            ranks.settle()  # the backward itself sends, or runs in a thread of its own
        reduction = ranks.reducer.begin(key, leaves, ranks.settle)
        self._reductions[key] = reduction
        if shard.spare:
            ranks.settle()
            self._walk_in_vain(as_loss(loss, "the loss"), leaves, retain_graph)
            reduction.hand_over((), spare=True)
            return
        terms = as_loss(loss, "the loss").terms
        root = Roots()
        columns = None
        for i, term in enumerate(terms):
            share = self._known(shard, term)
            if share is None:  # the other ranks know the rest of its denominator
                columns = columns or [as_loss(one, "the loss").terms for one in ranks.column(key)]
                share = shares([column[i].weight for column in columns], self.samples)[shard.index]
            root.outputs.append(term.total)
            root.cotangents.append(self._cotangent(term.total, share, key))
        with reduction:
            found = gradients.differentiate(root.outputs, root.cotangents, leaves, retain_graph)
        reduction.hand_over(found)

    def _walk_in_vain(self, loss: Loss, leaves: list[Parameter], retain_graph: bool) -> None:
        """The backward of a shard that has no samples, where all ranks must go through it."""
        if not self.places.together:
            return
        walks = [list(loss.terms)]
        if not self.lone:  # as `_parts` has them: a walk for all denominators that are known
            known = [t for t in loss.terms if t.weight is None or t.weight is SUMMED]
            others = [[t] for t in loss.terms if t.weight is not None and t.weight is not SUMMED]
            walks = [known, *others] if known else others
        for i, terms in enumerate(walks):
            outputs = [term.total for term in terms]
            retain = retain_graph or i < len(walks) - 1
            zeros = [torch.zeros_like(output) for output in outputs]
            gradients.differentiate(outputs, zeros, leaves, retain)

    def _parts(self, shard: Place, key: str, loss: Loss) -> list[tuple[int, Roots]]:
        """The roots of a shard's backwards: number 0 for all terms of known denominators."""
        known = Roots()
        parts: list[tuple[int, Roots]] = []
        weights: list[Any] = []
        for term in loss.terms:
            share = self._known(shard, term)
            if share is not None:
                known.outputs.append(term.total)
                known.cotangents.append(self._cotangent(term.total, share, key))
                continue
            weights.append(term.weight)
            # By the samples in place of the weights, which keeps float16 in range.
            provisional = (1.0, self.total_samples)
            cotangent = self._cotangent(term.total, provisional, key)
            parts.append((len(weights), Roots([term.total], [cotangent])))
        if weights:
            of_shards: list[list[Any]] = [[] for _ in self.samples]
            self.weights.setdefault(key, of_shards)[shard.index] = weights
        return [(0, known), *parts] if known.outputs else parts

    def _known(self, shard: Place, term: Term) -> Share | None:
        if len(self.samples) == 1:
            return shares([term.weight], self.samples)[0]
        if term.weight is None:
            return self._by_samples(shard)
        return (1.0, 1.0) if term.weight is SUMMED else None

    def _by_samples(self, shard: Place) -> Share:
        return (self.samples[shard.index], self.total_samples)

    def _cotangent(self, like: Tensor, share: Share, key: str) -> Tensor:
        """What a term's backward starts with: its share of the loss, times the loss scale."""
        numerator, denominator = share
        if isinstance(denominator, Tensor):
            start = self._constant(like, numerator) / denominator.to(like.device)
        else:
            start = self._constant(like, numerator / denominator)
        scale = self.scale_of(key)
        if scale is not None:
            start = start * scale
        return start if start.dtype is like.dtype else start.to(like.dtype)

    def _constant(self, like: Tensor, value: float) -> Tensor:
        key = (value, like.dtype, like.device)
        found = self._constants.get(key)
        if found is None:
            if len(self._constants) >= 256:
                self._constants.clear()
            found = torch.full((), value, dtype=like.dtype, device=like.device)
            self._constants[key] = found
        return found

    def _add(
        self,
        lane: int,
        key: str,
        part: int,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        parameters: list[Parameter],
        retain_graph: bool,
    ) -> None:
        """Differentiate, and add to the lane's sum."""
        found = gradients.differentiate(outputs, cotangents, parameters, retain_graph)
        total = self.sums[lane].get((key, part))
        if total is None:
            self.sums[lane][key, part] = gradients.own(found, parameters)
        else:
            gradients.add_(total, found, parameters)

    # -- at the barrier, in the calling thread -------------------------------------------------

    def take_waiting(
        self, key: str, places: Sequence[Place], each: Callable[[Callable[[Any], None]], None]
    ) -> None:
        """Take the gradients that had to wait for all shards."""
        waiting = self.waiting.pop(key, None)
        if waiting is None:
            return
        leaves = self.places.leaves(self.parameters[key])
        if self.ranks is None:
            columns = [waiting[place][0].terms for place in places]
        else:
            columns = [as_loss(loss, "the loss").terms for loss in self.ranks.column(key)]
        fractions = self._fractions(columns)
        roots: dict[Place, Roots] = {}
        for place in places:
            terms = waiting[place][0].terms
            root = roots[place] = Roots([term.total for term in terms])
            for term, share in zip(terms, fractions, strict=True):
                own = (0.0, 1.0) if place.spare else share[place.index]
                root.cotangents.append(self._cotangent(term.total, own, key))
        pull_back(self.crossings, roots, each, self.ranks, self.places.together)

        def to_parameters(place: Place) -> None:
            root, retain = roots[place], waiting[place][1]
            if place.spare:
                if self.places.together:
                    gradients.differentiate(root.outputs, root.cotangents, leaves, retain)
                return
            self._add(place.lane, key, 0, root.outputs, root.cotangents, leaves, retain)

        each(to_parameters)

    # -- over all shards -----------------------------------------------------------------------

    def total(self, key: str, kept: bool = False) -> tuple[list[Parameter], Gradients]:
        """The parameters and their gradients, over all shards; still times the loss scale.

        Args:
            key: what they were taken under.
            kept: they stay in use after the update.
        """
        parameters = self.parameters.pop(key)
        reduction = self._reductions.pop(key, None)
        if reduction is not None:
            return parameters, reduction.finish(kept)
        leaves = self.places.leaves(parameters)
        total = self._local_total(key, leaves)
        if self.ranks is None:
            return parameters, total
        reduction = self.ranks.reducer.begin(key, leaves, self.ranks.settle)
        reduction.hand_over(total, self.ranks.spare)
        return parameters, reduction.finish(kept)

    def _local_total(self, key: str, parameters: list[Parameter]) -> Gradients:
        total = self._over_lanes(key, 0, parameters)
        weights = self.weights.pop(key, None)
        if weights is not None and self.ranks is not None:
            weights = self._weights_of_ranks(self.ranks, key)
        if weights is not None:
            for part, column in enumerate(zip(*weights, strict=True), start=1):
                denominator = shares(column, self.samples)[0][1]
                if isinstance(denominator, Tensor) and denominator.device.type == "cpu":
                    denominator = denominator.item()
                found = self._over_lanes(key, part, parameters)
                gradients.scale_(found, self.total_samples / denominator)
                if total:
                    gradients.add_(total, found, parameters)
                else:
                    total = found
        return total

    def _weights_of_ranks(self, ranks: Ranks, key: str) -> list[list[Any]]:
        """For each shard of all ranks, the weights of the terms whose denominator was unknown."""
        return [
            [
                term.weight
                for term in as_loss(loss, "the loss").terms
                if term.weight is not None and term.weight is not SUMMED
            ]
            for loss in ranks.column(key)
        ]

    def _over_lanes(self, key: str, part: int, parameters: list[Parameter]) -> Gradients:
        lanes = [sums.pop((key, part)) for sums in self.sums if (key, part) in sums]
        if len(lanes) == 1:
            return lanes[0]
        return self.places.add_up(lanes, parameters) if lanes else []

    def reduce(self, losses: Sequence[Loss | Tensor]) -> Tensor:
        """The loss over all shards, detached."""
        first = losses[0]
        if len(losses) == 1 and isinstance(first, Tensor):
            return first.detach() if first.requires_grad else first
        columns = [as_loss(loss, "the loss").terms for loss in losses]
        with torch.no_grad():
            by_term = list(zip(*columns, strict=True))
            return reduced_loss(by_term, self._fractions(columns))

    def _fractions(self, columns: Sequence[Sequence[Term]]) -> list[list[Share]]:
        return [
            shares([term.weight for term in column], self.samples)
            for column in zip(*columns, strict=True)
        ]
