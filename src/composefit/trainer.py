"""`Trainer`: builds strategy, loops, callbacks and loggers from keyword arguments."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from rich import get_console

from composefit import arguments, checkpoint, explain, remote, report, snapshot
from composefit.callbacks import Callback, ModelCheckpoint, ModelSummary, ProgressBar
from composefit.callbacks.printing import print_table
from composefit.check import CheckReport, check, first_batches, is_loader, try_check
from composefit.check.copies import copied_module, untouched
from composefit.data import Batches
from composefit.data.loaders import one_shot
from composefit.datamodule import DataModule
from composefit.evaluation import Evaluation
from composefit.history import History
from composefit.hooks import HookCaller
from composefit.lockstep.contract import Body
from composefit.lockstep.driver import Lockstep
from composefit.lockstep.scatter import batch_size
from composefit.lockstep.stepper import OnNonfinite, Stepper
from composefit.logged import Logged
from composefit.loggers import Logger
from composefit.logs import Logs
from composefit.loops import EvaluateLoop, FitLoop, Loop, PredictLoop, TrainEpochLoop
from composefit.module import LoopModule, overridden
from composefit.optimizers import ClipAlgorithm, NamedOptimizer
from composefit.precision import Precision
from composefit.profilers import Profiler, as_profiler
from composefit.ranks import World
from composefit.replicas import RankMetrics
from composefit.results import print_results
from composefit.running import Run, in_job, running
from composefit.sources import Sources
from composefit.strategies import Strategy, choose
from composefit.training import Training

__all__ = ["Trainer"]


class Trainer:
    """Trains a `LoopModule` under a strategy.

    Args:
        strategy: how a step is carried out: a `Strategy`, or `"auto"`, `"single"`, `"threads"`.
        accelerator: `"auto"`, `"cpu"`, `"gpu"`, `"cuda"` or `"mps"`, for a strategy by name.
        devices: how many of them; several CPUs are threads.
        precision: `"32"`, `"64"`, `"bf16-mixed"`, `"bf16-true"`, `"16-mixed"`.
        max_epochs: stop after this many passes over the loader; None or -1 for no limit. Default:
            1000, or no limit where `max_steps` or `max_time` is given, as in Lightning.
        min_epochs: at least so many, whoever asks to stop.
        max_steps: stop after this many steps (not optimizer calls); -1 for no limit.
        min_steps: at least so many, whoever asks to stop.
        max_time: stop after this time of training: a timedelta, a dict of its arguments, or
            `"days:hours:minutes:seconds"`. Time before a resumption counts.
        accumulate_grad_batches: loader batches in a step; exact on a short last window.
        microbatch_size: no shard holds more samples than this: less memory, the same result.
        gradient_clip_val: the largest norm (or value) of each optimizer's gradients; an
            `OptimizerConfig` overrides it.
        gradient_clip_algorithm: `"norm"` or `"value"`.
        limit_train_batches: loader batches an epoch: a number, or a fraction as a float.
        limit_val_batches, limit_test_batches, limit_predict_batches: the same for the others, of
            each loader; 0 leaves validation out.
        overfit_batches: train, validate and test on so many batches (or this fraction), unshuffled.
        fast_dev_run: one epoch of one batch of everything (or so many), without loggers and
            checkpoints: does the code run at all? What `check` finds is printed.
        check: before the first step of a fit, check on its batch that the losses mean the same
            however a batch is cut, print what was found, and warn if they do not; see
            `Trainer.check`.
        num_sanity_val_steps: validation batches before training, to see that it works; -1 for all.
        val_check_interval: validate every so many loader batches, or after this fraction of an
            epoch; 1.0 is its end. Within an accumulation window: after its step.
        check_val_every_n_epoch: validate in every n-th epoch; None counts the batches of
            `val_check_interval` over all epochs.
        reload_dataloaders_every_n_epochs: ask the module or data module for loaders anew.
        log_every_n_steps: hand logged values to the loggers at every n-th step.
        callbacks: one or several, in the order in which their hooks run.
        logger: True for a `CSVLogger` in `default_root_dir`, False for none, or one or several.
        enable_progress_bar: show a bar, or plain lines where there is no terminal.
        enable_model_summary: print a table of parameters and optimizers before training.
        enable_checkpointing: keep `last.ckpt` in `default_root_dir`, unless a `ModelCheckpoint`
            says otherwise.
        default_root_dir: where files go.
        seed: of every random draw; None takes torch's (`torch.manual_seed`).
        deterministic: `torch.use_deterministic_algorithms` for the run; `"warn"` only warns.
        benchmark: `torch.backends.cudnn.benchmark` for the run; None leaves it.
        detect_anomaly: `torch.autograd.set_detect_anomaly` for the run.
        inference_mode: evaluate under `torch.inference_mode`; False: under `torch.no_grad`.
        profiler: None, `"simple"`, `"advanced"`, `"pytorch"`, or a profiler.
        on_nonfinite: what a NaN or infinite loss or gradient does: `"raise"` before any weight
            changes, `"skip"` the update, or `"ignore"`.

    Raises:
        TypeError, ValueError: an unknown argument, or a value that cannot be.

    Attributes:
        global_step: the steps done.
        should_stop: set it to end the fit after the step that runs.
        call: `call(hook, *arguments)` runs a hook of the callbacks and of the module.
        module: the module of the last run.
        datamodule: its data module, or None.
        loop: the loop that runs, or ran last.
        fit_loop: the `FitLoop` in it, or None.
        training: optimizers and driver of the training that goes on, or None.
        evaluation: drivers and logs of validation, test and prediction.
        mid_step: the last step failed after some of its updates.
        ready: optimizers are made, and any checkpoint is taken back.
        history: what was logged, for `report`.
        run_seed: the seed of this run's random draws.
        rank_metrics: the metrics of the module, where ranks count apart; or None.
        driver_class: of what runs steps.
    """

    driver_class: type[Lockstep] = Lockstep

    def __init__(
        self,
        *,
        strategy: str | Strategy = "auto",
        accelerator: str = "auto",
        devices: int | str | Sequence[int] = "auto",
        precision: str | int = "32",
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: str | timedelta | dict[str, int] | None = None,
        accumulate_grad_batches: int = 1,
        microbatch_size: int | None = None,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: ClipAlgorithm | None = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0,
        fast_dev_run: bool | int = False,
        check: bool = False,
        num_sanity_val_steps: int | None = None,
        val_check_interval: int | float | None = None,
        check_val_every_n_epoch: int | None = 1,
        reload_dataloaders_every_n_epochs: int = 0,
        log_every_n_steps: int | None = None,
        callbacks: Callback | Sequence[Callback] | None = None,
        logger: bool | Logger | Sequence[Logger] | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        enable_checkpointing: bool | None = None,
        default_root_dir: str | Path | None = None,
        seed: int | None = None,
        deterministic: bool | Literal["warn"] | None = None,
        benchmark: bool | None = None,
        detect_anomaly: bool = False,
        inference_mode: bool = True,
        profiler: str | Profiler | torch.profiler.profile | None = None,
        on_nonfinite: OnNonfinite = "raise",
        **unknown: Any,
    ) -> None:
        self.arguments = {k: v for k, v in locals().items() if k not in ("self", "unknown")}
        arguments.refuse_unknown(Trainer.__init__, unknown)
        count, flag, limit = arguments.count, arguments.flag, arguments.limit
        self.strategy = choose(strategy, accelerator, devices)
        self.precision = Precision.of(precision)
        dev = arguments.fast_dev_run(fast_dev_run)
        self.fast_dev_run = dev > 0
        self.checks = flag("check", check) or self.fast_dev_run
        self.limits = arguments.limits(max_epochs, max_steps, min_epochs, min_steps, max_time, dev)
        self.accumulate_grad_batches = count("accumulate_grad_batches", accumulate_grad_batches)
        self.microbatch_size = count("microbatch_size", microbatch_size, none=True)
        self.gradient_clip_val = arguments.positive("gradient_clip_val", gradient_clip_val)
        self.gradient_clip_algorithm: ClipAlgorithm = arguments.choice(
            "gradient_clip_algorithm", gradient_clip_algorithm or "norm", ("norm", "value")
        )
        overfit = arguments.overfit(overfit_batches)
        self.overfit_batches = overfit
        self.limit_train_batches = (
            dev or overfit or limit("limit_train_batches", limit_train_batches)
        )
        self.limit_val_batches = dev or overfit or limit("limit_val_batches", limit_val_batches, 0)
        self.limit_test_batches = dev or overfit or limit("limit_test_batches", limit_test_batches)
        self.limit_predict_batches = dev or limit("limit_predict_batches", limit_predict_batches)
        sanity = 2 if num_sanity_val_steps is None else num_sanity_val_steps
        self.num_sanity_val_steps = 0 if dev else count("num_sanity_val_steps", sanity, least=-1)
        interval = 1.0 if val_check_interval is None or dev else val_check_interval
        self.val_check_interval = limit("val_check_interval", interval) or 1.0
        self.check_val_every_n_epoch = count(
            "check_val_every_n_epoch", 1 if dev else check_val_every_n_epoch, none=True
        )
        if self.check_val_every_n_epoch is None and isinstance(self.val_check_interval, float):
            raise ValueError(
                "check_val_every_n_epoch=None counts loader batches over all epochs: give "
                f"val_check_interval as a number of them, got {self.val_check_interval}"
            )
        self.reload_dataloaders_every_n_epochs = count(
            "reload_dataloaders_every_n_epochs", reload_dataloaders_every_n_epochs, least=0
        )
        every = 50 if log_every_n_steps is None else log_every_n_steps
        self.log_every_n_steps = count("log_every_n_steps", every)
        self.on_nonfinite: OnNonfinite = arguments.choice(
            "on_nonfinite", on_nonfinite, ("raise", "skip", "ignore")
        )
        root = "runs" if default_root_dir is None else default_root_dir
        self.default_root_dir = arguments.path("default_root_dir", root)
        self.seed = count("seed", seed, least=0, none=True)
        self.deterministic = arguments.choice(
            "deterministic",
            False if deterministic is None else deterministic,
            (True, False, "warn"),
        )
        self.benchmark = benchmark if benchmark is None else flag("benchmark", benchmark)
        self.detect_anomaly = flag("detect_anomaly", detect_anomaly)
        self.inference_mode = flag("inference_mode", inference_mode)
        self.profiler = as_profiler(profiler, self.default_root_dir)
        self.callbacks = arguments.callbacks(callbacks)
        self._defaults: list[Callback] = []
        self._bring_along(ModelSummary, enable_model_summary)
        self._bring_along(ProgressBar, enable_progress_bar)
        self._bring_along(ModelCheckpoint, False if dev else enable_checkpointing)
        self.callbacks = _checkpoints_last(self.callbacks)
        arguments.refuse_order(self.callbacks)
        self.loggers = [] if dev else arguments.loggers(logger, self.default_root_dir)

        self.global_step = 0
        self.should_stop = False
        self.mid_step = False
        self.ready = False
        self.module: LoopModule | None = None
        self.datamodule: DataModule | None = None
        self.loop: Loop | None = None
        self.fit_loop: FitLoop | None = None
        self.training: Training | None = None
        self.evaluation = Evaluation(self)
        self.num_training_batches: float = math.inf
        self.num_val_batches: list[float] = []
        self.history = History()
        self.logs = self._heard = Logs()
        self.run_seed = 0
        self.rank_metrics: RankMetrics | None = None
        self.run_in_progress: Run | None = None
        self.call: HookCaller
        self._brought: list[Callback] = []  # by the module of the run
        self._whole_epoch = True
        self._unchecked = False  # the next step is to be checked first
        self._resumed_epoch = 0  # what loaders are made for, before the loops are there

    # -- what a user calls ---------------------------------------------------------------------

    def fit(
        self,
        model: LoopModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | Path | None = None,
    ) -> None:
        """Train a module.

        Args:
            model: is trained in place.
            train_dataloaders: an iterable of batches that can be iterated again for every epoch,
                or a dict of such (the batch is then a dict of theirs). A batch is the whole
                world's, whatever the strategy. Or a `DataModule`. None asks the module.
            val_dataloaders: what `validation_step` runs over after every epoch; several in a list
                or dict run one after another.
            datamodule: gives the loaders in their place.
            ckpt_path: go on from this checkpoint; `"last"`: the newest `last.ckpt` that the
                checkpoint callbacks have written; `"best"`: their best; `"auto"`: the last if there
                is one, else from the start.

        Raises:
            TypeError, ValueError: module, optimizers or loaders that cannot be, before any work.
            FileNotFoundError: there is no such checkpoint.
            RuntimeError: the checkpoint is damaged, or of another module.
            Whatever the module's code raises, with a note of the shard, effect and step.
        """
        module = model
        self._check(module, "training_step", "configure_optimizers")
        sources = Sources.of(module, datamodule, train=train_dataloaders, val=val_dataloaders)
        sources.refuse("train", "fit")
        self._refuse_to_run_twice("fit")
        if self._launches():
            given = {"train_dataloaders": train_dataloaders, "val_dataloaders": val_dataloaders}
            given |= {"datamodule": datamodule, "ckpt_path": ckpt_path}
            remote.call(self, "fit", module, given)
            return
        with in_job(self):
            state = snapshot.read(self, ckpt_path)
            # Where nobody has to set up data first, loaders that cannot be are refused now.
            ready = self._fit_loop(module, sources) if sources.given_directly else None
            self._attach(module, sources.datamodule)
        with running(self, module, "fit", sources.datamodule):
            if state is not None and sources.datamodule is not None:
                sources.datamodule.load_state_dict(state[1].get("data", {}))
            self.loop = self.fit_loop = None
            self._resumed_epoch = 0 if state is None else state[1]["epoch"]
            loop = ready or self._fit_loop(module, sources)
            if self.checks and self.world is not None:  # before parameters may be sharded
                self._check_losses(module, sources.loader("train"))
            self._begin(module, loop, state)
            self._unchecked = self.checks and self.world is None
            loop.run(self, module)

    def validate(
        self,
        model: LoopModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
    ) -> list[dict[str, float]]:
        """Run `validation_step` over one or several loaders.

        Args:
            model: is evaluated, without gradients; None: that of the last run.
            dataloaders: an iterable of batches, or several in a list or dict; a `DataModule`; None
                asks the module.
            ckpt_path: take the weights from this checkpoint first; `"best"` and `"last"` as in
                `fit`. With no module given the default is the best one, if there is one.
            verbose: print the results.
            datamodule: gives the loaders in their place.

        Returns:
            For each loader, name -> the mean over it of what was logged, weighted by samples.
        """
        return self._evaluate("validate", model, dataloaders, ckpt_path, verbose, datamodule)

    def test(
        self,
        model: LoopModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
    ) -> list[dict[str, float]]:
        """Run `test_step` over one or several loaders; arguments and result as `validate`."""
        return self._evaluate("test", model, dataloaders, ckpt_path, verbose, datamodule)

    def predict(
        self,
        model: LoopModule | None = None,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        return_predictions: bool = True,
        ckpt_path: str | Path | None = None,
    ) -> list[Any] | None:
        """Run `predict_step` over one or several loaders.

        Args:
            model: as in `validate`.
            dataloaders: as in `validate`.
            datamodule: as in `validate`.
            ckpt_path: as in `validate`.
            return_predictions: False keeps nothing in memory; a `PredictionWriter` sees it.

        Returns:
            One entry for each loader batch, in order, joined over shards; with several loaders one
            such list for each; None without `return_predictions`.
        """
        if self._launches():
            given = {"dataloaders": dataloaders, "datamodule": datamodule, "ckpt_path": ckpt_path}
            given["return_predictions"] = return_predictions
            return self._launched("predict", model, given)  # type: ignore[no-any-return]
        with in_job(self):
            module, sources, state = self._prepare(
                "predict", model, dataloaders, datamodule, ckpt_path
            )
            self._attach(module, sources.datamodule)
        with running(self, module, "predict", sources.datamodule):
            loop = PredictLoop(
                self._several(sources, "predict", self.limit_predict_batches), return_predictions
            )
            snapshot.load_weights(self, module, state)
            self.strategy.place(module, self.precision.dtype)
            try:
                return loop.run(self, module)
            finally:
                loop.close()

    def run(self, loop: Loop, module: LoopModule, ckpt_path: str | Path | None = None) -> Any:
        """Run any loop: one of your own, or one of this package's put together differently.

        Args:
            loop: what is done, and how often.
            module: with what.
            ckpt_path: go on from this checkpoint, which the same kind of loop has written.

        Returns:
            What the loop's `run` returns.
        """
        if not isinstance(loop, Loop):
            raise TypeError(f"trainer.run expects a Loop, got {type(loop).__name__}")
        self._check(module, *(("configure_optimizers",) if loop.trains else ()))
        self._refuse_to_run_twice("run")
        if self._launches():
            return remote.call(self, "run", module, {"loop": loop, "ckpt_path": ckpt_path})
        with in_job(self):
            state = snapshot.read(self, ckpt_path)
            self._attach(module, None)
        with running(self, module, loop.stage, None):
            self._begin(module, loop, state)
            return loop.run(self, module)

    def step(self, module: LoopModule, batches: list[Any], batch_idx: int = 0) -> Any:
        """One training step over these loader batches: what a loop calls.

        Outside of `fit` it goes on where the last call, or the last `fit` of this module, ended;
        with a new module it begins: optimizers are made, parameters placed, counters are zero.

        Args:
            module: is trained.
            batches: a list of the loader batches of the step (one, without accumulation).
            batch_idx: the index of the first of them.

        Returns:
            name of each updated optimizer -> its reduced loss (0-dim, detached, on its device);
            `{"loss": loss}` where there is one optimizer.

        Raises:
            TypeError: `batches` is no list.
            ValueError: it is empty.
            Whatever the module's code raises, with a note of the shard, effect and step.
        """
        if not isinstance(batches, list):
            # A tuple (x, y) would be taken for two batches, a tensor for as many as it has rows.
            raise TypeError(
                f"trainer.step expects a list of loader batches, got {type(batches).__name__}: "
                "write trainer.step(module, [batch])"
            )
        if not batches:
            raise ValueError(
                "trainer.step expects a list of at least one loader batch, got an empty list: "
                "write trainer.step(module, [batch])"
            )
        if self.module is not module or self.training is None:
            self._check(module, "training_step", "configure_optimizers")
            self._attach(module)
            self.restart(module)
        elif module.trainer is not self:  # another trainer has had it in the meantime
            module.trainer = self
        training = self.training
        assert training is not None
        if self._unchecked:
            self._unchecked = False
            self._check_losses(module, batches[0])
        training.batch_idx = batch_idx
        driver = training.driver
        if (world := self.strategy.world) is not None:
            world.mine.signal, world.mine.stop = self.interrupted, self.should_stop
            if self.rank_metrics is not None:
                self.rank_metrics.part()
        try:
            if self.profiler is None:
                shards = driver.step(batches, batch_idx, self.global_step)
            else:
                with self.profiler.span("step"):
                    shards = driver.step(batches, batch_idx, self.global_step)
                self.profiler.step()
        except BaseException:
            self.mid_step = bool(driver.history)
            raise
        self.mid_step = False
        self.global_step += 1
        training.finish_step(shards, batches)
        self.logs.add(shards)
        if training.monitors:
            self._exchange()
            training.step_monitors()
        if self.global_step % self.log_every_n_steps == 0:
            self.write_step()
        elif training.norms:
            self._write_own(self._own_norms())
        losses = driver.losses
        if len(training.optimizers) == 1:
            if losses:
                losses = training.losses = {"loss": next(iter(losses.values()))}
        else:
            training.losses.update(losses)
        return losses

    def evaluate(
        self, module: LoopModule, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0
    ) -> Any:
        """One evaluation step, within `evaluation.running`: what a loop calls.

        Returns:
            What the step returned, joined over shards; in a run None, where several shards have
            returned something and no hook asks for it.
        """
        return self.evaluation.step(module, batch, batch_idx, dataloader_idx)

    def check(
        self, module: LoopModule, batch_or_loader: Any, batches: int = 1, *, show: bool = True
    ) -> CheckReport:
        """Find losses that mean something else once a batch is cut into shards.

        Takes the gradients of a step on the whole batch, and on the batch in two shards of unlike
        sizes, which run side by side where the strategy has several lanes in this process. They
        must be the same to rounding: else data parallelism, accumulation and micro-batches would
        each train something else. Where they are not, the step is looked at operation by operation
        to say why, and what to write instead.

        It runs on copies, in float64 where the step does, without dropout and autocast: module,
        optimizers, loader and random states stay bitwise as they are. Of ranks, each looks at the
        whole batch by itself.

        Args:
            module: whose `training_step` is checked; `setup` and `configure_model` run on the copy.
            batch_or_loader: a batch (a tensor, list, tuple, dict, ...), or a loader (a DataLoader,
                or another iterable) or dict of loaders, whose first batches are taken.
            batches: how many, up to 3; conditions of the step may differ from batch to batch.
            show: print the report, on rank 0.

        Returns:
            What was found; a wrong loss is no error here (see `composefit.testing.check_losses`).

        Raises:
            TypeError: it is no module to train.
            ValueError: a one-shot iterator, which would lack a batch afterwards; a batch that is
                too small to be cut; several batches of something that is none but one.
            Whatever the step raises on the whole batch.
        """
        self._check(module, "training_step", "configure_optimizers")
        self._refuse_to_run_twice("check")
        if isinstance(batch_or_loader, DataModule):
            raise TypeError(
                "trainer.check takes a batch or a loader, got a DataModule: call its setup('fit') "
                "and pass its train_dataloader()"
            )
        if arguments.count("batches", batches) > 3:
            raise ValueError(
                f"trainer.check looks at one to 3 batches, got batches={batches}: what is wrong "
                "with a step shows in the first"
            )
        if is_loader(batch_or_loader):
            found = first_batches(batch_or_loader, batches)
        elif batches > 1:
            raise ValueError(f"trainer.check got one batch, and batches={batches}: give a loader")
        else:
            found = [batch_or_loader]
        report = check(module, found, self.strategy, self.precision, self)
        if show and explain.is_first_rank():
            print_table(get_console(), report)
        return report

    def _check_losses(self, module: LoopModule, given: Any) -> None:
        """Before the first step of a fit, on a batch or the first one of a loader."""
        found = try_check(module, given, self.strategy, self.precision, self)
        if isinstance(found, CheckReport):
            if self.is_global_zero:
                print_table(get_console(), found)
            if not found.ok and self.arguments["check"]:  # a trial run only shows it
                warnings.warn(
                    "what this step trains depends on how its batch is cut into shards: "
                    f"{found.summary}. See what was printed above",
                    stacklevel=2,
                )
        elif found is not None:
            self.print(f"the losses were not checked: {found}")

    def explain(
        self, module: LoopModule, batch: Any, *, step: int | None = None, show: bool = True
    ) -> explain.Plan:
        """Show what one training step does, before anything runs for long.

        Runs the step three times on a copy of the module, with optimizers of its own: module,
        batch, random states and this trainer stay bitwise as they are. Of a strategy with several
        processes it runs rank 0's part in this one. Callbacks take no part.

        Args:
            module: whose step.
            batch: what a loader gives, the whole world's; with accumulation it stands for each
                loader batch of the step.
            step: the number of the step, for those that do not always do the same; that of the
                next one by default.
            show: print it, on rank 0.

        Returns:
            The plan; `plan.save("step.svg")` draws it to scale in time.

        Raises:
            TypeError: it is no module to train.
            Whatever the module's code raises, with a note of the shard, effect and step.
        """
        self._check(module, "training_step", "configure_optimizers")
        self._refuse_to_run_twice("explain")
        home = explain.at_home(self.strategy)
        aside = Trainer(**{**self.arguments, **explain.QUIET, "strategy": home.strategy})
        aside.driver_class = explain.WatchedLockstep
        if self.module is module:
            step = self.global_step if step is None else step
            aside._resumed_epoch = self.current_epoch
        with untouched():
            loop = explain.Rehearsal(batch, step or 0, home, self.strategy)
            plan: explain.Plan = aside.run(loop, copied_module(module).module)
        if show and explain.is_first_rank():
            print_table(get_console(), plan)
        return plan

    def restart(self, module: LoopModule) -> None:
        """New counters, logs and optimizers; the weights stay. For loops that train several times.

        Args:
            module: the module of the run.
        """
        self.global_step = 0
        self.should_stop = False
        self.mid_step = False
        self._whole_epoch = True
        self.logs = self._heard = Logs()
        self.evaluation.logs = Logs()
        self.training = None
        self.seed_run(self._first_seed())
        self.strategy.place(module, self.precision.dtype)
        self.training = Training(self, module)

    def save_checkpoint(
        self, path: str | Path, weights_only: bool = False, trainable_only: bool = False
    ) -> None:
        """Write the whole state of the training, atomically.

        The file loads with `torch.load(path, weights_only=True)`; see `docs/state.md`.

        Args:
            path: the file.
            weights_only: module and hyperparameters alone; no training can go on from it.
            trainable_only: of the module only the parameters that are trained, and buffers.

        Raises:
            RuntimeError: nothing is trained yet.
            TypeError: a state that a safe load could not read back.
            OSError: the file cannot be written; the previous one is then intact.
        """
        if self.module is None or self.training is None:
            raise RuntimeError("there is nothing to save yet: call fit first")
        with self.profiled_as("checkpoint"):
            for logger in self.loggers:
                logger.flush()
            state = snapshot.take(self, weights_only, trainable_only)
            self.module.on_save_checkpoint(state)
            for callback in self.callbacks:
                callback.on_save_checkpoint(self, self.module, state)
            snapshot.write(self, path, state)

    def report(self, path: str | Path | None = None) -> Path:
        """Write one self-contained `report.html`: curves, settings, environment.

        Args:
            path: the file; by default in `default_root_dir`.

        Returns:
            Where it was written.
        """
        target = self.default_root_dir / "report.html" if path is None else Path(path)
        module = self.module
        settings = report.configuration(
            self.arguments,
            self.strategy,
            self.optimizers,
            {} if module is None else module.hparams,
        )
        title = "Training" if module is None else type(module).__name__
        return report.write(target, self.history, settings, report.environment(), title)

    # -- what loops and callbacks read ---------------------------------------------------------

    @property
    def world(self) -> World | None:
        """The ranks of the job; None where this process is all of it."""
        return self.strategy.world

    @property
    def global_rank(self) -> int:
        """The rank of this process in the job."""
        world = self.world
        return 0 if world is None else world.rank

    @property
    def local_rank(self) -> int:
        """Its rank on this machine."""
        world = self.world
        return 0 if world is None else world.local_rank

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        world = self.world
        return 1 if world is None else world.size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0, which alone prints and writes."""
        return self.global_rank == 0

    def clock(self) -> float:
        """Seconds on a clock that all ranks agree on: as of the last message between them."""
        world = self.world
        return time.monotonic() if world is None else world.agreed.clock

    def asked_to_stop(self) -> bool:
        """Whether the training is to end: `should_stop`, on any rank. Every rank must ask."""
        world = self.world
        if world is not None:
            world.mine.stop = self.should_stop
            world.agree("whether to go on")
            self.should_stop = world.agreed.stop
        return self.should_stop

    @property
    def current_epoch(self) -> int:
        """The epoch that runs, from 0."""
        return getattr(self.fit_loop or self.loop, "epoch", self._resumed_epoch)

    @property
    def optimizers(self) -> dict[str, NamedOptimizer]:
        """Name -> optimizer with its schedulers and clipping."""
        return {} if self.training is None else self.training.optimizers

    @property
    def updates(self) -> dict[str, int]:
        """Name -> how often this optimizer was updated."""
        return {} if self.training is None else self.training.stepper.updates

    @property
    def samples_seen(self) -> int | None:
        """The samples trained on; None where nobody knows how many there are."""
        return 0 if self.training is None else self.training.samples_seen

    @property
    def stage(self) -> str | None:
        """`"fit"`, `"validate"`, `"test"`, `"predict"`, or None between runs."""
        return None if self.run_in_progress is None else self.run_in_progress.stage

    @property
    def sanity_checking(self) -> bool:
        """Whether these are the validation batches before training."""
        return self.evaluation.sanity_checking

    @property
    def num_evaluation_batches(self) -> list[float]:
        """Batches of each loader of the evaluation that runs."""
        return self.evaluation.numbers

    @property
    def exception(self) -> BaseException | None:
        """What the run fails with, while its end hooks run; None otherwise."""
        call = getattr(self, "call", None)
        return None if call is None else call.exception

    @property
    def interrupted(self) -> int:
        """The number of a signal that will end the run at the next step boundary, or 0."""
        return 0 if self.run_in_progress is None else self.run_in_progress.signals.received

    @property
    def max_epochs(self) -> int | None:
        """The limit of epochs; None for none."""
        return self.limits.max_epochs

    @property
    def max_steps(self) -> int:
        """The limit of steps; -1 for none."""
        return -1 if self.limits.max_steps is None else self.limits.max_steps

    @property
    def estimated_stepping_batches(self) -> int | float:
        """How many steps the fit will take; infinity where nobody knows."""
        steps = math.inf if self.limits.max_steps is None else self.limits.max_steps
        epochs = self.limits.max_epochs
        if epochs is None or self.num_training_batches == math.inf:
            return steps
        an_epoch = math.ceil(self.num_training_batches / self.accumulate_grad_batches)
        found: int | float = min(steps, an_epoch * epochs)
        return found

    @property
    def callback_metrics(self) -> dict[str, torch.Tensor]:
        """Everything logged so far, by name, as 0-dim float64 tensors; waits for the device."""
        return _tensors(self.known_values())

    @property
    def logged_metrics(self) -> dict[str, torch.Tensor]:
        """What the loggers would get now, as 0-dim float64 tensors; waits for the device."""
        return _tensors(
            {
                **self.logs.step_values(),
                **self.logs.epoch_values(),
                **self.evaluation.logs.epoch_values(),
            }
        )

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """What was logged with `prog_bar=True`; waits for the device."""
        return {**self.logs.bar_values(), **self.evaluation.logs.bar_values()}

    def known_values(self) -> dict[str, float]:
        """Everything logged so far, by name; waits for the device."""
        return {**self.logs.all_values(), **self.evaluation.logs.all_values()}

    @property
    def logger(self) -> Logger | None:
        """The first logger."""
        return self.loggers[0] if self.loggers else None

    @property
    def checkpoint_callbacks(self) -> list[ModelCheckpoint]:
        """The callbacks that write checkpoints."""
        return [one for one in self.callbacks if isinstance(one, ModelCheckpoint)]

    @property
    def checkpoint_callback(self) -> ModelCheckpoint | None:
        """The first of them."""
        return next(iter(self.checkpoint_callbacks), None)

    def print(self, *values: Any, **options: Any) -> None:
        """As `print`, once per job."""
        if self.is_global_zero:
            print(*values, **options)

    def describe_batch(self, batch: Any) -> str | None:
        """How a loader's batch is cut, `32 = 2 threads x 16`; None where its size is not known."""
        assert self.module is not None
        rows = self.call.rows
        if rows is not None and rows.batch is batch:  # the hooks see no more of it
            return None if rows.sizes is None else self.strategy.describe(sum(rows.sizes))
        try:
            samples = batch_size(self.module, batch)
        except (TypeError, ValueError):  # if somebody needs the size, the step will say so
            return None
        return self.strategy.describe(samples)

    # -- what loops call -----------------------------------------------------------------------

    def between_steps(self) -> None:
        """Between two steps, where nothing is half done: a signal that came is obeyed now.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: after SIGTERM (143) or SIGUSR1 (138).
        """
        run = self.run_in_progress
        if run is None:
            return
        world = self.strategy.world
        if world is None:
            if run.signals.received:
                run.signals.obey()
            return
        if self._heard is not self.logs:  # an evaluation, whose steps need not tell each other
            world.mine.signal = run.signals.received
            world.agree("an evaluation, between two batches")
        if world.agreed.signal:
            run.signals.received = world.agreed.signal
            world.mine.signal = world.agreed.signal = 0
            world.ending = True
            run.signals.obey()

    def end_epoch(self, whole: bool = True) -> None:
        """The end of a training epoch: means, and what went unused.

        Args:
            whole: False where the epoch was left before its end: it may go on.
        """
        self._whole_epoch = whole
        self._exchange(whole=True)
        self.logs.end_epoch(whole)
        if whole:
            training = self.training
            assert training is not None
            training.warn_of_idle(self.current_epoch)

    def write_epoch(self) -> None:
        """Hand the epoch's means to the loggers, with what hooks have logged at its end."""
        self._exchange()
        self.logs.end_epoch(self._whole_epoch)
        self.write(self.logs.take_epoch(), self.logs.take_images())

    def settle_epoch(self) -> None:
        """After the hooks of an epoch's end, before its state is saved.

        Schedulers that count epochs step here: what they look at may be logged by these hooks.
        """
        self.write_epoch()
        if self._whole_epoch:
            assert self.training is not None
            self.training.step_epoch_schedules(self.current_epoch + 1)

    @contextmanager
    def hearing(self, logs: Logs) -> Iterator[None]:
        """What hooks log goes here."""
        self._heard, before = logs, self._heard
        try:
            yield
        finally:
            self._heard = before

    def profiled(self, name: str, iterable: Iterable[Any]) -> Iterable[Any]:
        """The same items, the time of getting each measured where there is a profiler."""
        if self.profiler is None:
            return iterable
        return self._profiled_items(name, iterable)

    def _profiled_items(self, name: str, iterable: Iterable[Any]) -> Iterator[Any]:
        iterator = iter(iterable)
        while True:
            with self.profiled_as(name):
                item = next(iterator, _END)
            if item is _END:
                return
            yield item

    def profiled_as(self, name: str) -> Any:
        """Around a part of the run whose time is measured, where there is a profiler."""
        return nullcontext() if self.profiler is None else self.profiler.span(name)

    # -- before a run --------------------------------------------------------------------------

    def _bring_along(self, kind: type[Callback], enabled: object) -> None:
        """Add a callback of the trainer's own, unless the user has passed one of its class."""
        if not isinstance(enabled, bool | None):
            name = {ProgressBar: "progress_bar", ModelSummary: "model_summary"}
            raise TypeError(
                f"enable_{name.get(kind, 'checkpointing')} must be True or False, got {enabled!r}"
            )
        if enabled is not False and not any(isinstance(one, kind) for one in self.callbacks):
            self._defaults.append(kind())
            self.callbacks.append(self._defaults[-1])

    def _refuse_to_run_twice(self, what: str) -> None:
        if self.run_in_progress is not None:
            raise RuntimeError(
                f"this trainer is running already: {what} cannot be called from its hooks or "
                "steps; use another Trainer there"
            )

    def _check(self, module: object, *methods: str) -> None:
        """Refuse what cannot be run, before any work."""
        if not isinstance(module, LoopModule):
            raise TypeError(
                f"expected a LoopModule, got {type(module).__name__}: derive it from "
                "composefit.LoopModule and give it training_step and configure_optimizers"
            )
        if "_modules" not in vars(module) or "_context" not in vars(module):
            raise TypeError(
                f"{type(module).__name__}.__init__ must begin with super().__init__(), which it "
                "does not call"
            )
        if not getattr(module, "automatic_optimization", True):
            module.automatic_optimization = False  # raises, and says what to write
        for method in methods:
            if not overridden(module, method):
                raise TypeError(
                    f"{type(module).__name__} defines no {method}; write\n\n"
                    + arguments.EXAMPLES[method]
                )

    def _prepare(
        self,
        stage: str,
        module: LoopModule | None,
        dataloaders: Any,
        datamodule: Any,
        ckpt_path: Any,
    ) -> tuple[LoopModule, Sources, snapshot.Found | None]:
        """What an evaluation runs with."""
        module, sources, ckpt_path = self._meant(stage, module, dataloaders, datamodule, ckpt_path)
        return module, sources, snapshot.read(self, ckpt_path)

    def _meant(
        self,
        stage: str,
        module: LoopModule | None,
        dataloaders: Any,
        datamodule: Any,
        ckpt_path: Any,
    ) -> tuple[LoopModule, Sources, Any]:
        """The module, data and checkpoint that an evaluation is of, where some were left out."""
        if module is None:
            if self.module is None:
                raise TypeError(f"trainer.{stage} needs a module: none was run before")
            module = self.module
            best = self.checkpoint_callback
            if ckpt_path is None and best is not None and best.best_model_path:
                ckpt_path = "best"
            if dataloaders is None and datamodule is None:
                datamodule = self.datamodule
        needed = {"validate": ("validation_step",), "test": ("test_step",), "predict": ()}[stage]
        self._check(module, *needed)
        name = "val" if stage == "validate" else stage
        sources = Sources.of(module, datamodule, **{name: dataloaders})
        sources.refuse(name, stage)
        self._refuse_to_run_twice(stage)
        return module, sources, ckpt_path

    def _evaluate(
        self,
        stage: Literal["validate", "test"],
        module: LoopModule | None,
        dataloaders: Any,
        ckpt_path: Any,
        verbose: bool,
        datamodule: Any,
    ) -> list[dict[str, float]]:
        if self._launches():
            given = {"dataloaders": dataloaders, "ckpt_path": ckpt_path, "verbose": verbose}
            given["datamodule"] = datamodule
            return self._launched(stage, module, given)  # type: ignore[no-any-return]
        name, limit = ("val", self.limit_val_batches)
        if stage == "test":
            name, limit = ("test", self.limit_test_batches)
        with in_job(self):
            module, sources, state = self._prepare(
                stage, module, dataloaders, datamodule, ckpt_path
            )
            self._attach(module, sources.datamodule)
        with running(self, module, stage, sources.datamodule):
            loop = EvaluateLoop(self._several(sources, name, limit), stage)
            snapshot.load_weights(self, module, state)
            self.strategy.place(module, self.precision.dtype)
            try:
                found = loop.run(self, module)
            finally:
                loop.close()
        bar = any(isinstance(one, ProgressBar) for one in self.callbacks)
        if verbose and bar and self.is_global_zero:
            print_results(stage, found)
        return found

    # -- a run ---------------------------------------------------------------------------------

    def _launches(self) -> bool:
        """Whether a run starts processes of its own, which do it all."""
        return self.strategy.processes_to_launch() is not None

    def _launched(self, stage: str, module: LoopModule | None, given: dict[str, Any]) -> Any:
        """An evaluation in processes of its own, of what could be evaluated here."""
        found, sources, given["ckpt_path"] = self._meant(
            stage, module, given["dataloaders"], given["datamodule"], given["ckpt_path"]
        )
        given["datamodule"] = sources.datamodule
        name = "val" if stage == "validate" else stage
        given["dataloaders"] = sources.given.get(name)
        return remote.call(self, stage, found, given)

    def _attach(self, module: LoopModule, datamodule: DataModule | None = None) -> None:
        if self.module is not module:
            self.module = module
            self.training = None
        self.datamodule = datamodule
        self.ready = self._unchecked = False
        self.evaluation.forget()
        self.evaluation.logs = Logs()
        self.seed_run(self._first_seed())
        module.trainer = self
        self._bring(arguments.callbacks(module.configure_callbacks()))
        self.call = HookCaller(self, module, self.callbacks, self._hear)

    def _bring(self, callbacks: list[Callback]) -> None:
        """Take in a module's callbacks, in place of those of the module before.

        They replace the trainer's own of the same kind, not those that the user passed.
        """
        kept = [one for one in self.callbacks if all(one is not other for other in self._brought)]
        replaced = tuple(type(one) for one in callbacks)
        self.callbacks = [
            one
            for one in kept
            if not (any(one is own for own in self._defaults) and isinstance(one, replaced))
        ]
        self.callbacks = _checkpoints_last([*self.callbacks, *callbacks])
        arguments.refuse_order(self.callbacks)
        self._brought = callbacks

    def _begin(self, module: LoopModule, loop: Loop, state: snapshot.Found | None) -> None:
        """Optimizers and counters of a training, and the state that it goes on from."""
        self.loop = loop
        if not loop.trains:
            snapshot.load_weights(self, module, state)
            self.strategy.place(module, self.precision.dtype)
            return
        self.fit_loop = loop if isinstance(loop, FitLoop) else None
        self.history.begin()
        self.restart(module)
        self._log_hyperparameters()
        if state is not None:
            snapshot.restore(self, *state)
        self.ready = True

    def _fit_loop(self, module: LoopModule, sources: Sources) -> FitLoop:
        limits = self.limits
        # With a limit of steps one epoch may be all there is: an endless stream will do then.
        epochs = math.inf if limits.max_epochs is None else limits.max_epochs
        if limits.max_steps is not None or limits.max_time is not None:
            epochs = 1
        sequential = bool(self.overfit_batches)

        def training() -> Batches:
            name, limit = "train_dataloaders", self.limit_train_batches
            return self._batches(module, sources.loader("train"), name, limit, epochs, sequential)

        def validating() -> list[Batches]:
            return self._several(sources, "val", self.limit_val_batches, epochs)

        validate = None
        if self.limit_val_batches != 0 and self._validates(module, sources):
            validate = EvaluateLoop(validating())
        train = TrainEpochLoop(
            training(),
            validate,
            val_check_interval=self.val_check_interval,
            check_val_every_n_epoch=self.check_val_every_n_epoch,
        )

        def reload() -> None:
            train.reload(training(), validating() if validate is not None else [])

        self.num_training_batches = train.batches.number
        once = (
            any(one_shot(one.loader) is not None for one in validate.loaders) if validate else False
        )
        return FitLoop(
            train,
            # What can be iterated only once is not spent on a trial.
            sanity_batches=0 if once else self.num_sanity_val_steps,
            reload=reload,
            reload_every=self.reload_dataloaders_every_n_epochs,
        )

    def _validates(self, module: LoopModule, sources: Sources) -> bool:
        if sources.given.get("val") is not None:
            self._check(module, "validation_step")
            return True
        if not sources.has("val"):
            return False
        if overridden(module, "validation_step"):
            return True
        warnings.warn(
            f"there is a val_dataloader, and {type(module).__name__} has no validation_step: "
            "nothing is validated",
            stacklevel=4,
        )
        return False

    def _several(
        self, sources: Sources, stage: str, limit: int | float | None, epochs: float = 1
    ) -> list[Batches]:
        name = "val_dataloaders" if stage == "val" else f"{stage}_dataloaders"
        sequential = stage != "predict" and bool(self.overfit_batches)
        module = sources.module
        return [
            self._batches(module, one, name, limit, epochs, sequential)
            for one in sources.loaders(stage)
        ]

    def compare_streams(self, batches: Batches) -> None:
        """In the first step of an epoch: ranks that read one loader must read the same from it.

        Raises:
            ValueError: they do not.
        """
        world = self.world
        if world is None:
            return
        found = world.agree(f"the first batch of {batches.name}", batches.fingerprint())
        other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
        if other is not None:
            raise ValueError(
                f"{batches.name} gives other samples on rank {other} than on rank 0, and "
                "each takes its rows of every batch: some would be trained on twice, "
                "others never. Make the data after seed_everything(seed), or the same way on all "
                "ranks; if the dataset divides itself over the ranks, say so by "
                "composefit.PerRank(loader)"
            )

    def _batches(
        self,
        module: LoopModule,
        loader: Any,
        name: str,
        limit: int | float | None,
        epochs: float,
        sequential: bool,
    ) -> Batches:
        world = self.world
        if world is None:
            return Batches(loader, name, limit, epochs, sequential)

        def anybody(has_batch: bool) -> bool:
            return any(there for (there,) in world.agree(f"a batch of {name}", has_batch))

        return Batches(
            loader,
            name,
            limit,
            epochs,
            sequential,
            ranks=(world.rank, world.size),
            group=module.samples_per_group,
            dim=module.batch_dim,
            agree=anybody,
        )

    def _first_seed(self) -> int:
        if self.seed is not None:
            return int(self.seed)
        world = self.world
        seed: int = torch.initial_seed()
        if world is not None:
            seed = int(world.broadcast("the seed of the run", seed))
        return seed

    def seed_run(self, seed: int) -> None:
        """Let all random draws of the run follow from this seed from now on."""
        self.run_seed = seed
        if self.training is not None:
            self.training.driver.seed_anew(seed)

    def driver(self, module: LoopModule, body: Body, stepper: Stepper | None) -> Lockstep:
        """What runs steps of this module, with the trainer's settings, until the run is over."""
        driver = self.driver_class(
            module,
            self.strategy,
            body,
            self.precision,
            stepper,
            self.microbatch_size,
            self.run_seed,
        )
        if self.rank_metrics is not None:
            driver.around_once = self.rank_metrics.whole
        if self.run_in_progress is not None:
            self.run_in_progress.sessions.enter_context(driver.session())
        return driver

    # -- logging -------------------------------------------------------------------------------

    def write_step(self) -> None:
        """Hand the last step's values to the loggers; the history also gets what moves training."""
        self._exchange()
        self.write(self.logs.take_steps(), self.logs.take_images())
        training = self.training
        assert training is not None
        own = {**self._own_norms(), **training.rates()}
        if training.samples_seen is not None:
            own["samples_per_second"] = training.rate()
        self._write_own(own)

    def _exchange(self, whole: bool = False) -> None:
        """Let all ranks know what all have logged; with `whole`, all that metrics have counted."""
        world = self.world
        if world is not None:
            self.logs.exchange(world, self.rank_metrics, whole)

    def _own_norms(self) -> dict[str, float]:
        """The norms that the last step was due; waits for the device."""
        assert self.training is not None
        found, self.training.norms = self.training.norms, {}
        return {f"grad_norm/{name}": float(norm) for name, norm in found.items()}

    def _write_own(self, values: dict[str, float]) -> None:
        """Add to the history, but for what a callback logs under the same name."""
        left = {name: value for name, value in values.items() if name not in self.logs}
        self.history.log_metrics({"epoch": self.current_epoch, **left}, self.global_step)

    def _log_hyperparameters(self) -> None:
        """Hand those of the module and of its data module to the loggers, as one."""
        found: dict[str, Any] = {}
        for one in (self.module, self.datamodule):
            if one is None or not one.hparams:
                continue
            own = dict(one.hparams)
            checkpoint.refuse_hyperparameters(own)
            if vars(one).get("_log_hparams", True):
                twice = [
                    name for name in own if repr(found.get(name, own[name])) != repr(own[name])
                ]
                if twice:
                    raise ValueError(
                        f"the hyperparameters {twice} of module and data module have one name and "
                        "different values: rename them, or write "
                        "save_hyperparameters(logger=False) in one of both"
                    )
                found |= own
        if found:
            for logger in self.loggers:
                logger.log_hyperparams(dict(found))

    def write(self, values: dict[str, float], images: dict[str, Any] | None = None) -> None:
        """Hand numbers and pictures to the loggers and the history."""
        if values:
            row = {"epoch": self.current_epoch, **values}
            for logger in (*self.loggers, self.history):
                logger.log_metrics(row, self.global_step)
        for name, image in (images or {}).items():
            for logger in (*self.loggers, self.history):
                logger.log_image(name, image, self.global_step)

    def _hear(self, logs: dict[str, Logged]) -> None:
        """After hooks: take what they have logged."""
        self._heard.add_hook(logs)


_END = object()


def _checkpoints_last(callbacks: list[Callback]) -> list[Callback]:
    """In their order, but those that write checkpoints after all others."""
    return sorted(callbacks, key=lambda one: isinstance(one, ModelCheckpoint))


def _tensors(values: dict[str, float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
