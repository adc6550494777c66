"""Calling hooks: callbacks first, then the module; only those that somebody has written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from composefit.callbacks import Callback
from composefit.module import Context, Logged, LoopModule
from composefit.steps import offered

_CALLBACK_ONLY = {"setup", "teardown", "on_exception"}

# What these log is a value of the step, as in Lightning; what others log, one of the epoch.
_IN_A_STEP = {
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_after_optimizer_step",
    "on_train_batch_end",
}


class HookCaller:
    """The hooks of one run, found once.

    A hook may declare fewer arguments than it is offered. Callbacks get the trainer and the module
    first. What a hook logs counts once, also where a hook runs within a step: it belongs to no
    shard.

    Args:
        trainer: what callbacks get as such.
        module: whose own hooks run after the callbacks', and before those of callbacks that
            save state.
        callbacks: in their order.
        heard: called after every group of hooks, with what they logged.
    """

    def __init__(
        self,
        trainer: Any,
        module: LoopModule,
        callbacks: Sequence[Callback],
        heard: Callable[[dict[str, Logged]], None],
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._callbacks = list(callbacks)
        self._heard = heard
        self._context = Context(None)
        self._found: dict[str, list[Callable[..., Any]]] = {}

    def anybody(self, name: str, count: int) -> bool:
        """Whether somebody has written this hook, which is offered `count` arguments.

        Asked once by who would call it at every step.
        """
        return bool(self.hooks(name, count))

    def hooks(self, name: str, count: int) -> list[Callable[..., Any]]:
        """The hooks of this name, each to be called with `count` arguments."""
        found = self._found.get(name)
        if found is None:
            found = self._found[name] = self._find(name, count)
        return found

    def __call__(self, name: str, *arguments: Any) -> None:
        """Run all hooks of this name."""
        hooks = self.hooks(name, len(arguments))
        if not hooks:
            return
        context, state = self._context, vars(self._module)
        context.training = name in _IN_A_STEP
        context.logs = {}
        outer = state["_context"]
        state["_context"] = context
        try:
            for hook in hooks:
                hook(*arguments)
        finally:
            state["_context"] = outer
        if context.logs:
            self._heard(context.logs)

    def _find(self, name: str, count: int) -> list[Callable[..., Any]]:
        first = [one for one in self._callbacks if not one.saves_state]
        last = [one for one in self._callbacks if one.saves_state]
        of_module = []
        if name not in _CALLBACK_ONLY and _written(self._module, LoopModule, name):
            of_module = [_fitted(getattr(self._module, name), count, ())]
        return [*self._of(first, name, count), *of_module, *self._of(last, name, count)]

    def _of(self, callbacks: Sequence[Callback], name: str, count: int) -> list[Callable[..., Any]]:
        given = (self._trainer, self._module)
        return [
            _fitted(getattr(callback, name), count + 2, given)
            for callback in callbacks
            if _written(callback, Callback, name)
        ]


def _written(owner: object, base: type, name: str) -> bool:
    if name in vars(owner):
        return True
    return getattr(type(owner), name, None) is not getattr(base, name, None)


def _fitted(hook: Callable[..., Any], count: int, first: tuple[Any, ...]) -> Callable[..., Any]:
    """The hook with its first arguments, given as many of the others as it declares."""
    takes = offered(hook, count)
    bound = partial(hook, *first[:takes]) if first else hook
    if takes == count:
        return bound
    rest = max(takes - len(first), 0)
    return lambda *arguments: bound(*arguments[:rest])
