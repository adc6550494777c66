"""A rank's rows of a stream that every rank reads: taken before they are collated.

They are taken where the batch is loaded, in a worker, perhaps. What this process has to know of the
rest of the batch comes with them and is taken off again before anybody sees it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import default_collate

from composefit.data.digests import digest
from composefit.data.rows import Share
from composefit.data.seeding import key_of, seed_generators


class OwnRows:
    """A `collate_fn` that gives this rank's samples to the user's.

    What that draws has nothing in common between ranks. The stream has drawn before, alike on all
    of them, and is seeded anew before the next batch.

    Args:
        collate: the user's.
        share: this rank's.
    """

    def __init__(self, collate: Callable[[Any], Any], share: Share) -> None:
        self.collate = collate
        self.share = share

    def __call__(self, samples: Any) -> tuple[Any, tuple[int, ...], int]:
        """The batch, each rank's number of samples, and the digest of all of them."""
        share = self.share
        found = digest(samples)
        if share.rank and self.collate is not default_collate:
            seed_generators(key_of(torch.default_generator.initial_seed(), share.rank))
        return self.collate(share.take(samples)), share.sizes(len(samples)), found


def unpack(iterator: Any, arrived: deque[tuple[tuple[int, ...], int]]) -> None:
    """Make a DataLoader's iterator give the batches that `OwnRows` made, and nothing with them.

    Args:
        iterator: of a DataLoader.
        arrived: gets the rest.
    """
    # Not the method itself, which would keep the iterator alive, and its workers with it.
    fetch: Any = weakref.WeakMethod(iterator._next_data)

    def next_data() -> Any:
        batch, sizes, found = fetch()()  # a list where memory was pinned
        arrived.append((tuple(sizes), found))
        return batch

    iterator.__dict__["_next_data"] = next_data
