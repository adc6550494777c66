"""What `configure_optimizers` may return, read into optimizers that each have a name.

One grammar covers this package's forms and Lightning's. An *entry* describes one optimizer:

- an `Optimizer`, or a pair `(optimizer, scheduler)`,
- an `OptimizerConfig`,
- `{"optimizer": ..., "lr_scheduler": scheduler or scheduler dict, "monitor": ...}`,

and what is returned is an entry, a dict `{name: entry}`, a list of entries, or two lists
`([optimizers], [schedulers or scheduler dicts])`. Anything else raises: nothing is dropped.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Interval: TypeAlias = Literal["epoch", "step"]
ClipAlgorithm: TypeAlias = Literal["norm", "value"]

OPTIMIZER_KEYS = ("optimizer", "lr_scheduler", "monitor")
SCHEDULER_KEYS = ("scheduler", "interval", "frequency", "monitor", "strict", "name")
FORMS = (
    "one optimizer, a dict of named ones such as {'critic': optimizer, 'generator': optimizer}, or "
    "a list; in place of an optimizer may stand OptimizerConfig(optimizer, lr_scheduler, ...), "
    "(optimizer, scheduler) or {'optimizer': ..., 'lr_scheduler': ...}"
)


@runtime_checkable
class Scheduler(Protocol):
    """What is needed of a learning-rate scheduler: torch's own have it, and others' mostly do."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Set the next learning rate."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take it back."""


@dataclass(slots=True)
class Schedule:
    """A scheduler and when it steps.

    Args:
        scheduler: steps an optimizer's learning rate.
        interval: `"epoch"`, or `"step"` for every update of its own optimizer.
        frequency: steps at every `frequency`-th end of an interval.
        monitor: the logged metric whose value `scheduler.step` is given, if it takes one.
        strict: whether a `monitor` that was not logged is an error, or only a warning.
        name: what a learning-rate monitor calls it.

    Raises:
        TypeError: something is of the wrong type.
        ValueError: a wrong value, or a `ReduceLROnPlateau` without a `monitor`.
    """

    scheduler: Scheduler
    interval: Interval = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    name: str | None = None

    def __post_init__(self) -> None:
        kind = type(self.scheduler).__name__
        if not _is_scheduler(self.scheduler):
            raise TypeError(f"expected a learning-rate scheduler, got {_what(self.scheduler)}")
        if self.interval not in get_args(Interval):
            raise ValueError(f"interval must be 'epoch' or 'step', got {self.interval!r}")
        if not isinstance(self.frequency, int) or isinstance(self.frequency, bool):
            raise TypeError(f"frequency must be an int, got {self.frequency!r}")
        if self.frequency < 1:
            raise ValueError(f"frequency must be at least 1, got {self.frequency}")
        for label, text in (("monitor", self.monitor), ("name", self.name)):
            if text is not None and not isinstance(text, str):
                raise TypeError(f"{label} must be a str, got {text!r}")
        if not isinstance(self.strict, bool):
            raise TypeError(f"strict must be True or False, got {self.strict!r}")
        if self.monitor is None and isinstance(self.scheduler, ReduceLROnPlateau):
            raise ValueError(
                f"{kind} needs the name of a logged metric to watch: write OptimizerConfig("
                "optimizer, scheduler, monitor='val_loss') or {'optimizer': optimizer, "
                "'lr_scheduler': {'scheduler': scheduler, 'monitor': 'val_loss'}}"
            )
        if self.monitor is not None and _takes_no_metric(self.scheduler):
            # It would land in `step(epoch)`, or have no effect.
            raise ValueError(f"{kind} takes no metric: leave monitor={self.monitor!r} out")

    def due(self, count: int) -> bool:
        """Whether to step now that `count` intervals have ended.

        Args:
            count: epochs, or updates of its optimizer, that have ended so far; the first is 1.
        """
        return count > 0 and count % self.frequency == 0


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer with its scheduler and clipping, for `configure_optimizers` to return.

    Args:
        optimizer: the optimizer.
        lr_scheduler: its scheduler; it is stepped for you.
        interval: the scheduler steps every `"epoch"`, or `"step"`: every update of this optimizer.
        frequency: at every `frequency`-th of them.
        monitor: the logged metric that a `ReduceLROnPlateau` is given.
        gradient_clip_val: the largest norm, or absolute value, of this optimizer's gradients. None
            leaves it to the trainer's `gradient_clip_val`; `math.inf` turns that one off here.
        gradient_clip_algorithm: `"norm"` (over all gradients of this optimizer together) or
            `"value"` (each number by itself). None leaves it to the trainer.

    Raises:
        TypeError: something is of the wrong type.
        ValueError: a value is out of its range, the scheduler belongs to another optimizer, or
            a `ReduceLROnPlateau` has no `monitor`.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
        >>> config = OptimizerConfig(optimizer, gradient_clip_val=1.0)
        >>> OptimizerConfig(optimizer, gradient_clip_val=-1.0)
        Traceback (most recent call last):
            ...
        ValueError: gradient_clip_val must be above 0 (math.inf for no clipping), got -1.0
    """

    optimizer: Optimizer
    lr_scheduler: LRScheduler | Scheduler | None = None
    interval: Interval = "epoch"
    frequency: int = 1
    monitor: str | None = None
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: ClipAlgorithm | None = None

    def __post_init__(self) -> None:
        _check_optimizer(self.optimizer)
        _check_clipping(self.gradient_clip_val, self.gradient_clip_algorithm)
        for schedule in self._schedules():
            _check_belongs(schedule, self.optimizer)

    def _schedules(self) -> list[Schedule]:
        if self.lr_scheduler is not None:
            return [Schedule(self.lr_scheduler, self.interval, self.frequency, self.monitor)]
        if (self.interval, self.frequency, self.monitor) != ("epoch", 1, None):
            raise ValueError(
                "interval, frequency and monitor say when lr_scheduler steps, and there is none: "
                "give lr_scheduler=, or leave them out"
            )
        return []


