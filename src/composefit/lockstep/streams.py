"""The random streams of a step."""

from __future__ import annotations

import torch
from torch import Tensor

# Parts of random keys, so that no stream is another's.
SHARD, ONCE = 1, 2


class DefaultGenerators:
    """torch's default generators: the stream of a shard that is alone, and put back after it.

    What the loader draws from them in between (the order of samples) must not depend on what the
    step drew.
    """

    def __init__(self, device: torch.device) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index or 0])
        self._states: list[Tensor] = []

    def lend(self, key: int) -> None:
        """Keep their states and seed them with a key of 64 bits."""
        for generator in self._generators:
            self._states.append(generator.get_state())
            generator.manual_seed(key)

    def put_back(self) -> None:
        """Give them their states back, as far as these were kept."""
        for generator, state in zip(self._generators, self._states, strict=False):
            generator.set_state(state)
        self._states.clear()
