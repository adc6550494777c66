"""The lockstep driver: shards advance together from yield to yield.

step(batches):
    shards = scatter(batches)                 # over workers and over time
    while some shard has a next effect:
        advance every shard to its next effect
        all must agree on it
        combine: an update adds up the shards' gradients, checks, unscales, clips, steps
        each shard gets its result
    merge what the shards did to buffers
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from composefit.effects import Effect
from composefit.lockstep import guards, messages
from composefit.lockstep.backward import Backward
from composefit.lockstep.barrier import StepBarrier
from composefit.lockstep.contract import Body, Lanes
from composefit.lockstep.guards import Place
from composefit.lockstep.ranked import Ranks
from composefit.lockstep.rewinding import Function
from composefit.lockstep.scatter import Part, batch_size, scatter
from composefit.lockstep.shard import Shard
from composefit.lockstep.stepper import Stepper
from composefit.lockstep.streams import ONCE, SHARD, DefaultGenerators
from composefit.logged import Context
from composefit.losses import Loss
from composefit.module import LoopModule, has_helpers
from composefit.precision import Precision
from composefit.random import (
    GlobalGenerators,
    SampleRandom,
    Stream,
    exchange_guard,
    hash_key,
    recomputation,
    thread_local_generators,
)
from composefit.replicas import Replica, differing_buffer, merge
from composefit.steps import ONLY, unknown_optimizer
from composefit.tree import move
from composefit.updates import Gradient, Update


class Lockstep:
    """Runs steps of one module under one strategy.

    Args:
        module: the owner.
        lanes: the strategy.
        body: what a shard runs.
        precision: casts batches, and the autocast context.
        stepper: steps optimizers; None where the body updates nothing.
        microbatch: no shard holds more samples than this.
        seed: of every random stream.

    Attributes:
        scatter: cuts a loader's batch: `scatter(module, batch, batch_idx, lanes, microbatch)`.
        shard_class: of the shards.
        reruns: a step that returns its loss may be run again by an optimizer that asks for it.
    """

    shard_class = Shard

    def __init__(
        self,
        module: nn.Module,
        lanes: Lanes,
        body: Body,
        precision: Precision,
        stepper: Stepper | None = None,
        microbatch: int | None = None,
        seed: int = 0,
    ) -> None:
        self.owner = module
        self.lanes = lanes
        self.body = body
        self.stepper = stepper
        self.precision = precision
        self.microbatch = microbatch
        self.scatter: Callable[[nn.Module, Any, int, int, int | None], list[Part]] = scatter
        self.seed = seed
        self.device = lanes.device
        self.device_type = self.device.type
        self.modes = guards.reader_of_modes(self.device_type)
        self.dtype = next(
            (p.dtype for p in module.parameters() if p.is_floating_point()),
            torch.get_default_dtype(),
        )
        self.backward = Backward(lanes, self.scale_of)
        self.stale = guards.StaleWeights()
        self.barrier = StepBarrier(self)
        world = lanes.world
        self.ranks = None if world is None else Ranks(self, world)
        self.backward.ranks = self.ranks
        self.is_loop = isinstance(module, LoopModule)
        self.reruns = stepper is not None and stepper.asks_again and not body.yields(module)
        self.has_helpers = has_helpers(module)
        self.number = 0
        self.dataloader_idx = 0
        self.around_once: Callable[[], AbstractContextManager[object]] = nullcontext
        self.log_suffix = ""  # where several loaders are evaluated
        self.history: list[tuple[str, Place]] = []
        self.losses: dict[str, Tensor] = {}
        self.shards: list[Shard] = []
        self._failed: list[tuple[Shard, BaseException]] = []
        self._first = True  # no step of several shards was done yet
        self._foreign_means: list[str] = []
        self._alone = self._shard(0, alone=True)
        self._many: list[Shard] = []
        self._lists: dict[str, list[Parameter]] = {}
        self._generators = GlobalGenerators()
        self._fingerprint: object = None
        self._side_by_side = False
        self._ambient = guards.Ambient(self.device_type)
        self._caller = 0
        self._outer_context: Context | None = None
        self._key = hash_key(seed, SHARD)
        self._default_generators = DefaultGenerators(self.device)
        self._open: ExitStack | None = None
        self._streams_open = False
        self._running = False
        self._parameters: list[Parameter] = []
        self._versions: list[int] = []

    def _shard(self, index: int, alone: bool) -> Shard:
        random = SampleRandom(self.seed)
        context = Context(random)
        context.training = self.body.training
        if alone:
            return self.shard_class(self, index, self.owner, None, context, random, None)
        own = {"_context": context, "_replica": True} if self.is_loop else None
        replica = Replica(self.owner, own)
        return self.shard_class(self, index, replica.module, replica, context, random, Stream())

    def seed_anew(self, seed: int) -> None:
        """Let random streams follow from another seed from now on."""
        self.seed = seed
        self._key = hash_key(seed, SHARD)
        for shard in (self._alone, *self._many):
            shard.random.seed_anew(seed)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Keep workers and patches of torch's random kernels for many steps."""
        with ExitStack() as stack:
            stack.enter_context(self.lanes.session())
            if self.body.training:  # an evaluation's guard would stand in a training's way
                stack.enter_context(recomputation(self.stale))
            self._open = stack
            try:
                yield
            finally:
                self._open = None
                self._streams_open = False

    # -- a step --------------------------------------------------------------------------------

    def step(self, batches: Sequence[Any], batch_idx: int, number: int) -> list[Shard]:
        """Run one step over these loader batches.

        Args:
            batches: the loader batches of the step, each cut by itself.
            batch_idx: the index of the first.
            number: the number of the step, for random streams and messages.

        Returns:
            The shards, with what they logged and returned, until the next step.

        Raises:
            Whatever the user's code raises, with a note of the shard, effect and step.
        """
        if self._open is None:
            with self.session():
                return self.step(batches, batch_idx, number)
        if self._running:
            raise RuntimeError(
                f"{self.body.name} was called from within itself: a step that runs cannot start "
                "another one of the same module and strategy"
            )
        enabled = torch.is_grad_enabled()
        self._running = True
        try:
            self._begin(batches, batch_idx, number)
            shards = self.shards
            alone = len(shards) == 1
            ranks = self.ranks
            while True:
                if alone:
                    if ranks is None:
                        shards[0].advance()
                    else:
                        self.within_step(shards[0], shards[0].advance)
                    effect = shards[0].effect
                else:
                    self.each(_advance)
                    effect = self._agreed()
                if effect is None:
                    break
                if ranks is None:
                    results = effect.combine(self.barrier, [shard.effect for shard in shards])
                else:
                    results = self._combine_over(ranks, effect, alone)
                if not alone:
                    self._look_again()
                for shard, result in zip(shards, results, strict=True):
                    shard.result = result
                if shards[0].done and (alone or all(shard.done for shard in shards)):
                    break
            if not alone:
                self._merge()
                self._first = False
            if ranks is not None:
                ranks.end()
        except BaseException as error:
            self._surface(error)
            raise
        finally:
            self._end()
            self._running = False
            torch._C._set_grad_enabled(enabled)
        return shards if ranks is None else [shard for shard in shards if not shard.spare]

    def within_step(self, shard: Shard, run: Callable[..., None], *args: Any) -> None:
        """Run the step's code: a rank's only shard is on the module itself, yet one of several."""
        state = self.owner.__dict__
        guarded = self.ranks is not None and self.is_loop and shard.replica is None
        if guarded:
            state["_replica"] = True
        try:
            run(*args)
        finally:
            if guarded:
                state["_replica"] = False

    def _combine_over(self, ranks: Ranks, effect: Effect[Any], alone: bool) -> list[Any]:
        """Combine with the shards of the other ranks; the results of those that are here."""
        if not alone:
            self._meet(ranks)
        elif self._foreign_means:
            messages.warn_of_foreign_mean(self._foreign_means[0], self.shards)
            self._foreign_means.clear()
        self._first = False
        everybodys = ranks.effects()
        with ranks.at_barrier():
            results = effect.combine(self.barrier, everybodys)
        return [results[shard.index] for shard in self.shards]

    def _meet(self, ranks: Ranks) -> None:
        """Tell the other ranks what the shards here have yielded."""
        ranks.meet([shard.effect for shard in self.shards if shard.effect is not None])

    def everybodys_effects(self) -> list[Effect[Any]]:
        """What all shards yielded, here and on other ranks, in sample order."""
        if self.ranks is None:
            return [shard.effect for shard in self.shards if shard.effect is not None]
        if self.shards[0].meets is None:
            self._meet(self.ranks)
        return self.ranks.effects()

    def _begin(self, batches: Sequence[Any], batch_idx: int, number: int) -> None:
        if self.body.training and torch.is_inference_mode_enabled():
            raise RuntimeError("a training step was called within torch.inference_mode(): leave it")
        self.number = number
        self.shards = []
        self.losses = {}
        self.history.clear()
        self._failed.clear()
        if self.ranks is not None:
            self._begin_ranked(self.ranks, batches, batch_idx)
            return
        parts: list[Part] = []
        for i, batch in enumerate(batches, start=batch_idx):
            try:
                batch = move(batch, self.device, self.precision.dtype)
                parts += self.scatter(self.owner, batch, i, self.lanes.lanes, self.microbatch)
            except Exception as error:
                messages.note(
                    error, f"step {number}, batch {i}, while it was moved and cut into shards"
                )
                raise
        if len(parts) == 1:
            self._begin_alone(parts[0])
        else:
            self._begin_many(parts)

    def _begin_ranked(self, ranks: Ranks, batches: Sequence[Any], first: int) -> None:
        """The same, with this rank's part of each batch."""
        try:
            parts = ranks.scatter(batches, first)
        except Exception as error:
            messages.note(error, f"step {self.number}, while its batches were cut into shards")
            raise
        # The same on all ranks: it decides in which order gradients are sent.
        self.backward.lone = max(ranks.counts) == 1
        ranks.buffers.begin(self.body.training)
        if len(parts) == 1 and not ranks.spare:
            self._begin_lone(ranks, parts[0])
        else:  # what a shard without samples does to its module must not stay
            self._begin_many(parts)
            self.shards[0].meets = ranks if len(parts) == 1 else None

    def _begin_lone(self, ranks: Ranks, part: Part) -> None:
        """A rank's only shard: on the module itself, with a stream of its own for its draws."""
        self.open_streams()
        shard = self._alone
        if shard.draws is None:
            shard.draws = Stream()
        (place,) = ranks.own
        sizes = [one.samples for one in ranks.shards]
        self.backward.begin(sizes)
        assert part.samples is not None
        start, world = sum(sizes[:place]), sum(sizes)
        shard.begin(0, part.batch, part.batch_idx, part.samples, place)
        shard.context.logs = {}
        shard.context.suffix = self.log_suffix
        stop = start + part.samples
        shard.random.begin(self.number, start, stop, world, self.dtype, self.device)
        assert isinstance(shard.draws, Stream)
        shard.draws.seed(hash_key(self._key, self.number, place))
        if self.is_loop:
            state = self.owner.__dict__
            self._outer_context = state["_context"]
            state["_context"] = shard.context
        self._default_generators.lend(hash_key(self._key, self.number, ONCE))
        shard.meets = ranks
        self.shards = [shard]

    def _begin_alone(self, part: Part) -> None:
        shard = self._alone
        self.shards = [shard]
        shard.begin(0, part.batch, part.batch_idx, part.samples)
        shard.context.logs = {}
        shard.context.suffix = self.log_suffix
        shard.random.begin(self.number, 0, None, None, self.dtype, self.device)
        if self.is_loop:
            state = self.owner.__dict__
            self._outer_context = state["_context"]
            state["_context"] = shard.context
        self.backward.begin_alone()
        self._default_generators.lend((self._key + self.number) % 2**64)

    def _begin_many(self, parts: list[Part]) -> None:
        self.open_streams()
        while len(self._many) < len(parts):
            self._many.append(self._shard(len(self._many), alone=False))
        self._caller = threading.get_ident()
        self._ambient = guards.Ambient(self.device_type)
        sizes = [
            part.samples if part.samples is not None else batch_size(self.owner, part.batch)
            for part in parts
        ]
        places: Sequence[int] = range(len(parts))
        everywhere = sizes
        if self.ranks is not None:
            places = self.ranks.own
            everywhere = [one.samples for one in self.ranks.shards]
        self.backward.begin(everywhere)
        shards = self._many[: len(parts)]
        world = sum(everywhere)
        starts = list(accumulate(everywhere, initial=0))
        for shard, part, size, place in zip(shards, parts, sizes, places, strict=True):
            start = starts[place]
            shard.begin(part.lane, part.batch, part.batch_idx, size, place, part.spare)
            assert shard.replica is not None
            shard.replica.refresh()
            shard.context.logs = {}
            shard.context.suffix = self.log_suffix
            shard.random.begin(self.number, start, start + size, world, self.dtype, self.device)
            assert isinstance(shard.draws, Stream)
            shard.draws.seed(hash_key(self._key, self.number, place))
        lanes_used = {part.lane for part in parts}
        self._side_by_side = self.lanes.concurrent and len(lanes_used) > 1
        self._parameters = list(self.owner.parameters()) if self.body.training else []
        self._look_again()
        # Hooks and other code at the barriers draw from the default generator, as in the loader's
        # thread: it is lent to the step, so that the order of samples does not depend on them.
        self._default_generators.lend(hash_key(self._key, self.number, ONCE))
        self.shards = shards

    def _look_again(self) -> None:
        """Take note of what may change at the barriers only: by updates, hooks and `Once`."""
        self._versions = [parameter._version for parameter in self._parameters]
        self._fingerprint = self._generators.fingerprint() if self._side_by_side else None

    def open_streams(self) -> None:
        """Give torch's kernels a stream for each thread, once somebody needs it."""
        if not self._streams_open:
            assert self._open is not None
            self._open.enter_context(thread_local_generators())
            self._streams_open = True

    def _end(self) -> None:
        shards = self.shards
        if len(shards) == 1 and self.is_loop and shards[0].replica is None:
            self.owner.__dict__["_context"] = self._outer_context
        self._default_generators.put_back()
        self._parameters = []
        for shard in shards:
            shard.close()
        self.barrier.once = None
        self.lanes.end_step(self.owner)
        self._failed.clear()
        self._lists.clear()
        self.backward.end()
        self.stale.stepped.clear()

    def _surface(self, error: BaseException) -> None:
        """What an error needs to speak for itself: the user's line in its traceback, and notes."""
        shards = self.shards
        if not shards:
            return
        failed = self._failed or [(shards[0], error)]
        updates = self.stepper.updates if self.stepper else {}
        note = messages.shard_note(failed[0][0], self.number, updates)
        if not self._failed and isinstance(error, Exception):  # raised at the barrier
            with suppress(Exception):
                shards[0].blame(error)
        messages.note(error, note)
        for hint in guards.hints(error, shards, self.microbatch):
            messages.note(error, hint)
        for beside in messages.raised_as_well(error, failed[1:]):
            messages.note(error, beside)
        if len(shards) == 1:
            shards[0].close()
        elif any(shard.generator is not None for shard in shards):
            self._each(Shard.close)
        for shard in shards:
            if shard.error is not None:
                messages.note(error, f"closing shard {shard.index} raised {shard.error!r}")
                shard.error = None

    @property
    def samples(self) -> int:
        """The samples of the step that was run last, over all ranks, where there are several."""
        return self.backward.total_samples

    # -- shards --------------------------------------------------------------------------------

    def each(self, function: Callable[[Shard], None]) -> None:
        """Run a function for every shard in its worker; raise the first shard's error."""
        self._each(function)
        failed = [shard for shard in self.shards if shard.error is not None]
        if not failed:
            return
        # Ctrl-C and the like before errors: they were meant for everybody.
        failed.sort(key=lambda shard: isinstance(shard.error, Exception))
        for shard in failed:
            error, shard.error = shard.error, None
            assert error is not None
            self._failed.append((shard, error))
        raise self._failed[0][1]

    def _each(self, function: Callable[[Shard], None]) -> None:
        lanes: dict[int, list[Shard]] = {}
        for shard in self.shards:
            lanes.setdefault(shard.lane, []).append(shard)

        def task(lane: int) -> Callable[[], None]:
            own = lanes.get(lane, [])
            return lambda: self._visit(own, function)

        self.lanes.run([task(lane) for lane in range(max(lanes) + 1)])

    def _visit(self, shards: list[Shard], function: Callable[[Shard], None]) -> None:
        """In a lane: the shards that live there, one after another."""
        with self._carried():
            for shard in shards:
                try:
                    function(shard)
                except BaseException as error:
                    shard.error = error
                    shard.thread = threading.current_thread().name
                    break

    @contextmanager
    def _carried(self) -> Iterator[None]:
        """The caller's modes and its guard, in a worker's thread."""
        if threading.get_ident() == self._caller:
            yield
            return
        outer = exchange_guard(self.stale)
        try:
            with self._ambient.entered():
                yield
        finally:
            exchange_guard(outer)

    def _agreed(self) -> Effect[Any] | None:
        """The effect that all shards yielded; None when all have ended.

        Raises:
            RuntimeError: they yielded different things, or did what shards must not.
        """
        shards = self.shards
        effect = shards[0].effect
        messages.refuse_disagreement(shards)
        if self._fingerprint is not None and self._generators.fingerprint() != self._fingerprint:
            raise messages.global_draw()
        for parameter, version in zip(self._parameters, self._versions, strict=True):
            if parameter._version != version:
                raise messages.written_parameter(self.owner, parameter)
        self._check_buffers()
        if self._foreign_means:
            messages.warn_of_foreign_mean(self._foreign_means[0], shards)
            self._foreign_means.clear()
            self._first = False
        return effect

    def replicas(self) -> list[Replica]:
        """Those of the step's shards; none where a shard is alone."""
        return [shard.replica for shard in self.shards if shard.replica is not None]

    def counted_replicas(self) -> list[Replica]:
        """Those whose shards have samples: what the others do to theirs ends with the step."""
        return [s.replica for s in self.shards if s.replica is not None and not s.spare]

    def _check_buffers(self) -> None:
        found = differing_buffer(self.owner, self.counted_replicas())
        if found is not None:
            raise messages.differing_writes(*found)

    def _merge(self) -> None:
        replicas = self.counted_replicas()
        if replicas:
            weights = [float(shard.samples) for shard in self.shards if not shard.spare]
            merge(self.owner, replicas, weights)

    # -- what a shard needs --------------------------------------------------------------------

    def batch_size(self, batch: Any) -> int:
        """The samples of a batch, as the module counts them."""
        return batch_size(self.owner, batch)

    def autocast(self) -> AbstractContextManager[object] | None:
        """Autocast, to be entered anew around each resume; None where there is none."""
        return self.precision.context(self.device, cache=len(self.shards) == 1)

    def check(self, effect: Effect[Any], shard: Shard) -> None:
        """Make an update complete: names are those of optimizers, functions become losses."""
        if not isinstance(effect, Update):
            if isinstance(effect, Gradient):
                if self._first:
                    self._look_for_foreign_means(effect.losses)
                if isinstance(effect.wrt, list) and (len(self.shards) > 1 or self.ranks):
                    guards.refuse_hooks(effect.wrt, "wrt")
            return
        losses = effect.losses
        if self.stepper is None:
            raise TypeError(
                f"{self.body.name} yields an update, but nothing is trained here: log the loss"
            )
        optimizers = self.stepper.optimizers
        if ONLY in losses and len(optimizers) == 1:
            (name,) = optimizers
            effect.rename(ONLY, name)
        else:
            for name in losses:
                if name not in optimizers:
                    raise unknown_optimizer(name, list(optimizers))
        if effect.given is not None:
            for one in effect.given.values():  # made of sharded parameters, perhaps
                one.gradients = self.lanes.whole_gradients(one.gradients)
        if effect.functions is not None or self.stepper.asks_again:
            self._evaluate(effect, shard)
        if self._first:
            self._look_for_foreign_means(losses)

    def _evaluate(self, effect: Update, shard: Shard) -> None:
        """Losses that are functions, or may be asked for again: evaluate them for the first time.

        Raises:
            TypeError: an optimizer that asks for its loss several times got one that cannot be.
        """
        assert self.stepper is not None
        found = shard.functions = {}
        given = effect.functions or {}
        for name in list(effect.losses):
            if name in given:
                found[name] = Function(shard, given[name])
                effect.evaluate(name, found[name])
            elif name in self.stepper.closures:
                if shard.start is None or not shard.done or name in (effect.given or ()):
                    raise messages.loss_must_be_a_function(name, self.stepper.optimizers[name])
                found[name] = Function(shard, shard.once_more(name), shard.start)
                effect.functions = {name: found[name]}

    def _look_for_foreign_means(self, losses: Mapping[str, Tensor | Loss | None]) -> None:
        if len(self.shards) > 1 or self.ranks is not None:
            present = [loss for loss in losses.values() if loss is not None]
            self._foreign_means.extend(guards.foreign_means(present))

    def parameters(self, name: str) -> list[Parameter]:
        """The trainable parameters of a named optimizer, read anew in each step."""
        found = self._lists.get(name)
        if found is None:
            if self.stepper is None:
                raise ValueError(
                    f"{self.body.name} has no optimizer {name!r}, since nothing is trained here: "
                    "write Gradient(losses, wrt=parameters)"
                )
            optimizers = self.stepper.optimizers
            if name not in optimizers:
                raise unknown_optimizer(name, list(optimizers))
            found = optimizers[name].parameters()
            if len(self.shards) > 1 or self.ranks is not None:
                guards.refuse_hooks(found, name)
            self._lists[name] = found
        return found

    def scale_of(self, key: str) -> Tensor | None:
        """The loss scale of an optimizer, or of another key that gradients are taken under."""
        scale = None if self.stepper is None else self.stepper.scale(key)
        return None if scale is None else scale.value


def _advance(shard: Shard) -> None:
    if not shard.done:
        shard.advance()
    else:
        shard.effect = None
