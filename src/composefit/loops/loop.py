"""`Loop`: what every loop is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from composefit.module import LoopModule
    from composefit.trainer import Trainer


class Loop(ABC):
    """Order and counting: what is done how often, and what follows what.

    A loop is made without a trainer and run with one, `trainer.run(loop, module)`. It knows nothing
    of devices: it calls `trainer.step` and `trainer.evaluate`. Loops that it uses are its
    attributes; their state is part of its own.

    Attributes:
        stage: what `setup` and `teardown` are told.
        trains: whether optimizers are needed.

    Example:
        >>> class Repeat(Loop):
        ...     '''Train on one batch again and again.'''
        ...
        ...     def __init__(self, batch, times):
        ...         self.batch, self.times, self.done = batch, times, 0
        ...
        ...     def run(self, trainer, module):
        ...         while self.done < self.times:
        ...             trainer.step(module, [self.batch])
        ...             self.done += 1
        ...             trainer.between_steps()
        ...
        ...     def state_dict(self):
        ...         return {"done": self.done}
        ...
        ...     def load_state_dict(self, state):
        ...         self.done = state["done"]
    """

    stage: ClassVar[str] = "fit"
    trains: ClassVar[bool] = True

    @abstractmethod
    def run(self, trainer: Trainer, module: LoopModule) -> Any:
        """Do what is left to do, from the state that the loop is in."""

    def state_dict(self) -> dict[str, Any]:
        """The state of the loops nested in this one; a loop with counters adds them."""
        return {name: loop.state_dict() for name, loop in self._nested()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for name, loop in self._nested():
            loop.load_state_dict(state[name])

    def close(self) -> None:
        """Let go of what a run needed, such as the workers of a loader; it may run again."""
        for _, loop in self._nested():
            loop.close()

    def _nested(self) -> Iterator[tuple[str, Loop]]:
        return ((name, value) for name, value in vars(self).items() if isinstance(value, Loop))
