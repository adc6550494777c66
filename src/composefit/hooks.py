"""Calling hooks: callbacks first, then the module; only those that somebody has written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from composefit.callbacks import Callback
from composefit.module import LoopModule, offered

_CALLBACK_ONLY = {"setup", "teardown", "on_exception"}


class HookCaller:
    """The hooks of one run, found once.

    A hook may declare fewer arguments than it is offered. Callbacks get the trainer and the module
    first.

    Args:
        trainer: what callbacks get as such.
        module: whose own hooks run after the callbacks'.
        callbacks: in their order.
        heard: called after every group of hooks, with what they logged.
    """

    def __init__(
        self,
        trainer: Any,
        module: LoopModule | None,
        callbacks: Sequence[Callback],
        heard: Callable[[], None],
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._callbacks = list(callbacks)
        self._heard = heard
        self._found: dict[str, list[Callable[..., Any]]] = {}

    def anybody(self, name: str, count: int) -> bool:
        """Whether somebody has written this hook, which is offered `count` arguments.

        Asked once by who would call it at every step.
        """
        return bool(self._hooks(name, count))

    def __call__(self, name: str, *arguments: Any) -> None:
        """Run all hooks of this name."""
        hooks = self._hooks(name, len(arguments))
        if hooks:
            for hook in hooks:
                hook(*arguments)
            self._heard()

    def _hooks(self, name: str, count: int) -> list[Callable[..., Any]]:
        hooks = self._found.get(name)
        if hooks is None:
            hooks = self._found[name] = self._find(name, count)
        return hooks

    def _find(self, name: str, count: int) -> list[Callable[..., Any]]:
        found: list[Callable[..., Any]] = []
        for callback in self._callbacks:
            if _written(callback, Callback, name):
                hook = getattr(callback, name)
                found.append(_fitted(hook, count + 2, (self._trainer, self._module)))
        module = self._module
        if module is not None and name not in _CALLBACK_ONLY and _written(module, LoopModule, name):
            found.append(_fitted(getattr(module, name), count, ()))
        return found


def _written(owner: object, base: type, name: str) -> bool:
    if name in vars(owner):
        return True
    return getattr(type(owner), name, None) is not getattr(base, name, None)


def _fitted(hook: Callable[..., Any], count: int, first: tuple[Any, ...]) -> Callable[..., Any]:
    """The hook with its first arguments, given as many of the others as it declares."""
    takes = offered(hook, count)
    bound = partial(hook, *first[:takes]) if first else hook
    rest = takes - len(first)
    if takes == count:
        return bound
    return lambda *arguments: bound(*arguments[: max(rest, 0)])
