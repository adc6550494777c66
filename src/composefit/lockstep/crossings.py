"""Gradients through barriers: what shards exchanged with a graph (`Gather`, bare `Mean`).

Forward, each shard got leaves made of every shard's sources. Backward, a loss has gradients with
respect to the leaves of its own shard; those of all shards are added up and go to each shard's
sources as cotangents, last exchange first. Then one walk per shard, with the loss and the sources
as outputs, gives the parameters' gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from composefit.effects import Pull
from composefit.lockstep import gradients

if TYPE_CHECKING:
    from composefit.lockstep.ranked import Ranks


@dataclass
class Crossing:
    """One exchange: per shard the sources in its graph and the leaves it got.

    A shard without samples is not among them: `of_spare` holds what it would have handed over.
    """

    sources: list[list[Tensor]]
    leaves: list[list[Tensor]]
    pull: Pull
    of_spare: dict[Any, list[Tensor]]


@dataclass
class Roots:
    """What a shard's backward starts from: outputs and their cotangents."""

    outputs: list[Tensor] = field(default_factory=list)
    cotangents: list[Tensor] = field(default_factory=list)


def pull_back(
    crossings: Sequence[Crossing],
    roots: Mapping[Any, Roots],
    each: Callable[[Callable[[Any], None]], None],
    ranks: Ranks | None = None,
    together: bool = False,
) -> None:
    """Extend each shard's roots by what reaches its sources from all shards' losses.

    Args:
        crossings: the step's exchanges in their order.
        roots: for each shard that is here, its loss with its share as the cotangent; extended in
            place.
        each: runs a function for every such shard, in its worker.
        ranks: adds up over other ranks' shards, where there are any.
        together: also a shard without samples goes through its graph.
    """
    walking = [shard for shard in roots if together or not shard.spare]
    counted = [shard for shard in roots if not shard.spare]
    for crossing in reversed(crossings):
        found: dict[Any, tuple[Tensor | None, ...]] = {}

        def to_leaves(shard: Any, crossing: Crossing = crossing) -> None:
            if shard not in walking:
                return
            leaves = crossing.leaves[shard.index]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            root = roots[shard]
            taken = iter(gradients.differentiate(root.outputs, root.cotangents, wanted, True))
            found[shard] = tuple(  # noqa: B023 (called before the next turn of the loop)
                next(taken) if leaf.requires_grad else None for leaf in leaves
            )

        each(to_leaves)
        like = crossing.leaves[next(iter(roots)).index]
        totals: list[Tensor | None] = [None] * len(like)
        if counted:
            columns = zip(*(found[shard] for shard in counted), strict=True)
            totals = [_total(column) for column in columns]
        if ranks is not None:
            ranks.add_up_leaves(totals, like)
        if all(total is None for total in totals):
            continue  # this loss does not depend on what was exchanged here
        for shard in walking:
            cotangents: list[Tensor | None]
            if shard.spare:
                sources = crossing.of_spare.get(shard, [])
                cotangents = [torch.zeros_like(source) for source in sources]
            else:
                sources = crossing.sources[shard.index]
                cotangents = crossing.pull(shard.index, totals)
            for source, cotangent in zip(sources, cotangents, strict=True):
                if cotangent is not None and source.requires_grad:
                    roots[shard].outputs.append(source)
                    roots[shard].cotangents.append(cotangent)


def _total(column: Sequence[Tensor | None]) -> Tensor | None:
    """The sum over shards in their order."""
    present = [g for g in column if g is not None]
    if not present:
        return None
    total = present[0]
    for g in present[1:]:
        total = total + g
    return total
