"""Finds draws from Python's and NumPy's global generators, which have no streams."""

import ctypes
import random
from collections.abc import Hashable
from typing import Any

import numpy as np

_numpy_random: Any = np.random  # whose stubs do not know get_bit_generator

_MT19937_BYTES = 624 * 4 + 4  # the state words and the position in them


class GlobalGenerators:
    """Tells whether the `random` module or `numpy.random.*` were drawn from between two calls.

    Draws from generators of one's own (`random.Random(0)`, `numpy.random.default_rng(0)`) do not
    count.

    Example:
        >>> generators = GlobalGenerators()
        >>> before = generators.fingerprint()
        >>> _ = random.random()
        >>> generators.fingerprint() == before
        False
    """

    def __init__(self) -> None:
        self._numpy_state = b""
        self._numpy_gauss: object = None

    def fingerprint(self) -> Hashable:
        """A value that changes with every draw, and with nothing else."""
        return random.getstate(), self._numpy()

    def _numpy(self) -> Hashable:
        # Asking NumPy for its state takes twice as long as asking Python, so the state is read
        # where NumPy publishes it for C. That leaves out the second number of a pair of normals,
        # which is kept elsewhere and can go without a trace: only while there is one, ask.
        generator = _numpy_random.get_bit_generator()
        if not isinstance(generator, np.random.MT19937):
            return repr(np.random.get_state(legacy=False))
        state = ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)
        if state != self._numpy_state or self._numpy_gauss:
            full: Any = np.random.get_state(legacy=False)
            self._numpy_state = state
            self._numpy_gauss = (full["gauss"],) if full["has_gauss"] else None
        return state, self._numpy_gauss
