"""Gradients through barriers: what shards exchanged with a graph (`Gather`, bare `Mean`).

Forward, each shard got leaves made of every shard's sources. Backward, a loss has gradients with
respect to the leaves of its own shard; those of all shards are added up and go to each shard's
sources as cotangents, last exchange first. Then one walk per shard, with the loss and the sources
as outputs, gives the parameters' gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from composefit.effects import Pull
from composefit.lockstep import gradients

if TYPE_CHECKING:
    from composefit.lockstep.ranked import Ranks


@dataclass
class Crossing:
    """One exchange: per shard the sources in its graph and the leaves it got."""

    sources: list[list[Tensor]]
    leaves: list[list[Tensor]]
    pull: Pull


@dataclass
class Roots:
    """What a shard's backward starts from: outputs and their cotangents."""

    outputs: list[Tensor] = field(default_factory=list)
    cotangents: list[Tensor] = field(default_factory=list)


def pull_back(
    crossings: Sequence[Crossing],
    roots: Mapping[int, Roots],
    each: Callable[[Callable[[int], None]], None],
    ranks: Ranks | None = None,
) -> None:
    """Extend each shard's roots by what reaches its sources from all shards' losses.

    Args:
        crossings: the step's exchanges in their order.
        roots: for the index of each shard that is here, its loss with its share as the cotangent;
            extended in place.
        each: runs a function for every such index, in the shard's worker.
        ranks: adds up over other ranks' shards, where there are any.
    """
    spare = ranks is not None and ranks.spare
    for crossing in reversed(crossings):
        found: dict[int, tuple[Tensor | None, ...]] = {}

        def to_leaves(i: int, crossing: Crossing = crossing) -> None:
            wanted = [leaf for leaf in crossing.leaves[i] if leaf.requires_grad]
            taken = iter(
                gradients.differentiate(roots[i].outputs, roots[i].cotangents, wanted, True)
            )
            found[i] = tuple(  # noqa: B023 (called before the next turn of the loop)
                next(taken) if leaf.requires_grad else None for leaf in crossing.leaves[i]
            )

        like = crossing.leaves[next(iter(roots))]
        totals: list[Tensor | None] = [None] * len(like)
        if not spare:
            each(to_leaves)
            totals = [_total(column) for column in zip(*(found[i] for i in roots), strict=True)]
        if ranks is not None:
            ranks.add_up_leaves(totals, like)
        if spare or all(total is None for total in totals):
            continue  # this loss does not depend on what was exchanged here
        for i, root in roots.items():
            cotangents = crossing.pull(i, totals)
            for source, cotangent in zip(crossing.sources[i], cotangents, strict=True):
                if cotangent is not None and source.requires_grad:
                    root.outputs.append(source)
                    root.cotangents.append(cotangent)


def _total(column: Sequence[Tensor | None]) -> Tensor | None:
    """The sum over shards in their order."""
    present = [g for g in column if g is not None]
    if not present:
        return None
    total = present[0]
    for g in present[1:]:
        total = total + g
    return total
