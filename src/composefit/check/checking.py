"""Whether a step means the same with its batch whole and cut: the check itself.

for each batch:
    whole = gradients of a copy, the batch in one shard
    cut = gradients of another copy, the batch in two shards of unlike sizes
    compare them, optimizer by optimizer
    where they differ, run the cut step again, followed operation by operation, to see why
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from composefit import tree
from composefit.check import causes, copies
from composefit.check.causes import Cause
from composefit.check.comparing import Comparison
from composefit.check.cutting import TooSmallError, unevenly
from composefit.check.recording import Recording, Tracer, record
from composefit.check.report import CheckReport, Finding
from composefit.check.state import Written
from composefit.check.trace import NORM, ROOT, Event, Trace
from composefit.module import LoopModule
from composefit.optimizers import Optimizers, read_optimizers
from composefit.precision import Precision
from composefit.steps import offered
from composefit.strategies import SingleDevice, Strategy

if TYPE_CHECKING:
    from composefit.trainer import Trainer

# A larger difference is none of rounding, in the dtype of the parameters.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE = 0.1  # of half precision

_LARGEST = 50_000_000  # parameters: more would take too much memory in float64

_MOST_BATCHES = 3


def check(
    module: LoopModule,
    batches: Sequence[Any],
    strategy: Strategy,
    precision: Precision,
    trainer: Trainer | None = None,
    prepared: bool = False,
) -> CheckReport:
    """Compare the gradients of a step on whole batches and on batches in two unequal shards.

    All is done on copies; module, batches, and the global generators stay as they are.

    Args:
        module: whose `training_step` is looked at.
        batches: loader batches, one to three.
        strategy: runs the cut step, where it runs several shards in this process; else one device.
        precision: of the parameters, where float64 will not do; never autocast.
        trainer: what `self.trainer` is in the step.
        prepared: `setup` and `configure_model` have run.

    Returns:
        What was found.

    Raises:
        ValueError: a batch that is too small to be cut, or another number of batches.
        Whatever the step raises on a whole batch.
    """
    if not 1 <= len(batches) <= _MOST_BATCHES:
        raise ValueError(
            f"the check looks at one to {_MOST_BATCHES} batches, got {len(batches)}: what is wrong "
            "with a step shows in the first"
        )
    with copies.untouched(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is found the report tells
        runs = _Runs(module, strategy, precision, trainer, prepared)
        try:
            return _Check(runs).of(batches)
        except _StepFailed as failed:
            raise failed.error from None


def try_check(
    module: LoopModule,
    given: Any,
    strategy: Strategy,
    precision: Precision,
    trainer: Trainer | None = None,
) -> CheckReport | str | None:
    """The check before a fit's first step, which it must not keep from being done.

    Args:
        module: `setup` and `configure_model` have run.
        given: a batch, or a loader, of which the first one is taken.
        strategy: as in `check`.
        precision: as in `check`.
        trainer: as in `check`.

    Returns:
        What was found; or why nothing could be checked, in words; or None where the step fails on
        the whole batch, as it will when it is done in earnest.
    """
    try:
        with copies.untouched(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batches = copies.first_batches(given, 1) if copies.is_loader(given) else [given]
            return _Check(_Runs(module, strategy, precision, trainer, prepared=True)).of(batches)
    except _StepFailed:
        return None
    except Exception as error:
        return str(error)


class _StepFailed(Exception):
    """The step raised an error on a whole batch."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _Runs:
    """Runs of a module's step, each on a copy of its own."""

    def __init__(
        self,
        module: LoopModule,
        strategy: Strategy,
        precision: Precision,
        trainer: Trainer | None,
        prepared: bool,
    ) -> None:
        self.original = module
        self.trainer = trainer
        self.prepared = prepared
        local = strategy.world is None and strategy.processes_to_launch() is None
        device = strategy.device if local or strategy.world else torch.device("cpu")
        self.single = SingleDevice(device)
        self.lanes: Strategy = SingleDevice(device, shards=2)
        if local and strategy.lanes > 1:
            self.lanes = strategy
        self.own_precision = Precision(precision.name, precision.dtype, None)
        parameters = list(module.parameters())
        self.double = (
            device.type != "mps"
            and not any(p.is_complex() for p in parameters)
            and sum(p.numel() for p in parameters if not is_lazy(p)) < _LARGEST
        )
        self.shared: list[str] = []

    def whole(self, batch: Any, **options: Any) -> Recording:
        """In one shard."""
        return self._run(batch, self.single, **options)

    def cut(self, batch: Any, dim: int | None = None) -> Recording:
        """In two unlike shards; with `dim` along another dimension than the module says."""
        return self._run(batch, self.lanes, scatter=unevenly, dim=dim)

    def traced(self, batch: Any, tracer: Tracer, exact: bool) -> Recording:
        """The same, the first shard followed; in numbers that take less time unless `exact`."""
        double, self.double = self.double, self.double and exact
        try:
            return self._run(batch, self.lanes, scatter=unevenly, tracer=tracer)
        finally:
            self.double = double

    def _run(
        self,
        batch: Any,
        lanes: Strategy,
        dim: int | None = None,
        carried: Sequence[tuple[Written, nn.Module]] = (),
        **options: Any,
    ) -> Recording:
        with copies.untouched():
            torch.manual_seed(0)
            if self.double:
                torch.set_default_dtype(torch.float64)
            module, optimizers = self._copy()
            if dim is not None:
                vars(module)["batch_dim"] = dim
            for one, source in carried:
                _carry(one, source, module)
            precision = Precision.of("64") if self.double else self.own_precision

            def run(lanes: Strategy, **options: Any) -> Recording:
                own = copies.copied_batch(batch)
                return record(module, optimizers, own, lanes, precision=precision, **options)

            if any(map(is_lazy, module.parameters())):  # a whole step gives them their shapes
                run(self.single)
            return run(lanes, **options)

    def _copy(self) -> tuple[LoopModule, Optimizers]:
        """A copy as a fit would begin with it, and optimizers of its parameters."""
        copied = copies.copied_module(self.original, self.trainer)
        self.shared = copied.shared
        module = copied.module
        if not self.prepared:
            module.setup(*("fit",)[: offered(module.setup, 1)])
            module.configure_model()
        if self.double:
            copies.to_float64(copied)
        self.single.place(module, None if self.double else self.own_precision.dtype)
        if not module.training:
            module.train()
        optimizers = read_optimizers(module.configure_optimizers(), module)
        for one in optimizers.values():  # of the original's, where a function has made them
            groups = [
                {**group, "params": [copied.memo.get(id(p), p) for p in group["params"]]}
                for group in one.optimizer.param_groups
            ]
            one.optimizer = copy.copy(one.optimizer)  # it may be the user's own
            one.optimizer.param_groups = groups
        return module, optimizers


