"""Logged values that callbacks judge a run by: looking them up, comparing them, and when."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

from torch import Tensor

Mode: TypeAlias = Literal["min", "max"]


def check_monitor(monitor: object, mode: object) -> None:
    """Refuse a name or a direction that cannot be one.

    Raises:
        TypeError: `monitor` is neither a str nor None.
        ValueError: `mode` is neither `"min"` nor `"max"`.
    """
    if monitor is not None and not isinstance(monitor, str):
        raise TypeError(
            f"monitor must be the name of a logged value, such as 'val_loss', got {monitor!r}"
        )
    if mode not in ("min", "max"):
        raise ValueError(
            f"mode must be 'min' (a loss) or 'max' (an accuracy), got {mode!r}: say which values "
            "of monitor are better"
        )


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        TypeError: it is no int.
        ValueError: it is less.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def better(value: float, than: float, mode: Mode) -> bool:
    """Whether a value beats another; equal ones do not, and NaN never does.

    Example:
        >>> better(0.1, 0.2, "min"), better(0.2, 0.2, "min"), better(math.nan, 0.2, "max")
        (True, False, False)
    """
    return value < than if mode == "min" else value > than


def worst(mode: Mode) -> float:
    """What any number beats."""
    return math.inf if mode == "min" else -math.inf


def never_logged(who: str, names: Iterable[str], logged: Iterable[str]) -> ValueError:
    """The error for values that a callback needs and nobody has logged."""
    wanted = ", ".join(repr(name) for name in sorted(names))
    known = sorted(logged)
    return ValueError(
        f"{who} needs {wanted}, which was not logged by now; logged are {known}. Write "
        "self.log(name, value) in training_step (the mean over an epoch: on_epoch=True) or in "
        "validation_step, or name one of these"
    )


def as_score(value: Any) -> Tensor:
    """A metric as it is kept: by itself, on the CPU."""
    score: Tensor = value.detach().cpu().clone()
    return score


def agreed_values(trainer: Any) -> dict[str, Tensor]:
    """Everything logged by now, the same on all ranks; all of them call it."""
    if trainer.world is not None:
        for logs in (trainer.logs, trainer.evaluation.logs):
            logs.exchange(trainer.world, trainer.rank_metrics)
    found: dict[str, Tensor] = trainer.callback_metrics
    return found


def judges_at_epoch_end(trainer: Any, chosen: bool | None) -> bool:
    """Whether values are judged at the end of a training epoch, not of each validation.

    As Lightning decides it: at the end of the epoch where each epoch has one validation at its
    end, or none at all, since then everything is known; after each validation where these come at
    other times.

    Args:
        trainer: of which the validation's rhythm is read.
        chosen: what the user said; None leaves it to the rhythm.
    """
    if chosen is not None:
        return chosen
    if not sum(trainer.num_val_batches):
        return True
    # A whole number 1 is something else than 1.0: after every batch.
    interval = trainer.val_check_interval
    once = interval is None or (isinstance(interval, float) and interval == 1.0)
    return once and trainer.check_val_every_n_epoch == 1
