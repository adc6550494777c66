"""Hyperparameters: the arguments that a module was made with, kept so that it can be made again."""

from __future__ import annotations

import dataclasses
import inspect
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from inspect import Parameter, Signature
from types import FrameType, SimpleNamespace
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

__all__ = ["Hyperparameters", "build", "collect"]

T = TypeVar("T")


class Hyperparameters(dict[str, Any]):
    """A dict whose items can also be read and set as attributes.

    A name that dict has itself (`items`, `copy`, ...) is reached with brackets only.

    Attributes:
        given_as: the argument of `__init__` which all of it came as, or None where each item was an
            argument of its own.

    Raises:
        AttributeError: there is no such item; names the nearest one.

    Example:
        >>> hparams = Hyperparameters(width=64, lr=1e-3)
        >>> hparams.width, hparams["lr"]
        (64, 0.001)
        >>> hparams.widht
        Traceback (most recent call last):
            ...
        AttributeError: there is no hyperparameter 'widht'; did you mean 'width'?
    """

    given_as: str | None = None

    def merge(self, other: Hyperparameters) -> None:
        """Take over the items of another one; where both have one, the other's counts."""
        self.update(other)
        if other:
            self.given_as = other.given_as

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"there is no hyperparameter {name!r}; {_nearest(name, self)}", name=name, obj=self
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "given_as":
            super().__setattr__(name, value)
        else:
            self[name] = value

    def __delattr__(self, name: str) -> None:
        self.__getattr__(name)  # for its error
        del self[name]


def collect(
    frame: FrameType, owner: object, names: Sequence[Any] = (), ignore: str | Sequence[str] = ()
) -> Hyperparameters:
    """What `save_hyperparameters` keeps when it is called from a frame.

    That is the arguments of `owner.__init__`, defaults and `**kwargs` one by one included, as they
    are when this is called. Where a base class calls, a subclass's `__init__` is further up the
    stack: its arguments are kept too, and count where names are the same, since it is the subclass
    that will be made again. `*args` are kept as a tuple under their own name.

    Containers, tensors and arrays are copied, so that what is kept stays as it is; modules and
    functions are kept as they are, although a checkpoint cannot hold them: it says so when it is
    written, and `ignore` leaves them out.

    Args:
        frame: of the function that called `save_hyperparameters`.
        owner: the object under construction.
        names: only these arguments; or one mapping, namespace or dataclass instance, whose items
            are kept instead.
        ignore: names to leave out.

    Raises:
        RuntimeError: there is no `__init__` of the owner on the stack, and no mapping is given.
        TypeError: a name that is no str, several mappings, or something else altogether.
        ValueError: a name that is no argument.
    """
    calls = _constructors(frame, owner)
    arguments: dict[str, Any] = {}
    for call in calls:  # the innermost first
        arguments |= _arguments(call, outermost=call is calls[-1])
    left_out = {ignore} if isinstance(ignore, str) else set(ignore)
    if not all(isinstance(name, str) for name in left_out):
        raise TypeError(f"save_hyperparameters(ignore=...) expects names, got {ignore!r}")

    given_as = None
    if not names:
        if not calls:
            raise RuntimeError(
                f"save_hyperparameters() keeps the arguments of {type(owner).__name__}.__init__, "
                "and belongs in there; anywhere else give it a dict: save_hyperparameters({...})"
            )
        found = arguments
    elif all(isinstance(name, str) for name in names):
        for name in names:
            if name not in arguments:
                raise ValueError(
                    f"save_hyperparameters({name!r}): {type(owner).__name__}.__init__ has no such "
                    f"argument; {_nearest(name, arguments)}"
                )
        found = {name: arguments[name] for name in names}
    elif len(names) == 1:
        found = _items(names[0])
        given_as = next((name for name, value in arguments.items() if value is names[0]), None)
    else:
        raise TypeError(
            "save_hyperparameters(...) expects names of arguments, as strings, or one dict, "
            f"namespace or dataclass; got {', '.join(type(one).__name__ for one in names)}"
        )
    kept = Hyperparameters({k: _copy(v) for k, v in found.items() if k not in left_out})
    kept.given_as = given_as
    return kept


