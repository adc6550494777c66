"""`self.random`: draws for the whole world's batch, of which each shard computes its own rows.

Number j of draw d in step s is a function of (seed, s, d, j) and of nothing else: Philox (Salmon,
Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, 2011) turns a counter into a block
of 256 random bits. Here its key is (seed, step) and its counter (block, draw, kind), so a shard
starts at the block of its first number and never makes another shard's. The bits become numbers on
the host, by NumPy, whose vectorised loops give an element the same value wherever in an array it
stands; so the numbers are the same on every device and under every strategy.
"""

import math
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from composefit.random.shared import SharedRandom, moved
from composefit.random.streams import hash_key

Device: TypeAlias = torch.device | str | None

# What fits the dtype's mantissa; with more bits, the largest number would round up to 1.
_MANTISSA = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}

# The third word of the counter: two kinds of draw have no bits in common.
_NORMAL, _UNIFORM, _INTEGERS, _BERNOULLI = range(4)

# Sets the shared generator's key apart from other uses of (seed, step).
_SHARED = 0x5AED


class SampleRandom:
    """Draws that do not depend on how the samples are spread over shards.

    Each method draws k numbers, or rows of them, for every sample of the step (k = n / the shard's
    samples) and returns those of the shard's own: sample i owns rows k*i to k*i + k - 1. A step
    must call them in the same order and with the same shapes on every shard.

    Outside of a step it draws as one shard of any size.

    Args:
        seed: an integer; of larger ones the low 64 bits count.

    Example:
        >>> random = SampleRandom(seed=0)
        >>> def noise(start: int, stop: int) -> Tensor:
        ...     random.begin(7, start, stop, 8, torch.float32, torch.device("cpu"))
        ...     return random.normal(stop - start, 3)
        >>> torch.equal(torch.cat([noise(0, 5), noise(5, 8)]), noise(0, 8))
        True
    """

    def __init__(self, seed: int) -> None:
        self._philox = np.random.Philox(key=0)
        self._state = self._philox.state
        self._counter = self._state["state"]["counter"]
        self._key = self._state["state"]["key"]
        self._shared = SharedRandom()
        self.seed_anew(seed)
        self.begin(0, 0, None, None, torch.get_default_dtype(), torch.device("cpu"))

    def seed_anew(self, seed: int) -> None:
        """Let the draws of the steps to come follow from another seed."""
        self._seed = seed & 0xFFFF_FFFF_FFFF_FFFF
        self._key[0] = self._seed

    def begin(
        self,
        step: int,
        start: int,
        stop: int | None,
        world: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Say which samples of which step the next draws are for; they count from 0 again.

        Args:
            step: number of the step, from 0.
            start: the shard's first sample in the step.
            stop: the sample after its last, or None for one shard of a size that nobody asked
                for: then any n is that of the whole step.
            world: samples in the step, over all shards, or None.
            dtype: floating dtype of draws that do not name one.
            device: device of draws that do not name one.
        """
        self._step = step
        self._start = start
        self._stop = stop
        self._world = world
        self._dtype = dtype
        self._device = device
        self._draws = 0
        self._shared_is_seeded = False

    def state(self) -> tuple[int, Tensor | None]:
        """Where the draws of this step have got to."""
        return self._draws, self._shared.get_state() if self._shared_is_seeded else None

    def rewind(self, state: tuple[int, Tensor | None]) -> None:
        """Go back to where the step stood."""
        self._draws, shared = state
        self._shared_is_seeded = shared is not None
        if shared is not None:
            self._shared.set_state(shared)

    @property
    def shared(self) -> SharedRandom:
        """The generator that agrees on every shard; each step starts it from (seed, step).

        For coins that steer control flow, and for permutations.
        """
        if not self._shared_is_seeded:
            self._shared.manual_seed(hash_key(self._seed, self._step, _SHARED))
            self._shared.dtype_of_draws = self._dtype
            self._shared.device_of_draws = self._device
            self._shared_is_seeded = True
        return self._shared

    def normal(
        self,
        n: int,
        *shape: int,
        mean: float = 0.0,
        std: float = 1.0,
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> Tensor:
        """Normal numbers, by the transform of Box and Muller.

        Args:
            n: rows, a whole multiple of the shard's samples.
            shape: of a row.
            mean: of the distribution.
            std: its standard deviation, not negative.
            dtype: a floating dtype; the module's if None.
            device: where the draw goes; the shard's if None.

        Returns:
            A tensor of shape (n, *shape).

        Raises:
            ValueError: if n is no multiple of the shard's samples, or std is negative.
            TypeError: if dtype is not floating.
        """
        dtype = self._floating(dtype)
        if not std >= 0:
            raise ValueError(f"expected a standard deviation `std` of at least 0, got {std}")
        bits, skipped = self._bits(_NORMAL, 64 if dtype == torch.float64 else 32, n, shape)
        numbers = _normal(bits, std)
        if mean:
            numbers += mean
        return self._rows(torch.from_numpy(numbers), skipped, n, shape, dtype, device)

    def uniform(
        self,
        n: int,
        *shape: int,
        low: float = 0.0,
        high: float = 1.0,
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> Tensor:
        """Numbers spread evenly over [low, high).

        Args:
            n: rows, a whole multiple of the shard's samples.
            shape: of a row.
            low: the smallest number.
            high: above all numbers.
            dtype: a floating dtype; the module's if None.
            device: where the draw goes; the shard's if None.

        Returns:
            A tensor of shape (n, *shape).

        Raises:
            ValueError: if n is no multiple of the shard's samples, or high is not above low.
            TypeError: if dtype is not floating.
        """
        dtype = self._floating(dtype)
        if not high > low:
            raise ValueError(f"expected low < high, got low={low}, high={high}")
        width = 64 if dtype == torch.float64 else 32
        bits, skipped = self._bits(_UNIFORM, width, n, shape)
        bits >>= bits.dtype.type(width - _MANTISSA[dtype])
        unit = (high - low) * 2.0 ** -_MANTISSA[dtype]
        numbers = np.multiply(bits, unit, dtype=_real(bits))
        if low:
            numbers += low
        drawn = self._rows(torch.from_numpy(numbers), skipped, n, shape, dtype, "cpu")
        if (low, high) != (0.0, 1.0):  # the sum may have been rounded up to high
            ends = torch.tensor([high, low], dtype=dtype)
            drawn.clamp_(max=torch.nextafter(ends[0], ends[1]))
        return moved(drawn, self._device if device is None else device)

    def integers(
        self,
        n: int,
        *shape: int,
        low: int = 0,
        high: int,
        dtype: torch.dtype = torch.int64,
        device: Device = None,
    ) -> Tensor:
        """Integers from low to high - 1, all as likely.

        Probabilities are off by at most 2**-21 of themselves for up to 2**32 different integers,
        and by their number / 2**64 for more.

        Args:
            n: rows, a whole multiple of the shard's samples.
            shape: of a row.
            low: the smallest integer.
            high: one above the largest.
            dtype: of the result.
            device: where the draw goes; the shard's if None.

        Returns:
            A tensor of shape (n, *shape).

        Raises:
            ValueError: if n is no multiple of the shard's samples, or no integer is in
                [low, high), or not all of them fit 64 bits.
        """
        if not -(2**63) <= low < high <= 2**63:
            raise ValueError(f"expected -2**63 <= low < high <= 2**63, got low={low}, high={high}")
        count = high - low
        bits, skipped = self._bits(_INTEGERS, 64, n, shape)
        if count <= 2**32:  # five times as fast as the remainder, and never rounds up to count
            bits >>= np.uint64(11)
            numbers = np.multiply(bits, count * 2.0**-53, dtype=np.float64).astype(np.int64)
        else:
            numbers = (bits % np.uint64(count) if count < 2**64 else bits).view(np.int64)
        if low:
            numbers += low
        return self._rows(torch.from_numpy(numbers), skipped, n, shape, dtype, device)

    def bernoulli(
        self,
        n: int,
        *shape: int,
        p: float = 0.5,
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> Tensor:
        """Ones with probability p (to within 2**-32), else zeros.

        Args:
            n: rows, a whole multiple of the shard's samples.
            shape: of a row.
            p: the probability of a one.
            dtype: of the result; the module's floating dtype if None.
            device: where the draw goes; the shard's if None.

        Returns:
            A tensor of shape (n, *shape).

        Raises:
            ValueError: if n is no multiple of the shard's samples, or p is not in [0, 1].
        """
        if not 0 <= p <= 1:
            raise ValueError(f"expected a probability `p` in [0, 1], got {p}")
        bits, skipped = self._bits(_BERNOULLI, 32, n, shape)
        ones = torch.from_numpy(bits < round(p * 2**32))
        return self._rows(ones, skipped, n, shape, self._dtype if dtype is None else dtype, device)

    def _floating(self, dtype: torch.dtype | None) -> torch.dtype:
        dtype = self._dtype if dtype is None else dtype
        if dtype not in _MANTISSA:
            known = ", ".join(map(str, _MANTISSA))
            raise TypeError(
                f"expected one of the dtypes {known}, got {dtype}; for whole numbers write "
                "`self.random.integers(n, ..., high=...)`"
            )
        return dtype

    def _first_row(self, n: int) -> int:
        if self._stop is None:
            if n < 1:
                raise ValueError(f"expected to draw at least 1 row, got n={n}")
            return 0
        samples = self._stop - self._start
        if n < 1 or n % samples:
            raise ValueError(
                f"expected n to be a whole multiple of the shard's {samples} samples (samples "
                f"{self._start} to {self._stop - 1} of the step's {self._world}), got n={n}: "
                "each sample owns as many rows of a draw. For a draw that belongs to no sample "
                "and is the same on every shard write `self.random.shared.normal(...)`, "
                "`.uniform(...)`, `.integers(...)` or `.permutation(...)`"
            )
        return n // samples * self._start

    def _bits(
        self, kind: int, width: int, n: int, shape: tuple[int, ...]
    ) -> tuple[NDArray[np.unsignedinteger], int]:
        """Random words for the shard's rows: those of whole blocks, and how many come before."""
        size = math.prod(shape)
        per_block = 256 // width
        block, skipped = divmod(self._first_row(n) * size, per_block)
        blocks = -(-(skipped + n * size) // per_block)
        self._counter[:] = block, self._draws, kind, 0
        self._key[1] = self._step
        self._draws += 1
        self._philox.state = self._state
        words = self._philox.random_raw(4 * blocks)
        return (words if width == 64 else words.view(np.uint32)), skipped

    def _rows(
        self,
        numbers: Tensor,
        skipped: int,
        n: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: Device,
    ) -> Tensor:
        count = n * math.prod(shape)
        if len(numbers) != count:
            numbers = numbers[skipped : skipped + count]
        return moved(numbers.view(n, *shape).to(dtype), self._device if device is None else device)


def _real(bits: NDArray[np.unsignedinteger]) -> type[np.float32] | type[np.float64]:
    return np.float64 if bits.itemsize == 8 else np.float32


def _normal(bits: NDArray[np.unsignedinteger], std: float) -> NDArray[np.floating]:
    # A pair of words makes a pair of numbers, and pairs do not straddle blocks.
    if bits.itemsize == 8:
        bits >>= np.uint64(11)  # what fits the mantissa
    unit = 2.0 ** (-53 if bits.itemsize == 8 else -32)
    radius = np.multiply(bits[0::2], unit, dtype=_real(bits))
    radius += unit / 2  # never the logarithm of 0
    np.log(radius, out=radius)
    radius *= -2 * std**2
    np.sqrt(radius, out=radius)
    angle = np.multiply(bits[1::2], 2 * math.pi * unit, dtype=_real(bits))
    numbers = np.empty(bits.size, _real(bits))
    np.multiply(radius, np.cos(angle), out=numbers[0::2])
    np.multiply(radius, np.sin(angle, out=angle), out=numbers[1::2])
    return numbers
