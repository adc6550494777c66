"""The laws of this package as functions that a test calls on its own module.

- Composition (`assert_same_training`): the parameters are those of a hand-written loop on the full
  batch, whatever the strategy, the accumulation and the micro-batches.
- Determinism (`assert_deterministic`): the same seed gives bitwise the same parameters.
- Resumption (`assert_resumable`): stopped at any step and resumed is the same as never stopped.
- Errors (`assert_user_error`): a fault surfaces as the user's own exception, and nothing is lost.

Whether one's losses keep the first of them, `check_losses` tells in a moment, and why they do not.

For a closer look there are `run_step`, which gives the effects of one step, and `Recording`, a
strategy that writes down what it was asked to do.
"""

from __future__ import annotations

import hashlib
import inspect
import random
import shutil
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from composefit import tree
from composefit.callbacks import Callback, ModelCheckpoint
from composefit.check import CheckReport
from composefit.effects import Effect
from composefit.lockstep.contract import Body
from composefit.lockstep.driver import Lockstep
from composefit.lockstep.gradients import Gradients
from composefit.lockstep.scatter import scatter
from composefit.lockstep.shard import Shard
from composefit.lockstep.stepper import Stepper
from composefit.loggers import Logger
from composefit.module import LoopModule
from composefit.seeding import global_states, restore_global_states
from composefit.snapshot import keyed
from composefit.strategies import SingleDevice, Strategy
from composefit.trainer import Trainer

__all__ = [
    "Recording",
    "Reference",
    "assert_deterministic",
    "assert_resumable",
    "assert_same_training",
    "assert_user_error",
    "check_losses",
    "run_step",
]

#: A hand-written training loop: `reference(module, batches)`.
Reference: TypeAlias = Callable[[Any, Sequence[Any]], Any]

State: TypeAlias = dict[str, Tensor]

# A parameter without larger numbers is compared as if it had some. A bias that a softmax or a
# normalisation takes out again gets no gradient but rounding: of a zero, that is a large part.
_SMALL = 1e-3

_CPU = torch.device("cpu")


def assert_same_training(
    make_module: Callable[[], LoopModule],
    batches: Sequence[Any],
    strategies: Sequence[Strategy],
    reference: Reference | None = None,
    *,
    accumulate: Sequence[int] = (1,),
    microbatch_sizes: Sequence[int | None] = (None,),
    tolerance: float = 1e-10,
    movement: float = 1e-3,
    **trainer_arguments: Any,
) -> float:
    """Law 1: however a step is carried out, the parameters are those of the plain loop.

    Trains under every strategy x accumulation x micro-batching, in float64, and compares each
    parameter after every step: the largest difference to the reference, divided by the
    reference's largest number, is at most `tolerance`. It holds where samples meet only through
    effects; not for BatchNorm, a token mean returned as a plain loss, or torch's own random draws
    (dropout), which differ from strategy to strategy.

    Args:
        make_module: builds a fresh module, each time with the same weights (torch's generator is
            seeded before each call). It is cast to float64.
        batches: the batch of each step, cast to float64; take sizes that no number of shards
            divides. Under accumulation each is cut into that many loader batches.
        strategies: to train under.
        reference: `reference(module, batches)` trains a module by hand, without a trainer. A
            generator function that yields after each step is compared after each, a plain function
            after the last. Without one, the comparison is with one device and one shard.
        accumulate: values of `Trainer(accumulate_grad_batches=)`.
        microbatch_sizes: values of `Trainer(microbatch_size=)`.
        tolerance: of the relative difference; what float64 leaves of rounding is some 1e-14.
        movement: by how much each optimizer's parameters must change in all, in the same measure;
            else the comparison would show nothing.
        trainer_arguments: for the `Trainer`; hooks run as in a fit of one epoch.

    Returns:
        The largest relative difference found.

    Raises:
        AssertionError: a difference; the message names the strategy, the accumulation, the step
            and the optimizer and parameter that differ first, and by how much. Or parameters that
            have not moved.
        ValueError: modules that are not built alike, a batch with fewer samples than it is to be
            cut into, a reference with another number of steps than there are batches.

    Example:
        >>> from composefit import SingleDevice, ThreadDataParallel
        >>> class Regression(LoopModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(3, 1)
        ...
        ...     def training_step(self, batch):
        ...         return self.layer(batch).square().mean()
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> batches = [torch.randn(7, 3) for _ in range(3)]
        >>> strategies = [SingleDevice("cpu", shards=3), ThreadDataParallel(2)]
        >>> assert_same_training(Regression, batches, strategies, accumulate=(1, 2)) < 1e-10
        True
    """
    batches = [tree.move(batch, _CPU, torch.float64) for batch in batches]
    arguments = {"seed": 0, **trainer_arguments}
    worst = 0.0
    with torch.random.fork_rng(devices=[]):
        start = _parameters(_made(make_module))
        if reference is None:
            _, expected = _trained(make_module, batches, SingleDevice(_CPU), 1, arguments, start)
        else:
            expected = _trained_by_hand(make_module, batches, reference)
        for strategy, k, m in product(strategies, accumulate, microbatch_sizes):
            under = {**arguments, "microbatch_size": m}
            owners, found = _trained(make_module, batches, strategy, k, under, start)
            _require_movement(start, found[len(batches) - 1], owners, movement)
            setting = f"{_name(strategy)}, accumulate_grad_batches={k}, microbatch_size={m}"
            source = "one device and one shard" if reference is None else "the reference"
            for step in sorted(expected):
                largest, name = _largest_difference(found[step], expected[step])
                if not largest <= tolerance:
                    raise AssertionError(
                        f"training under {setting} differs from {source}, first after step "
                        f"{step + 1} of {len(batches)}: parameter {name!r} "
                        f"({owners.get(name, 'of no optimizer')}) by {largest:.2e} of its size "
                        f"(allowed: {tolerance:.0e}). Is each loss a mean over samples? A mean "
                        "over anything else is Mean(total, weight), a sum is Sum(total); what "
                        "couples samples (BatchNorm, a loss between samples) needs Gather or "
                        "another layer"
                    )
                worst = max(worst, largest)
    return worst


