"""Sums over all numbers of gradients of which each rank has some rows, and others whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from composefit.ranks.world import World


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, in the same memory; others as they are."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def norm(world: World, gradients: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """The norm of all gradients together, the same on every rank; all must call it.

    Args:
        world: the ranks.
        gradients: of which each rank has its rows (`DTensor`), or the same whole one.
        order: the `p` of the p-norm, `math.inf` for the largest absolute value.

    Returns:
        A plain 0-dim tensor.

    Source: `torch.nn.utils.get_total_norm`, which cannot mix both kinds.
    """
    device = world.device if not gradients else local(gradients[0]).device
    parts = [
        [local(g) for g in gradients if isinstance(g, DTensor) is cut] for cut in (True, False)
    ]
    own, whole = (_power_sum(part, order, device) for part in parts)
    if order == float("inf"):
        totals = world.all_gather(own, "the norm of gradients")
        return torch.stack([*totals, whole]).max()
    world.add_up_([own])
    total: Tensor = (own + whole) ** (1 / order)
    return total


def _power_sum(tensors: Sequence[Tensor], order: float, device: torch.device) -> Tensor:
    """The sum of |x|^p over all numbers, or the largest |x|."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return torch.zeros((), device=device)
    norms = torch.stack([one.to(device) for one in torch._foreach_norm(tensors, order)])
    if order == float("inf"):
        return norms.max()
    powers: Tensor = norms.pow(order).sum()
    return powers


def clip(
    world: World, parameters: Sequence[Parameter], limit: float, algorithm: str | None = "norm"
) -> None:
    """Clip `.grad` of these parameters together, as `composefit.optimizers.clip`.

    Args:
        world: the ranks; all must call it.
        parameters: those without a gradient are left out.
        limit: the largest norm of all gradients together, or absolute value of each number.
        algorithm: `"norm"` or `"value"`; None is `"norm"`.

    Raises:
        ValueError: another algorithm.

    Source: `torch.nn.utils.clip_grad_norm_`, `clip_grad_value_`.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    owned = [part for part in map(local, gradients) if part.numel()]
    if algorithm == "value":
        if owned:
            torch._foreach_clamp_min_(owned, -limit)
            torch._foreach_clamp_max_(owned, limit)
    elif algorithm in ("norm", None):
        factor = (limit / (norm(world, gradients) + 1e-6)).clamp(max=1.0)
        for part in owned:
            part.mul_(factor.to(part.device, part.dtype))
    else:
        raise ValueError(f"gradient_clip_algorithm must be 'norm' or 'value', got {algorithm!r}")
