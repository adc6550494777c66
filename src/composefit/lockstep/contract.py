"""What the driver is given: lanes to run shards in, and a body to run in each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from composefit.lockstep.gradients import Gradients
from composefit.ranks import World
from composefit.ranks.reduction import Reducer
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
    def together(self) -> bool:
        """Whether every rank must run as many shards as the others, forward and backward."""

    def session(self) -> AbstractContextManager[object]:
        """Open while steps are run; may be open several times at once."""

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run task i in lane i; returns when all have ended. Tasks raise nothing."""

    def leaves(self, parameters: list[Parameter]) -> list[Parameter]:
        """What stands for these parameters in a graph, to differentiate with respect to."""

    def reducer(self) -> Reducer:
        """What adds up gradients over the ranks, where there are several."""

    def local(self, gradients: list[Tensor]) -> list[Tensor]:
        """This rank's part of total gradients, in the same memory."""

    def agree_found_(self, found: Tensor) -> None:
        """Make a number that is not zero where a gradient is not finite so on every rank."""

    def norm(self, gradients: Sequence[Tensor], order: float = 2.0) -> Tensor:
        """The norm of total gradients together, 0-dim."""

    def clip(self, parameters: list[Parameter], limit: float, algorithm: str | None) -> None:
        """Clip `.grad` of these parameters together."""

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Tensor] | None = None
    ) -> None:
        """Step an optimizer whose parameters have their total gradients.

        `closure` gives its loss, and at each further call loss and gradients anew.
        """

    def whole_gradients(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Total gradients as whole tensors; all ranks must call it."""

    def own_gradients(
        self, gradients: list[Tensor | None], parameters: list[Parameter]
    ) -> list[Tensor | None]:
        """The part of whole gradients that this process steps with."""

    def stepped(self, parameters: list[Parameter]) -> None:
        """These parameters have changed."""

    def end_step(self, module: nn.Module) -> None:
        """A step is over, also after an error."""

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

    def yields(self, module: nn.Module) -> bool:
        """Whether the step is a generator function."""
        return inspect.isgeneratorfunction(inspect.unwrap(self.of(module)))

    @classmethod
    def method(cls, module: nn.Module, name: str, training: bool) -> Body:
        """The body that is a method of the module, `training_step` say."""
        takes = max(1, offered(getattr(module, name), 2 if training else 3))
        return cls(attrgetter(name), takes, name, training)
