"""Seeds of what a loader draws: a function of (seed, epoch, batch), in whichever process.

Datasets, samplers and collate functions draw from the global generators of torch, NumPy and the
`random` module. Saving these would not make an epoch resumable: workers have their own, and run
ahead. So each batch starts them anew, from a key.
"""

import ctypes
import random
import struct
from hashlib import blake2b
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import get_worker_info

NUMPY: Any = np.random  # whose stubs do not know get_bit_generator

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


_PASS = 1_000_000


def pass_of(epoch: int, repeat: int) -> int:
    """The number under which a loader that comes around several times an epoch does so.

    The first time it is the epoch's own.

    Example:
        >>> pass_of(3, 0), pass_of(3, 2), pass_in_words(2_000_003)
        (3, 2000003, 'pass 2 of epoch 3')
    """
    return epoch + repeat * _PASS


def pass_in_words(number: int) -> str:
    """The same for messages; both count from 0."""
    repeat, epoch = divmod(number, _PASS)
    return f"pass {repeat} of epoch {epoch}" if repeat else f"epoch {epoch}"


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


class PythonGenerator:
    """The state of the `random` module's generator, taken and put back.

    `random.getstate` makes an object of each of its 625 words, which costs more than all the rest
    of a fetch. Where CPython has the words is tried out once; where they are not there, the slow
    way is taken.

    Attributes:
        generator: the object.
        fast: whether the words are where they are expected.
        address: where that is.
    """

    _WORDS = struct.Struct("i624I")

    def __init__(self) -> None:
        # `random.random` and its like are bound methods of this object.
        self.generator: Any = random.random.__self__  # type: ignore[attr-defined]
        address = id(self.generator) + object.__basicsize__
        index, *words = self._WORDS.unpack(ctypes.string_at(address, self._WORDS.size))
        found = type(self.generator) is random.Random
        self.address = address
        self.fast = found and (*words, index) == self.generator.getstate()[1]

    def words(self) -> bytes:
        """Its words, where they can be had fast."""
        return ctypes.string_at(self.address, self._WORDS.size)

    def set_words(self, words: bytes) -> None:
        """Put them back; no number is kept above them."""
        ctypes.memmove(self.address, words, self._WORDS.size)
        self.generator.gauss_next = None

    def get(self) -> Any:
        """Its state."""
        if not self.fast:
            return self.generator.getstate()
        return self.words(), self.generator.gauss_next

    def put_back(self, state: Any) -> None:
        """Go back to what `get` gave."""
        if not self.fast:
            self.generator.setstate(state)
            return
        words, gauss = state
        self.set_words(words)
        self.generator.gauss_next = gauss


PYTHON = PythonGenerator()


class TorchGenerator:
    """Whether somebody has drawn from torch's CPU generator, without a copy of its 5 kB of state.

    The generator's words are looked for in the memory of its object; where they are not found, or
    drawing does not show, `fast` is False.
    """

    def __init__(self) -> None:
        self.fast = False
        self._words = 0
        with torch.random.fork_rng(devices=[]):
            state = torch.default_generator.get_state().numpy()
            # at::CPUGeneratorImplStateLegacy: each word takes 8 bytes there, and 4 in memory.
            words = state[24 : 24 + 8 * 624].view(np.uint64).astype(np.uint32).tobytes()
            begin: int = getattr(torch.default_generator, "_cdata", 0)
            found = ctypes.string_at(begin, 256).find(words[:64]) if begin else -1
            if found < 12:
                return
            self._words = begin + found
            looks = [self.look()]
            for size in (1, 1, 1, 624, 17):  # the second of a pair of normals is kept above them
                torch.randn(size)
                looks.append(self.look())
            self.fast = len(set(looks)) == len(looks)

    def places(self) -> list[Any]:
        """What changes with every draw: position, first word, and whether a normal is kept."""
        at = self._words
        kept = [ctypes.c_uint64.from_address(at + 4 * 624 + more) for more in (0, 16)]
        return [*(ctypes.c_uint32.from_address(at + more) for more in (-4, 0)), *kept]

    def look(self) -> tuple[int, ...]:
        """All of them."""
        return tuple(place.value for place in self.places())


TORCH = TorchGenerator()


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
        self._python = PYTHON.get()
        # NumPy takes 70 µs to give its state and to take it back, but 1 µs to change the generator
        # below it. Only the second number of a pair of normals, which is kept above it, gets lost
        # with that. It is asked about when the generator was used since the last time; or always
        # while there is one, since it can go without a trace.
        generator = self._numpy = NUMPY.get_bit_generator()
        seen = b""
        if isinstance(generator, np.random.MT19937):
            seen = ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)
        if seen != self._numpy_seen or not seen or self._numpy_gauss is not None:
            state: Any = np.random.get_state(legacy=False)
            self._numpy_gauss = state if state["has_gauss"] else None
            self._numpy_seen = seen
        NUMPY.set_bit_generator(self._own_numpy)
        return self

    def look(self) -> object:
        """Changes within the block when somebody draws."""
        own: int = self._own_numpy.ctypes.state_address
        torch_state = torch.default_generator.get_state().numpy().tobytes()
        return torch_state, ctypes.string_at(own, _MT19937_BYTES), PYTHON.get()

    def __exit__(self, *exception: object) -> None:
        torch.default_generator.set_state(self._torch)
        PYTHON.put_back(self._python)
        NUMPY.set_bit_generator(self._numpy)
        if self._numpy_gauss is not None:
            np.random.set_state(self._numpy_gauss)
