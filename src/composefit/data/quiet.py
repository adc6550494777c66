"""Fetching from an iterable that draws no numbers, at a fraction of the cost of one that does."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from composefit.data.seeding import NUMPY, PYTHON, TORCH


class Quiet:
    """Around a fetch, for an iterable that has drawn nothing so far.

    The generators of torch, NumPy and `random` stay as they are, and are only looked at: most
    iterables leave them alone, and keeping and seeding them costs as much as a small step. If the
    fetch has drawn from them after all, they are put back to what they were, and `before` holds
    what it has drawn from, so that the epoch can be repeated.

    Attributes:
        before: the states at the fetch, as plain data.
    """

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}
        self._seen: tuple[int, ...] = ()
        self._generator: Any = None
        self._look: Callable[[], tuple[int, ...]] = tuple

    def ready(self) -> bool:
        """Whether a look is enough; if not, the fetch needs `GeneratorsKept`."""
        if self._generator is not NUMPY.get_bit_generator() and not self._find_generators():
            return False
        # The second of a pair of normals is taken without a trace in the generator.
        if PYTHON.generator.gauss_next is not None:
            return False
        return self._look() == self._seen or self._copy()

    def drew(self) -> bool:
        """After the fetch: whether it has drawn; its traces are gone then."""
        if self._look() == self._seen:
            return False
        set_states(self.before)
        return True

    def _copy(self) -> bool:
        """Somebody else has drawn since the last fetch, or this is the first."""
        seen = self._look()
        if seen[2:4] != self._seen[2:4]:
            state: Any = np.random.get_state(legacy=False)  # 70 µs, and few draw from it in hooks
            if state["has_gauss"]:
                return False
            self.before["numpy"] = state["state"]["key"].tobytes()
            self.before["numpy_position"] = int(state["state"]["pos"])
        self.before["python"] = PYTHON.words()
        self.before["torch"] = torch.default_generator.get_state()
        self._seen = seen
        return True

    def _find_generators(self) -> bool:
        generator = NUMPY.get_bit_generator()
        if not (PYTHON.fast and TORCH.fast and isinstance(generator, np.random.MT19937)):
            return False
        self._generator = generator
        words: int = generator.ctypes.state_address
        # Their positions, and a word that changes when a generator has come around.
        own = (PYTHON.address, PYTHON.address + 4, words + 4 * 624, words)
        a, b, c, d = (ctypes.c_uint32.from_address(place) for place in own)
        e, f, g, h = TORCH.places()

        def look() -> tuple[int, ...]:
            return a.value, b.value, c.value, d.value, e.value, f.value, g.value, h.value

        self._look = look
        self._seen = ()
        return True


def set_states(states: dict[str, Any]) -> None:
    """Put the global generators into states that `Quiet.before` holds."""
    torch.default_generator.set_state(states["torch"])
    PYTHON.set_words(states["python"])
    key = np.frombuffer(states["numpy"], dtype=np.uint32)
    np.random.set_state(("MT19937", key, states["numpy_position"], 0, 0.0))
