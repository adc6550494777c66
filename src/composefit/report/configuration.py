"""How a run was set up, as plain nested text and numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch

from composefit.optimizers import NamedOptimizer, Schedule

#: A value that is shown as it is.
_PLAIN = (bool, int, float, str, type(None))


def configuration(
    arguments: Mapping[str, Any],
    strategy: object,
    optimizers: Mapping[str, NamedOptimizer],
    hyperparameters: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Collect what `write` shows of a run's set-up.

    Args:
        arguments: the trainer's arguments by name; a `"strategy"` among them is left out.
        strategy: the strategy that was used.
        optimizers: name -> optimizer with its schedulers and clipping.
        hyperparameters: the module's.

    Returns:
        `"trainer"`, `"strategy"`, `"optimizers"` and `"hyperparameters"`, each a dict of plain
        values; the last two only where there are any.
    """
    found: dict[str, Any] = {
        "trainer": {name: describe(v) for name, v in arguments.items() if name != "strategy"},
        "strategy": {"class": type(strategy).__name__, **_settings(strategy)},
    }
    if optimizers:
        found["optimizers"] = {name: _optimizer(one) for name, one in optimizers.items()}
    if hyperparameters:
        found["hyperparameters"] = describe(hyperparameters)
    return found


def describe(value: object) -> Any:
    """Something as plain values: containers item by item, objects by class and plain attributes.

    Nothing depends on where an object lies in memory, so that reports can be compared.

    Example:
        >>> describe({"lr": 0.1, "betas": (0.5, 0.9), "device": torch.device("cpu")})
        {'lr': 0.1, 'betas': [0.5, 0.9], 'device': 'cpu'}
        >>> describe(torch.nn.LeakyReLU(0.2))
        'LeakyReLU(training=True, negative_slope=0.2, inplace=False)'
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, os.PathLike | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else f"tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, Sequence | AbstractSet) and not isinstance(value, bytes):
        return [describe(item) for item in value]
    name = getattr(value, "__qualname__", None)  # of a class or function
    if isinstance(name, str):
        return name
    settings = ", ".join(f"{key}={item!r}" for key, item in _settings(value).items())
    return f"{type(value).__name__}({settings})"


def _settings(value: object) -> dict[str, Any]:
    """The public attributes of an object that are plain values."""
    attributes = getattr(value, "__dict__", {})
    return {
        name: str(item) if isinstance(item, torch.device) else item
        for name, item in attributes.items()
        if not name.startswith("_") and isinstance(item, (*_PLAIN, torch.device))
    }


def _optimizer(one: NamedOptimizer) -> dict[str, Any]:
    groups = one.optimizer.param_groups
    found: dict[str, Any] = {
        "class": type(one.optimizer).__name__,
        "parameters": sum(p.numel() for group in groups for p in group["params"]),
    }
    for name in groups[0]:
        # Its first learning rate, where a scheduler has changed it since.
        key = "initial_lr" if name == "lr" and "initial_lr" in groups[0] else name
        values = [describe(group.get(key)) for group in groups]
        same = all(value == values[0] for value in values)
        # None and False stand for torch's own choice of an implementation.
        if name in ("params", "initial_lr") or (same and values[0] in (None, False, "")):
            continue
        found[name] = values[0] if same else values
    if one.schedulers:
        found["schedulers"] = [_schedule(schedule) for schedule in one.schedulers]
    if one.gradient_clip_val is not None:
        kind = one.gradient_clip_algorithm or "norm"
        found["gradient clipping"] = f"{kind} at most {one.gradient_clip_val:g}"
    return found


def _schedule(schedule: Schedule) -> str:
    every = f"{schedule.frequency} " if schedule.frequency > 1 else ""
    plural = "s" if schedule.frequency > 1 else ""
    watching = f", watching {schedule.monitor}" if schedule.monitor else ""
    interval = f"every {every}{schedule.interval}{plural}"
    return f"{type(schedule.scheduler).__name__}, {interval}{watching}"
