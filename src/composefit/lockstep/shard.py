"""A shard: the part of one step's data that runs through the user's step once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import GeneratorType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from composefit.effects import Effect
from composefit.lockstep import guards
from composefit.lockstep.guards import Place
from composefit.lockstep.rewinding import Beginning, Function
from composefit.logged import Context
from composefit.losses import Loss
from composefit.random import SampleRandom
from composefit.replicas import Replica
from composefit.steps import ONLY, Helper, as_effect, dropped_helper, watch_helpers
from composefit.updates import Update

if TYPE_CHECKING:
    from composefit.lockstep.driver import Lockstep
    from composefit.lockstep.ranked import Ranks

_EFFECT_CODES = {Effect.__iter__.__code__, Loss.__iter__.__code__}


class Shard:
    """Runs one part of the data through the step, from yield to yield, always in the same worker.

    Kept from step to step, with its replica and its random stream; `begin` gives it its data.

    Attributes:
        index: its place in sample order, over all ranks.
        lane: the worker it lives on.
        module: the module itself where it is the only shard, else a replica.
        effect: what it yielded last; None once it has ended.
        done: no further effect will come (a returned loss is both an effect and the end).
        result: what goes back into the step at its next resume.
        spare: its samples are another rank's: it takes part, and counts for nothing. It sees what
            the first shard of all sees.
        meets: the ranks that are told of each effect at once, where it is the only shard here.
        functions: the losses of the last update that can be evaluated again, if any.
        start: where the whole step began, where it may be run again.
    """

    def __init__(
        self,
        lock: Lockstep,
        index: int,
        module: nn.Module,
        replica: Replica | None,
        context: Context,
        random: SampleRandom,
        draws: AbstractContextManager[object] | None,
    ) -> None:
        self.lock = lock
        self.index = index
        self.meets: Ranks | None = None
        self.module = module
        self.replica = replica
        self.context = context
        context.samples = lambda: self.samples
        self.random = random
        self.draws = draws
        self.lane = 0
        self.functions: dict[str, Function] | None = None
        self.start: Beginning | None = None
        self.begin(0, None, 0, None, index)

    def begin(
        self,
        lane: int,
        batch: Any,
        batch_idx: int,
        samples: int | None,
        index: int = 0,
        spare: bool = False,
    ) -> None:
        """Take the data of a new step."""
        self.index = index
        self.spare = spare
        self.step = object()  # that of this shard, to be told from others
        self.lane = lane
        self.batch = batch
        self.batch_idx = batch_idx
        self.known_samples = samples
        self.generator: GeneratorType[Any, Any, Any] | None = None
        self.done = False
        self.result: Any = None
        self.output: Any = None
        self.effect: Effect[Any] | None = None
        self.error: BaseException | None = None
        self.thread = "MainThread"

    @property
    def samples(self) -> int:
        """How many samples it holds; asked of the batch only when somebody wants to know."""
        if self.known_samples is None:
            self.known_samples = self.lock.batch_size(self.batch)
        return self.known_samples

    def owners(self, part: Any) -> Any:
        """The owner's module (a metric, say) or method for one of this shard's replica."""
        return part if self.replica is None else self.replica.owner_of(part)

    # -- running the user's code ---------------------------------------------------------------

    def advance(self) -> None:
        """Resume the step to its next effect, and do the shard's own part of that effect."""
        lock = self.lock
        training = lock.body.training
        returned = False
        if lock.has_helpers:
            watch_helpers(self.step)
        # Entered by hand: most steps need neither, and an idle `with` costs a microsecond.
        draws, autocast = self.draws, lock.autocast()
        if draws is not None:
            draws.__enter__()
        if autocast is not None:
            autocast.__enter__()
        try:
            torch._C._set_grad_enabled(training)
            before = lock.modes()
            try:
                if self.generator is not None:
                    value = self.generator.send(self.result)
                else:
                    if lock.reruns:
                        self.start = Beginning(self)
                    step = lock.body.of(self.module)
                    takes_batch_alone = lock.body.takes == 1
                    value = step(self.batch) if takes_batch_alone else step(*self._arguments())
                    if type(value) is Helper:
                        value = iter(value)
                    if type(value) is GeneratorType:
                        self.generator = value
                        value = value.send(None)
                    else:
                        returned = True
            except StopIteration as stop:
                if self.generator is None:
                    raise _stray(lock.body.name, stop) from stop
                returned = True
                value = stop.value
            except RuntimeError as error:
                # What Python makes of a StopIteration within a generator.
                stray = error.__cause__
                if isinstance(stray, StopIteration) and self.generator is not None:
                    raise _stray(lock.body.name, stray) from stray
                raise
            self.result = None
            after = lock.modes()
            if after != before:
                self.blame(guards.left_open(before, after))
        finally:
            if autocast is not None:
                autocast.__exit__(None, None, None)
            if draws is not None:
                draws.__exit__(None, None, None)
        helper = dropped_helper() if lock.has_helpers else None
        if helper is not None:
            self.blame(
                RuntimeError(
                    f"{helper}() is a generator and does nothing when called: write "
                    f"`yield from self.{helper.rpartition('.')[2]}(...)`"
                )
            )
        try:
            if returned:
                self.done = True
                self.generator = None
                if not training:
                    self.effect = None
                    self.output = value
                    return
            effect = self.effect = as_effect(value, returned)
            del value  # of a returned loss nothing but its gradient is to stay
            if effect is not None:
                lock.check(effect, self)
                if self.meets is not None:
                    self.meets.meet([effect])
                effect.visit(self)
        except Exception as error:
            self.blame(error)

    def _arguments(self) -> tuple[Any, ...]:
        """As many as the step declares."""
        return (self.batch, self.batch_idx, self.lock.dataloader_idx)[: self.lock.body.takes]

    def once_more(self, name: str) -> Callable[[], Any]:
        """A function that runs a step which returns its loss again, and gives the loss."""
        start = self.start
        assert start is not None

        def loss() -> Any:
            self.batch = start.batch()
            effect = as_effect(self.lock.body.of(self.module)(*self._arguments()), True)
            losses = effect.losses if isinstance(effect, Update) else {}
            return losses.get(name, losses.get(ONLY))

        return loss

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function as a part of the step: with its grad mode, autocast and streams."""
        lock = self.lock
        enabled = torch.is_grad_enabled()
        with self.draws or nullcontext(), lock.autocast() or nullcontext():
            torch._C._set_grad_enabled(lock.body.training)
            before = lock.modes()
            try:
                value = function()
            except StopIteration as stop:
                raise _stray("a loss function", stop) from stop
            finally:
                after = lock.modes()
                torch._C._set_grad_enabled(enabled)
        if after != before:
            raise guards.left_open(before, after)
        if isinstance(value, (GeneratorType, Helper)):
            raise TypeError(
                "a loss function yields, and nobody would see its effects: yield before the update "
                "what the loss needs of other shards, and let the function return a loss"
            )
        return value

    def evaluate_again(self, name: str) -> None:
        """Take the gradients of a loss that is a function anew."""
        assert self.functions is not None
        function = self.functions[name]
        try:
            effect = self.effect = Update({name: function.again()})
            effect.functions = {name: function}  # it is asked again: what it shares must live
            if self.meets is not None:
                self.meets.meet([effect])
            effect.visit(self)
        except Exception as error:
            explained = guards.explain_again(error, name, self.place())
            if explained is not error:
                explained.__cause__ = error
            self.blame(explained)

    def blame(self, error: BaseException) -> None:
        """Raise an error with the user's yield in its traceback, by throwing it in there."""
        if self.generator is not None and not self.done:
            try:
                self.generator.throw(error)
            except BaseException as thrown:
                if thrown is error:
                    raise
        raise error

    def close(self) -> None:
        """End the step's code, in its own worker, so that its `with` and `finally` blocks run.

        What they raise is kept in `error`: it must not hide the fault that ended the step.
        """
        self.effect = self.result = None
        self.batch = self.start = self.functions = None
        if self.generator is not None:
            generator, self.generator = self.generator, None
            torch._C._set_grad_enabled(self.lock.body.training)
            try:
                generator.close()
            except BaseException as error:
                self.error = error

    def place(self) -> Place:
        """Where in the user's code it stands: the code and line of its yield."""
        generator = self.generator
        if generator is None:
            function = self.lock.body.of(self.lock.owner)
            return getattr(function, "__code__", None), None
        while type(inner := generator.gi_yieldfrom) is GeneratorType:
            if inner.gi_code in _EFFECT_CODES:
                break
            generator = inner
        frame = generator.gi_frame
        return generator.gi_code, frame.f_lineno if frame is not None else None

    def where(self) -> str:
        """The same in words."""
        return guards.in_words(self.place())

    # -- gradients -----------------------------------------------------------------------------

    def parameters(self, name: str) -> list[Parameter]:
        """The trainable parameters of a named optimizer."""
        return self.lock.parameters(name)

    def take(
        self, key: str, loss: Loss | Tensor, parameters: list[Parameter], retain_graph: bool
    ) -> None:
        """Take this shard's gradients of a loss (see `Backward.take`)."""
        try:
            self.lock.backward.take(self, key, loss, parameters, retain_graph)
        except RuntimeError as error:
            explained = guards.explain(error, key, self.lock.history)
            if explained is error:
                raise
            raise explained from error


def _stray(name: str, stop: StopIteration) -> RuntimeError:
    """The error for a StopIteration of the user's code, at the user's line."""
    error = RuntimeError(
        f"{name} raised StopIteration (a next() on an iterator that is at its end?), which would "
        "end training in silence: write next(iterator, default), or catch it"
    )
    return error.with_traceback(stop.__traceback__)
