"""`SingleDevice`: one device, one thread, any number of shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from composefit.strategies.base import Strategy


class SingleDevice(Strategy):
    """Everything on one device, in the calling thread.

    Args:
        device: `"auto"` (an accelerator if there is one, else the CPU), or a torch device.
        shards: cut each batch into this many shards, run one after another. Bitwise equal to
            `ThreadDataParallel(threads=shards)` (with one intra-op thread in both), for a debugger
            and for tests.

    Raises:
        ValueError: `shards` is less than one.
    """

    def __init__(self, device: str | torch.device = "auto", shards: int = 1) -> None:
        if not isinstance(shards, int) or isinstance(shards, bool) or shards < 1:
            raise ValueError(f"SingleDevice(shards=...) expects a positive number, got {shards!r}")
        self.device = best_device() if device == "auto" else torch.device(device)
        self.lanes = shards

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """One task after another."""
        for task in tasks:
            task()

    def describe(self, samples: int) -> str:
        """As `Strategy.describe`."""
        if self.lanes == 1:
            return f"{samples} on {self.device}"
        return f"{samples} = {self.lanes} shards x {-(-samples // self.lanes)} on {self.device}"


def best_device() -> torch.device:
    """An accelerator if there is one, else the CPU."""
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator()
        if found is not None:
            return torch.device(found.type, torch.accelerator.current_device_index())
    return torch.device("cpu")