def check_losses(
    module: LoopModule | Callable[[], LoopModule],
    batch: Any,
    strategy: str | Strategy = "single",
    batches: int = 1,
    **trainer_arguments: Any,
) -> CheckReport:
    """`Trainer.check` as a test: a step's losses mean the same however a batch is cut.

    Args:
        module: it stays as it is; or a function that builds one, torch's generator being seeded.
        batch: a batch, or a loader, of which the first ones are taken.
        strategy: the shards run side by side where it has several lanes in this process.
        batches: how many of a loader's to look at, up to 3.
        trainer_arguments: for the `Trainer`.

    Returns:
        The report, all being right.

    Raises:
        AssertionError: a loss means something else once the batch is cut; the message is the
            report, with the likely cause and the line to write instead.
        ValueError: as `Trainer.check`.

    Example:
        >>> class Regression(LoopModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(3, 1)
        ...
        ...     def training_step(self, batch):
        ...         return self.layer(batch).square().mean()
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> check_losses(Regression, torch.randn(7, 3)).ok
        True
    """
    if not isinstance(module, LoopModule):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = module()
    trainer = Trainer(**{**_quiet(trainer_arguments), "strategy": strategy})
    report = trainer.check(module, batch, batches, show=False)
    _require(report.ok, str(report))
    return report


def assert_deterministic(
    make_module: Callable[[], LoopModule],
    batches: Sequence[Any],
    strategy: Strategy,
    runs: int = 3,
    **trainer_arguments: Any,
) -> None:
    """Law 2: the same seed under the same strategy gives bitwise the same parameters and buffers.

    Args:
        make_module: builds a fresh module, each time with the same weights (torch's generator is
            seeded before each call).
        batches: the loader's batches.
        strategy: to train under.
        runs: how often to train, at least 2; the more threads, the more chances to differ.
        trainer_arguments: for the `Trainer`.

    Raises:
        AssertionError: two runs differ; the message names the run and what differs.
        ValueError: fewer than two runs.
    """
    if runs < 2:
        raise ValueError(f"assert_deterministic compares runs: expected 2 or more, got {runs}")
    first: State = {}
    with torch.random.fork_rng(devices=[]):
        for run in range(runs):
            torch.manual_seed(0)
            module = make_module()
            _trainer(strategy, {"seed": 0, **trainer_arguments}).fit(module, batches)
            state = {name: _bits(value) for name, value in _tensors(module)}
            first = first or state
            differ = [n for n, bits in state.items() if not torch.equal(bits, first[n])]
            if differ:
                raise AssertionError(
                    f"run {run + 1} of {runs} under {_name(strategy)} ended with other values "
                    f"than the first, with the same seed: {', '.join(differ)}. Does the step draw "
                    "from a generator of its own, read a clock, or iterate over a set?"
                )


