"""Sizes of shards by which their samples are told from everything else."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from composefit import tree


def telling_size(
    samples: int, group: int, module: nn.Module, batch: Any = None, dim: int = 0
) -> int:
    """How many of so many samples to give a shard, so that its dimensions are told from others.

    About two thirds of them; not half; no number of which a dimension of a weight, or of the batch,
    is a multiple, where there is one.

    Args:
        samples: the batch's, at least two groups of them.
        group: samples that stay together.
        module: whose weights are looked at.
        batch: its sizes apart from samples are looked at.
        dim: the dimension of the batch's tensors that counts samples.

    Returns:
        A multiple of `group`.

    Example:
        >>> telling_size(64, 1, nn.Linear(43, 86))
        41
    """
    groups = samples // group
    taken = {size for p in (*module.parameters(), *module.buffers()) for size in _shape(p)}
    for tensor in tree.tensors(batch):
        taken |= {size for i, size in enumerate(tensor.shape) if i != dim}
    taken.add(groups)  # what is gathered

    def cost(first: int) -> tuple[bool, bool, int, bool, float]:
        rest = groups - first
        return (
            first == rest,
            min(first, rest) < 2,  # no sample is to be alone
            sum(size % first == 0 for size in taken),
            any(first % i == 0 for i in range(2, math.isqrt(first) + 1)),
            abs(first - 2 * groups / 3),
        )

    return group * min(range(1, groups), key=cost) if groups > 1 else samples


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return () if is_lazy(tensor) else tuple(tensor.shape)
