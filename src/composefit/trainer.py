"""`Trainer`: builds strategy, loops, callbacks and logger from keyword arguments, and runs them."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from composefit import checkpoint, tree
from composefit.callbacks import Callback, LastCheckpoint, ModelSummary, ProgressBar
from composefit.data import Batches, as_loader, number_of_batches
from composefit.hooks import HookCaller
from composefit.lockstep.driver import Body, Lockstep
from composefit.lockstep.scatter import batch_size
from composefit.lockstep.shard import Shard
from composefit.lockstep.stepper import OnNonfinite, Stepper
from composefit.loggers import CSVLogger, Logger
from composefit.logs import Logs
from composefit.loops import EvaluateLoop, FitLoop, TrainEpochLoop
from composefit.losses import describe
from composefit.module import Context, LoopModule
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
        _refuse_unknown(unknown)
        self.strategy = choose(strategy)
        self.precision = Precision.of(precision)
        self.max_epochs = _count("max_epochs", max_epochs, least=0, none=True)
        self.max_steps = _count("max_steps", max_steps, least=-1)
        if max_epochs is None and self.max_steps < 0:
            self.max_epochs = 1000
        elif self.max_epochs == -1:
            self.max_epochs = None
        self.accumulate_grad_batches = _count("accumulate_grad_batches", accumulate_grad_batches)
        self.microbatch_size = _count("microbatch_size", microbatch_size, none=True)
        self.gradient_clip_val = _positive("gradient_clip_val", gradient_clip_val)
        if gradient_clip_algorithm not in (None, "norm", "value"):
            raise ValueError(
                "gradient_clip_algorithm must be 'norm' or 'value', "
                f"got {gradient_clip_algorithm!r}"
            )
        self.gradient_clip_algorithm: ClipAlgorithm = gradient_clip_algorithm or "norm"
        self.limit_train_batches = _limit("limit_train_batches", limit_train_batches)
        self.limit_val_batches = _limit("limit_val_batches", limit_val_batches)
        self.log_every_n_steps = _count("log_every_n_steps", log_every_n_steps)
        if on_nonfinite not in ("raise", "skip", "ignore"):
            raise ValueError(
                f"on_nonfinite must be 'raise', 'skip' or 'ignore', got {on_nonfinite!r}"
            )
        self.on_nonfinite = on_nonfinite
        self.default_root_dir = _path("default_root_dir", default_root_dir)
        self.seed = _count("seed", seed, least=0, none=True)
        self.deterministic = _flag("deterministic", deterministic)
        self.callbacks = _callbacks(callbacks)
        if _flag("enable_model_summary", enable_model_summary):
            self.callbacks.append(ModelSummary())
        if _flag("enable_progress_bar", enable_progress_bar):
            self.callbacks.append(ProgressBar())
        if _flag("enable_checkpointing", enable_checkpointing):
            self.callbacks.append(LastCheckpoint())
        self.loggers = self._loggers(logger)

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
        self._epoch_values: dict[str, float] = {}
        self._sessions: ExitStack | None = None
        self._training: Lockstep | None = None
        self._evaluating: Lockstep | None = None
        self._stepper: Stepper | None = None
        self.call = HookCaller(self, None, self.callbacks, self._heard)
        self._hook_context = Context(None)
        self._hook_context.training = False  # what hooks log counts once an epoch
        self._epoch_updates: dict[str, int] = {}
        self._epoch_steps = 0
        self._samples_per_step: int | None = None

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
        train = Batches(as_loader(train_dataloaders, "train_dataloaders"), "train_dataloaders")
        self._check(module, "training_step", "configure_optimizers")
        self._start_run()
        with self._running(module, "fit"):
            self._prepare_training(module)
            self.num_training_batches = _limited(train, self.limit_train_batches)
            epoch = TrainEpochLoop(
                self,
                module,
                train,
                self.num_training_batches,
                self.accumulate_grad_batches,
                math.inf if self.max_steps < 0 else self.max_steps,
            )
            validate = None
            if val_dataloaders is not None:
                self._check(module, "validation_step")
                validate = self.validate_loop = self._evaluation(module, val_dataloaders)
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
        self._check(module, "validation_step")
        self._fresh_logs()
        with self._running(module, "validate"):
            self.strategy.place(module, self.precision.dtype)
            loop = self._evaluation(module, dataloaders)
            return loop.run()

    def step(self, module: LoopModule, batches: Sequence[Any], batch_idx: int = 0) -> Any:
        """One training step over these loader batches: what a loop calls.

        Outside of `fit` it prepares the module at the first call: optimizers are made, parameters
        placed.

        Args:
            module: is trained.
            batches: the loader batches of the step (one, without accumulation).
            batch_idx: the index of the first of them.

        Returns:
            name of each updated optimizer -> its reduced loss (0-dim, detached, on its device);
            `{"loss": loss}` where there is one optimizer.
        """
        if self.module is not module or self._training is None:
            self._check(module, "training_step", "configure_optimizers")
            self._start_run()
            self._attach(module)
            self._prepare_training(module)
        driver = self._training
        assert driver is not None
        shards = driver.step(batches, batch_idx, self.global_step)
        self.global_step += 1
        self._epoch_steps += 1
        if self.samples_seen is not None:
            self._count_samples(shards, batches)
        self.logs.add(shards)
        if self.loggers and self.global_step % self.log_every_n_steps == 0:
            self._write(self.logs.step_values())
        losses = driver.losses
        if len(self.optimizers) == 1:
            return {"loss": next(iter(losses.values()))} if losses else {}
        return losses

    def evaluate(self, module: LoopModule, batch: Any, batch_idx: int = 0) -> Any:
        """One evaluation step: what a loop calls; what the step returned, joined over shards."""
        driver = self._evaluating
        if driver is None:
            body = Body.method(module, "validation_step", training=False)
            driver = self._evaluating = self._driver(module, body, None)
        shards = driver.step([batch], batch_idx, batch_idx)
        self.evaluation_logs.add(shards)
        outputs = [shard.output for shard in shards]
        return outputs[0] if len(outputs) == 1 else tree.join(outputs)

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
        self._epoch_values = self.logs.end_epoch()
        stepper = self._stepper
        assert stepper is not None
        done = {n: stepper.updates[n] - self._epoch_updates.get(n, 0) for n in stepper.updates}
        self._epoch_updates = dict(stepper.updates)
        if self._epoch_steps and not any(done.values()):
            warnings.warn(
                f"none of the {self._epoch_steps} steps of epoch {self.current_epoch} updated "
                "anything: training_step returned None, or ended without a yield, each time"
                + _left_out(stepper.left_out.total()),
                stacklevel=2,
            )
        elif self._epoch_steps:
            for name, count in done.items():
                if not count:
                    warnings.warn(
                        f"optimizer {name!r} was never updated in epoch {self.current_epoch}: no "
                        f"step yielded {{{name!r}: loss}}" + _left_out(stepper.left_out[name]),
                        stacklevel=2,
                    )
        self._epoch_steps = 0
        stepper.left_out.clear()
        for one in self.optimizers.values():
            for schedule in one.schedulers:
                if schedule.interval == "epoch" and schedule.due(self.current_epoch + 1):
                    self._step_schedule(one.name, schedule)

    def begin_evaluation(self) -> None:
        """The start of a validation: what is logged from now on is its own."""
        self._current_logs = self.evaluation_logs

    def end_evaluation(self) -> dict[str, float]:
        """The end of a validation: its means, also handed to the loggers."""
        values = self.evaluation_logs.end_epoch()
        self._current_logs = self.logs
        self._write(values)
        return values

    def write_epoch(self) -> None:
        """Hand the epoch's means to the loggers."""
        self._write(self._epoch_values | self.logs.end_epoch())

    # -- building ------------------------------------------------------------------------------

    def _loggers(self, logger: bool | Logger | Sequence[Logger] | None) -> list[Logger]:
        if logger is True:
            return [CSVLogger(self.default_root_dir)]
        if not logger:
            return []
        found = list(logger) if isinstance(logger, Sequence) else [logger]
        for one in found:
            if not isinstance(one, Logger):
                raise TypeError(f"logger must be True, False or loggers, got {one!r}")
        return found

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

    def _start_run(self) -> None:
        self.global_step = 0
        self.should_stop = False
        self.samples_seen = 0
        self._fresh_logs()
        self._epoch_updates = {}
        self._epoch_steps = 0
        self._samples_per_step = None
        self.fit_loop = self.validate_loop = None

    def _attach(self, module: LoopModule) -> None:
        self.module = module
        self._training = self._evaluating = self._stepper = None
        module.trainer = self
        self.call = HookCaller(self, module, self.callbacks, self._heard)

    @contextmanager
    def _running(self, module: LoopModule, stage: str) -> Iterator[None]:
        """Around a run: seed, hooks' context, exceptions told to callbacks, everything put back."""
        self._attach(module)
        self._hook_context.logs = {}
        status = "failed"
        with ExitStack() as stack:
            stack.enter_context(self.strategy.session())
            if self.seed is not None:
                torch.manual_seed(self.seed)
            if self.deterministic:
                stack.enter_context(_deterministic())
            vars(module)["_context"] = self._hook_context
            stack.callback(vars(module).__setitem__, "_context", None)
            self._sessions = stack
            try:
                self.call("setup", stage)
                yield
                status = "finished"
            except BaseException as error:
                self.call("on_exception", error)
                raise
            finally:
                self._sessions = None
                self.call("teardown", stage)
                for logger in self.loggers:
                    logger.finalize(status)

    def _prepare_training(self, module: LoopModule) -> None:
        self.strategy.place(module, self.precision.dtype)
        self.optimizers = read_optimizers(module.configure_optimizers(), module)
        for one in self.optimizers.values():
            if one.gradient_clip_val is None:
                one.gradient_clip_val = self.gradient_clip_val
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
        module.train()

    def _driver(self, module: LoopModule, body: Body, stepper: Stepper | None) -> Lockstep:
        seed = torch.initial_seed() if self.seed is None else self.seed
        driver = Lockstep(
            module, self.strategy, body, self.precision, stepper, self.microbatch_size, seed
        )
        if self._sessions is not None:
            self._sessions.enter_context(driver.session())
        return driver

    def _evaluation(self, module: LoopModule, dataloaders: Any) -> EvaluateLoop:
        batches = Batches(as_loader(dataloaders, "val_dataloaders"), "val_dataloaders")
        self.num_val_batches = _limited(batches, self.limit_val_batches)
        return EvaluateLoop(self, module, batches, self.num_val_batches)

    # -- counting and logging ------------------------------------------------------------------

    def _fresh_logs(self) -> None:
        self.logs = self._current_logs = Logs()
        self.evaluation_logs = Logs()

    def _count_samples(self, shards: Sequence[Shard], batches: Sequence[Any]) -> None:
        """For samples per second; the size of a batch that nobody cut is asked once."""
        assert self.samples_seen is not None
        if len(shards) > 1:
            self.samples_seen += sum(shard.samples for shard in shards)
            return
        if self._samples_per_step is None:
            try:
                assert self.module is not None
                self._samples_per_step = sum(batch_size(self.module, b) for b in batches)
            except (TypeError, ValueError):  # nobody needs the size, so nobody had to tell
                self.samples_seen = None
                return
        self.samples_seen += self._samples_per_step

    def _write(self, values: dict[str, float]) -> None:
        if values:
            for logger in self.loggers:
                logger.log_metrics({"epoch": self.current_epoch, **values}, self.global_step)

    def _heard(self) -> None:
        """After hooks: take what they have logged."""
        if self._hook_context.logs:
            self._current_logs.add_hook(self._hook_context.logs)

    def before_optimizer_step(self, optimizer: Optimizer, name: str) -> None:
        """Hooks before an optimizer's step; the stepper calls it."""
        self.call("on_before_optimizer_step", optimizer, name)

    def after_optimizer_step(self, optimizer: Optimizer, name: str) -> None:
        """Schedulers that count updates, and hooks after a step; the stepper calls it."""
        for schedule in self.optimizers[name].schedulers:
            if schedule.interval == "step" and schedule.due(self.updates[name]):
                self._step_schedule(name, schedule)
        self.call("on_after_optimizer_step", optimizer, name)

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


