"""`Rows`: one rank's rows of a batch, in place of the batch; `Share`: which rows these are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from composefit import tree


@dataclass(slots=True)
class Rows:
    """One rank's rows of a batch of the world's, where a loader loads no others.

    Attributes:
        batch: this rank's rows; a spare batch where it has none.
        sizes: each rank's samples of this batch, in rank order; None where a rank does not know
            those of the others.
        spare: this rank has no rows of this batch: `batch` is one to take part with, weight zero.
        counted: the sizes are those of the batches; else of what a function made them from, which
            may have left out samples or doubled them.
    """

    batch: Any
    sizes: tuple[int, ...] | None
    spare: bool = False
    counted: bool = True


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank of several gets of each batch: contiguous rows, in rank order.

    Attributes:
        rank: the rank.
        size: how many ranks there are.
        group: samples that stay together.
        dim: the dimension of a batch's tensors that counts samples.
    """

    rank: int
    size: int
    group: int = 1
    dim: int = 0

    def sizes(self, samples: int) -> tuple[int, ...]:
        """The samples of each rank; of fewer groups than ranks, the last ranks get none.

        Example:
            >>> Share(0, 3).sizes(7), Share(0, 3).sizes(2)
            ((3, 2, 2), (1, 1, 0))
        """
        sizes = tree.even_sizes(samples, self.size, self.group)
        return (*sizes, *[0] * (self.size - len(sizes)))

    def take(self, items: Any) -> Any:
        """This rank's of what there is one of for each sample; a spare group where it has none.

        Args:
            items: indices or samples, as a sequence or otherwise iterable.

        Example:
            >>> Share(1, 2).take([5, 6, 7]), Share(1, 2).take([5])
            ([7], [5])
        """
        items = sliceable(items)
        sizes = self.sizes(len(items))
        first = sum(sizes[: self.rank])
        return items[first : first + sizes[self.rank]] if sizes[self.rank] else items[: self.group]

    def rows(self, batch: Any, sizes: tuple[int, ...], counted: bool = True) -> Rows:
        """What this rank has loaded, told what it is a part of."""
        return Rows(batch, sizes, not sizes[self.rank], counted)

    def cut(self, batch: Any) -> Rows:
        """This rank's rows of a batch that is loaded as a whole.

        Raises:
            ValueError, TypeError: see `composefit.tree.cut`.
        """
        sizes = self.sizes(tree.batch_size(batch, self.dim))
        parts = tree.cut(batch, [size for size in sizes if size], self.dim)
        return self.rows(parts[self.rank if sizes[self.rank] else 0], sizes)


def sliceable(items: Any) -> Any:
    """The same, or a list of it where it cannot be sliced."""
    return items if isinstance(items, Sequence | np.ndarray | Tensor) else list(items)
