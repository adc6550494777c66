"""The laws of this package as functions that a test calls on its own module.

- Composition (`assert_same_training`): the parameters are those of a hand-written loop on the full
  batch, whatever the strategy, the accumulation and the micro-batches.
- Determinism (`assert_deterministic`): the same seed gives bitwise the same parameters.
- Errors (`assert_user_error`): a fault surfaces as the user's own exception, and nothing is lost.

For a closer look there are `run_step`, which gives the effects of one step, and `Recording`, a
strategy that writes down what it was asked to do.
"""

from __future__ import annotations

import inspect
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from composefit import tree
from composefit.callbacks import Callback
from composefit.effects import Effect
from composefit.lockstep.contract import Body
from composefit.lockstep.driver import Lockstep
from composefit.lockstep.gradients import Gradients
from composefit.lockstep.scatter import scatter
from composefit.lockstep.stepper import Stepper
from composefit.module import LoopModule
from composefit.strategies import SingleDevice, Strategy
from composefit.trainer import Trainer

__all__ = [
    "Recording",
    "Reference",
    "assert_deterministic",
    "assert_same_training",
    "assert_user_error",
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

    def optimizer_step(self, optimizer: Optimizer) -> None:
        """As the other's."""
        self.calls.append(("optimizer_step", optimizer))
        self.strategy.optimizer_step(optimizer)

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

        def noted(effect: Effect[Any]) -> None:
            check(effect)
            self.effects.append(effect)

        driver.check = noted  # type: ignore[method-assign]
        return driver


# -- comparing ---------------------------------------------------------------------------------


def _name(strategy: Strategy) -> str:
    if isinstance(strategy, Recording):
        strategy = strategy.strategy
    return f"{type(strategy).__name__} ({strategy.lanes} lane{'s' * (strategy.lanes > 1)})"


def _parameters(module: nn.Module) -> State:
    return {name: p.detach().to(_CPU, copy=True) for name, p in module.named_parameters()}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _bits(value: Tensor) -> Tensor:
    """Its bytes, so that NaN equals NaN, and zero does not equal minus zero."""
    return value.detach().to(_CPU, copy=True).reshape(-1).view(torch.uint8)


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