# -- reading arguments -------------------------------------------------------------------------


def _refuse_unknown(unknown: Mapping[str, Any]) -> None:
    for name in unknown:
        known = [p for p in inspect.signature(Trainer.__init__).parameters if p != "self"]
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known[:-1])}"
        raise TypeError(f"Trainer() has no argument {name!r}; {hint}")


def _count(name: str, value: Any, least: int = 1, none: bool = False) -> Any:
    if value is None and none:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least and not (name == "max_epochs" and value == -1):
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def _positive(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not value > 0:
        raise ValueError(f"{name} must be above 0 (None for no clipping), got {value}")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, (str, Path)):
        raise TypeError(f"{name} must be a path, got {value!r}")
    return Path(value)


def _limit(name: str, value: Any) -> int | float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of batches or a fraction, got {value!r}")
    if isinstance(value, int) and value < 1:
        none = "; for no validation leave val_dataloaders out" if name == "limit_val_batches" else ""
        raise ValueError(f"{name} must be at least 1 batch, got {value}{none}")
    if isinstance(value, float) and not 0.0 < value <= 1.0:
        raise ValueError(f"{name} as a fraction must be above 0 and at most 1.0, got {value}")
    return value


def _limited(batches: Batches, limit: int | float | None) -> float:
    """How many loader batches an epoch takes; infinity where nobody knows."""
    available = number_of_batches(batches.loader)
    if limit is None:
        return available
    if isinstance(limit, int):
        return min(limit, available)
    if available == math.inf:
        raise ValueError(
            f"{batches.name} does not say how many batches it has, so {limit} of them is no "
            "number: give a whole number of batches"
        )
    return max(1, int(available * limit))


def _callbacks(given: object) -> list[Callback]:
    if given is None:
        return []
    found = [given] if isinstance(given, Callback) else given
    if not isinstance(found, Iterable):
        raise TypeError(f"callbacks must be Callbacks, got {describe(found)}")
    found = list(found)
    for i, callback in enumerate(found):
        if not isinstance(callback, Callback):
            hint = ""
            if isinstance(callback, type) and issubclass(callback, Callback):
                hint = f": write {callback.__name__}() with parentheses"
            raise TypeError(
                f"callbacks[{i}] must be a composefit.Callback, got {describe(callback)}{hint}"
            )
    return found


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
