"""Reading the trainer's arguments; what is refused, and how, is in tests/faults."""

import math
from pathlib import Path
from typing import Any

import pytest

from composefit import Callback, Trainer, arguments
from composefit.loggers import CSVLogger, Logger


class Nowhere(Logger):
    def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...


def test_good_values_are_kept() -> None:
    assert arguments.count("n", 3) == 3
    assert arguments.count("n", 0, least=0) == 0
    assert arguments.count("n", None, none=True) is None
    assert arguments.positive("x", 2) == 2.0
    assert arguments.positive("x", math.inf) == math.inf
    assert arguments.positive("x", None) is None
    assert arguments.flag("x", False) is False
    assert arguments.path("x", "runs/a") == Path("runs/a")
    assert [arguments.limit("x", value) for value in (None, 1, 1.0, 0.1)] == [None, 1, 1.0, 0.1]


@pytest.mark.parametrize("value", [None, 0, "3", True, 2.0])
def test_a_count_is_a_whole_number(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"n must be .*got {value!r}"):
        arguments.count("n", value)


def test_one_several_or_no_callbacks() -> None:
    a, b = Callback(), Callback()
    assert arguments.callbacks(None) == []
    assert arguments.callbacks(a) == [a]
    assert arguments.callbacks((a, b)) == [a, b]
    given = [a]
    assert arguments.callbacks(given) is not given  # the trainer's own must not land in it


def test_one_several_or_no_loggers(tmp_path: Path) -> None:
    a, b = Nowhere(), Nowhere()
    assert arguments.loggers(False, tmp_path) == []
    assert arguments.loggers(a, tmp_path) == [a]
    assert arguments.loggers([a, b], tmp_path) == [a, b]
    for default in (True, None):
        (one,) = arguments.loggers(default, tmp_path)
        assert isinstance(one, CSVLogger) and one.path.parent == tmp_path
    with pytest.raises(TypeError, match="got 'csv'"):
        arguments.loggers(["csv"], tmp_path)


@pytest.mark.parametrize(
    ("options", "epochs", "steps"),
    [
        ({}, 1000, -1),  # as in Lightning
        ({"max_steps": 5}, None, 5),
        ({"max_epochs": 3}, 3, -1),
        ({"max_epochs": -1}, None, -1),
        ({"max_epochs": 0}, 0, -1),
        ({"max_epochs": 3, "max_steps": 5}, 3, 5),
    ],
)
def test_how_long_a_fit_takes(options: dict[str, Any], epochs: int | None, steps: int) -> None:
    run = Trainer(logger=False, **options)
    assert (run.max_epochs, run.max_steps) == (epochs, steps)