def assert_resumable(
    make_module: Callable[[], LoopModule],
    make_loader: Callable[[], Any],
    strategies: Sequence[Strategy],
    *,
    val_loader: Callable[[], Any] | None = None,
    max_epochs: int = 2,
    accumulate: Sequence[int] = (1,),
    stops: Sequence[int | tuple[int, ...]] | None = None,
    via: Sequence[str | Callable[[int], Callback]] = ("exception", "signal", "max_steps"),
    callbacks: Callable[[], Sequence[Callback]] = list,
    **trainer_arguments: Any,
) -> int:
    """Law 3: stopped at any step and resumed is bitwise the same as never stopped.

    Trains without a stop, then once for each stop: up to there, and from its checkpoint to the end
    with everything made anew and other seeds of the global generators, as in another process.
    Compared are the batches, parameters and buffers, optimizers, schedulers, loss scales, counters,
    callbacks' states, and what the loggers got.

    Nothing that is compared may depend on a clock, as the values of a `ThroughputMonitor` do.

    Args:
        make_module: builds a fresh module.
        make_loader: builds a fresh loader of training batches. The global generators are seeded
            alike before each call, so that data which are drawn here are the same data.
        strategies: to train under.
        val_loader: builds a fresh loader, or several in a list, for validation.
        max_epochs: epochs of a fit.
        accumulate: values of `Trainer(accumulate_grad_batches=)`.
        stops: steps after which to stop; several in a tuple: at each of them, resumed in between.
            None: at every step.
        via: what stops a fit: `"exception"` between two steps, `"signal"` (a SIGTERM within the
            step), `"max_steps"`, `"should_stop"`, `"validation"` (an exception within the
            validation that follows the step), or a function that makes a callback, for a step,
            which ends the fit after it. Where one ends no fit at a step (a validation does not
            follow each), this is left out.
        callbacks: builds fresh callbacks.
        trainer_arguments: for the `Trainer`; files go to a temporary folder.

    Returns:
        The number of resumed fits that were compared.

    Raises:
        AssertionError: a difference; the message names the strategy, the stop and the first thing
            that differs. Or a way to stop that has stopped nothing.
        ValueError: an unknown way to stop, or a signal where a run does not take it over (outside
            of the main thread, or with a handler of its own).

    Example:
        >>> from composefit import SingleDevice
        >>> from torch.utils.data import DataLoader
        >>> class Regression(LoopModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Sequential(nn.Dropout(0.2), nn.Linear(3, 1))
        ...
        ...     def training_step(self, batch):
        ...         return self.net(batch).square().mean()
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters())
        >>> def shuffled():
        ...     return DataLoader(torch.randn(10, 3), batch_size=4, shuffle=True)
        >>> assert_resumable(Regression, shuffled, [SingleDevice("cpu")], via=["exception"])
        6
    """
    for how in via:
        _require_way_to_stop(how)
    made = _Made(make_module, make_loader, val_loader, callbacks)
    arguments = {**trainer_arguments, "max_epochs": max_epochs}
    compared = 0
    before = global_states()
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "run"  # one path for all: callbacks keep paths in their states
            for strategy, k in product(strategies, accumulate):
                under = {**arguments, "strategy": strategy, "accumulate_grad_batches": k}
                whole = made.fit(under, folder)
                for how in via:
                    found = 0
                    for stop in stops or range(1, whole.global_step + 1):
                        places = stop if isinstance(stop, tuple) else (stop,)
                        resumed = made.fit(under, folder, how, places, whole.global_step)
                        if resumed is not None:
                            _require_same_run(resumed, whole, how, places)
                            found += 1
                    _require(
                        found > 0,
                        f"{how!r} has stopped no fit of {whole.global_step} steps under "
                        f"{whole.setting}, so nothing was compared: give other stops",
                    )
                    compared += found
    finally:
        restore_global_states(before)
    return compared