def build(
    cls: type[T],
    hyperparameters: Mapping[str, Any],
    overrides: Mapping[str, Any],
    given_as: str | None = None,
) -> T:
    """Make an object with the hyperparameters that were kept of another one.

    Args:
        cls: the class to make one of. It gets what its `__init__` takes; all, if it has `**kwargs`.
        hyperparameters: name -> value.
        overrides: take precedence. With `given_as`, those that are no argument of the class are
            items of that one.
        given_as: the argument which the hyperparameters are items of (`Hyperparameters.given_as`).

    Raises:
        TypeError: an argument without a default is missing, or an override is no argument.

    Example:
        >>> class Net:
        ...     def __init__(self, width, depth=2):
        ...         self.size = width, depth
        >>> build(Net, {"width": 64, "of a base class": 1}, {"depth": 3}).size
        (64, 3)
    """
    parameters = inspect.signature(cls).parameters
    if given_as in overrides:
        hyperparameters = {}
    elif given_as is not None and given_as in parameters:
        items = {k: v for k, v in overrides.items() if k not in parameters}
        overrides = {k: v for k, v in overrides.items() if k in parameters}
        hyperparameters = {given_as: Hyperparameters({**hyperparameters, **items})}
    values = {**hyperparameters, **overrides}
    named = {n: p for n, p in parameters.items() if p.kind is not Parameter.VAR_KEYWORD}
    rest = next((n for n, p in parameters.items() if p.kind is Parameter.VAR_KEYWORD), None)

    unknown = [name for name in overrides if name not in named]
    if unknown and rest is None:
        raise TypeError(
            f"{cls.__name__}.__init__ has no argument {unknown[0]!r}; {_nearest(unknown[0], named)}"
        )
    missing = [
        n
        for n, p in named.items()
        if p.default is p.empty and p.kind is not Parameter.VAR_POSITIONAL and n not in values
    ]
    if missing:
        them = ", ".join(map(repr, missing))
        raise TypeError(
            f"{cls.__name__}.__init__ needs {them}, which the checkpoint does not hold: pass "
            f"load_from_checkpoint(path, {', '.join(f'{name}=...' for name in missing)}), or call "
            "save_hyperparameters() in __init__ before the next checkpoint is written"
        )
    bound = inspect.BoundArguments(Signature(list(parameters.values())), {})
    bound.arguments.update({n: values[n] for n in named if n in values})
    bound.apply_defaults()
    if rest is not None:
        bound.arguments[rest] = {k: v for k, v in values.items() if k not in named}
    try:
        return cls(*bound.args, **bound.kwargs)
    except TypeError as error:
        error.add_note(
            f"when {cls.__name__} was made with the hyperparameters {', '.join(values)}; one that "
            "it works out itself is left out by save_hyperparameters(ignore=[...])"
        )
        raise


# -- arguments ---------------------------------------------------------------------------------


def _constructors(frame: FrameType | None, owner: object) -> list[FrameType]:
    """The frames of the owner's `__init__` methods that are running, the innermost first."""
    found = []
    while frame is not None:
        code = frame.f_code
        if (
            code.co_name == "__init__"
            and code.co_argcount
            and frame.f_locals.get(code.co_varnames[0]) is owner
        ):
            found.append(frame)
        frame = frame.f_back
    return found


def _arguments(frame: FrameType, outermost: bool) -> dict[str, Any]:
    names, args, kwargs, values = inspect.getargvalues(frame)
    # A name that was deleted since is gone.
    found = {name: values[name] for name in names[1:] if name in values}
    if args is not None and outermost and values.get(args):
        found[args] = values[args]
    if kwargs is not None:
        found |= values.get(kwargs, {})
    return found


def _items(given: object) -> dict[str, Any]:
    if isinstance(given, Mapping):
        found = dict(given)
    elif isinstance(given, Namespace | SimpleNamespace):
        found = dict(vars(given))
    elif dataclasses.is_dataclass(given) and not isinstance(given, type):
        found = {one.name: getattr(given, one.name) for one in dataclasses.fields(given)}
    else:
        raise TypeError(
            "save_hyperparameters(...) expects names of arguments, as strings, or a dict, "
            f"namespace or dataclass instance, got {type(given).__name__}"
        )
    for name in found:
        if not isinstance(name, str):
            raise TypeError(f"a hyperparameter's name must be a str, got {name!r}")
    return found


def _copy(value: Any) -> Any:
    """A copy of data; anything else stays what it is: a network is large, and not kept anyway."""
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(_copy(item) for item in value)
    if type(value) is Tensor:
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    return value


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known are {', '.join(known)}" if known else "there are none"