class _Check:
    """A check of one module."""

    def __init__(self, runs: _Runs) -> None:
        self.runs = runs
        self.tolerance = 0.0
        self.names: set[str] = set()

    def of(self, batches: Sequence[Any]) -> CheckReport:
        """Compare, and explain what differs."""
        comparison = Comparison()
        found: dict[str, list[Cause]] = {}
        state: list[Cause] = []
        cuts: list[str] = []
        for batch in batches:
            whole = self._whole(batch)
            if not comparison.names:
                comparison.begin(whole)
                self.names = set(comparison.names)
            cut = self.runs.cut(batch)
            if isinstance(cut.error, TooSmallError):
                raise cut.error
            cuts.append(" + ".join(str(shard.samples) for shard in cut.shards) or "no")
            one = comparison.add(whole, cut)
            wrong = {n: difference for n, difference in one.items() if difference > self.tolerance}
            if wrong:
                for name, own in self._explain(batch, whole, cut, wrong).items():
                    found.setdefault(name, own)
            state = state or self._state(batch, whole)
        findings = {}
        for name, difference in comparison.differences().items():
            differs = difference is not None and difference > self.tolerance
            own = found.get(name, []) if differs else []
            findings[name] = Finding(difference, comparison.largest(name), own)
        return CheckReport(
            findings,
            state,
            self.tolerance,
            f"{'; '.join(cuts)} samples, {self._lanes()}",
            str(self.dtype).removeprefix("torch."),
            self._notes(),
        )

    def _whole(self, batch: Any) -> Recording:
        whole = self.runs.whole(batch, watched=True)
        if whole.error is not None and self.runs.double:
            self.runs.double = False  # it may not run in float64
            whole = self.runs.whole(batch, watched=True)
        if whole.error is not None:
            whole.error.add_note("while the check ran the step, the batch being whole")
            raise _StepFailed(whole.error)
        self.dtype = _dtype(whole.module)
        self.tolerance = max(self.tolerance, _tolerance(self.dtype))
        return whole

    def _lanes(self) -> str:
        lanes = self.runs.lanes
        return f"{lanes.lanes} threads" if lanes.concurrent else "one after another"

    def _notes(self) -> list[str]:
        notes = []
        if not self.runs.double:
            notes.append("the step does not run in float64, so that small differences are not seen")
        elif self.tolerance > _tolerance(self.dtype):
            notes.append("a part of the step rounds to fewer bits than float64 has")
        if self.runs.shared:
            names = ", ".join(self.runs.shared)
            notes.append(f"{names} could not be copied, and the check has used the module's own")
        return notes

    # -- why -----------------------------------------------------------------------------------

    def _explain(
        self, batch: Any, whole: Recording, cut: Recording, wrong: Mapping[str, float]
    ) -> dict[str, list[Cause]]:
        """The causes for each of these optimizers, given by their differences."""
        step = _line_of_step(whole.module)
        if cut.error is not None and not cut.shards:
            kind = causes.TIME_FIRST if _may_be_time_first(batch) else causes.UNCUT
            uncut = causes.cause(kind, step, detail=str(cut.error))
            return {name: [uncut] for name in wrong}
        if cut.error is not None:
            error = causes.of_error(cut.error, _file_of(whole.module), whole.module)
            return {name: [error] for name in wrong}
        if self._is_time_first(batch, whole, wrong):
            return {name: [causes.cause(causes.TIME_FIRST, step)] for name in wrong}
        # Where float32 would explain a difference, it has to be seen where it comes in.
        traced, dtypes = self._traced(batch, max(wrong.values()) <= TOLERANCES[torch.float32])
        coarse = max(map(_tolerance, dtypes), default=0.0)
        if max(wrong.values()) <= coarse:  # a part of the step rounds, whatever its weights do
            self.tolerance = coarse
            return {}
        explained = {}
        for name in wrong:
            own = causes.of_events(traced.get(name, []), _by_value(name, whole, cut), step)
            if any(shard.drew for shard in whole.shards):
                own.insert(0, causes.cause(causes.GLOBAL_DRAW, step))
            if len(whole.gradients[name]) != len(cut.gradients[name]):
                own.append(causes.cause(causes.CONTROL_FLOW, step))
            explained[name] = own or [causes.cause(causes.UNKNOWN)]
        return explained

    def _is_time_first(self, batch: Any, whole: Recording, wrong: Iterable[str]) -> bool:
        """Whether the difference is gone once the batch is cut along dimension 1."""
        flat = any(tensor.dim() < 2 for tensor in tree.tensors(batch))
        if flat or not _may_be_time_first(batch) or getattr(whole.module, "batch_dim", 0) != 0:
            return False
        other = self.runs.cut(batch, dim=1)
        if other.error is not None:
            return False
        comparison = Comparison()
        comparison.begin(whole)
        differences = comparison.add(whole, other)
        return all(differences[name] <= self.tolerance for name in wrong)

    def _traced(self, batch: Any, exact: bool) -> tuple[dict[str, list[Event]], set[torch.dtype]]:
        """What the losses of each optimizer depend on, in the first of two shards; its dtypes."""
        recording = self.runs.traced(batch, Trace.of_shard, exact)
        if recording.error is not None and not exact:
            recording = self.runs.traced(batch, Trace.of_shard, exact=True)
        first = recording.shards[0]
        found: dict[str, list[Event]] = {}
        for taken in first.taken:
            found.setdefault(taken.key, []).extend(taken.events)
        # An update with `Grads` depends on the losses of which they were made.
        for name in self.names - found.keys():
            found[name] = [event for taken in first.taken for event in taken.events]
        return found, set() if first.trace is None else first.trace.dtypes

    def _state(self, batch: Any, whole: Recording) -> list[Cause]:
        """Attributes that the step has set and that change what it computes the next time."""
        written = whole.shards[0].written
        found = []
        for one in written:
            again = self.runs.whole(batch, carried=[(one, whole.module)])
            comparison = Comparison()
            comparison.begin(whole)
            differences = comparison.add(whole, again)
            if any(difference > self.tolerance for difference in differences.values()):
                found.append(causes.of_state(one))
        return found