def assert_user_error(
    make_module: Callable[[], LoopModule],
    batch: Any,
    bad_batch: Any,
    error: type[BaseException],
    strategies: Sequence[Strategy],
    **trainer_arguments: Any,
) -> None:
    """Law 5: a fault surfaces once, as the user's own exception, and nothing is lost.

    Trains on `batch`, then on `bad_batch`, then, with the same trainer, on `batch` again. The
    second must raise the error with no frame of this package below the user's line and a note that
    says where it was; if it came before the step's first update, no parameter may have changed; no
    thread may be left over; and the third must train.

    Args:
        make_module: builds a fresh module.
        batch: one that can be trained on.
        bad_batch: one on which the module's step raises.
        error: what it raises.
        strategies: to train under.
        trainer_arguments: for the `Trainer`.

    Raises:
        AssertionError: any of this does not hold.
    """
    for strategy in strategies:
        under = f"under {_name(strategy)}"
        module = make_module()
        trainer = _trainer(strategy, trainer_arguments)
        watch = _Faults()
        trainer.callbacks.append(watch)
        threads = threading.active_count()
        try:
            trainer.fit(module, [batch, bad_batch])
        except error as raised:
            fault: BaseException = raised
        except Exception as raised:
            raise AssertionError(
                f"expected {error.__name__} {under}, got {type(raised).__name__}: {raised}"
            ) from raised
        else:
            raise AssertionError(f"expected {error.__name__} {under}, nothing was raised")
        _require(watch.seen == 1, f"on_exception ran {watch.seen} times {under}, expected once")
        _require_users_line(fault, module, under)
        notes = "\n".join(getattr(fault, "__notes__", []))
        _require(
            "shard" in notes and "step" in notes,
            f"expected a note that names shard and step {under}, got {notes!r}",
        )
        if watch.updates == trainer.updates:
            changed = [n for n, p in _parameters(module).items() if not p.equal(watch.before[n])]
            _require(not changed, f"the faulty step changed {', '.join(changed)} {under}")
        _require(
            threading.active_count() == threads,
            f"threads are left over {under}: {[t.name for t in threading.enumerate()]}",
        )
        trainer.fit(module, [batch])
        _require(
            any(trainer.updates.values()), f"after the error the trainer trains no more {under}"
        )


def run_step(module: LoopModule, batch: Any, **trainer_arguments: Any) -> list[Effect[Any]]:
    """Train a module for one step, on the CPU and in one shard: the effects that the step yielded.

    The weights change as in any step, with the hooks around each update; those of loops do not run.

    Args:
        module: is trained.
        batch: of the step.
        trainer_arguments: for the `Trainer`.

    Returns:
        The effects in their order. A loss is an `Update`, whose `losses` hold, by name, the
        detached loss (a 0-dim tensor, `Mean` or `Sum`), also where the step returned it or yielded
        it bare. Empty for a step that was skipped.

    Example:
        >>> class Regression(LoopModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(3, 1)
        ...
        ...     def training_step(self, batch):
        ...         yield {"only": self.layer(batch).square().mean()}
        ...
        ...     def configure_optimizers(self):
        ...         return {"only": torch.optim.SGD(self.parameters(), lr=0.1)}
        >>> (update,) = run_step(Regression(), torch.zeros(2, 3))
        >>> update
        {'only': loss}
        >>> bool(update.losses["only"] > 0)
        True
    """
    trainer = _Tracing(**_quiet({**trainer_arguments, "strategy": SingleDevice(_CPU)}))
    trainer.step(module, [batch])
    return trainer.effects


class Recording(Strategy):
    """Carries everything out as another strategy does, and writes down what it was asked for.

    Args:
        strategy: does the work.

    Attributes:
        calls: `(method, detail)` in order: `("run", number of tasks)`, `("add_up", number of
            lanes)`, `("optimizer_step", optimizer)`, `("place", module)`, `("open", None)` and
            `("close", None)`.

    Example:
        >>> recording = Recording(SingleDevice("cpu", shards=2))
        >>> recording.run([lambda: None, lambda: None])
        >>> recording.calls
        [('run', 2)]
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.lanes = strategy.lanes
        self.concurrent = strategy.concurrent
        self.device = strategy.device
        self.calls: list[tuple[str, Any]] = []

    def count(self, method: str) -> int:
        """How often a method was called."""
        return sum(called == method for called, _ in self.calls)

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """As the other's."""
        self.calls.append(("run", len(tasks)))
        self.strategy.run(tasks)

    def open(self) -> None:
        """As the other's."""
        self.calls.append(("open", None))
        self.strategy.open()

    def close(self) -> None:
        """As the other's."""
        self.calls.append(("close", None))
        self.strategy.close()

    def place(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        """As the other's."""
        self.calls.append(("place", module))
        self.strategy.place(module, dtype)

    def add_up(self, lanes: Sequence[Gradients], parameters: Sequence[Parameter]) -> Gradients:
        """As the other's."""
        self.calls.append(("add_up", len(lanes)))
        return self.strategy.add_up(lanes, parameters)

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Tensor] | None = None
    ) -> None:
        """As the other's."""
        self.calls.append(("optimizer_step", optimizer))
        self.strategy.optimizer_step(optimizer, closure)

    def describe(self, samples: int) -> str:
        """As the other's."""
        return self.strategy.describe(samples)


