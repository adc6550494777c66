"""Reading what a user passed to `Trainer`: the value, or an error that says what it should be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from composefit.callbacks import Callback
from composefit.loggers import CSVLogger, Logger
from composefit.losses import describe


def refuse_unknown(function: Callable[..., Any], unknown: Mapping[str, Any]) -> None:
    """Raise a TypeError for arguments that landed in a constructor's last one, `**unknown`."""
    for name in unknown:
        known = [p for p in inspect.signature(function).parameters if p != "self"]
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known[:-1])}"
        raise TypeError(f"Trainer() has no argument {name!r}; {hint}")


def count(name: str, value: Any, least: int = 1, none: bool = False) -> Any:
    """A whole number of at least `least`; None where `none` allows it."""
    if value is None and none:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least and not (name == "max_epochs" and value == -1):
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def positive(name: str, value: Any) -> float | None:
    """A number above zero, or None."""
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not value > 0:
        raise ValueError(f"{name} must be above 0 (None for no clipping), got {value}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """True or False, and nothing that only counts as such."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def path(name: str, value: Any) -> Path:
    """A path."""
    if not isinstance(value, (str, Path)):
        raise TypeError(f"{name} must be a path, got {value!r}")
    return Path(value)


def limit(name: str, value: Any) -> int | float | None:
    """A number of batches, or a fraction of them as a float."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of batches or a fraction, got {value!r}")
    if isinstance(value, int) and value < 1:
        hint = "; for no validation leave val_dataloaders out" if "val" in name else ""
        raise ValueError(f"{name} must be at least 1 batch, got {value}{hint}")
    if isinstance(value, float) and not 0.0 < value <= 1.0:
        raise ValueError(f"{name} as a fraction must be above 0 and at most 1.0, got {value}")
    return value


def callbacks(given: object) -> list[Callback]:
    """One callback, several, or None, as a list."""
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


def loggers(given: object, root: Path) -> list[Logger]:
    """True for a `CSVLogger` in `root`, False or None for no logger, or one or several."""
    if given is True:
        return [CSVLogger(root)]
    if given is None or given is False:
        return []
    found: list[Logger] = []
    for one in given if isinstance(given, Sequence) else [given]:
        if not isinstance(one, Logger):
            raise TypeError(f"logger must be True, False or loggers, got {one!r}")
        found.append(one)
    return found
