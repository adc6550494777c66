"""What the driver is given: lanes to run shards in, and a body to run in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import Parameter

from composefit.lockstep.gradients import Gradients
from composefit.ranks import World
from composefit.steps import offered


class Lanes(Protocol):
    """What the driver needs of a strategy: places, and a way to run a function in each."""

    @property
    def lanes(self) -> int:
        """Into how many shards a batch is cut in space."""

    @property
    def concurrent(self) -> bool:
        """Whether lanes run at the same time."""

    @property
    def device(self) -> torch.device:
        """Where batches and parameters are."""

    @property
    def world(self) -> World | None:
        """The ranks of the job; None where this process is all."""

    @property
    def shares_modules(self) -> bool:
        """Whether modules can have replicas; a lone shard can do without."""

    def session(self) -> AbstractContextManager[object]:
        """Open while steps are run; may be open several times at once."""

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run task i in lane i; returns when all have ended. Tasks raise nothing."""

    def add_up(self, lanes: Sequence[Gradients], parameters: Sequence[Parameter]) -> Gradients:
        """The sum of the lanes' gradients, in their order; may use up the first."""


@dataclass(frozen=True)
class Body:
    """What runs in each shard: the user's step, and whether it trains.

    Attributes:
        of: `of(module or replica)` gives the step.
        takes: how many it declares of: batch, its index, the index of its loader.
        name: its name, for messages.
        training: gradients are on, and what it returns is a loss.
    """

    of: Callable[[nn.Module], Callable[..., Any]]
    takes: int
    name: str
    training: bool

    @classmethod
    def method(cls, module: nn.Module, name: str, training: bool) -> Body:
        """The body that is a method of the module, `training_step` say."""
        takes = max(1, offered(getattr(module, name), 2 if training else 3))
        return cls(attrgetter(name), takes, name, training)