def _may_be_time_first(batch: Any) -> bool:
    """Whether all tensors that have a dimension 1 agree in it."""
    sizes = {tensor.size(1) for tensor in tree.tensors(batch) if tensor.dim() > 1}
    return len(sizes) == 1 and sizes != {1}


def _by_value(name: str, whole: Recording, cut: Recording) -> str | None:
    """What the loss of an optimizer's first update is to those of its shards."""
    found = [
        next((taken.terms for taken in shard.taken if taken.key == name), [])
        for shard in (*whole.shards, *cut.shards)
    ]
    if not all(len(terms) == 1 and terms[0][1] is None for terms in found):
        return None
    loss, *losses = (terms[0][0] for terms in found)
    sizes = [shard.samples for shard in cut.shards]
    mean = sum(n * one for n, one in zip(sizes, losses, strict=True)) / sum(sizes)
    squares = sum(n * one**2 for n, one in zip(sizes, losses, strict=True)) / sum(sizes)
    if not loss or _close(loss, mean):
        return None
    if _close(loss, sum(losses)):
        return causes.SUM
    if _close(loss**2, squares):
        return ROOT
    return NORM if _close(loss**2, sum(one**2 for one in losses)) else None


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


def _carry(one: Written, source: nn.Module, target: nn.Module) -> None:
    """Let a module begin with an attribute as another one's step has left it."""
    value = vars(source.get_submodule(one.path))[one.name]
    vars(target.get_submodule(one.path))[one.name] = _detached(value)


def _detached(value: Any) -> Any:
    """Without the graph of the step that made it."""
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) in (list, tuple):
        return type(value)(map(_detached, value))
    if type(value) is dict:
        return {key: _detached(item) for key, item in value.items()}
    return value


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCES.get(dtype, _COARSE)


def _dtype(module: nn.Module) -> torch.dtype:
    found = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(found, torch.get_default_dtype())


def _file_of(module: LoopModule) -> str | None:
    line = _line_of_step(module)
    return None if line is None else line.rpartition(":")[0]


def _line_of_step(module: LoopModule) -> str | None:
    code = getattr(inspect.unwrap(module.training_step), "__code__", None)
    return None if code is None else f"{code.co_filename}:{code.co_firstlineno}"
