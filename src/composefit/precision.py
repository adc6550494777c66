"""Precision: what dtype parameters and batches have, the autocast context, the loss scaler."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

_NAMES = {
    "32": (None, None),
    "32-true": (None, None),
    "64": (torch.float64, None),
    "64-true": (torch.float64, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (None, torch.bfloat16),
    "16-mixed": (None, torch.float16),
}


@dataclass(frozen=True)
class Precision:
    """How numbers are represented.

    Attributes:
        name: `"32"`, `"64"`, `"bf16-true"`, `"16-true"`, `"bf16-mixed"` or `"16-mixed"`, as in
            Lightning.
        dtype: what floating parameters, buffers and inputs are cast to; None leaves them as they
            are.
        autocast: the dtype of `torch.autocast` around each resume of a step, or None.
    """

    name: str
    dtype: torch.dtype | None
    autocast: torch.dtype | None

    @classmethod
    def of(cls, precision: str | int | Precision) -> Precision:
        """Read what a user wrote.

        Raises:
            ValueError: an unknown name; the message lists the valid ones.
        """
        if isinstance(precision, Precision):
            return precision
        name = str(precision)
        if isinstance(precision, bool) or name not in _NAMES:
            raise ValueError(
                f"unknown precision {precision!r}: choose one of {', '.join(map(repr, _NAMES))}"
            )
        return cls(name, *_NAMES[name])

    def context(
        self, device: torch.device, cache: bool = True
    ) -> AbstractContextManager[object] | None:
        """The autocast context, to be entered anew around each resume; None where there is none.

        Leaving it drops autocast's cache of cast weights, which an update in between has outdated.

        Args:
            device: where the step runs.
            cache: cast a weight once. All threads have one cache in common: whether a shard casts
                a weight itself, and so where gradients are rounded, would be a matter of timing.
        """
        if self.autocast is None:
            return None
        return torch.autocast(device.type, self.autocast, cache_enabled=cache)

    @property
    def scales_losses(self) -> bool:
        """Whether losses need a `LossScale`: float16's range is too small for gradients."""
        return self.autocast is torch.float16


class LossScale:
    """The factor by which float16 losses are scaled, adapted to what overflows.

    As `torch.amp.GradScaler`, whose rule and state it has; one for each optimizer, so that a
    simultaneous update can skip all of its optimizers when one overflows.

    Args:
        device: where losses and gradients are.
        init_scale, growth_factor, backoff_factor, growth_interval: as `torch.amp.GradScaler`'s.
    """

    def __init__(
        self,
        device: torch.device,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        self.value = torch.full((), init_scale, dtype=torch.float32, device=device)
        self.tracker = torch.zeros((), dtype=torch.int32, device=device)
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval

    def inverse(self) -> Tensor:
        """What gradients are multiplied by: 1 / scale, rounded once."""
        return self.value.double().reciprocal().float()

    def adapt(self, found_inf: Tensor) -> None:
        """Lower the scale where `found_inf` is 1, raise it after enough updates without."""
        torch._amp_update_scale_(
            self.value,
            self.tracker,
            found_inf,
            self.growth_factor,
            self.backoff_factor,
            self.growth_interval,
        )

    def state_dict(self) -> dict[str, float]:
        """The scale and the updates since it last changed, as `GradScaler` names them."""
        return {"scale": self.value.item(), "_growth_tracker": self.tracker.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a saved state."""
        self.value.fill_(state["scale"])
        self.tracker.fill_(int(state["_growth_tracker"]))
