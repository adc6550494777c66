"""`composefit explain` and `composefit check`, on files of all kinds."""

import sys
from pathlib import Path

import pytest

from composefit import cli

RECIPES = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("[!_]*.py"))

FILE = """
import beside
import torch
from torch import nn
from composefit import LoopModule

class Mine(LoopModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch):
        return self.net(batch).square().{reduction}()

def build():
    return Mine(), [torch.ones(beside.SAMPLES, 3)]

def once():
    return Mine(), iter([torch.ones(beside.SAMPLES, 3)])

def failing():
    raise LookupError("mine")

class Broken(Mine):
    def training_step(self, batch):
        raise LookupError("in my step")

def broken():
    return Broken(), [torch.ones(4, 3)]

def alone():
    return Mine()

def wrong():
    return nn.Linear(1, 1), []

def no_loader():
    return Mine(), 3

def empty():
    return Mine(), []

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("SAMPLES = 6\n")
    path = tmp_path / "mine.py"
    path.write_text(FILE.replace("{reduction}", "mean"))
    return path


def test_explain_prints_the_plan_of_the_files_step(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--strategy", "threads", "--devices", "2", "--accumulate", "2", "--clip", "0.5"]
    assert cli.main(["explain", str(file), *arguments, "--microbatch", "2", "--step", "7"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "Mine: one step in",
        "global_step 7",
        "6 = 2 threads x 3",
        "8 = 2 in space x 4 in time",
        "micro-batches of at most 2 samples",
        "norm 0.5",
        "mine.py:15 returned",
    ):
        assert words in printed, words


def test_explain_draws_where_it_is_told(file: Path, tmp_path: Path) -> None:
    target = tmp_path / "pictures" / "step.svg"
    assert cli.main(["explain", f"{file}:once", "--svg", str(target)]) == 0
    assert target.read_text("utf-8").startswith("<svg")


@pytest.mark.parametrize("command", ["explain", "check"])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("missing", "mine.py has no function missing: write one that returns (module, loader)"),
        ("number", "has no function number"),
        ("alone", "alone() must return (module, loader), it returned a Mine"),
        ("wrong", "must return a composefit.LoopModule and a loader, the first is a Linear"),
        ("no_loader", "must be an iterable of batches, such as a DataLoader"),
        ("failing", "mine.py raised LookupError, see above"),
        ("broken", "the step raised LookupError, see above"),
        ("empty", "the loader gave no batch at all"),
    ],
)
def test_what_a_file_does_not_give_is_told_with_status_2(
    command: str, function: str, message: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, f"{file}:{function}"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_traceback_begins_in_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["explain", f"{file}:failing"])
    told = capsys.readouterr().err
    assert "LookupError: mine" in told
    assert told.count('File "') == 1 and f'File "{file}"' in told


def test_a_file_that_cannot_be_imported_is_told_with_its_line(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("import nothing_of_this_name\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["explain", str(file)])
    told = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "ModuleNotFoundError" in told and f'File "{file}", line 1' in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "there is no file nowhere.py"),
        (["nowhere.py:build"], "there is no file nowhere.py"),
        ([__file__.replace(".py", ".txt")], "there is no file"),
        ([__file__, "--strategy", "magic"], "invalid choice: 'magic'"),
        ([__file__, "--accumulate", "0"], "--accumulate: expected at least 1, got 0"),
        (["FILE", "--devices", "many"], "devices must be 'auto', -1, a number from 1"),
        (["FILE", "--precision", "7"], "unknown precision '7'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: list[str], message: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["explain", *(str(file) if one == "FILE" else one for one in arguments)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_no_python_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["explain", str(tmp_path / "notes.txt")])
    assert stopped.value.code == 2
    assert "notes.txt is no Python file" in capsys.readouterr().err


def test_the_files_folder_can_be_imported_from_only_meanwhile(file: Path) -> None:
    path, modules = list(sys.path), set(sys.modules)
    assert cli.main(["explain", str(file)]) == 0
    assert sys.path == path
    assert not {"beside", "mine"} & (set(sys.modules) - modules)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_explain_works_on_every_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if recipe.stem == "lora":
        pytest.importorskip("transformers")
    devices = ["--strategy", "threads", "--devices", "2"]
    assert cli.main(["explain", str(recipe), *devices]) == 0
    assert f"{recipe.name}:" in capsys.readouterr().out


# -- the check -------------------------------------------------------------------------------------


def test_check_of_a_right_loss_is_status_0(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(file)]) == 0
    assert cli.main(["check", f"{file}:once", "--batches", "3"]) == 0
    assert "right" in capsys.readouterr().out


def test_check_of_a_wrong_loss_is_status_1_and_tells_it(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(FILE.replace("{reduction}", "sum"))
    assert cli.main(["check", str(file), "--strategy", "threads", "--devices", "2"]) == 1
    assert "Sum(" in capsys.readouterr().out


#: Those in whose first step BatchNorm couples the samples of a shard.
NORMALISED = {"byol", "clip", "dcgan", "dino", "fixmatch", "moco", "simclr"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_check_works_on_every_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if recipe.stem == "lora":
        pytest.importorskip("transformers")
    status = cli.main(["check", str(recipe), "--strategy", "single", "--devices", "1"])
    printed = capsys.readouterr().out
    assert status == int(recipe.stem in NORMALISED), printed
    assert ("BatchNorm" in printed) == (recipe.stem in NORMALISED)
