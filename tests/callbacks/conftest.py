"""A trainer that does nothing, a clock that stands still, a file that says it is a terminal."""

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A monotonic clock that a test moves by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class FakeTrainer:
    """What callbacks read of a trainer."""

    def __init__(self, **attributes: Any) -> None:
        self.metrics: Callable[[], dict[str, float]] = dict
        self.metric_requests = 0
        self.global_step = 0
        self.training = None
        self.current_epoch = 0
        self.max_epochs: int | None = 2
        self.max_steps = -1
        self.num_training_batches: float = 4
        self.num_val_batches: float = 2
        self.samples_seen: int | None = 0
        self.is_global_zero = True
        self.optimizers: dict[str, Any] = {}
        self.strategy: Any = SimpleNamespace()
        self.default_root_dir: str | Path = "."
        self.saved: list[Path] = []
        for name, value in attributes.items():
            setattr(self, name, value)

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        self.metric_requests += 1
        return self.metrics()

    def save_checkpoint(self, path: Path) -> None:
        self.saved.append(path)


@pytest.fixture
def make_trainer() -> type[FakeTrainer]:
    return FakeTrainer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("composefit.callbacks.progress_bar.time", clock)
    return clock


@pytest.fixture
def terminal() -> Console:
    return Console(
        file=Terminal(), force_terminal=True, width=80, height=24, _environ={"TERM": "xterm"}
    )


@pytest.fixture
def pipe() -> Console:
    """No terminal, though the environment asks for colour, as it does on many build servers."""
    return Console(file=io.StringIO(), width=80, _environ={"FORCE_COLOR": "1", "TERM": "xterm"})