# -- training ----------------------------------------------------------------------------------


def _quiet(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a trainer that prints and writes nothing, and runs one epoch."""
    return {
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        **arguments,
    }


def _trainer(strategy: Strategy, arguments: Mapping[str, Any]) -> Trainer:
    return Trainer(**_quiet({**arguments, "strategy": strategy}))


def _made(make_module: Callable[[], LoopModule]) -> LoopModule:
    torch.manual_seed(0)
    return make_module().double()


def _trained(
    make_module: Callable[[], LoopModule],
    batches: Sequence[Any],
    strategy: Strategy,
    accumulate: int,
    arguments: Mapping[str, Any],
    start: State,
) -> tuple[dict[str, str], dict[int, State]]:
    """Train: which optimizer each parameter belongs to, and the parameters after each step."""
    module = _made(make_module)
    for name, value in _parameters(module).items():
        if name not in start or not torch.equal(value, start[name]):
            raise ValueError(
                f"make_module() must build the same weights each time, {name!r} differs between "
                "two calls: draw them from torch's generator, which is seeded before each"
            )
    trainer = _trainer(strategy, {**arguments, "accumulate_grad_batches": accumulate})
    snapshots = _Snapshots()
    trainer.callbacks.append(snapshots)
    trainer.fit(module, [part for b in batches for part in _cut(module, b, accumulate)])
    return _owners(module, trainer), snapshots.after


def _trained_by_hand(
    make_module: Callable[[], LoopModule], batches: Sequence[Any], reference: Reference
) -> dict[int, State]:
    module = _made(make_module)
    module.train()
    after: dict[int, State] = {}
    running = reference(module, batches)
    if inspect.isgenerator(running):
        for step, _ in enumerate(running):
            after[step] = _parameters(module)
        if len(after) != len(batches):
            raise ValueError(
                f"the reference yielded {len(after)} times for {len(batches)} batches: expected "
                "one yield after each step"
            )
    after[len(batches) - 1] = _parameters(module)
    return after


def _cut(module: LoopModule, batch: Any, parts: int) -> list[Any]:
    """A step's batch as the loader batches of an accumulated step, cut as a module's shards are."""
    found = [part.batch for part in scatter(module, batch, 0, parts, None)]
    if len(found) != parts:
        raise ValueError(
            f"a batch can be cut into {len(found)} loader batches only, accumulate asks for {parts}"
        )
    return found


class _Snapshots(Callback):
    """The parameters after each step, counted from 0."""

    def __init__(self) -> None:
        self.after: dict[int, State] = {}

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step - 1
        if step not in self.after:  # an accumulated step ends several batches
            self.after[step] = _parameters(module)


class _Faults(Callback):
    """How often a fault was told, and what stood before the step that raised."""

    def __init__(self) -> None:
        self.seen = 0
        self.before: State = {}
        self.updates: dict[str, int] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.before, self.updates = _parameters(module), dict(trainer.updates)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self.seen += 1


class _Tracing(Trainer):
    """Notes the effects of a step that runs in one shard."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.effects: list[Effect[Any]] = []

    def driver(self, module: LoopModule, body: Body, stepper: Stepper | None) -> Lockstep:
        driver = super().driver(module, body, stepper)
        check = driver.check

        def noted(effect: Effect[Any], shard: Shard) -> None:
            check(effect, shard)
            self.effects.append(effect)

        driver.check = noted  # type: ignore[method-assign]
        return driver


# -- stopping and resuming ---------------------------------------------------------------------

_WAYS_TO_STOP = ("exception", "signal", "max_steps", "should_stop", "validation")


class _Stop(Exception):
    """Ends a fit on purpose."""


class _Rows(Logger):
    """What loggers get: steps and values."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))


class _Last(ModelCheckpoint):
    """Beside the user's own, which may write elsewhere, or never."""


class _Stopping(Trainer):
    """Notes what it trains on, and stops by itself after a step."""

    def __init__(self, stop: int, how: object, **arguments: Any) -> None:
        if how == "max_steps" and stop:
            arguments["max_steps"] = stop
        super().__init__(**arguments)
        self.stop = stop
        self.how = how
        self.begun_at = 0
        self.batches: list[list[str]] = []  # of each step, as they were loaded
        self._fetched: list[str] = []
        self.rows = _Rows()
        self.loggers.append(self.rows)

    @property
    def setting(self) -> str:
        return f"{_name(self.strategy)}, accumulate_grad_batches={self.accumulate_grad_batches}"

    def step(self, module: LoopModule, batches: list[Any], batch_idx: int = 0) -> Any:
        if not self.batches:
            self.begun_at = self.global_step
        self.batches.append(self._fetched)
        self._fetched = []
        if self.global_step + 1 == self.stop and self.how == "signal":
            signal.raise_signal(signal.SIGTERM)
        if self.global_step + 1 == self.stop and self.how == "should_stop":
            self.should_stop = True
        return super().step(module, batches, batch_idx)

    def profiled(self, name: str, iterable: Iterable[Any]) -> Iterable[Any]:
        for item in super().profiled(name, iterable):
            if name == "fetch":
                self._fetched.append(_fingerprint(item))
            yield item

    def evaluate(
        self, module: LoopModule, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0
    ) -> Any:
        output = super().evaluate(module, batch, batch_idx, dataloader_idx)
        if self.how == "validation" and self._is_there() and not self.sanity_checking:
            raise _Stop
        return output

    def between_steps(self) -> None:
        super().between_steps()
        if self.how == "exception" and self._is_there():
            raise _Stop

    def _is_there(self) -> bool:
        return self.stop > 0 and self.global_step == self.stop


class _Made:
    """Makes all that a fit needs, as in a process of its own, and fits.

    Args:
        module, loader, val_loader, callbacks: functions that make them.
    """

    def __init__(
        self,
        module: Callable[[], LoopModule],
        loader: Callable[[], Any],
        val_loader: Callable[[], Any] | None,
        callbacks: Callable[[], Sequence[Callback]],
    ) -> None:
        self.module = module
        self.loader = loader
        self.val_loader = val_loader
        self.callbacks = callbacks

    def fit(
        self,
        arguments: Mapping[str, Any],
        folder: Path,
        how: str | Callable[[int], Callback] = "",
        stops: Sequence[int] = (),
        steps: int = 0,
    ) -> Any:
        """Fit, stopped after these of all steps and resumed: the last trainer.

        None where one of the stops has stopped nothing.
        """
        shutil.rmtree(folder, ignore_errors=True)
        ckpt_path = None
        for process, stop in enumerate((*stops, 0)):
            trainer = self._process(process, stop, how, arguments, folder)
            raised = self._run(trainer, ckpt_path)
            if stop and not raised and trainer.global_step == steps:
                return None
            ckpt_path = folder / "stopped" / _Last.LAST
            _require(
                not stop or ckpt_path.is_file(),
                f"a fit that was stopped after step {stop} by {how!r} under {trainer.setting} "
                "has left no checkpoint",
            )
        return trainer

    def _process(
        self, process: int, stop: int, how: Any, arguments: Mapping[str, Any], folder: Path
    ) -> _Stopping:
        callbacks = [*self.callbacks(), _Last(dirpath=folder / "stopped")]
        if stop and callable(how):
            callbacks.insert(-1, how(stop))
        _seed(process)
        own = {**_quiet(arguments), "default_root_dir": folder, "callbacks": callbacks}
        return _Stopping(stop, how, **own)

    def _run(self, trainer: _Stopping, ckpt_path: Path | None) -> bool:
        """Whether an exception has stopped it."""
        seed = torch.initial_seed()
        _seed(0)
        loader = self.loader()
        val_loader = None if self.val_loader is None else self.val_loader()
        _seed(seed)
        module = self.module()
        try:
            trainer.fit(module, loader, val_loader, ckpt_path=ckpt_path)
        except _Stop:
            return True
        except SystemExit:
            if not trainer.stop:
                raise
            return True
        except Exception:
            if not callable(trainer.how) or trainer.global_step != trainer.stop:
                raise
            return True
        return False


def _require_way_to_stop(how: object) -> None:
    if not callable(how) and how not in _WAYS_TO_STOP:
        raise ValueError(
            f"assert_resumable(via=...) knows {', '.join(map(repr, _WAYS_TO_STOP))}, and functions "
            f"that make a callback, got {how!r}"
        )
    if how == "signal" and (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        raise ValueError(
            "assert_resumable(via=['signal']) needs the main thread, and no handler of SIGTERM "
            "other than Python's own: a run takes over no other, and the signal would end the tests"
        )


def _require_same_run(
    resumed: _Stopping, whole: _Stopping, how: object, stops: tuple[int, ...]
) -> None:
    """The end of both is the same, and what they did since the stop."""
    steps = " and ".join(map(str, stops))
    by = how if isinstance(how, str) else getattr(how, "__name__", how)
    where = f"stopped after step {steps} of {whole.global_step} ({by}), under {whole.setting}"
    difference = _batches_difference(resumed, whole) or _rows_difference(resumed, whole, stops[-1])
    found = _first_difference(_outcome(resumed), _outcome(whole), "")
    if found is not None and not (difference and "batch" in difference):
        difference = (
            f"{found}. What it depends on must be in the checkpoint: a buffer, a state_dict"
        )
    _require(
        difference is None,
        f"a resumed fit differs from one that was never stopped, {where}: {difference}",
    )


def _batches_difference(resumed: _Stopping, whole: _Stopping) -> str | None:
    begun = resumed.begun_at if resumed.batches else whole.global_step
    expected = whole.batches[begun:]
    for i, (one, other) in enumerate(zip(resumed.batches, expected, strict=False)):
        if one != other:
            return (
                f"step {begun + i + 1} got another batch. Does the loader's order follow from "
                "what the run seeds, or has it a state_dict?"
            )
    if len(resumed.batches) != len(expected):
        return f"it took {len(resumed.batches)} batches of steps, expected {len(expected)}"
    return None


def _rows_difference(resumed: _Stopping, whole: _Stopping, stop: int) -> str | None:
    """Of what the loggers got: all after the stop, and the end of what came at it."""
    rows, expected = resumed.rows.rows, whole.rows.rows
    count = max(len(rows), sum(step > stop for step, _ in expected))
    tail = expected[len(expected) - count :] if count else []
    found = _first_difference(rows, tail, "the loggers' rows")
    return None if found is None else f"{found} ({rows[:3]}... for {tail[:3]}...)"


def _outcome(trainer: _Stopping) -> dict[str, Any]:
    """What a fit has led to, by what a message calls it."""
    module, training = trainer.module, trainer.training
    assert module is not None and training is not None
    named = trainer.optimizers.items()
    return {
        "parameter or buffer ": dict(_tensors(module)),
        "optimizer ": {name: one.optimizer.state_dict() for name, one in named},
        "schedulers of ": {
            name: [s.scheduler.state_dict() for s in one.schedulers] for name, one in named
        },
        "loss scale of ": {n: scale.state_dict() for n, scale in training.stepper.scales.items()},
        "updates of ": dict(trainer.updates),
        "trainer.": {"global_step": trainer.global_step, "current_epoch": trainer.current_epoch},
        "state of callback ": {key: _state(c) for key, c in keyed(trainer.callbacks)},
        "logged value ": trainer.known_values(),
    }


def _state(callback: Callback) -> dict[str, Any]:
    state = callback.state_dict()
    if isinstance(callback, ModelCheckpoint):
        # Not the names of its files: a limit lets a fit end with one more validation, and the file
        # of that is in the way of a later one.
        state["best_k_models"] = list(state["best_k_models"].values())
        del state["best_model_path"], state["last_model_path"]
    return state


def _first_difference(found: Any, expected: Any, where: str) -> str | None:
    """The place of the first difference, bit by bit, and the values; None where there is none."""
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return f"{where} is {found.dtype} {tuple(found.shape)}"
        if torch.equal(_bits(found), _bits(expected)):
            return None
        return f"{where}, by up to {(found.double() - expected.double()).abs().max().item():.2e}"
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        if found.keys() != expected.keys():
            return f"{where} has {list(found)} for {list(expected)}"
        pairs = [(_path(where, key), found[key], expected[key]) for key in expected]
    elif isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return f"{where} has {len(found)} entries for {len(expected)}"
        pairs = [
            (f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(found, expected, strict=True))
        ]
    else:
        same = found == expected or (found != found and expected != expected)
        return None if same else f"{where} is {found!r} for {expected!r}"
    return next((d for path, a, b in pairs if (d := _first_difference(a, b, path))), None)


def _path(where: str, key: Any) -> str:
    if not where:
        return str(key)
    return f"{where}{key!r}" if where.endswith((" ", ".")) else f"{where}[{key!r}]"


def _fingerprint(batch: Any) -> str:
    """Of the tensors of a batch, which hooks and steps may change."""
    digest = hashlib.sha256()
    for tensor in tree.tensors(batch):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bits(tensor).numpy().tobytes())
    return digest.hexdigest()


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# -- comparing ---------------------------------------------------------------------------------


def _name(strategy: Strategy) -> str:
    if isinstance(strategy, Recording):
        strategy = strategy.strategy
    return f"{type(strategy).__name__} ({strategy.lanes} lane{'s' * (strategy.lanes > 1)})"


def _parameters(module: nn.Module) -> State:
    return {name: _whole(p).to(_CPU, copy=True) for name, p in module.named_parameters()}


def _whole(value: Tensor) -> Tensor:
    """Without a graph; of a sharded one all rows, which is collective."""
    gather = getattr(value, "full_tensor", None)
    return value.detach() if gather is None else gather().detach()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _bits(value: Tensor) -> Tensor:
    """Its bytes, so that NaN equals NaN, and zero does not equal minus zero."""
    return _whole(value).to(_CPU, copy=True).reshape(-1).view(torch.uint8)


def _owners(module: nn.Module, trainer: Trainer) -> dict[str, str]:
    """The optimizers of each parameter, in words."""
    names = {id(p): name for name, p in module.named_parameters()}
    found: dict[str, list[str]] = {}
    for optimizer, one in trainer.optimizers.items():
        for group in one.optimizer.param_groups:
            for p in group["params"]:
                if id(p) in names:
                    found.setdefault(names[id(p)], []).append(repr(optimizer))
    return {name: f"of optimizer {' and '.join(own)}" for name, own in found.items()}


def _difference(value: Tensor, expected: Tensor) -> float:
    """The largest difference, divided by the expected value's largest number."""
    if not expected.numel():
        return 0.0
    size = max(expected.abs().max().item(), _SMALL)
    return (value - expected).abs().max().item() / size


def _largest_difference(state: State, expected: State) -> tuple[float, str]:
    largest, where = 0.0, ""
    for name, value in expected.items():
        difference = _difference(state[name], value)
        if not difference <= largest:  # NaN as well, and it stays
            largest, where = difference, name
            if difference != difference:
                break
    return largest, where


def _require_movement(start: State, end: State, owners: Mapping[str, str], movement: float) -> None:
    for owner in dict.fromkeys(owners.values()):
        own = [name for name, found in owners.items() if found == owner]
        moved = max(_difference(start[name], end[name]) for name in own)
        _require(
            moved > movement,
            f"the parameters {owner} have moved by {moved:.1e} of their size only (expected more "
            f"than {movement:.0e}): whatever is compared would be equal. Train for more steps, or "
            "with a higher learning rate",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _require_users_line(fault: BaseException, module: LoopModule, under: str) -> None:
    """The user's file is in the traceback, and no file of this package comes after it."""
    theirs = inspect.getsourcefile(type(module).training_step)
    ours = inspect.getsourcefile(LoopModule)
    assert ours is not None
    package = ours.removesuffix("module.py")
    files = [frame.filename for frame in traceback.extract_tb(fault.__traceback__)]
    _require(
        theirs in files, f"the traceback {under} does not reach {theirs}: it ends at {files[-1]}"
    )
    after = files[len(files) - files[::-1].index(str(theirs)) :]
    inside = [file for file in after if file.startswith(package)]
    _require(
        not inside, f"the traceback {under} goes on after the user's line, in {', '.join(inside)}"
    )
