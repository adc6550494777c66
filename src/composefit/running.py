"""`running`: what surrounds every run of a trainer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from composefit.datamodule import DataModule
from composefit.loggers.silent import Silent
from composefit.module import LoopModule
from composefit.profilers import Profiler
from composefit.ranks.environment import found_job
from composefit.ranks.process import as_rank
from composefit.replicas import RankMetrics
from composefit.settings import torch_settings
from composefit.signals import Signals

if TYPE_CHECKING:
    from composefit.trainer import Trainer


class Run:
    """A run that goes on.

    Attributes:
        stage: `"fit"`, `"validate"`, `"test"` or `"predict"`.
        signals: those that wait for a step boundary.
        sessions: what is open until the run ends: workers, torch's settings.
    """

    def __init__(self, stage: str, signals: Signals, sessions: ExitStack) -> None:
        self.stage = stage
        self.signals = signals
        self.sessions = sessions


@contextmanager
def in_job(trainer: Trainer) -> Iterator[None]:
    """Around what a rank does for a run: the other ranks are told of an error, once.

    `running` is within it. What comes before that, and may go wrong on one machine alone (a
    checkpoint that is not there, loaders that cannot be), needs one of its own.
    """
    with as_rank(found_job()):
        world = trainer.world
        failures = 0 if world is None else world.failures
        try:
            yield
        except BaseException as error:
            now = trainer.world  # a job that has failed before may have begun anew
            if now is not None and now.failures == (failures if now is world else 0):
                now.fail(error)
            raise


@contextmanager
def running(
    trainer: Trainer, module: LoopModule, stage: str, datamodule: DataModule | None
) -> Iterator[None]:
    """Around a run: settings, hooks and signals; everything is put back, whatever happens."""
    with ExitStack() as stack:
        stack.enter_context(in_job(trainer))
        signals = stack.enter_context(Signals())
        stack.callback(setattr, trainer, "run_in_progress", None)
        trainer.run_in_progress = Run(stage, signals, stack)
        # Its traceback would keep the tensors of the failed step alive.
        stack.callback(setattr, trainer.call, "exception", None)
        stack.enter_context(trainer.strategy.session())
        if trainer.seed is not None:
            torch.manual_seed(trainer.seed)
        stack.enter_context(
            torch_settings(trainer.deterministic, trainer.benchmark, trainer.detect_anomaly)
        )
        world = trainer.world
        if world is not None:
            stack.callback(setattr, trainer, "rank_metrics", None)
            trainer.rank_metrics = stack.enter_context(RankMetrics(world, module))
            if world.rank:
                stack.callback(setattr, trainer, "loggers", trainer.loggers)
                trainer.loggers = [Silent(logger) for logger in trainer.loggers]
                stack.enter_context(_quiet_warnings())
        if trainer.profiler is not None:
            trainer.profiler.start()
            stack.callback(_finish, trainer.profiler, trainer.is_global_zero)
        try:
            _set_up(trainer, module, stage, datamodule)
            yield
            if trainer.training is not None and stage == "fit":
                trainer.training.stepper.finish()
                if (ranks := trainer.training.driver.ranks) is not None:
                    ranks.finish()
        except BaseException as error:
            trainer.call.fail(error)
            _wind_up(trainer, stage, error)
            raise
        _wind_up(trainer, stage, None)


@contextmanager
def _quiet_warnings() -> Iterator[None]:
    """Rank 0 warns for all; while somebody is looking for a fault, each for itself."""
    if os.environ.get("COMPOSEFIT_DEBUG") == "1":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _finish(profiler: Profiler, shows: bool) -> None:
    profiler.stop()
    if shows:
        print(profiler.summary())


def _set_up(
    trainer: Trainer, module: LoopModule, stage: str, datamodule: DataModule | None
) -> None:
    if datamodule is not None:
        datamodule.trainer = trainer
    world = trainer.world

    def prepare() -> None:
        if datamodule is not None:
            datamodule.prepare_data()
        module.prepare_data()

    if world is None:
        prepare()
    else:
        world.first_here(prepare)
    if datamodule is not None:
        datamodule.setup(stage)
    trainer.call("setup", stage)
    module.configure_model()


def _wind_up(trainer: Trainer, stage: str, error: BaseException | None) -> None:
    """Tear down everything, whatever a part of it raises: the first error is the one raised."""
    status = "finished" if error is None else "failed"
    tasks: list[Callable[[], Any]] = []
    if trainer.loop is not None:
        tasks.append(trainer.loop.close)
    tasks += trainer.call.separately("teardown", stage)
    if trainer.datamodule is not None:
        tasks.append(partial(trainer.datamodule.teardown, stage))
    tasks += [partial(one.finalize, status) for one in trainer.loggers]
    if stage == "fit":
        tasks.append(partial(trainer.history.finalize, status))
    for task in tasks:
        try:
            task()
        except Exception as raised:
            if error is None:
                error = trainer.call.exception = raised
            else:
                error.add_note(f"then {raised!r} was raised as well")
    if error is not None and status == "finished":
        if (world := trainer.strategy.world) is not None:
            world.fail(error)
        raise error
