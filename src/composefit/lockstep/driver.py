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
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from composefit.effects import Effect, Pull
from composefit.lockstep import guards
from composefit.lockstep.backward import Backward
from composefit.lockstep.crossings import Crossing
from composefit.lockstep.gradients import Gradients
from composefit.lockstep.guards import Place
from composefit.lockstep.scatter import Part, batch_size, scatter
from composefit.lockstep.shard import Shard, shard_note
from composefit.lockstep.stepper import Stepper
from composefit.losses import Loss, as_loss
from composefit.module import (
    ONLY,
    Context,
    LoopModule,
    has_helpers,
    offered,
    unknown_optimizer,
)
from composefit.precision import Precision
from composefit.random import (
    GlobalGenerators,
    SampleRandom,
    Stream,
    hash_key,
    recomputation,
    thread_local_generators,
)
from composefit.replicas import Replica, differing_buffer, merge
from composefit.tree import move
from composefit.updates import Update

# Parts of random keys, so that no stream is another's.
_SHARD, _ONCE = 1, 2


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
        of: `of(module or replica)` gives the step, to be called with a batch and its index.
        takes_index: whether it declares the index.
        name: its name, for messages.
        training: gradients are on, and what it returns is a loss.
    """

    of: Callable[[nn.Module], Callable[..., Any]]
    takes_index: bool
    name: str
    training: bool

    @classmethod
    def method(cls, module: nn.Module, name: str, training: bool) -> Body:
        """The body that is a method of the module, `training_step` say."""
        return cls(attrgetter(name), offered(getattr(module, name), 2) > 1, name, training)


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
    """

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
        self.seed = seed
        self.device = lanes.device
        self.device_type = self.device.type
        self.modes = guards.reader_of_modes(self.device_type)
        self.dtype = next(
            (p.dtype for p in module.parameters() if p.is_floating_point()),
            torch.get_default_dtype(),
        )
        self.backward = Backward(lanes.lanes, lanes.add_up, self.scale_of)
        self.stale = guards.StaleWeights()
        self.number = 0
        self.updated = False
        self.history: list[tuple[str, Place]] = []
        self.losses: dict[str, Tensor] = {}
        self.shards: list[Shard] = []
        self._failed: list[tuple[Shard, BaseException]] = []
        self._first = True  # no step of several shards was done yet
        self._foreign_means: list[str] = []
        self._is_loop = isinstance(module, LoopModule)
        self.has_helpers = has_helpers(module)
        self._alone = self._shard(0, alone=True)
        self._many: list[Shard] = []
        self._lists: dict[str, list[Parameter]] = {}
        self._generators = GlobalGenerators()
        self._fingerprint: object = None
        self._ambient = guards.Ambient(self.device_type)
        self._caller = 0
        self._once: Context | None = None
        self._outer_context: Context | None = None
        self._once_stream = Stream()
        self._key = hash_key(seed, _SHARD)
        self._default_generators = [torch.default_generator]
        if self.device_type == "cuda":
            device_generator = torch.cuda.default_generators[self.device.index or 0]
            self._default_generators.append(device_generator)
        self._default_states: list[Tensor] = []
        self._open: ExitStack | None = None
        self._streams_open = False

    def _shard(self, index: int, alone: bool) -> Shard:
        random = SampleRandom(self.seed)
        context = Context(random)
        context.training = self.body.training
        if alone:
            return Shard(self, index, self.owner, None, context, random, None)
        own = {"_context": context, "_replica": True} if self._is_loop else None
        replica = Replica(self.owner, own)
        return Shard(self, index, replica.module, replica, context, random, Stream())

    @contextmanager
    def session(self) -> Iterator[None]:
        """Keep workers and patches of torch's random kernels for many steps."""
        with ExitStack() as stack:
            stack.enter_context(self.lanes.session())
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
        enabled = torch.is_grad_enabled()
        try:
            self._begin(batches, batch_idx, number)
            shards = self.shards
            alone = len(shards) == 1
            while True:
                if alone:
                    shards[0].advance()
                    effect = shards[0].effect
                else:
                    self.each(_advance)
                    effect = self._agreed()
                if effect is None:
                    break
                results = effect.combine(self, [shard.effect for shard in shards])
                for shard, result in zip(shards, results, strict=True):
                    shard.result = result
                if shards[0].done and (alone or all(shard.done for shard in shards)):
                    break
            if not alone:
                self._merge()
                self._first = False
        except BaseException as error:
            self._surface(error)
            raise
        finally:
            self._end()
            torch._C._set_grad_enabled(enabled)
        return shards

    def _begin(self, batches: Sequence[Any], batch_idx: int, number: int) -> None:
        if self.body.training and torch.is_inference_mode_enabled():
            raise RuntimeError("a training step was called within torch.inference_mode(): leave it")
        self.number = number
        self.updated = False
        self.shards = []
        self.losses = {}
        self.history.clear()
        self._failed.clear()
        parts: list[Part] = []
        for i, batch in enumerate(batches, start=batch_idx):
            try:
                batch = move(batch, self.device, self.precision.dtype)
                parts += scatter(self.owner, batch, i, self.lanes.lanes, self.microbatch)
            except Exception as error:
                error.add_note(f"step {number}, batch {i}, while it was moved and cut into shards")
                raise
        if len(parts) == 1:
            self._begin_alone(parts[0])
        else:
            self._begin_many(parts)

    def _begin_alone(self, part: Part) -> None:
        shard = self._alone
        self.shards = [shard]
        shard.begin(0, part.batch, part.batch_idx, part.samples)
        shard.context.logs = {}
        shard.random.begin(self.number, 0, None, None, self.dtype, self.device)
        if self._is_loop:
            state = self.owner.__dict__
            self._outer_context = state["_context"]
            state["_context"] = shard.context
        self.backward.begin_alone()
        # Its stream is the default generator, which is put back afterwards: what the loader draws
        # from it in between (the order of samples) must not depend on what the step drew.
        key = (self._key + self.number) % 2**64
        for generator in self._default_generators:
            self._default_states.append(generator.get_state())
            generator.manual_seed(key)

    def _begin_many(self, parts: list[Part]) -> None:
        self._open_streams()
        while len(self._many) < len(parts):
            self._many.append(self._shard(len(self._many), alone=False))
        self._caller = threading.get_ident()
        self._ambient = guards.Ambient(self.device_type)
        sizes = [
            part.samples if part.samples is not None else batch_size(self.owner, part.batch)
            for part in parts
        ]
        self.backward.begin(sizes)
        shards = self._many[: len(parts)]
        start, world = 0, sum(sizes)
        for shard, part, size in zip(shards, parts, sizes, strict=True):
            shard.begin(part.lane, part.batch, part.batch_idx, size)
            assert shard.replica is not None
            shard.replica.refresh()
            shard.context.logs = {}
            shard.random.begin(self.number, start, start + size, world, self.dtype, self.device)
            assert isinstance(shard.draws, Stream)
            shard.draws.seed(hash_key(self._key, self.number, shard.index))
            start += size
        lanes_used = {part.lane for part in parts}
        side_by_side = self.lanes.concurrent and len(lanes_used) > 1
        self._fingerprint = self._generators.fingerprint() if side_by_side else None
        self.shards = shards

    def _open_streams(self) -> None:
        """Give torch's kernels a stream for each thread, once somebody needs it."""
        if not self._streams_open:
            assert self._open is not None
            self._open.enter_context(thread_local_generators())
            self._streams_open = True

    def _end(self) -> None:
        shards = self.shards
        if len(shards) == 1:
            if self._is_loop:
                self.owner.__dict__["_context"] = self._outer_context
            for generator, state in zip(
                self._default_generators, self._default_states, strict=False
            ):
                generator.set_state(state)
            self._default_states.clear()
        for shard in shards:
            shard.close()
        self._once = None
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
        note = shard_note(failed[0][0], self.number, self.stepper.updates if self.stepper else {})
        if not self._failed and isinstance(error, Exception):  # raised at the barrier
            with suppress(Exception):
                shards[0].blame(error)
        error.add_note(note)
        for hint in guards.hints(error, [shard.known_samples for shard in shards]):
            error.add_note(hint)
        for text, others in _by_text(failed[1:]).items():
            names = " and ".join(map(str, others))
            what = "the same" if text == repr(error) else f"{text} as well"
            error.add_note(f"shard{'s' * (len(others) > 1)} {names} raised {what}")
        if len(shards) == 1:
            shards[0].close()
        elif any(shard.generator is not None for shard in shards):
            self._each(Shard.close)
        for shard in shards:
            if shard.error is not None:
                error.add_note(f"closing shard {shard.index} raised {shard.error!r}")
                shard.error = None

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
        with self._ambient.entered(), recomputation(self.stale):
            yield

    def _agreed(self) -> Effect[Any] | None:
        """The effect that all shards yielded; None when all have ended.

        Raises:
            RuntimeError: they yielded different things, or did what shards must not.
        """
        shards = self.shards
        effect = shards[0].effect
        if len(shards) == 1:
            return effect
        agreement = None if effect is None else effect.agreement()
        for shard in shards:
            other = shard.effect
            if (None if other is None else other.agreement()) != agreement:
                raise self._disagreement()
        if self._fingerprint is not None and self._generators.fingerprint() != self._fingerprint:
            raise RuntimeError(
                "the step drew from Python's `random` or NumPy's global generator while several "
                "shards ran side by side: these have one state for all threads, so that no run "
                "would repeat another. Use self.random.uniform(n, ...), a draw per sample, or "
                "self.random.shared, the same for all shards"
            )
        self._check_buffers()
        if self._foreign_means:
            self._warn_of_foreign_mean(self._foreign_means[0])
            self._foreign_means.clear()
            self._first = False
        return effect

    def _warn_of_foreign_mean(self, what: str) -> None:
        code, line = self.shards[0].place()
        warnings.warn_explicit(
            f"a loss is a mean over {what}, not over samples: with {len(self.shards)} shards the "
            "step's loss is then not the batch's, since each shard divides by a number of its own. "
            "Write Mean.of(loss, weight), with the shard's weight of all targets that count, such "
            "as (target != ignore_index).sum() or class_weights[target].sum()",
            UserWarning,
            code.co_filename if code is not None else "<unknown>",
            line or (code.co_firstlineno if code is not None else 0),
        )

    def _disagreement(self) -> RuntimeError:
        lines = []
        for shard in self.shards:
            did = "ended"
            if shard.effect is not None:
                did = f"{'returned' if shard.done else 'yielded'} {shard.effect!r}"
            lines.append(f"  shard {shard.index} ({shard.where()}): {did}")
        return RuntimeError(
            "the shards of this step disagree; all must yield the same effects, with the same "
            "names and shapes, in the same order:\n" + "\n".join(lines) + "\nA condition that "
            "steers the step must be the same in every shard: reduce what it depends on "
            "(`value = yield Mean(total, weight)`), or draw it from self.random.shared"
        )

    def _replicas(self) -> list[Replica]:
        return [shard.replica for shard in self.shards if shard.replica is not None]

    def _check_buffers(self) -> None:
        found = differing_buffer(self.owner, self._replicas())
        if found is not None:
            name, reason = found
            raise RuntimeError(
                f"the shards have written different values into buffer {name!r} ({reason}): which "
                "one counts would be chance. Write it at a barrier instead, "
                "`yield from Once(self.method, tensors)`, which hands the method the rows of all "
                "shards; or, if it is a running mean, name it in the module's class attribute "
                "running_statistics"
            )

    def _merge(self) -> None:
        replicas = self._replicas()
        if replicas:
            merge(self.owner, replicas, [float(shard.samples) for shard in self.shards])

    # -- what a shard needs --------------------------------------------------------------------

    def batch_size(self, batch: Any) -> int:
        """The samples of a batch, as the module counts them."""
        return batch_size(self.owner, batch)

    def autocast(self) -> AbstractContextManager[object] | None:
        """Autocast, to be entered anew around each resume; None where there is none."""
        return self.precision.context(self.device)

    def check(self, effect: Effect[Any]) -> None:
        """Put the name of the one optimizer into a bare loss, and refuse unknown names."""
        if not isinstance(effect, Update):
            return
        losses = effect.losses
        if self._first and len(self.shards) > 1:
            self._look_for_foreign_means(losses)
        if self.stepper is None:
            raise TypeError(
                f"{self.body.name} yields an update, but nothing is trained here: log the loss"
            )
        optimizers = self.stepper.optimizers
        if ONLY in losses and len(optimizers) == 1:
            (name,) = optimizers
            losses[name] = losses.pop(ONLY)
            return
        for name in losses:
            if name not in optimizers:
                raise unknown_optimizer(name, list(optimizers))

    def _look_for_foreign_means(self, losses: dict[str, Tensor | Loss]) -> None:
        for loss in losses.values():
            terms = loss.terms if isinstance(loss, Loss) else as_loss(loss, "the loss").terms
            for term in terms:
                found = guards.foreign_mean(term.total) if term.weight is None else None
                if found is not None:
                    self._foreign_means.append(found)

    def parameters(self, name: str) -> list[Parameter]:
        """The trainable parameters of a named optimizer, read anew in each step."""
        found = self._lists.get(name)
        if found is None:
            assert self.stepper is not None
            found = self.stepper.optimizers[name].parameters()
            if len(self.shards) > 1:
                _refuse_hooks(found, name)
            self._lists[name] = found
        return found

    def scale_of(self, key: str) -> Tensor | None:
        """The loss scale of an optimizer, under float16."""
        if self.stepper is None or key not in self.stepper.scales:
            return None
        return self.stepper.scales[key].value

    # -- what an effect may do at the barrier --------------------------------------------------

    def cross(self, sources: list[list[Tensor]], leaves: list[list[Tensor]], pull: Pull) -> None:
        """Let gradients flow from all shards' leaves to every shard's sources."""
        self.backward.crossings.append(Crossing(sources, leaves, pull))

    def reduce(self, losses: Sequence[Loss | Tensor]) -> Tensor:
        """One loss of each shard, reduced, detached."""
        return self.backward.reduce(losses)

    def gradients(self, key: str) -> list[Tensor | None]:
        """The gradients taken under `key`, over all shards."""
        return self._total(key)[1]

    def update(self, losses: dict[str, list[Loss | Tensor]]) -> dict[str, Tensor]:
        """Step the named optimizers with the gradients taken; the reduced losses."""
        assert self.stepper is not None
        reduced = {name: self.backward.reduce(column) for name, column in losses.items()}
        totals = {name: self._total(name) for name in losses}
        for name, (_, found) in totals.items():
            for gradient in found:
                if gradient is not None:
                    break
            else:
                raise _no_path(name, self.body.name)
        if self.stepper.update(totals, reduced, self.number):
            place = self.shards[0].place()
            for name, (parameters, _) in totals.items():
                self.stale.stepped.append(parameters)
                self.history.append((name, place))
            self.updated = True
        self.losses.update(reduced)
        return reduced

    def on_owner(self, function: Callable[..., Any], *args: Tensor) -> Any:
        """Call a function once, on the owner; what it writes all shards see afterwards."""
        replicas = self._replicas()
        if replicas:
            function = replicas[0].owner_of(function)
        state = self.owner.__dict__
        outer = state.get("_context")
        if self._is_loop:
            state["_context"] = self._owner_context()
        try:
            self._open_streams()
            with torch.no_grad(), self._once_stream:
                result = function(*args)
        finally:
            if self._is_loop:
                state["_context"] = outer
        for replica in replicas:
            replica.refresh(within_step=True)
        return result

    def _owner_context(self) -> Context:
        """Logs and draws of the functions that run once, the same for every strategy."""
        if self._once is None:
            random = SampleRandom(hash_key(self.seed, _ONCE))
            random.begin(self.number, 0, None, None, self.dtype, self.device)
            self._once = Context(random, lambda: sum(shard.samples for shard in self.shards))
            self._once.training = self.body.training
            self._once_stream.seed(hash_key(self.seed, _ONCE, self.number))
            self._once.logs = self.shards[0].context.logs  # it counts once: for the first shard
        return self._once

    def _total(self, key: str) -> tuple[list[Parameter], Gradients]:
        if self.backward.waiting:
            self.backward.take_waiting(key, self.shards, self._each_index)
        return self.backward.total(key)

    def _each_index(self, function: Callable[[int], None]) -> None:
        def visit(shard: Shard) -> None:
            try:
                function(shard.index)
            except RuntimeError as error:
                explained = guards.explain(error, "the loss", self.history)
                if explained is not error:
                    explained.__cause__ = error
                shard.blame(explained)

        self.each(visit)


def _advance(shard: Shard) -> None:
    if not shard.done:
        shard.advance()
    else:
        shard.effect = None


def _by_text(failed: Sequence[tuple[Shard, BaseException]]) -> dict[str, list[int]]:
    """The shards that raised each error, by its text."""
    found: dict[str, list[int]] = {}
    for shard, error in failed:
        found.setdefault(repr(error), []).append(shard.index)
    return found


def _refuse_hooks(parameters: Sequence[Parameter], name: str) -> None:
    if any(parameter._backward_hooks for parameter in parameters):
        raise RuntimeError(
            f"a parameter of optimizer {name!r} has a tensor hook (register_hook), which would see "
            "the gradient of each shard in place of the total: use "
            "register_post_accumulate_grad_hook or on_before_optimizer_step, which run once, on "
            "the total"
        )


def _no_path(name: str, step: str) -> RuntimeError:
    return RuntimeError(
        f"the loss of {name!r} reaches none of its optimizer's parameters: was it detached, or "
        f"computed under torch.no_grad(), from other networks than the optimizer's, or are all of "
        f"them frozen (requires_grad=False)? Compute it in {step} from what the optimizer updates"
    )