@dataclass(slots=True)
class NamedOptimizer:
    """One optimizer of a run.

    Attributes:
        name: what a step yields for it.
        optimizer: the optimizer.
        schedulers: its schedulers, each with when it steps.
        gradient_clip_val: its own limit, or None for the trainer's.
        gradient_clip_algorithm: its own algorithm, or None for the trainer's.
    """

    name: str
    optimizer: Optimizer
    schedulers: list[Schedule] = field(default_factory=list)
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: ClipAlgorithm | None = None

    def parameters(self) -> list[Parameter]:
        """Its trainable parameters, each once, in the order of its groups.

        Read anew at each call, so that groups added and layers unfrozen in mid-run count.
        """
        # Each comes once, which `read_optimizers` has made sure of: this runs at every update.
        return [p for g in self.optimizer.param_groups for p in g["params"] if p.requires_grad]


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether its step evaluates the loss itself, and cannot do without: `torch.optim.LBFGS`."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


class Optimizers(dict[str, NamedOptimizer]):
    """The optimizers by name; another key raises a KeyError that lists the names."""

    def __missing__(self, key: object) -> NamedOptimizer:
        raise KeyError(f"there is no optimizer {key!r}: configure_optimizers named {list(self)}")


def read_optimizers(returned: object, module: nn.Module) -> Optimizers:
    """Read what `configure_optimizers` returned.

    Args:
        returned: one of the forms at the top of this file.
        module: whose parameters are trained; for the names in messages.

    Returns:
        The optimizers by name, in the order given: the dict's names; `"optimizer"` for a single
        one; `"0"`, `"1"`, ... for a list of several.

    Raises:
        TypeError: something that is no optimizer, scheduler or name stands where one should.
        ValueError: None or nothing was returned; a wrong value; an unknown key; a scheduler
            without its optimizer; an optimizer, a scheduler, or a parameter of one optimizer,
            that comes twice. (A parameter in *two* optimizers is fine: a yield names one.)

    Warns:
        UserWarning: trainable parameters of the module are in no optimizer.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1)
        >>> list(read_optimizers(torch.optim.SGD(net.parameters(), lr=0.1), net))
        ['optimizer']
    """
    entries = _entries(returned).items()
    named = Optimizers((name, _read_entry(name, entry)) for name, entry in entries)
    _refuse_twice((one.optimizer for one in named.values()), "optimizer")
    _refuse_twice((s.scheduler for one in named.values() for s in one.schedulers), "scheduler")
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for one in named.values():
        _refuse_repeated_parameters(one, names)
    _warn_of_untrained(named.values(), module)
    return named


def clip(
    parameters: Sequence[Parameter], limit: float, algorithm: ClipAlgorithm | str | None = "norm"
) -> None:
    """Clip `.grad` of these parameters together.

    Args:
        parameters: those without a gradient are left out.
        limit: the largest norm of all gradients together, or absolute value of each number.
        algorithm: `"norm"` or `"value"`; None is `"norm"`.

    Raises:
        ValueError: another algorithm.

    Source: `torch.nn.utils.clip_grad_norm_`, `clip_grad_value_`.
    """
    if algorithm == "value":
        torch.nn.utils.clip_grad_value_(parameters, limit)
    elif algorithm in ("norm", None):
        torch.nn.utils.clip_grad_norm_(parameters, limit)
    else:
        raise ValueError(f"gradient_clip_algorithm must be 'norm' or 'value', got {algorithm!r}")


# -- the forms ---------------------------------------------------------------------------------


