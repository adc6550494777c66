"""The table of a validation's or test's results."""

import io
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

from composefit import LoopModule, Trainer
from composefit.results import print_results
from tests.lockstep.steps import data, linear


def printed(stage: str, results: list[dict[str, float]]) -> list[list[str]]:
    """The cells of each line that has any."""
    file = io.StringIO()
    print_results(stage, results, Console(file=file, width=100, color_system=None))
    lines = [line.split("  ") for line in file.getvalue().splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return [line for line in cells if line and set("".join(line)) - set("─━╶╴ ")]


def test_one_loader_has_a_line_for_each_value() -> None:
    assert printed("test", [{"loss": 0.123456789, "acc": 1.0}]) == [
        ["test"],
        ["loss", "0.123457"],
        ["acc", "1"],
    ]


def test_several_loaders_have_a_column_each_under_the_plain_name() -> None:
    results = [
        {"loss/dataloader_idx_0": 1.0, "all": 5.0},
        {"loss/dataloader_idx_1": 2.0, "own/dataloader_idx_1": 3.0, "all": 5.0},
    ]
    assert printed("validate", results) == [
        ["validate", "loader 0", "loader 1"],
        ["loss", "1", "2"],
        ["all", "5", "5"],
        ["own", "3"],
    ]


@pytest.mark.parametrize("results", [[], [{}], [{}, {}]])
def test_nothing_logged_is_nothing_printed(results: list[dict[str, float]]) -> None:
    assert printed("test", results) == []


def test_names_are_text_not_markup() -> None:
    assert printed("test", [{"[red]loss[/red]": 1.0, "a/dataloader_idx_x": 2.0}]) == [
        ["test"],
        ["[red]loss[/red]", "1"],
        ["a/dataloader_idx_x", "2"],
    ]


def test_numbers_of_any_size_can_be_read() -> None:
    values = {"small": 1.5e-9, "large": 2.25e12, "nan": float("nan"), "minus": -3.0}
    assert printed("test", [values])[1:] == [
        ["small", "1.5e-09"],
        ["large", "2.25e+12"],
        ["nan", "nan"],
        ["minus", "-3"],
    ]


class Net(LoopModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = linear(3, 1)

    def test_step(self, x: Tensor) -> None:
        self.log("answer", 42.0)

    def validation_step(self, x: Tensor) -> None:
        self.log("answer", 41.0)


def test_a_trainer_prints_them_where_it_shows_progress_and_is_not_asked_to_be_quiet(
    capsys: Any,
) -> None:
    def run(bar: bool, verbose: bool) -> str:
        one = Trainer(strategy="single", enable_progress_bar=bar, logger=False)
        assert one.test(Net(), [data(2, 3)], verbose=verbose) == [{"answer": 42.0}]
        assert one.validate(Net(), [data(2, 3)], verbose=verbose) == [{"answer": 41.0}]
        found: str = capsys.readouterr().out
        return found

    assert "42" in (told := run(True, True))
    assert "41" in told
    assert "42" not in run(True, False)
    assert run(False, True) == ""
