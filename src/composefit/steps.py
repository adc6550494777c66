"""What a step may hand over, and how that is read as effects."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Set
from difflib import get_close_matches
from typing import Any, TypeAlias, cast

from torch import Tensor

from composefit.effects import Effect, Gather, Once, Reduce, ShardView
from composefit.losses import Loss, describe, is_function
from composefit.updates import Given, Gradient, Grads, OnlyUpdate, Update

#: What a training step yields: an effect, `{name: loss}`, or a bare loss.
Yielded: TypeAlias = "Effect[Any] | Mapping[str, Given] | Given"

#: The return type of a `training_step` that yields.
Step: TypeAlias = Generator[Yielded, Any, Any]

#: Stands for the one optimizer there is, whatever its name.
ONLY = ""


def as_effect(value: object, returned: bool) -> Effect[Any] | None:
    """The effect that a yielded or returned value stands for; None skips the step.

    Raises:
        TypeError: anything that is no loss and no effect.
    """
    if isinstance(value, Tensor):
        return OnlyUpdate({ONLY: value})
    if isinstance(value, Effect):
        if returned and isinstance(value, (Gather, Gradient, Once, Reduce)):
            kind = type(value).__name__
            raise TypeError(
                f"training_step returned {kind}(...), whose result nobody would get: yield it, "
                f"`result = yield from {kind}(...)`, and return a loss"
            )
        return value
    if isinstance(value, Loss):
        return OnlyUpdate({ONLY: value}) if returned else Reduce(value)
    if isinstance(value, dict):
        if returned and "loss" in value:
            loss = as_effect(value["loss"], returned)
            others = value.keys() - {"loss"}
            return _LossOf(loss.losses, others) if type(loss) is OnlyUpdate and others else loss
        return Update(cast("dict[str, Given]", value))
    if isinstance(value, Grads) or is_function(value):
        return OnlyUpdate({ONLY: cast("Given", value)})
    if value is None and returned:
        return None
    verb = "returned" if returned else "yielded"
    if isinstance(value, (Generator, Helper)):
        raise TypeError(
            f"training_step {verb} a generator, which does nothing by itself: "
            "write `yield from self.helper(...)`"
        )
    hint = ""
    if isinstance(value, str) and not returned:
        hint = ": `yield from` a dict hands over its keys, write `yield`"
    elif isinstance(value, float):
        hint = ": a Python number has no gradient, was .item() called on the loss?"
    elif value is None:
        hint = ": to skip a step, `return`"
    raise TypeError(
        f"training_step {verb} {describe(value)}, expected a loss (0-dim tensor, Mean, Sum), "
        f"{{name: loss}} or an effect (Update, Gather, Once, ...){hint}"
    )


class _LossOf(OnlyUpdate):
    """A returned `{"loss": loss, ...}`, of which nothing but the loss is looked at."""

    __slots__ = ("others",)

    def __init__(self, losses: Mapping[str, Given], others: Set[object]) -> None:
        super().__init__(losses)
        self.others = others

    def visit(self, shard: ShardView) -> None:
        """As `OnlyUpdate`, once it is sure that none of the others was meant as a loss."""
        (name,) = self.losses  # by now the optimizer's
        if name in self.others:
            raise ValueError(
                f'training_step returned {{"loss": ..., {name!r}: ...}}, and {name!r} is the '
                f"optimizer: write {{{name!r}: loss}} alone, or give the other value another name"
            )
        super().visit(shard)


def unknown_optimizer(name: object, known: list[str]) -> ValueError:
    """The error for a loss whose optimizer does not exist."""
    if name == ONLY:
        return ValueError(
            f"a bare loss needs one optimizer, there are {len(known)}: write "
            f"`yield {{name: loss}}` with one of {known}"
        )
    close = get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return ValueError(f"there is no optimizer {name!r}: configure_optimizers named {known}{hint}")


def offered(function: Callable[..., Any], count: int) -> int:
    """How many of `count` positional arguments a step or hook takes: it may declare fewer."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return count
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return min(count, len(positional))


# -- generator methods that nobody runs --------------------------------------------------------


class _Running(threading.local):
    """In each thread: the step that runs, and the helper that it dropped."""

    step: object = None
    dropped: str | None = None


_running = _Running()


class Helper:
    """What a generator method of a LoopModule returns: it notices when nobody runs it."""

    __slots__ = ("generator", "name", "started", "step")

    def __init__(self, generator: Generator[Any, Any, Any], name: str) -> None:
        self.generator = generator
        self.name = name
        self.started = False
        self.step = _running.step

    def __iter__(self) -> Iterator[Any]:
        self.started = True
        return self.generator

    def __next__(self) -> Any:
        self.started = True
        return next(self.generator)

    def send(self, value: Any) -> Any:
        """As the generator's."""
        self.started = True
        return self.generator.send(value)

    def close(self) -> None:
        """As the generator's."""
        self.started = True
        self.generator.close()

    def __del__(self) -> None:
        # One that a fault left in a traceback may die within any later step, whose fault it is not.
        if not self.started and self.step is _running.step:
            _running.dropped = self.name


def watch_helpers(step: object) -> None:
    """This thread now runs this step: `dropped_helper` will tell of no other step's helpers."""
    _running.step = step
    _running.dropped = None


def dropped_helper() -> str | None:
    """The name of a generator method that this step has called in this thread and never run."""
    name = _running.dropped
    if name is not None:
        _running.dropped = None
    return name


def helper(function: Callable[..., Generator[Any, Any, Any]]) -> Callable[..., Helper]:
    """A generator method whose calls are noticed where nobody runs them."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Helper:
        return Helper(function(*args, **kwargs), function.__qualname__)

    call.makes_helpers = True  # type: ignore[attr-defined]
    return call