def _entries(returned: object) -> dict[str, object]:
    """The names, and what stands for each optimizer."""
    if returned is None:
        raise ValueError(f"configure_optimizers returned None; expected {FORMS}")
    if isinstance(returned, Mapping) and "optimizer" not in returned:
        if not returned:
            raise ValueError(f"configure_optimizers returned an empty dict; expected {FORMS}")
        _refuse_stray_schedulers(returned)
        for name in returned:
            if not isinstance(name, str):
                raise TypeError(f"optimizers are named by str, got {name!r}: write {str(name)!r}")
            if not name:
                raise ValueError("the name of an optimizer is empty")
        return dict(returned)
    if not isinstance(returned, list | tuple) or _is_pair(returned):
        return {"optimizer": returned}
    entries = _paired(*returned) if _is_two_lists(returned) else list(returned)
    if not entries:
        raise ValueError(f"configure_optimizers returned no optimizer; expected {FORMS}")
    if len(entries) == 1:
        return {"optimizer": entries[0]}
    return {str(index): entry for index, entry in enumerate(entries)}


def _read_entry(name: str, entry: Any) -> NamedOptimizer:
    try:
        if isinstance(entry, OptimizerConfig):
            return NamedOptimizer(
                name,
                entry.optimizer,
                entry._schedules(),
                entry.gradient_clip_val,
                entry.gradient_clip_algorithm,
            )
        if isinstance(entry, NamedOptimizer):  # from `_paired`
            entry.name = name
            return entry
        if isinstance(entry, Mapping):
            if "optimizer" not in entry:
                raise ValueError(f"expected the key 'optimizer', got the keys {list(entry)}")
            _check_keys(entry, OPTIMIZER_KEYS, "an optimizer's dict")
            parts = entry
        elif _is_pair(entry):
            parts = {"optimizer": entry[0], "lr_scheduler": entry[1]}
        else:
            parts = {"optimizer": entry}
        optimizer = _check_optimizer(parts["optimizer"])
        scheduler, monitor = parts.get("lr_scheduler"), parts.get("monitor")
        if scheduler is None and monitor is not None:
            raise ValueError(f"monitor={monitor!r} is for a scheduler: give lr_scheduler too")
        schedules = [] if scheduler is None else [_read_schedule(scheduler, monitor)]
        for schedule in schedules:
            _check_belongs(schedule, optimizer)
        return NamedOptimizer(name, optimizer, schedules)
    except (TypeError, ValueError) as error:
        error.add_note(f"in configure_optimizers, for the optimizer {name!r}")
        raise


def _read_schedule(scheduler: Any, monitor: str | None = None) -> Schedule:
    """A `Schedule` from a scheduler or Lightning's dict around one."""
    if not isinstance(scheduler, Mapping):
        return Schedule(scheduler, monitor=monitor)
    _check_keys(scheduler, SCHEDULER_KEYS, "a scheduler's dict")
    if "scheduler" not in scheduler:
        raise ValueError("a scheduler's dict needs the key 'scheduler': the scheduler itself")
    return Schedule(**{"monitor": monitor, **scheduler})


def _is_scheduler(value: object) -> bool:
    return isinstance(value, Scheduler) and not isinstance(value, Optimizer | nn.Module | type)


def _takes_no_metric(scheduler: Scheduler) -> bool:
    """Whether its `step` is one of torch's own that are given no metric."""
    of_torch = getattr(type(scheduler).step, "__module__", None) == LRScheduler.__module__
    return of_torch and not isinstance(scheduler, ReduceLROnPlateau)


def _is_pair(value: object) -> bool:
    """`(optimizer, scheduler)`; a list `[optimizer, scheduler]` is too likely a slip."""
    if not isinstance(value, tuple) or len(value) != 2 or not isinstance(value[0], Optimizer):
        return False
    second = value[1]
    return (
        second is None
        or _is_scheduler(second)
        or (isinstance(second, Mapping) and "scheduler" in second)
    )


def _is_two_lists(value: Sequence[object]) -> bool:
    """`([optimizers], [schedulers])`, the second a single scheduler if need be."""
    if len(value) != 2 or not isinstance(value[0], list | tuple):
        return False
    second = value[1] if isinstance(value[1], list | tuple) else [value[1]]
    return all(isinstance(one, Optimizer) for one in value[0]) and not any(
        isinstance(one, Optimizer) for one in second
    )


def _paired(optimizers: Sequence[Optimizer], schedulers: Any) -> list[NamedOptimizer]:
    """Give each scheduler to the optimizer that it was made with, whatever the order."""
    found = [NamedOptimizer("", optimizer) for optimizer in optimizers]
    for scheduler in schedulers if isinstance(schedulers, list | tuple) else [schedulers]:
        schedule = _read_schedule(scheduler)
        its_own = getattr(schedule.scheduler, "optimizer", None)
        owners = [one for one in found if one.optimizer is its_own]
        if not owners:
            raise ValueError(
                f"the scheduler {type(schedule.scheduler).__name__} was made with an optimizer "
                "that is not in the list: return that optimizer too"
            )
        owners[0].schedulers.append(schedule)
    return found


