"""Shallow replicas of a module tree, and how what they wrote comes back to their owner.

Shards that run side by side must not write into each other's modules. Each therefore runs on a
`Replica`: a tree of its own around the *same* parameters. Gradients reach the owner's
``Parameter`` objects directly; a forward that sets attributes, registers hooks or writes buffers
changes its own shard only. A step goes

    replica.refresh()                     # begin with what the owner holds now
    ... replica.module(...) ...           # one shard of the step
    differing_buffer(owner, replicas)     # before an update: has a shard written something alone?
    merge(owner, replicas, weights)       # statistics, buffers and metrics return to the owner

Nothing is ever deep-copied, so locks, generators, stored activations and references to a trainer
do no harm. What stays shared with the owner: parameters, tensors that are plain attributes,
and objects of other classes, even if they in turn refer to modules. Lists, dicts and sets that
are attributes are copied, one level deep: ``self.outputs.append(...)`` reaches the owner by
`merge`, in shard order; other changes of them are the shard's alone and end with the step.
"""

from composefit.replicas.merging import differing_buffer, merge
from composefit.replicas.metrics import MetricState, RankMetrics
from composefit.replicas.naming import path_of
from composefit.replicas.replica import Replica
from composefit.replicas.twin import statistics_of

__all__ = [
    "MetricState",
    "RankMetrics",
    "Replica",
    "differing_buffer",
    "merge",
    "path_of",
    "statistics_of",
]
