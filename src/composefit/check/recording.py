"""One step as it would be, but that no optimizer steps: what gradients it takes, and of what."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from composefit.check.cutting import Scatter
from composefit.check.dropout import without_dropout
from composefit.check.state import Written, written
from composefit.check.trace import CLASS_WEIGHTS, RATIO, TOKENS, Event, Trace
from composefit.effects import Once
from composefit.lockstep.contract import Body, Lanes
from composefit.lockstep.driver import Lockstep
from composefit.lockstep.gradients import Gradients
from composefit.lockstep.scatter import Part
from composefit.lockstep.shard import Shard
from composefit.lockstep.stepper import Again, Stepper
from composefit.losses import Loss, Term, as_loss
from composefit.module import LoopModule
from composefit.optimizers import NamedOptimizer
from composefit.precision import Precision
from composefit.random import GlobalGenerators

#: Makes what follows the first shard: of its module, batch and samples.
Tracer = Callable[[nn.Module, Any, int], Trace]


class Recorder(Stepper):
    """Keeps the total gradients of each update and steps nothing.

    All gradients of a step are then at the weights it began with, and two runs of it can be
    compared, whatever its optimizers make of small differences.

    Attributes:
        gradients: name -> those of each of its updates, in the order of its parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Mapping[str, NamedOptimizer],
        precision: Precision,
        lanes: Lanes,
    ) -> None:
        super().__init__(module, optimizers, precision, lanes, lanes.optimizer_step)
        self.gradients: dict[str, list[Gradients]] = {name: [] for name in optimizers}

    def update(
        self,
        totals: dict[str, tuple[list[Parameter], Gradients]],
        losses: dict[str, Tensor],
        step: int,
        again: Mapping[str, Again] | None = None,
        given: Collection[str] = (),
    ) -> bool:
        """Keep the gradients; False, since no weight has changed."""
        for name, (_, found) in totals.items():
            self.gradients[name].append(list(found))
        return False


class Taken(NamedTuple):
    """A loss of one shard whose gradients were taken.

    Attributes:
        key: the optimizer, or a key of `Gradient`.
        terms: total and weight of each; the weight of a mean over samples is None.
        events: what its value depends on, if the shard was traced.
    """

    key: str
    terms: list[tuple[float, float | None]]
    events: list[Event]


class RecordingShard(Shard):
    """A shard that tells what its losses were, and may be traced.

    Attributes:
        taken: the losses whose gradients were taken, in order.
        written: attributes that its step has set outside of `Once`, where that is watched.
        drew: it drew from Python's or NumPy's global generator.
        watched: the module whose attributes are looked at, or None.
        trace: follows its samples, or None.
    """

    watched: nn.Module | None = None
    trace: Trace | None = None

    def begin(self, *args: Any, **kwargs: Any) -> None:
        """As a shard's."""
        self.taken: list[Taken] = []
        self.written: list[Written] = []
        self.drew = False
        self.trace = None
        super().begin(*args, **kwargs)

    def advance(self) -> None:
        """As a shard's, watched."""
        generators = GlobalGenerators()
        before = generators.fingerprint()
        with self._traced(), written(self.watched, self.written):
            super().advance()
        self.drew = self.drew or generators.fingerprint() != before

    @contextmanager
    def _traced(self) -> Iterator[None]:
        if self.trace is None:
            yield
            return
        if self.effect is not None and self.result is not None:
            sources = [value for value in self.effect.values() if isinstance(value, Tensor)]
            rows = isinstance(self.effect, Once) and self.effect.rows
            self.trace.receive(self.result, sources, rows)
        with self.trace:
            yield

    def take(
        self, key: str, loss: Loss | Tensor, parameters: list[Parameter], retain_graph: bool
    ) -> None:
        """Take this shard's gradients, and note of what."""
        trace = self.trace
        with nullcontext() if trace is None else trace.resting():
            terms = as_loss(loss, "the loss").terms
            found = [] if trace is None else [e for t in terms for e in _events(trace, t)]
            self.taken.append(Taken(key, list(map(_numbers, terms)), list(dict.fromkeys(found))))
            super().take(key, loss, parameters, retain_graph)


def _numbers(term: Term) -> tuple[float, float | None]:
    return float(term.total), None if term.weight is None else float(term.weight)


def _events(trace: Trace, term: Term) -> list[Event]:
    found = trace.of(term.total)
    if term.weight is None:
        return found
    # `Mean.of` takes a mean over tokens times their number.
    return [event for event in found if event.kind not in (CLASS_WEIGHTS, RATIO, TOKENS)]


class _Driver(Lockstep):
    """Runs recording shards."""

    shard_class = RecordingShard
    watched: nn.Module | None = None
    tracer: Tracer | None = None

    def _begin_alone(self, part: Part) -> None:
        super()._begin_alone(part)
        cast(RecordingShard, self.shards[0]).watched = self.watched

    def _begin_many(self, parts: list[Part]) -> None:
        super()._begin_many(parts)
        if self.tracer is not None:
            first = cast(RecordingShard, self.shards[0])
            first.trace = self.tracer(first.module, first.batch, first.samples)
            first.trace.trust(first.random.shared)


class Recording(NamedTuple):
    """What one run of a step was.

    Attributes:
        module: whose step it was.
        parameters: name -> those of the optimizer.
        gradients: name -> the total gradients of each of its updates, in their order.
        shards: those of the step.
        error: what it raised, or None.
    """

    module: LoopModule
    parameters: dict[str, list[Parameter]]
    gradients: dict[str, list[Gradients]]
    shards: list[RecordingShard]
    error: Exception | None


def record(
    module: LoopModule,
    optimizers: Mapping[str, NamedOptimizer],
    batch: Any,
    lanes: Lanes,
    *,
    precision: Precision,
    seed: int = 0,
    scatter: Scatter | None = None,
    watched: bool = False,
    tracer: Tracer | None = None,
) -> Recording:
    """Run one step of a module that may be spoiled, dropout off.

    Args:
        module: a copy.
        optimizers: of its parameters; they are not stepped.
        batch: a copy.
        lanes: the strategy.
        precision: what the batch is cast to.
        seed: of random streams and of the global generators.
        scatter: cuts the batch; None leaves it whole.
        watched: note which attributes the step sets.
        tracer: makes what follows the first of several shards.

    Returns:
        What happened, an `Exception` of the step among it.
    """
    recorder = Recorder(module, optimizers, precision, lanes)
    body = Body.method(module, "training_step", training=True)
    driver = _Driver(module, lanes, body, precision, recorder, seed=seed)
    driver.watched = module if watched else None
    driver.tracer = tracer
    if scatter is not None:
        driver.scatter = scatter
    error: Exception | None = None
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        with without_dropout(module):
            driver.step([batch], 0, 0)
    except Exception as raised:
        error = raised
    parameters = {name: one.parameters() for name, one in optimizers.items()}
    shards = cast("list[RecordingShard]", driver.shards)
    return Recording(module, parameters, recorder.gradients, shards, error)
