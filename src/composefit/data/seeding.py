"""Seeds of what a loader draws: a function of (seed, epoch, batch), in whichever process.

Datasets, samplers and collate functions draw from the global generators of torch, NumPy and the
`random` module. Saving these would not make an epoch resumable: workers have their own, and run
ahead. So each batch starts them anew, from a key.
"""

import ctypes
import random
from hashlib import blake2b
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import get_worker_info

_numpy_random: Any = np.random  # whose stubs do not know get_bit_generator

_MT19937_BYTES = 624 * 4 + 4  # the state words and the position in them


def key_of(*parts: int) -> int:
    """A well-spread key of 64 bits, the same in every process and version.

    Args:
        parts: integers; their order and number count.

    Example:
        >>> key_of(0, 7) == key_of(0, 7), key_of(0, 7) == key_of(7, 0)
        (True, False)
    """
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def seed_generators(key: int) -> None:
    """Start the global CPU generators of torch, NumPy and the `random` module from a key."""
    # torch.manual_seed would start every device's too, which takes a hundred times as long.
    torch.default_generator.manual_seed(key)
    random.seed(key)
    np.random.seed(key & 0xFFFF_FFFF)


class Keyed:
    """What a sampler gave for a batch, on its way to a worker: seeds the process it arrives in.

    Unpickling it gives the index itself, so that nobody in the worker sees a difference.

    Args:
        key: the batch's, or with `by_worker` the epoch's.
        index: what the sampler gave.
        by_worker: number the batches in the worker, where nobody knows beforehand who gets which.
    """

    __slots__ = ("by_worker", "index", "key")

    def __init__(self, key: int, index: Any, by_worker: bool = False) -> None:
        self.key = key
        self.index = index
        self.by_worker = by_worker

    def __reduce__(self) -> tuple[Any, ...]:
        return (_arrived_in_worker if self.by_worker else _arrived), (self.key, self.index)


def _arrived(key: int, index: Any) -> Any:
    seed_generators(key)
    return index


_epoch_key, _number = 0, 0


def _arrived_in_worker(key: int, index: Any) -> Any:
    global _epoch_key, _number
    _number = _number + 1 if key == _epoch_key else 0
    _epoch_key = key
    worker = get_worker_info()
    seed_generators(key_of(key, worker.id if worker else 0, _number))
    return index


class GeneratorsKept:
    """Inside the `with` block the global generators may be seeded; after it they are as before.

    Those of torch's CPU, of NumPy, and of the `random` module. Not reentrant.

    Example:
        >>> before = torch.get_rng_state()
        >>> with GeneratorsKept():
        ...     seed_generators(1)
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """

    def __init__(self) -> None:
        self._own_numpy = np.random.MT19937()
        self._numpy_seen = b""
        self._numpy_gauss: Any = None

    def __enter__(self) -> Self:
        self._torch = torch.default_generator.get_state()
        self._python = random.getstate()
        # NumPy takes 70 µs to give its state and to take it back, but 1 µs to change the generator
        # below it. Only the second number of a pair of normals, which is kept above it, gets lost
        # with that. It is asked about when the generator was used since the last time; or always
        # while there is one, since it can go without a trace.
        generator = self._numpy = _numpy_random.get_bit_generator()
        seen = b""
        if isinstance(generator, np.random.MT19937):
            seen = ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)
        if seen != self._numpy_seen or not seen or self._numpy_gauss is not None:
            state: Any = np.random.get_state(legacy=False)
            self._numpy_gauss = state if state["has_gauss"] else None
            self._numpy_seen = seen
        _numpy_random.set_bit_generator(self._own_numpy)
        return self

    def __exit__(self, *exception: object) -> None:
        torch.default_generator.set_state(self._torch)
        random.setstate(self._python)
        _numpy_random.set_bit_generator(self._numpy)
        if self._numpy_gauss is not None:
            np.random.set_state(self._numpy_gauss)
