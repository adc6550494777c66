"""Random numbers in shards.

Attributes:
    Stream: torch's own draws of one shard (`streams`).
    SampleRandom: `self.random`, the same draw under every strategy (`samples`).
    SharedRandom: `self.random.shared`, the same on every shard (`shared`).
    recomputation: activation checkpointing in shards (`recompute`).
    GlobalGenerators: finds draws that have no streams (`global_generators`).
"""

from composefit.random.global_generators import GlobalGenerators
from composefit.random.recompute import Recompute, exchange_guard, recomputation
from composefit.random.samples import SampleRandom
from composefit.random.shared import SharedRandom
from composefit.random.streams import Stream, hash_key, thread_local_generators

__all__ = [
    "GlobalGenerators",
    "Recompute",
    "SampleRandom",
    "SharedRandom",
    "Stream",
    "exchange_guard",
    "hash_key",
    "recomputation",
    "thread_local_generators",
]
