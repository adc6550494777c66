"""Logging the size of gradients."""

from __future__ import annotations

from typing import Any

import torch

from composefit.callbacks.callback import Callback


class GradientNormMonitor(Callback):
    """Logs the norm of each optimizer's gradients as `grad_norm/<optimizer>`.

    Of all its gradients together, as `torch.nn.utils.clip_grad_norm_` takes it: reduced over all
    shards and ranks, unscaled, and before they are clipped. It is computed at the steps that
    loggers get only, and the device is not waited for. Of several updates of an optimizer within a
    step, it is the last one's.

    Args:
        norm_type: the `p` of the p-norm; `math.inf` for the largest absolute value.

    Raises:
        TypeError, ValueError: no number above zero.

    Example:
        >>> GradientNormMonitor(0)
        Traceback (most recent call last):
            ...
        ValueError: norm_type must be above 0 (math.inf for the largest value), got 0

    Source: `torch.nn.utils.get_total_norm`.
    """

    def __init__(self, norm_type: float = 2.0) -> None:
        if not isinstance(norm_type, (int, float)) or isinstance(norm_type, bool):
            raise TypeError(f"norm_type must be a number, got {norm_type!r}")
        if not norm_type > 0:
            raise ValueError(
                f"norm_type must be above 0 (math.inf for the largest value), got {norm_type}"
            )
        self.norm_type = float(norm_type)

    def on_before_optimizer_step(
        self, trainer: Any, module: Any, optimizer: Any, name: str
    ) -> None:
        """Log the norm, if loggers get this step."""
        if (trainer.global_step + 1) % trainer.log_every_n_steps:
            return
        gradients = [
            parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if any(hasattr(gradient, "full_tensor") for gradient in gradients):  # sharded over ranks
            norm = trainer.strategy.norm(gradients, self.norm_type)
        else:
            norm = torch.nn.utils.get_total_norm(gradients, self.norm_type)
        module.log(f"grad_norm/{name}", norm)
