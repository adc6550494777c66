"""States of the generators that samplers own, as plain data."""

import ast
import random
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch

Generator: TypeAlias = torch.Generator | np.random.Generator | np.random.RandomState | random.Random

_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def has_state(thing: object) -> bool:
    """It can save its state, and load it."""
    return callable(getattr(thing, "state_dict", None)) and callable(
        getattr(thing, "load_state_dict", None)
    )


class Drawers:
    """What decides on a loader's order and keeps a state of its own.

    The generators that the loader, its samplers, and the samplers inside these have as attributes;
    and those samplers that have `state_dict` and `load_state_dict`.

    Args:
        loader: a DataLoader.
    """

    def __init__(self, loader: Any) -> None:
        self._generators: dict[str, Generator] = {}
        self._samplers: dict[str, Any] = {}
        if loader.generator is not None:
            self._generators["generator"] = loader.generator
        for name, sampler in samplers_of(loader):
            if has_state(sampler):
                self._samplers[name] = sampler
            for attribute, value in getattr(sampler, "__dict__", {}).items():
                if isinstance(value, _KINDS) and not any(
                    value is known for known in self._generators.values()
                ):
                    self._generators[f"{name}.{attribute}"] = value

    def __bool__(self) -> bool:
        return bool(self._generators or self._samplers)

    def generators(self) -> dict[str, Any]:
        """The generators' states."""
        return {name: _state(generator) for name, generator in self._generators.items()}

    def state_dict(self) -> dict[str, Any]:
        """The states of generators and samplers."""
        samplers = {name: sampler.state_dict() for name, sampler in self._samplers.items()}
        return {"generators": self.generators(), "samplers": samplers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put states back.

        Raises:
            ValueError: the state is that of other generators or samplers.
        """
        for what, here in (("generators", self._generators), ("samplers", self._samplers)):
            if set(state[what]) != set(here):
                raise ValueError(
                    f"the loader has {_names(here)} as {what} with a state, but the one that was "
                    f"saved had {_names(state[what])}: give the loader the same samplers and "
                    "generators as then"
                )
        self.load_generators(state["generators"])
        for name, sampler in self._samplers.items():
            sampler.load_state_dict(state["samplers"][name])

    def load_generators(self, states: dict[str, Any]) -> None:
        """Put the generators' states back."""
        for name, generator in self._generators.items():
            _put_back(generator, states[name])


def samplers_of(loader: Any) -> Iterator[tuple[str, Any]]:
    """A loader's samplers, and the samplers inside these, by where they are found."""
    seen: list[Any] = []
    for name in ("batch_sampler", "sampler"):
        sampler = getattr(loader, name, None)
        while sampler is not None and not any(sampler is one for one in seen):
            seen.append(sampler)
            yield name, sampler
            name, sampler = f"{name}.sampler", getattr(sampler, "sampler", None)


def _names(found: Any) -> str:
    return ", ".join(sorted(found)) or "nothing"


def _state(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    # NumPy's hold arrays and integers of 128 bits, neither of which a safe load reads.
    if isinstance(generator, np.random.RandomState):
        return repr(_listed(generator.get_state(legacy=False)))
    return repr(_listed(generator.bit_generator.state))


def _put_back(generator: Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        version, words, gauss = state
        generator.setstate((version, tuple(words), gauss))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(ast.literal_eval(state))
    else:
        generator.bit_generator.state = ast.literal_eval(state)


def _listed(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _listed(value) for name, value in state.items()}
    if isinstance(state, np.ndarray | np.generic):
        return state.tolist()
    return state