# -- what is refused ---------------------------------------------------------------------------


def _what(value: object) -> str:
    """A short description of a value for a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value)
    return type(value).__name__ if len(text) > 60 or "\n" in text else text


def _check_optimizer(value: object) -> Optimizer:
    if isinstance(value, Optimizer):
        return value
    if _is_scheduler(value) or (isinstance(value, Mapping) and "scheduler" in value):
        raise ValueError(
            "a scheduler stands where an optimizer should: a scheduler is given with its "
            "optimizer, as OptimizerConfig(optimizer, scheduler) or (optimizer, scheduler)"
        )
    if isinstance(value, type) and issubclass(value, Optimizer):
        raise TypeError(
            f"expected an optimizer, got the class {value.__name__}: "
            f"write {value.__name__}(self.parameters(), lr=...)"
        )
    raise TypeError(f"expected an optimizer, got {_what(value)}; write {FORMS}")


def _refuse_stray_schedulers(returned: Mapping[Any, object]) -> None:
    for key in ("lr_scheduler", "scheduler"):
        if key in returned and not isinstance(returned[key], Optimizer | OptimizerConfig):
            raise ValueError(
                f"the dict has the key {key!r} but not 'optimizer', so the scheduler is without "
                f"its optimizer; got the keys {list(returned)}: write "
                "{'optimizer': ..., 'lr_scheduler': ...}"
            )


def _check_keys(given: Mapping[Any, object], known: Sequence[str], what: str) -> None:
    for key in given:
        if key in known:
            continue
        close = get_close_matches(str(key), known, n=1)
        hint = f": did you mean {close[0]!r}?" if close else ""
        if isinstance(given[key], Optimizer | OptimizerConfig):
            hint = ": a dict with the key 'optimizer' describes one optimizer; for several named "
            hint += "ones, choose another name than 'optimizer'"
        elif not close and key in OptimizerConfig.__dataclass_fields__:
            hint = f": OptimizerConfig(optimizer, {key}=...) takes it"
        raise ValueError(f"{what} has the unknown key {key!r}{hint} (known: {', '.join(known)})")


def _check_belongs(schedule: Schedule, optimizer: Optimizer) -> None:
    its_own = getattr(schedule.scheduler, "optimizer", optimizer)
    if its_own is not optimizer:
        raise ValueError(
            f"the scheduler {type(schedule.scheduler).__name__} was made with another optimizer "
            "than the one it is given with: make it with this one"
        )


def _check_clipping(value: object, algorithm: object) -> None:
    if value is not None:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"gradient_clip_val must be a number, got {value!r}")
        if math.isnan(value) or value <= 0:
            raise ValueError(
                f"gradient_clip_val must be above 0 (math.inf for no clipping), got {value!r}"
            )
    if algorithm is not None and algorithm not in get_args(ClipAlgorithm):
        raise ValueError(f"gradient_clip_algorithm must be 'norm' or 'value', got {algorithm!r}")


def _refuse_twice(values: Iterable[object], what: str) -> None:
    seen: list[object] = []
    for value in values:
        if any(value is earlier for earlier in seen):
            raise ValueError(
                f"one and the same {what}, {type(value).__name__}, was returned twice: "
                "it would step twice; return it once"
            )
        seen.append(value)


def _refuse_repeated_parameters(one: NamedOptimizer, names: Mapping[int, str]) -> None:
    # torch raises between groups, but within a group it only warns.
    seen: set[int] = set()
    for group in one.optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in seen:
                outside = f"(of shape {tuple(parameter.shape)}, none of the module's)"
                name = names.get(id(parameter), outside)
                raise ValueError(
                    f"the parameter {name} is twice in the optimizer {one.name!r}: it would be "
                    "stepped twice; pass each parameter once (for modules that share some: "
                    "nn.ModuleList([a, b]).parameters())"
                )
            seen.add(id(parameter))


def _warn_of_untrained(optimizers: Iterable[NamedOptimizer], module: nn.Module) -> None:
    owned = {
        id(parameter)
        for one in optimizers
        for group in one.optimizer.param_groups
        for parameter in group["params"]
    }
    left = [n for n, p in module.named_parameters() if p.requires_grad and id(p) not in owned]
    if left:
        more = f" and {len(left) - 10} more" if len(left) > 10 else ""
        warnings.warn(
            f"trainable parameters in no optimizer, so never trained ({len(left)}): "
            f"{', '.join(left[:10])}{more}. Give them to an optimizer, or say that it is meant "
            "with requires_grad_(False)",
            UserWarning,
            stacklevel=3,
        )
