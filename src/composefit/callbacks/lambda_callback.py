"""A callback from functions."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from composefit.callbacks.callback import Callback

_HOOKS = [
    name
    for name, value in vars(Callback).items()
    if callable(value) and (name.startswith("on_") or name in ("setup", "teardown"))
]


class LambdaCallback(Callback):
    """Runs functions at given moments, without a class of one's own.

    Args:
        hooks: name of a hook of `Callback` -> function, which may declare fewer arguments than
            the hook is offered.

    Raises:
        TypeError: a name that is no hook, or something that cannot be called.

    Example:
        >>> LambdaCallback(on_train_epoch_end=lambda trainer: print(trainer.current_epoch))
        LambdaCallback(on_train_epoch_end)
        >>> LambdaCallback(on_fit_ends=print)
        Traceback (most recent call last):
            ...
        TypeError: LambdaCallback() has no hook 'on_fit_ends'; did you mean 'on_fit_end'?
    """

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        for name, function in hooks.items():
            if name not in _HOOKS:
                close = get_close_matches(name, _HOOKS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(_HOOKS)}"
                raise TypeError(f"LambdaCallback() has no hook {name!r}; {hint}")
            if not callable(function):
                raise TypeError(f"{name} must be a function, got {function!r}")
        # A hook of an instance is found as one of its class is.
        vars(self).update(hooks)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(vars(self))})"
