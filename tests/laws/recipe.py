"""A recipe: a small module, its data, and the same training written by hand in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from composefit import LoopModule

# Batch sizes of ten steps. No number of shards divides all of the ragged ones; the smallest has
# fewer samples than there are threads.
RAGGED = [7, 5, 6, 11, 3, 9, 7, 10, 5, 8]
EVEN = [12] * 10

#: A training loop by hand: yields after each step.
Loop: TypeAlias = Callable[[Any, Sequence[Any]], Iterator[None]]


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how one would write it by hand.

    Attributes:
        make: builds the module.
        batches: makes a batch of each of these sizes.
        by_hand: full batch, one device: what every strategy must end at.
        arguments: for the trainer.
    """

    make: Callable[[], LoopModule]
    batches: Callable[[list[int]], list[Any]]
    by_hand: Loop
    arguments: dict[str, Any] = field(default_factory=dict)


class Draws:
    """Data: the same in every run."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers between 0 and 1, float64."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers below `high`."""
        return torch.randint(high, shape, generator=self.generator)
