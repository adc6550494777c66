"""A driver that looks on: when each shard worked, what it yielded, what was done at the barriers.

It runs a step as any other driver does; what it saw of the last one is in `Seen`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from composefit.effects import Effect, Gather, Once, Reduce, kinds
from composefit.explain.keeping import Piece, kept
from composefit.explain.memory import bytes_of
from composefit.lockstep.barrier import StepBarrier
from composefit.lockstep.driver import Lockstep
from composefit.lockstep.gradients import Gradients
from composefit.lockstep.shard import Shard
from composefit.losses import Loss
from composefit.updates import Gradient, Update


@dataclass(slots=True)
class Sight:
    """An effect, as one shard yielded it.

    Attributes:
        effect: its class.
        label: it in a few words.
        file, line, returned: where in the user's code.
        losses: key -> the terms of the loss.
        updates: whether optimizers step.
        shares: bytes of the shard's tensors that all others get.
        answers: bytes of those whose gradients come back with every later update.
        kept: what the step's variables hold.
        held: bytes alive in this process by now; None where nobody counts them.
    """

    effect: str
    label: str
    file: str
    line: int
    returned: bool
    losses: dict[str, str]
    updates: bool
    shares: int
    answers: int
    kept: list[Piece]
    held: int | None


@dataclass(slots=True)
class Stretch:
    """A time in which a shard worked: on its way to an effect, or for one at its barrier."""

    kind: str
    round: int
    start: float
    end: float = 0.0
    gradients: float | None = None  # when it began to take them
    sight: Sight | None = None


@dataclass(slots=True)
class Total:
    """Gradients over all shards, at a barrier."""

    key: str
    round: int
    parameters: list[Parameter]
    reached: int
    bytes: int
    given: bool


@dataclass
class Seen:
    """What was seen of one step; times in seconds.

    Attributes:
        start, ready, end: of the step; `ready` when the first shard began.
        totals: the gradients taken at the barriers, in their order.
        evaluations: (key, round) -> how often a loss was evaluated again.
    """

    start: float = 0.0
    end: float = 0.0
    totals: list[Total] = field(default_factory=list)
    evaluations: dict[tuple[str, int], int] = field(default_factory=dict)


class WatchedShard(Shard):
    """A shard that notes when it works and what it yields."""

    stretches: list[Stretch]
    size: int | None

    @property
    def driver(self) -> WatchedLockstep:
        """Its driver."""
        return cast(WatchedLockstep, self.lock)

    def begin(
        self,
        lane: int,
        batch: Any,
        batch_idx: int,
        samples: int | None,
        index: int = 0,
        spare: bool = False,
    ) -> None:
        """Take the data of a new step, of which nothing was seen yet."""
        super().begin(lane, batch, batch_idx, samples, index, spare)
        self.stretches = []
        self.size = None

    def advance(self) -> None:
        """Go on to the next effect, and look at it."""
        driver = self.driver
        rounds = sum(one.kind == "forward" for one in self.stretches)
        if not rounds:
            self.size = self._count()
        stretch = Stretch("forward", rounds, driver.now())
        self.stretches.append(stretch)
        try:
            super().advance()
        finally:
            stretch.end = driver.now()
        if self.effect is not None:
            stretch.sight = self._look(self.effect)

    def take(
        self, key: str, loss: Loss | Tensor, parameters: list[Parameter], retain_graph: bool
    ) -> None:
        """Take gradients, and note when; after a `Gather` that is at the barrier."""
        if not self.lock.backward.crossings and self.stretches[-1].gradients is None:
            self.stretches[-1].gradients = self.driver.now()
        super().take(key, loss, parameters, retain_graph)

    def _count(self) -> int | None:
        try:
            return self.samples
        except (TypeError, ValueError):  # no step of one shard needs it
            return None

    def _look(self, effect: Effect[Any]) -> Sight:
        code, line = self.place()
        if line is None or code is None:
            function: Any = inspect.unwrap(self.lock.body.of(self.lock.owner))
            code = function.__code__
        losses = {}
        if isinstance(effect, (Update, Gradient)):
            losses = {
                key: "gradients given" if loss is None else " + ".join(kinds(loss))
                for key, loss in effect.losses.items()
            }
        tensors = getattr(effect, "tensors", ()) if isinstance(effect, (Gather, Once)) else ()
        return Sight(
            effect=_kind(effect),
            label=_label(effect),
            file=code.co_filename,
            line=code.co_firstlineno if line is None else line,
            returned=line is None,
            losses=losses,
            updates=isinstance(effect, Update),
            shares=bytes_of(tensors),
            answers=sum(
                t.nbytes for t in tensors if t.requires_grad and isinstance(effect, Gather)
            ),
            kept=kept(self.generator, self.batch) if self.driver.looks_into_variables else [],
            held=self.driver.held(),
        )


class WatchedBarrier(StepBarrier):
    """A barrier that notes which gradients there are."""

    @property
    def driver(self) -> WatchedLockstep:
        """Its driver."""
        return cast(WatchedLockstep, self.lock)

    def _total(self, key: str, kept: bool = False) -> tuple[list[Parameter], Gradients]:
        parameters, found = super()._total(key, kept)
        self._note(key, parameters, found, False)
        return parameters, found

    def _given(self, name: str, found: Gradients) -> tuple[list[Parameter], Gradients]:
        parameters, own = super()._given(name, found)
        self._note(name, parameters, own, True)
        return parameters, own

    def _again(self, name: str) -> tuple[Tensor, Gradients]:
        driver = self.driver
        key = name, driver.round
        driver.seen.evaluations[key] = driver.seen.evaluations.get(key, 0) + 1
        driver.at_barrier = "evaluation"
        try:
            return super()._again(name)
        finally:
            driver.at_barrier = "backward"

    def _note(self, key: str, parameters: list[Parameter], found: Gradients, given: bool) -> None:
        driver = self.driver
        if any(one.key == key and one.round == driver.round for one in driver.seen.totals):
            return  # evaluated again
        present = [gradient for gradient in found if gradient is not None]
        size = bytes_of(present)
        total = Total(key, driver.round, list(parameters), len(present), size, given)
        driver.seen.totals.append(total)


class WatchedLockstep(Lockstep):
    """Runs steps as every driver does, and looks on.

    Attributes:
        seen: what was seen of the last step.
        looks_into_variables: whether it asks what a step keeps across its yields, which takes time.
        held: the bytes alive in this process.
        at_barrier: what shards do at barriers.
    """

    shard_class = WatchedShard
    looks_into_variables = False

    def __init__(self, module: nn.Module, *arguments: Any, **named: Any) -> None:
        self.seen = Seen()
        self.at_barrier = "backward"
        self.held: Callable[[], int | None] = lambda: None
        super().__init__(module, *arguments, **named)
        self.barrier = WatchedBarrier(self)

    @property
    def watched(self) -> Sequence[WatchedShard]:
        """The shards of the step."""
        return cast("Sequence[WatchedShard]", self.shards)

    @property
    def round(self) -> int:
        """The place of the effect at which the shards are."""
        return sum(one.kind == "forward" for one in self.watched[0].stretches) - 1

    def now(self) -> float:
        """The time, when the device has done what it was told."""
        if self.device_type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def step(self, batches: Sequence[Any], batch_idx: int, number: int) -> list[Shard]:
        """As it is, looking on."""
        self.seen = Seen(start=self.now())
        try:
            return super().step(batches, batch_idx, number)
        finally:
            self.seen.end = self.now()

    def each(self, function: Callable[[Shard], None]) -> None:
        """As it is, noting what shards do at a barrier."""

        def noted(shard: Shard) -> None:
            assert isinstance(shard, WatchedShard)
            before = len(shard.stretches)
            stretch = Stretch(self.at_barrier, self.round, self.now())
            if self.at_barrier == "evaluation":
                shard.stretches.append(stretch)
            function(shard)
            if self.at_barrier == "backward" and len(shard.stretches) == before:
                shard.stretches.append(stretch)
            stretch.end = self.now()

        super().each(noted)


def _kind(effect: Effect[Any]) -> str:
    return "Update" if isinstance(effect, Update) else type(effect).__name__


def _label(effect: Effect[Any]) -> str:
    if isinstance(effect, Update):
        return ", ".join(effect.losses)
    if isinstance(effect, Gradient):
        return f"Gradient {', '.join(map(str, effect.losses))}"
    if isinstance(effect, Gather):
        return "Gather " + ", ".join(str(tuple(t.shape)) for t in effect.tensors)
    if isinstance(effect, Once):
        name = getattr(effect.function, "__qualname__", type(effect.function).__name__)
        return f"Once {name.rpartition('.')[2]}"
    if isinstance(effect, Reduce):
        return " + ".join({"mean": "Mean", "sum": "Sum"}.get(k, k) for k in kinds(effect.loss))
    return repr(effect)[:60]
