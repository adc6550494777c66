"""Reading what a user passed to `Trainer`: the value, or an error that says what it should be."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from composefit.callbacks import Callback
from composefit.loggers import CSVLogger, Logger
from composefit.loops import Limits
from composefit.losses import describe

# Arguments of Lightning's Trainer that there are none of, and what to write instead.
INSTEAD = {
    "num_nodes": "one process is used",
    "plugins": "write a Strategy, and pass it as strategy=...",
    "sync_batchnorm": "statistics of shards are merged after each step",
    "use_distributed_sampler": "leave it out: a loader's batch is cut, never its dataset",
    "barebones": "switch off what you do not want: logger=False, enable_checkpointing=False, "
    "enable_progress_bar=False, enable_model_summary=False",
    "model_registry": "give the file's path as ckpt_path",
    "enable_autolog_hparams": "call self.save_hyperparameters(logger=False) in the module",
    "gpus": "write accelerator='gpu', devices=...",
    "resume_from_checkpoint": "write trainer.fit(..., ckpt_path=...)",
}

EXAMPLES = {
    "training_step": """    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)
""",
    "configure_optimizers": """    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)
""",
    "validation_step": """    def validation_step(self, batch):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))
""",
    "test_step": """    def test_step(self, batch):
        x, y = batch
        self.log("test_loss", F.cross_entropy(self.net(x), y))
""",
}


def refuse_unknown(function: Callable[..., Any], unknown: Mapping[str, Any]) -> None:
    """Raise a TypeError for arguments that landed in a constructor's last one, `**unknown`."""
    for name in unknown:
        known = [p for p in inspect.signature(function).parameters if p != "self"]
        close = get_close_matches(name, known, n=1)
        if name in INSTEAD:
            raise TypeError(f"Trainer() has no argument {name!r}: {INSTEAD[name]}")
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
    return Path(value).expanduser()


def limit(name: str, value: Any, least: int = 1) -> int | float | None:
    """A number of batches, or a fraction of them as a float."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of batches or a fraction, got {value!r}")
    if value == 0 and least == 0:
        return 0
    if isinstance(value, int) and value < least:
        raise ValueError(f"{name} must be at least {least} {_BATCHES[least]}, got {value}")
    if isinstance(value, float) and not 0.0 < value <= 1.0:
        raise ValueError(f"{name} as a fraction must be above 0 and at most 1.0, got {value}")
    return value


_BATCHES = {0: "batches", 1: "batch"}


def choice(name: str, value: Any, known: Sequence[Any]) -> Any:
    """One of a few values."""
    if value not in known:
        listed = " or ".join([", ".join(map(repr, known[:-1])), repr(known[-1])])
        raise ValueError(f"{name} must be {listed}, got {value!r}")
    return value


def fast_dev_run(value: Any) -> int:
    """How many batches: 0 for an ordinary run."""
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"fast_dev_run must be True, False or a number of batches, got {value!r}")
    return int(value)


def overfit(value: Any) -> int | float | None:
    """A number of batches or a fraction of them; None for an ordinary run."""
    return limit("overfit_batches", value, least=0) or None


def limits(
    max_epochs: Any, max_steps: Any, min_epochs: Any, min_steps: Any, max_time: Any, dev: int
) -> Limits:
    """When a fit is over."""
    epochs = count("max_epochs", max_epochs, least=0, none=True)
    steps = count("max_steps", max_steps, least=-1)
    seconds = None if max_time is None else _seconds(max_time)
    if dev:
        epochs, steps = 1, dev
    if epochs is None and steps < 0 and seconds is None:
        epochs = 1000
    return Limits(
        None if epochs == -1 else epochs,
        None if steps < 0 else steps,
        count("min_epochs", min_epochs, least=0, none=True) or 0,
        count("min_steps", min_steps, least=0, none=True) or 0,
        seconds,
    )


def _seconds(value: Any) -> float:
    """A duration as Lightning's `max_time` takes it."""
    if isinstance(value, timedelta):
        found = value
    elif isinstance(value, Mapping):
        found = timedelta(**value)
    elif isinstance(value, str) and re.fullmatch(r"\d+:\d+:\d+:\d+", value):
        days, hours, minutes, seconds = map(int, value.split(":"))
        found = timedelta(days, seconds, hours=hours, minutes=minutes)
    else:
        raise ValueError(
            "max_time must be a timedelta, a dict of its arguments, or a text "
            f"'days:hours:minutes:seconds' such as '00:12:00:00', got {value!r}"
        )
    return found.total_seconds()


def refuse_order(given: Sequence[Callback]) -> None:
    """Raise a ValueError where a callback stands after one that it has to run before."""
    for i, late in enumerate(given):
        for early in given[:i]:
            if late.runs_before and isinstance(early, late.runs_before):
                raise ValueError(
                    f"{type(late).__name__} has to run before {type(early).__name__}: put it in "
                    "front of that in callbacks=[...]"
                )


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
    """True or None for a `CSVLogger` in `root`, False for no logger, or one or several."""
    if given is True or given is None:
        return [CSVLogger(root)]
    if given is False:
        return []
    found: list[Logger] = []
    for one in given if isinstance(given, Sequence) else [given]:
        if not isinstance(one, Logger):
            raise TypeError(f"logger must be True, False or loggers, got {one!r}")
        found.append(one)
    return found
