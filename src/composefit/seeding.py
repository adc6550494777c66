"""The global generators of Python, NumPy and torch: seeded together, saved and restored."""

from __future__ import annotations

import logging
import operator
import os
import random
from typing import Any

import numpy as np
import torch

__all__ = ["global_states", "restore_global_states", "seed_everything"]

_VARIABLE = "PL_GLOBAL_SEED"
_LARGEST = 2**32 - 1  # NumPy takes no larger one

_log = logging.getLogger(__name__)


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed the global generators of `random`, `numpy.random` and torch, on all its devices.

    Draws in training steps follow from it, unless `Trainer(seed=...)` says otherwise.

    Args:
        seed: from 0 to 2**32 - 1. None takes the environment variable `PL_GLOBAL_SEED`, and 0 where
            there is none.
        workers: makes no difference, since the generators in a loader's workers follow from the
            seed in any case.
        verbose: log the seed, on the level INFO.

    Returns:
        The seed.

    Raises:
        TypeError: a seed that is no whole number.
        ValueError: one that is out of range, or an environment variable that is no such number.

    Source: Lightning's function of this name, whose environment variable is set too, so that
    processes which are started from here seed themselves alike.

    Example:
        >>> seed_everything(7)
        7
        >>> first = random.random(), np.random.rand(), torch.rand(1).item()
        >>> _ = seed_everything(7)
        >>> first == (random.random(), np.random.rand(), torch.rand(1).item())
        True
    """
    if not isinstance(workers, bool):
        raise TypeError(f"seed_everything(workers=...) expects True or False, got {workers!r}")
    if seed is None:
        said = os.environ.get(_VARIABLE, "0")
        if not said.isdecimal():
            raise ValueError(f"expected the variable {_VARIABLE} to be a seed, got {said!r}")
        seed = int(said)
    if isinstance(seed, bool):
        raise TypeError(f"a seed must be a whole number, got {seed!r}")
    try:
        seed = operator.index(seed)
    except TypeError:
        raise TypeError(f"a seed must be a whole number, got {seed!r}") from None
    if not 0 <= seed <= _LARGEST:
        raise ValueError(f"a seed must be from 0 to {_LARGEST} (2**32 - 1), got {seed}")
    if verbose:
        _log.info("seed set to %d", seed)
    os.environ[_VARIABLE] = str(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def global_states() -> dict[str, Any]:
    """The states of the global generators, as what `torch.load(weights_only=True)` reads.

    Returns:
        `"python"`: what `random.getstate` returns; `"numpy"`: what `numpy.random.get_state` does,
        arrays as tensors; `"torch"`: uint8 tensor (5056,), of the CPU; `"cuda"`: uint8 tensors, one
        a device, none where CUDA is not in use.

    Example:
        >>> before = global_states()
        >>> drawn = torch.rand(3)
        >>> restore_global_states(before)
        >>> torch.equal(drawn, torch.rand(3))
        True
    """
    # Asking a device that nobody has used would initialise it.
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "python": random.getstate(),
        "numpy": _arrays_to_tensors(np.random.get_state(legacy=False)),
        # Not torch.get_rng_state(): in a step, that is the state of the shard's stream.
        "torch": torch.default_generator.get_state(),
        "cuda": torch.cuda.get_rng_state_all() if in_use else [],
    }


def restore_global_states(state: dict[str, Any]) -> None:
    """Set the global generators to what `global_states` returned, bit by bit.

    States of CUDA devices that this machine does not have are left out.

    Args:
        state: what was saved; tensors on any device.

    Raises:
        ValueError: NumPy's global generator is of another kind than the one saved.
    """
    numpy = _tensors_to_arrays(state["numpy"])
    saved, here = numpy["bit_generator"], type(_bit_generator()).__name__
    if saved != here:
        raise ValueError(
            f"the state of NumPy's global generator is that of a {saved}, and here it is a {here}: "
            f"call numpy.random.set_bit_generator(numpy.random.{saved}()) first"
        )
    random.setstate(state["python"])
    np.random.set_state(numpy)
    torch.default_generator.set_state(state["torch"].cpu())
    devices = torch.cuda.device_count() if state["cuda"] else 0
    for device, one in enumerate(state["cuda"][:devices]):
        torch.cuda.set_rng_state(one.cpu(), device)


def _bit_generator() -> object:
    numpy_random: Any = np.random  # whose stubs do not know get_bit_generator
    return numpy_random.get_bit_generator()


def _arrays_to_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _arrays_to_tensors(item) for key, item in value.items()}
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _tensors_to_arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tensors_to_arrays(item) for key, item in value.items()}
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else value
