"""`self.random.shared`: a generator that agrees on every shard."""

import torch
from torch import Tensor


class SharedRandom(torch.Generator):
    """A `torch.Generator` on the CPU whose draws are the same on every shard.

    Works wherever torch takes a `generator=`, and has the usual draws as methods. Their tensors
    go to the shard's device.

    Example:
        >>> shared = SharedRandom()
        >>> _ = shared.manual_seed(0)
        >>> order = shared.permutation(5)
        >>> coin = torch.rand((), generator=shared).item() < 0.5
    """

    dtype_of_draws = torch.float32
    device_of_draws = torch.device("cpu")

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        """Normal numbers of the given shape and the module's dtype."""
        return self._moved(self._empty(shape).normal_(mean, std, generator=self))

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Numbers spread evenly over [low, high), of the given shape and the module's dtype."""
        return self._moved(self._empty(shape).uniform_(low, high, generator=self))

    def integers(self, *shape: int, low: int = 0, high: int) -> Tensor:
        """Integers from low to high - 1 (int64) of the given shape."""
        return self._moved(torch.randint(low, high, shape, generator=self, device="cpu"))

    def bernoulli(self, *shape: int, p: float = 0.5) -> Tensor:
        """Ones with probability p, else zeros, of the given shape and the module's dtype."""
        return self._moved(self._empty(shape).bernoulli_(p, generator=self))

    def permutation(self, n: int) -> Tensor:
        """The integers 0 to n - 1 (int64) in a random order."""
        return self._moved(torch.randperm(n, generator=self, device="cpu"))

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype_of_draws, device="cpu")

    def _moved(self, drawn: Tensor) -> Tensor:
        return moved(drawn, self.device_of_draws)


def moved(drawn: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on another device, without waiting for that device."""
    device = torch.device(device)
    if device.type == "cpu":
        return drawn
    if device.type == "cuda":
        drawn = drawn.pin_memory()  # else the copy waits for all work before it
    return drawn.to(device, non_blocking=True)
