"""`Trainer`: builds strategy, loops, callbacks and logger from keyword arguments, and runs them."""

from __future__ import annotations

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from composefit import arguments, checkpoint, tree
from composefit.callbacks import Callback, LastCheckpoint, ModelSummary, ProgressBar
from composefit.data import Batches
from composefit.hooks import HookCaller
from composefit.lockstep.contract import Body
from composefit.lockstep.driver import Lockstep
from composefit.lockstep.scatter import batch_size
from composefit.lockstep.shard import Shard
from composefit.lockstep.stepper import OnNonfinite, Stepper
from composefit.loggers import Logger
from composefit.logs import Logs
from composefit.loops import EvaluateLoop, FitLoop, TrainEpochLoop
from composefit.module import Logged, LoopModule
from composefit.optimizers import ClipAlgorithm, NamedOptimizer, Schedule, read_optimizers
from composefit.precision import Precision
from composefit.strategies import Strategy, choose

__all__ = ["Trainer"]

#: Changes when older checkpoints cannot be read as they are.
CHECKPOINT_FORMAT = 1


class Trainer:
    """Trains a `LoopModule` under a strategy.

    Args:
        strategy: how a step is carried out: a `Strategy`, or `"auto"`, `"single"`, `"threads"`.
        precision: `"32"`, `"64"`, `"bf16-mixed"`, `"bf16-true"`, `"16-mixed"`.
        max_epochs: stop after this many passes over the loader; None for no limit. Default: 1000,
            or no limit where `max_steps` is given, as in Lightning.
        max_steps: stop after this many steps (not optimizer calls); -1 for no limit.
        accumulate_grad_batches: loader batches in a step; exact on a short last window.
        microbatch_size: no shard holds more samples than this: less memory, the same result.
        gradient_clip_val: the largest norm (or value) of each optimizer's gradients; an
            `OptimizerConfig` overrides it.
        gradient_clip_algorithm: `"norm"` or `"value"`.
        limit_train_batches: loader batches an epoch: a number, or a fraction as a float.
        limit_val_batches: the same for validation.
        log_every_n_steps: hand logged values to the logger at every n-th step.
        callbacks: one or several, in the order in which their hooks run.
        logger: True for a `CSVLogger` in `default_root_dir`, False for none, or one or several.
        enable_progress_bar: show a bar, or plain lines where there is no terminal.
        enable_model_summary: print a table of parameters and optimizers before training.
        enable_checkpointing: keep `default_root_dir/last.ckpt`.
        default_root_dir: where files go.
        seed: of every random draw; None takes torch's (`torch.manual_seed`).
        deterministic: `torch.use_deterministic_algorithms` for the run.
        on_nonfinite: what a NaN or infinite loss or gradient does: `"raise"` before any weight
            changes, `"skip"` the update, or `"ignore"`.

    Raises:
        TypeError, ValueError: an unknown argument, or a value that cannot be.

    Attributes:
        global_step: the steps done.
        current_epoch: the epoch that runs, from 0.
        updates: name -> how often an optimizer was updated.
        optimizers: name -> optimizer with its schedulers and clipping.
        samples_seen: the samples trained on; None where nobody knows how many there are.
        should_stop: set it to end the fit after the step that runs.
        call: `call(hook, *arguments)` runs a hook of the callbacks, then of the module.
    """

    def __init__(
        self,
        *,
        strategy: str | Strategy = "auto",
        precision: str | int = "32",
        max_epochs: int | None = None,
        max_steps: int = -1,
        accumulate_grad_batches: int = 1,
        microbatch_size: int | None = None,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: ClipAlgorithm | None = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        log_every_n_steps: int = 50,
        callbacks: Callback | Sequence[Callback] | None = None,
        logger: bool | Logger | Sequence[Logger] | None = True,
        enable_progress_bar: bool = True,
        enable_model_summary: bool = True,
        enable_checkpointing: bool = True,
        default_root_dir: str | Path = "runs",
        seed: int | None = None,
        deterministic: bool = False,
        on_nonfinite: OnNonfinite = "raise",
        **unknown: Any,
    ) -> None:
        arguments.refuse_unknown(Trainer.__init__, unknown)
        count, flag = arguments.count, arguments.flag
        self.strategy = choose(strategy)
        self.precision = Precision.of(precision)
        self.max_epochs = count("max_epochs", max_epochs, least=0, none=True)
        self.max_steps = count("max_steps", max_steps, least=-1)
        if max_epochs is None and self.max_steps < 0:
            self.max_epochs = 1000
        elif self.max_epochs == -1:
            self.max_epochs = None
        self.accumulate_grad_batches = count("accumulate_grad_batches", accumulate_grad_batches)
        self.microbatch_size = count("microbatch_size", microbatch_size, none=True)
        self.gradient_clip_val = arguments.positive("gradient_clip_val", gradient_clip_val)
        if gradient_clip_algorithm not in (None, "norm", "value"):
            raise ValueError(
                "gradient_clip_algorithm must be 'norm' or 'value', "
                f"got {gradient_clip_algorithm!r}"
            )
        self.gradient_clip_algorithm: ClipAlgorithm = gradient_clip_algorithm or "norm"
        self.limit_train_batches = arguments.limit("limit_train_batches", limit_train_batches)
        self.limit_val_batches = arguments.limit("limit_val_batches", limit_val_batches)
        self.log_every_n_steps = count("log_every_n_steps", log_every_n_steps)
        if on_nonfinite not in ("raise", "skip", "ignore"):
            raise ValueError(
                f"on_nonfinite must be 'raise', 'skip' or 'ignore', got {on_nonfinite!r}"
            )
        self.on_nonfinite = on_nonfinite
        self.default_root_dir = arguments.path("default_root_dir", default_root_dir)
        self.seed = count("seed", seed, least=0, none=True)
        self.deterministic = flag("deterministic", deterministic)
        self.callbacks = arguments.callbacks(callbacks)
        self._bring_along(ModelSummary, flag("enable_model_summary", enable_model_summary))
        self._bring_along(ProgressBar, flag("enable_progress_bar", enable_progress_bar))
        self._bring_along(LastCheckpoint, flag("enable_checkpointing", enable_checkpointing))
        self.loggers = arguments.loggers(logger, self.default_root_dir)

        self.global_step = 0
        self.should_stop = False
        self.is_global_zero = True
        self.optimizers: dict[str, NamedOptimizer] = {}
        self.fit_loop: FitLoop | None = None
        self.validate_loop: EvaluateLoop | None = None
        self.module: LoopModule | None = None
        self.num_training_batches: float = math.inf
        self.num_val_batches: float = math.inf
        self.samples_seen: int | None = 0
        self.logs = self._current_logs = Logs()
        self.evaluation_logs = Logs()
        self.call: HookCaller
        self._sessions: ExitStack | None = None
        self._training: Lockstep | None = None
        self._evaluating: Lockstep | None = None
        self._stepper: Stepper | None = None
        self._monitors: list[tuple[str, Schedule]] = []
        self._epoch_updates: Counter[str] = Counter()
        self._epoch_steps = 0
        self._samples_per_batch: int | None = None

    # -- what a user calls ---------------------------------------------------------------------

    def fit(
        self,
        module: LoopModule,
        train_dataloaders: Any,
        val_dataloaders: Any = None,
    ) -> None:
        """Train a module.

        Args:
            module: is trained in place.
            train_dataloaders: an iterable of batches that can be iterated again for every epoch,
                or a dict of such (the batch is then a dict of theirs). A batch is the whole
                world's, whatever the strategy.
            val_dataloaders: what `validation_step` runs over after every epoch.

        Raises:
            TypeError, ValueError: module, optimizers or loaders that cannot be, before any work.
            Whatever the module's code raises, with a note of the shard, effect and step.
        """
        # With a limit of steps one epoch may be all there is: an endless stream will do then.
        no_limit = math.inf if self.max_epochs is None else self.max_epochs
        epochs = 1 if self.max_steps >= 0 else no_limit
        train = Batches(train_dataloaders, "train_dataloaders", self.limit_train_batches, epochs)
        self._check(module, "training_step", "configure_optimizers")
        val = None
        if val_dataloaders is not None:
            val = Batches(val_dataloaders, "val_dataloaders", self.limit_val_batches, epochs)
            self._check(module, "validation_step")
        with self._running(module, "fit"):
            self._start_training(module)
            self.num_training_batches = train.number
            epoch = TrainEpochLoop(
                self,
                module,
                train,
                self.accumulate_grad_batches,
                math.inf if self.max_steps < 0 else self.max_steps,
            )
            validate = None if val is None else self._evaluation(module, val)
            self.fit_loop = FitLoop(self, self.max_epochs, epoch, validate)
            self.fit_loop.run()
            assert self._stepper is not None
            self._stepper.finish()

    def validate(self, module: LoopModule, dataloaders: Any) -> dict[str, float]:
        """Run `validation_step` over a loader.

        Args:
            module: is evaluated, without gradients.
            dataloaders: an iterable of batches.

        Returns:
            name -> the mean over the loader of what was logged, weighted by samples.
        """
        val = Batches(dataloaders, "val_dataloaders", self.limit_val_batches)
        self._check(module, "validation_step")
        with self._running(module, "validate"):
            self.strategy.place(module, self.precision.dtype)
            return self._evaluation(module, val).run()

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
        if self.module is not module or self._training is None:
            self._check(module, "training_step", "configure_optimizers")
            self._attach(module)
            self._start_training(module)
        elif module.trainer is not self:  # another trainer has had it in the meantime
            module.trainer = self
        driver = self._training
        assert driver is not None
        shards = driver.step(batches, batch_idx, self.global_step)
        self.global_step += 1
        self._epoch_steps += 1
        if self.samples_seen is not None:
            self._count_samples(shards, batches)
        self.logs.add(shards)
        if self._monitors:
            self._step_monitors()
        if self.loggers and self.global_step % self.log_every_n_steps == 0:
            self._write(self.logs.step_values())
        losses = driver.losses
        if len(self.optimizers) == 1:
            return {"loss": next(iter(losses.values()))} if losses else {}
        return losses

    def evaluate(self, module: LoopModule, batch: Any, batch_idx: int = 0) -> Any:
        """One evaluation step: what a loop calls.

        Returns:
            What the step returned, joined over shards; within `fit` and `validate` None, where
            several shards have returned something and no `on_validation_batch_end` asks for it.
        """
        driver = self._evaluating
        if driver is None or driver.owner is not module:
            body = Body.method(module, "validation_step", training=False)
            driver = self._evaluating = self._driver(module, body, None)
        shards = driver.step([batch], batch_idx, batch_idx)
        self.evaluation_logs.add(shards)
        if self.loggers and (batch_idx + 1) % self.log_every_n_steps == 0:
            self._write(self.evaluation_logs.step_values())
        outputs = [shard.output for shard in shards]
        if len(outputs) == 1:
            return outputs[0]
        if self._sessions is not None and not self.call.anybody("on_validation_batch_end", 3):
            return None  # what cannot be joined does no harm where nobody looks at it
        return tree.join(outputs)

    def save_checkpoint(self, path: str | Path) -> None:
        """Write module, optimizers, schedulers, loss scales, loops and callbacks, atomically.

        The file loads with `torch.load(path, weights_only=True)`.

        Raises:
            RuntimeError: nothing is trained yet.
            TypeError: a state that a safe load could not read back.
            OSError: the file cannot be written; the previous one is then intact.
        """
        if self.module is None or self._stepper is None:
            raise RuntimeError("there is nothing to save yet: call fit first")
        callbacks = {
            f"{i}.{type(c).__name__}": c.state_dict() for i, c in enumerate(self.callbacks)
        }
        named = self.optimizers.items()
        state = {
            "composefit_checkpoint": CHECKPOINT_FORMAT,
            "module": self.module.state_dict(),
            "optimizers": {name: one.optimizer.state_dict() for name, one in named},
            "schedulers": {
                name: [s.scheduler.state_dict() for s in one.schedulers] for name, one in named
            },
            "loss_scales": {n: scale.state_dict() for n, scale in self._stepper.scales.items()},
            "updates": dict(self.updates),
            "global_step": self.global_step,
            "loops": {} if self.fit_loop is None else self.fit_loop.state_dict(),
            "callbacks": {name: found for name, found in callbacks.items() if found},
        }
        checkpoint.save(path, state)

    # -- what loops and callbacks read ---------------------------------------------------------

    @property
    def current_epoch(self) -> int:
        """The epoch that runs, from 0."""
        return 0 if self.fit_loop is None else self.fit_loop.epoch

    @property
    def updates(self) -> dict[str, int]:
        """Name -> how often this optimizer was updated."""
        return {} if self._stepper is None else self._stepper.updates

    @property
    def callback_metrics(self) -> dict[str, float]:
        """Everything logged so far, by name; waits for the device."""
        return {**self.logs.all_values(), **self.evaluation_logs.all_values()}

    @property
    def logged_metrics(self) -> dict[str, float]:
        """What the loggers would get now; waits for the device."""
        return self.logs.step_values()

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """What was logged with `prog_bar=True`; waits for the device."""
        return {**self.logs.bar_values(), **self.evaluation_logs.bar_values()}

    def describe_batch(self, batch: Any) -> str | None:
        """How a loader's batch is cut, `32 = 2 threads x 16`; None where its size is not known."""
        assert self.module is not None
        try:
            samples = batch_size(self.module, batch)
        except (TypeError, ValueError):  # if somebody needs the size, the step will say so
            return None
        return self.strategy.describe(samples)

    # -- what loops call -----------------------------------------------------------------------

    def end_epoch(self) -> None:
        """The end of a training epoch: means, schedulers by epoch, and what went unused."""
        self.logs.end_epoch()
        self._warn_of_idle()
        for one in self.optimizers.values():
            for schedule in one.schedulers:
                if schedule.interval == "epoch" and schedule.due(self.current_epoch + 1):
                    self._step_schedule(one.name, schedule)

    def write_epoch(self) -> None:
        """Hand the epoch's means to the loggers, with what hooks have logged at its end."""
        self.logs.end_epoch()
        self._write(self.logs.take_epoch())

    @contextmanager
    def evaluation(self, module: LoopModule) -> Iterator[None]:
        """Around a validation: no gradients, all parts in evaluation mode, logs of its own."""
        modes = {part: part.training for part in module.modules()}
        module.eval()
        self._current_logs = self.evaluation_logs
        try:
            with torch.no_grad():
                yield
        finally:
            self._current_logs = self.logs
            for part, training in modes.items():
                part.training = training

    def end_evaluation(self) -> None:
        """The end of a validation: its means are known."""
        self.evaluation_logs.end_epoch()

    def write_evaluation(self) -> dict[str, float]:
        """Hand a validation's means to the loggers, with what hooks have logged at its end."""
        self.evaluation_logs.end_epoch()
        self._write(self.evaluation_logs.take_epoch())
        return self.evaluation_logs.all_values()

    # -- building ------------------------------------------------------------------------------

    def _bring_along(self, kind: type[Callback], enabled: bool) -> None:
        """Add a callback of the trainer's own, unless the user has passed one of its class."""
        if enabled and not any(isinstance(one, kind) for one in self.callbacks):
            self.callbacks.append(kind())

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
        for method in methods:
            if getattr(type(module), method) is getattr(LoopModule, method) and (
                method not in vars(module)
            ):
                raise TypeError(
                    f"{type(module).__name__} defines no {method}; write\n\n" + _EXAMPLES[method]
                )

    def _attach(self, module: LoopModule) -> None:
        if self.module is not module:
            self.module = module
            self._training = self._stepper = None
            self.optimizers = {}
        self._evaluating = None
        self.evaluation_logs = Logs()
        module.trainer = self
        self.call = HookCaller(self, module, self.callbacks, self._hear)

    @contextmanager
    def _running(self, module: LoopModule, stage: str) -> Iterator[None]:
        """Around a run: seed and settings, exceptions told to callbacks, everything put back."""
        if self._sessions is not None:
            raise RuntimeError(
                f"this trainer is running already: {stage} cannot be called from its hooks or "
                "steps; use another Trainer there"
            )
        self._attach(module)
        with ExitStack() as stack:
            stack.enter_context(self.strategy.session())
            if self.seed is not None:
                torch.manual_seed(self.seed)
            if self.deterministic:
                stack.enter_context(_deterministic())
            self._sessions = stack
            stack.callback(setattr, self, "_sessions", None)
            try:
                self.call("setup", stage)
                yield
            except BaseException as error:
                for hook in self.call.hooks("on_exception", 1):
                    _despite(error, partial(hook, error))
                self._wind_up(stage, error)
                raise
            self._wind_up(stage, None)

    def _wind_up(self, stage: str, error: BaseException | None) -> None:
        """Tear down everything, whatever a part of it raises: the first error is the one raised."""
        status = "finished" if error is None else "failed"
        hooks = [partial(hook, stage) for hook in self.call.hooks("teardown", 1)]
        for task in [*hooks, *(partial(one.finalize, status) for one in self.loggers)]:
            if error is not None:
                _despite(error, task)
                continue
            try:
                task()
            except Exception as raised:
                error = raised
        if error is not None and status == "finished":
            raise error

    def _start_training(self, module: LoopModule) -> None:
        """New counters, logs and optimizers; the weights stay."""
        self.global_step = 0
        self.should_stop = False
        self.samples_seen = 0
        self.logs = self._current_logs = Logs()
        self.fit_loop = self.validate_loop = None
        self._monitors.clear()
        self._epoch_updates.clear()
        self._epoch_steps = 0
        self._samples_per_batch = None
        self.strategy.place(module, self.precision.dtype)
        self.optimizers = read_optimizers(module.configure_optimizers(), module)
        for one in self.optimizers.values():
            _refuse_closure(one)
            if one.gradient_clip_val is None:
                one.gradient_clip_val = self.gradient_clip_val
            if one.gradient_clip_val == math.inf:
                one.gradient_clip_val = None
            if one.gradient_clip_algorithm is None:
                one.gradient_clip_algorithm = self.gradient_clip_algorithm
        self._stepper = Stepper(
            module,
            self.optimizers,
            self.precision,
            self.strategy.device,
            self.strategy.optimizer_step,
            self,
            self.on_nonfinite,
        )
        body = Body.method(module, "training_step", training=True)
        self._training = self._driver(module, body, self._stepper)
        if not module.training:  # else parts in evaluation mode, a frozen teacher say, stay in it
            module.train()

    def _driver(self, module: LoopModule, body: Body, stepper: Stepper | None) -> Lockstep:
        seed = torch.initial_seed() if self.seed is None else self.seed
        driver = Lockstep(
            module, self.strategy, body, self.precision, stepper, self.microbatch_size, seed
        )
        if self._sessions is not None:
            self._sessions.enter_context(driver.session())
        return driver

    def _evaluation(self, module: LoopModule, batches: Batches) -> EvaluateLoop:
        self.num_val_batches = batches.number
        self.validate_loop = EvaluateLoop(self, module, batches)
        return self.validate_loop

    # -- counting and logging ------------------------------------------------------------------

    def _count_samples(self, shards: Sequence[Shard], batches: Sequence[Any]) -> None:
        """For samples per second; the size of batches that nobody cut is asked once at most."""
        assert self.samples_seen is not None and self.module is not None
        sizes = [shard.known_samples for shard in shards]
        if None in sizes:
            sizes = [self._samples_per_batch] * len(batches)
        if None in sizes:
            if not any(isinstance(one, ProgressBar) for one in self.callbacks):
                self.samples_seen = None
                return
            try:
                sizes = [batch_size(self.module, batch) for batch in batches]
            except Exception:  # no step needs the size, so the module need not tell it
                self.samples_seen = None
                return
            self._samples_per_batch = sizes[0]
        self.samples_seen += sum(size for size in sizes if size is not None)

    def _write(self, values: dict[str, float]) -> None:
        if values:
            for logger in self.loggers:
                logger.log_metrics({"epoch": self.current_epoch, **values}, self.global_step)

    def _hear(self, logs: dict[str, Logged]) -> None:
        """After hooks: take what they have logged."""
        self._current_logs.add_hook(logs)

    def _warn_of_idle(self) -> None:
        """Warn of optimizers that no step of the epoch has updated."""
        stepper = self._stepper
        assert stepper is not None
        idle = [n for n, updates in stepper.updates.items() if updates == self._epoch_updates[n]]
        if self._epoch_steps and len(idle) == len(stepper.updates):
            warnings.warn(
                f"none of the {self._epoch_steps} steps of epoch {self.current_epoch} updated "
                "anything: training_step returned None, or ended without a yield, each time"
                + _left_out(stepper.left_out.total()),
                stacklevel=3,
            )
        elif self._epoch_steps:
            for name in idle:
                warnings.warn(
                    f"optimizer {name!r} was never updated in epoch {self.current_epoch}: no "
                    f"step yielded {{{name!r}: loss}}" + _left_out(stepper.left_out[name]),
                    stacklevel=3,
                )
        self._epoch_updates = Counter(stepper.updates)
        self._epoch_steps = 0
        stepper.left_out.clear()

    # -- an optimizer's step -------------------------------------------------------------------

    def before_optimizer_step(self, optimizer: Optimizer, name: str) -> None:
        """Hooks before an optimizer's step; the stepper calls it."""
        self.call("on_before_optimizer_step", optimizer, name)

    def after_optimizer_step(self, optimizer: Optimizer, name: str) -> None:
        """Schedulers that count updates, and hooks after a step; the stepper calls it."""
        for schedule in self.optimizers[name].schedulers:
            if schedule.interval == "step" and schedule.due(self.updates[name]):
                if schedule.monitor is None:
                    schedule.scheduler.step()
                else:  # what this step logs is known at its end
                    self._monitors.append((name, schedule))
        self.call("on_after_optimizer_step", optimizer, name)

    def _step_monitors(self) -> None:
        """At the end of a step: schedulers that count updates and look at a logged value."""
        waiting, self._monitors = self._monitors, []
        for name, schedule in waiting:
            self._step_schedule(name, schedule)

    def _step_schedule(self, name: str, schedule: Schedule) -> None:
        if schedule.monitor is None:
            schedule.scheduler.step()
            return
        known = self.callback_metrics
        if schedule.monitor in known:
            schedule.scheduler.step(known[schedule.monitor])
            return
        message = (
            f"the scheduler of optimizer {name!r} monitors {schedule.monitor!r}, which was never "
            f"logged; logged are {sorted(known)}"
        )
        if schedule.strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)


def _refuse_closure(one: NamedOptimizer) -> None:
    """Refuse an optimizer that evaluates the loss itself, such as `torch.optim.LBFGS`."""
    step = one.optimizer.step
    closure = inspect.signature(step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        kind = type(one.optimizer).__name__
        raise TypeError(
            f"optimizer {one.name!r} is {kind}, whose step(closure) evaluates the loss several "
            "times, while a step of training evaluates it once: give configure_optimizers an "
            "optimizer whose step() needs no closure, such as SGD or Adam"
        )


def _despite(error: BaseException, task: Callable[[], Any]) -> None:
    """Run what has to be done after an error; an error of its own must not hide the first."""
    try:
        task()
    except Exception as other:
        error.add_note(f"then {other!r} was raised as well")


def _left_out(count: int) -> str:
    return f", or its gradients were not finite ({count} times)" if count else ""


_EXAMPLES = {
    "training_step": """    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)
""",
    "configure_optimizers": """    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)
""",
    "validation_step": """    def validation_step(self, batch):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))
""",
}


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
