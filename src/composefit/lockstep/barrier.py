"""What an effect may do with all shards of a step at the barrier (`composefit.effects.Barrier`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from composefit.effects import Pull, ShardSize
from composefit.lockstep import gradients, guards, messages
from composefit.lockstep.crossings import Crossing
from composefit.lockstep.gradients import Gradients
from composefit.lockstep.shard import Shard
from composefit.lockstep.streams import ONCE
from composefit.logged import Context
from composefit.losses import Loss
from composefit.random import SampleRandom, Stream, hash_key

if TYPE_CHECKING:
    from composefit.lockstep.driver import Lockstep


class StepBarrier:
    """The verbs of effects, where `Shard` is what an effect sees of one shard.

    Attributes:
        once: what the functions of this step's `Once` log into and draw from; None before them.
    """

    def __init__(self, lock: Lockstep) -> None:
        self.lock = lock
        self.once: Context | None = None
        self._once_stream = Stream()

    @property
    def shards(self) -> Sequence[ShardSize]:
        """The shards of the step, in sample order, those of other ranks too."""
        return self.lock.shards if self.lock.ranks is None else self.lock.ranks.shards

    def cross(self, sources: list[list[Tensor]], leaves: list[list[Tensor]], pull: Pull) -> None:
        """Let gradients flow from all shards' leaves to every shard's sources."""
        of_spare = {
            shard: [v for v in shard.effect.values() if isinstance(v, Tensor) and v.requires_grad]
            for shard in self.lock.shards
            if shard.spare and shard.effect is not None
        }
        self.lock.backward.crossings.append(Crossing(sources, leaves, pull, of_spare))

    def reduce(self, losses: Sequence[Loss | Tensor]) -> Tensor:
        """One loss of each shard, reduced, detached."""
        return self.lock.backward.reduce(losses)

    def gradients(self, key: str, whole: bool = True) -> list[Tensor | None]:
        """The gradients taken under `key`, over all shards, unscaled."""
        lock = self.lock
        found = self._total(key, kept=True)[1]
        if lock.stepper is not None:
            lock.stepper.unscale(key, found)
        return lock.lanes.whole_gradients(found) if whole else found

    def update(
        self,
        losses: dict[str, list[Loss | Tensor]],
        given: Mapping[str, Gradients] | None = None,
        functions: Sequence[str] = (),
    ) -> dict[str, Tensor]:
        """Step the named optimizers with the gradients taken or given; the reduced losses."""
        lock = self.lock
        assert lock.stepper is not None
        given = given or {}
        reduced = {n: lock.backward.reduce(c) for n, c in losses.items() if c[0] is not None}
        totals = {
            name: self._given(name, given[name]) if name in given else self._total(name)
            for name in losses
        }
        for name, (_, found) in totals.items():
            for gradient in found:
                if gradient is not None:
                    break
            else:
                raise messages.no_path(name, lock.body.name)
        again = {n: partial(self._again, n) for n in functions} if functions else None
        if lock.stepper.update(totals, reduced, lock.number, again, given.keys()):
            place = lock.shards[0].place()
            for name, (parameters, _) in totals.items():
                lock.stale.stepped.append(lock.lanes.leaves(parameters))
                lock.history.append((name, place))
        lock.losses.update(reduced)
        return reduced

    def on_owner(self, functions: Sequence[Callable[..., Any]], *args: Tensor) -> Any:
        """Call a function once, on the owner; what it writes all shards see afterwards."""
        lock = self.lock
        replicas = lock.replicas()
        if lock.ranks is not None:
            functions = [functions[shard.index] for shard in lock.shards]
        if replicas:
            functions = [
                replica.owner_of(function)
                for replica, function in zip(replicas, functions, strict=True)
            ]
            guards.refuse_own_tensors(functions)
        state = lock.owner.__dict__
        outer = state.get("_context")
        if lock.is_loop:
            state["_context"] = self._owner_context()
            state["_replica"] = False
        try:
            lock.open_streams()
            with torch.no_grad(), self._once_stream, lock.around_once():
                result = functions[0](*args)
        except StopIteration as stop:
            raise RuntimeError(
                "a function given to Once raised StopIteration (a next() on an iterator that is at "
                "its end?): that would end training in silence"
            ) from stop
        finally:
            if lock.is_loop:
                state["_context"] = outer
        for replica in replicas:
            replica.refresh(within_step=True)
        return result

    def _owner_context(self) -> Context:
        """Logs and draws of the functions that run once, the same for every strategy."""
        lock = self.lock
        if self.once is None:
            random = SampleRandom(hash_key(lock.seed, ONCE))
            random.begin(lock.number, 0, None, None, lock.dtype, lock.device)
            self.once = Context(random, lambda: sum(shard.samples for shard in self.shards))
            self.once.training = lock.body.training
            self._once_stream.seed(hash_key(lock.seed, ONCE, lock.number))
            first = lock.shards[0]
            if first.index == 0 and not first.spare:
                self.once.logs = first.context.logs  # it counts once: for the first shard
        return self.once

    def _given(self, name: str, found: Gradients) -> tuple[list[Parameter], Gradients]:
        """Gradients that the step has made, as our own: clipping writes to them."""
        lanes, parameters = self.lock.lanes, self.lock.parameters(name)
        own = lanes.own_gradients(found, parameters)
        copies = [None if gradient is None else gradient.clone() for gradient in own]
        return parameters, gradients.own(copies, parameters)

    def _again(self, name: str) -> tuple[Tensor, Gradients]:
        """Evaluate a loss that is a function anew, in all shards: the loss and its gradients."""
        lock = self.lock
        effects = [shard.effect for shard in lock.shards]
        # A graph of before that is recomputed would be so with the weights of now.
        lock.stale.stepped.append(lock.lanes.leaves(lock.parameters(name)))
        try:
            with nullcontext() if lock.ranks is None else lock.ranks.back_in():
                lock.each(lambda shard: lock.within_step(shard, shard.evaluate_again, name))
            messages.refuse_disagreement(lock.shards)
            found = lock.everybodys_effects()
            reduced = lock.backward.reduce([effect.loss_of(name) for effect in found])
            return reduced, self._total(name)[1]
        finally:
            for shard, effect in zip(lock.shards, effects, strict=True):
                shard.effect = effect

    def _total(self, key: str, kept: bool = False) -> tuple[list[Parameter], Gradients]:
        backward = self.lock.backward
        if backward.waiting:
            backward.take_waiting(key, self.lock.shards, partial(self._each_shard, key))
        return backward.total(key, kept)

    def _each_shard(self, key: str, function: Callable[[Shard], None]) -> None:
        def visit(shard: Shard) -> None:
            try:
                function(shard)
            except RuntimeError as error:
                explained = guards.explain(error, key, self.lock.history)
                if explained is not error:
                    explained.__cause__ = error
                shard.blame(explained)

        self.lock.each(visit)
