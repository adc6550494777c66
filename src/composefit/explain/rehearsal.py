"""The step that is explained, run on a copy of the module: twice to warm up, once measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from composefit.check.copies import copied_batch
from composefit.explain.coupling import coupling_layers
from composefit.explain.memory import meter, resident
from composefit.explain.plan import Plan
from composefit.explain.reading import Extra, barriers_of, extras_of, parts_of, spans_of
from composefit.explain.watching import WatchedLockstep
from composefit.lockstep.scatter import batch_size, rows_of
from composefit.loops import Loop
from composefit.module import LoopModule
from composefit.precision import Precision
from composefit.ranks.environment import found_job
from composefit.strategies import Distributed, Strategy

if TYPE_CHECKING:
    from composefit.trainer import Trainer

#: What a trainer is made with that rehearses in the place of another one: it leaves nothing behind.
QUIET: dict[str, Any] = {
    "accelerator": "auto",
    "devices": "auto",
    "callbacks": None,
    "logger": False,
    "profiler": None,
    "fast_dev_run": False,
    "check": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class Home(NamedTuple):
    """Where a step of a strategy is rehearsed in this process alone.

    Attributes:
        strategy: what one rank runs.
        ranks: how many there would be.
        sharded: whether parameters would be cut over them.
    """

    strategy: Strategy
    ranks: int
    sharded: bool


def at_home(strategy: Strategy) -> Home:
    """The part of a strategy that one process carries out: rank 0's."""
    if not isinstance(strategy, Distributed):
        return Home(strategy, 1, False)
    job = found_job()
    ranks = strategy.processes_to_launch() if job is None else job.size
    return Home(strategy.inner, ranks or 1, strategy.shards_state)


def is_first_rank() -> bool:
    """Whether this process is the one that prints."""
    job = found_job()
    return job is None or job.rank == 0


class Rehearsal(Loop):
    """Runs one step three times, each time as if it were the same one of a training.

        the hooks that open a training
        three times, with the same number:
            on_train_batch_start
            trainer.step: to see what variables keep, to see the memory, to see the time
            on_train_batch_end
        once more in two shards, updating nothing: do samples meet in it?

    Args:
        batch: what the loader gave, for each of the step's loader batches.
        step: the number of the step.
        home: where it runs.
        given: the strategy that it runs in the place of.
    """

    def __init__(self, batch: Any, step: int, home: Home, given: Strategy) -> None:
        self.batch = batch
        self.number = step
        self.home = home
        self.given = given

    def run(self, trainer: Trainer, module: LoopModule) -> Plan:
        """Run it, and tell what was seen."""
        training = trainer.training
        assert training is not None
        driver = cast(WatchedLockstep, training.driver)
        optimizers = training.optimizers
        trainer.global_step = self.number
        for hook in ("on_fit_start", "on_train_start", "on_train_epoch_start"):
            trainer.call(hook)

        driver.looks_into_variables = True
        self._step(trainer, module)
        driver.looks_into_variables = False
        variables = extras_of(driver)

        before = resident(module, [one.optimizer for one in optimizers.values()])
        with meter(driver.device) as memory:
            driver.held = lambda: memory.live
            self._step(trainer, module)
        driver.held = lambda: None
        live = extras_of(driver)

        self._step(trainer, module)
        ranks, sharded = self.home.ranks, self.home.sharded
        plan = Plan(
            module=type(module).__name__,
            strategy=self._describe(module),
            step=self.number,
            ranks=ranks,
            lanes=max(shard.lane for shard in driver.watched) + 1,
            concurrent=driver.lanes.concurrent,
            sharded=sharded,
            device=str(driver.device),
            precision=trainer.precision.name,
            accumulate=trainer.accumulate_grad_batches,
            microbatch=trainer.microbatch_size,
            parts=parts_of(driver),
            barriers=barriers_of(
                driver, training.stepper, ranks, sharded, _joined(variables, live, driver)
            ),
            spans=spans_of(driver),
            ready=(driver.watched[0].stretches[0].start - driver.seen.start) * 1e3,
            duration=(driver.seen.end - driver.seen.start) * 1e3,
            resident=before,
            peak=memory.peak,
            coupling=(),
            notes=tuple(self._notes()),
        )
        precision = Precision(trainer.precision.name, trainer.precision.dtype, None)
        coupling = coupling_layers(module, self.batch, optimizers, precision, driver.device)
        return replace(plan, coupling=tuple(coupling))

    def _step(self, trainer: Trainer, module: LoopModule) -> None:
        trainer.global_step = self.number
        window = [self._fresh(module) for _ in range(trainer.accumulate_grad_batches)]
        with trainer.call.batch_span("train", window, 0) as span:
            if span.skipped:
                raise ValueError(
                    f"{type(module).__name__}.on_train_batch_start returned -1, which ends the "
                    "epoch: there is no step to explain"
                )
            span.outputs = trainer.step(module, window)

    def _fresh(self, module: LoopModule) -> Any:
        """The batch, or rank 0's rows of it, which the step may write to."""
        batch = copied_batch(self.batch)
        if self.home.ranks == 1:
            return batch
        return rows_of(module, batch, 0, self.home.ranks).batch

    def _describe(self, module: LoopModule) -> str:
        """`ThreadDataParallel, 64 = 2 threads x 32`."""
        name = type(self.given).__name__
        try:
            samples = batch_size(module, self.batch)
        except (TypeError, ValueError):  # no step of one shard needs it
            return name
        if self.home.ranks == 1:
            return f"{name}, {self.given.describe(samples)}"
        own = -(-samples // self.home.ranks)
        return (
            f"{name}, {samples} = {self.home.ranks} ranks x {own}, of which rank 0: "
            f"{self.home.strategy.describe(own)}"
        )

    def _notes(self) -> Sequence[str]:
        notes = []
        if self.home.ranks > 1:
            notes.append(
                f"measured in this process alone, as rank 0 of {self.home.ranks} on its part of "
                "the batch: what crosses ranks is computed, and its time is not in the picture"
            )
        if self.home.sharded:
            notes.append(
                "gradients are counted as reduce-scattered and weights as gathered once for each "
                "update; where they are gathered again in the backward, that comes on top. "
                "Memory is that of whole weights: a rank keeps its part of them"
            )
        return notes


def _joined(
    variables: Sequence[tuple[str, int, Extra]],
    live: Sequence[tuple[str, int, Extra]],
    driver: WatchedLockstep,
) -> list[Extra]:
    """What two runs have told of the effects of a third, as far as they are the same ones."""
    found = []
    for a, b, now in zip(variables, live, extras_of(driver), strict=False):
        if not a[:2] == b[:2] == now[:2]:
            break
        found.append(Extra(a[2].kept, b[2].held))
    return found
