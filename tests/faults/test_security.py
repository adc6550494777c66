"""F40 to F43: files that carry code, names that escape, text that a reader would execute."""

import ast
import csv
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch import Tensor

from composefit import checkpoint
from composefit.callbacks import Callback, ModelCheckpoint
from composefit.loggers import CSVLogger, Logger, TensorBoardLogger
from tests.faults import runs
from tests.faults.conftest import Tells
from tests.faults.fault import Surfaced, surfaces
from tests.lockstep.steps import data, module

SAMPLES = [[torch.zeros(4, 2), torch.arange(4)]]


class Hostile:
    """Makes a folder when it is unpickled without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


# -- F40: code in a checkpoint -------------------------------------------------------------------


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


#: Where in the state of a trainer a hostile object may stand.
PLACES: dict[str, Callable[[dict[str, Any], Hostile], Any]] = {
    "on top": lambda state, hostile: state.update(extra=hostile),
    "a callback's": lambda state, hostile: state["callbacks"].update(EMA={"decay": hostile}),
    "a logger's": lambda state, hostile: state["loggers"].append({"step": 1, "id": hostile}),
    "a hyperparameter": lambda state, hostile: state["hyper_parameters"].update(width=hostile),
    "a loop's": lambda state, hostile: state["loop"].update(train=hostile),
}


def read_in_every_way(path: Path, kind: type[Exception], *words: str) -> Surfaced:
    """What each entry to a checkpoint raises."""
    run, net = runs.trainer(path.parent), runs.GAN()
    type(net).test_step = type(net).validation_step
    for call in (
        lambda: run.fit(net, SAMPLES, ckpt_path=path),
        lambda: run.validate(net, SAMPLES, ckpt_path=path),
        lambda: run.test(net, SAMPLES, ckpt_path=path),
        lambda: run.predict(net, SAMPLES, ckpt_path=path),
        lambda: runs.GAN.load_from_checkpoint(path),
        lambda: checkpoint.load(path),
    ):
        with surfaces(kind, *words) as found:
            call()
    return found


@pytest.mark.parametrize("place", PLACES)
def test_f40_a_checkpoint_that_carries_code(
    place: str, tmp_path: Path, marker: Path, tells: Tells
) -> None:
    runs.fit(tmp_path, max_epochs=1)
    path = tmp_path / "last.ckpt"
    state = checkpoint.load(path)
    PLACES[place](state, Hostile(marker))
    torch.save(state, path)
    words = ("was not loaded: it asks for posix.mkdir", "None of its code was run")
    found = read_in_every_way(path, RuntimeError, *words)
    with surfaces(RuntimeError, *words):
        runs.fit(tmp_path, ckpt_path="last")
    assert not marker.exists()
    assert "weights_only=False" not in found.text
    torch.load(path, weights_only=False)
    assert marker.exists()  # the control
    tells(found)


def test_f40_an_old_file_format_that_carries_code(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"x": Hostile(marker)}, path, _use_new_zipfile_serialization=False)
    read_in_every_way(path, RuntimeError, "is damaged or no checkpoint")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_f40_what_would_have_to_run_is_not_saved_either(tmp_path: Path, marker: Path) -> None:
    class Remembers(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"x": Hostile(marker)}

    class Keeps(Logger):
        def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {"x": Hostile(marker)}

    for options in ({"callbacks": Remembers()}, {"logger": Keeps()}):
        with surfaces(TypeError, '["x"] is a', "Hostile, which a safe load does not read back"):
            runs.fit(tmp_path, **options)
    assert not marker.exists() and not list(tmp_path.iterdir())


def test_f40_an_address_is_not_read(tmp_path: Path) -> None:
    address = "http://localhost:9/last.ckpt"
    run, net = runs.trainer(tmp_path), runs.GAN()
    words = (f"'{address}' is an address", "download it first")
    with surfaces(ValueError, *words):
        run.fit(net, SAMPLES, ckpt_path=address)
    with surfaces(ValueError, *words):
        runs.GAN.load_from_checkpoint(address)


# -- F41: names that escape ----------------------------------------------------------------------

OUTSIDE = ("../../x", "..", "a/b", "/x", "..\\x")


@pytest.mark.parametrize("name", OUTSIDE)
def test_f41_names_that_lead_out_of_their_folder(name: str, tmp_path: Path, tells: Tells) -> None:
    inside = tmp_path / "a" / "b"
    found = []

    def keeps() -> ModelCheckpoint:
        return ModelCheckpoint(inside, filename=name)

    for make in (
        lambda: CSVLogger(inside, name=name),
        lambda: CSVLogger(inside, version=name),
        lambda: CSVLogger(inside, filename=name),
        lambda: TensorBoardLogger(inside, name=name),
        keeps,
    ):
        if (name, make) == ("..", keeps):  # the file is then `...ckpt`, within the folder
            continue
        with surfaces(ValueError, "is no name of a file: give the folder separately") as one:
            make()
        found.append(one)
    assert not list(tmp_path.iterdir())
    if name == "../../x":
        tells(found[0])


def test_f41_names_of_metrics_that_lead_out_of_their_folder(tmp_path: Path) -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        loss = self.net(x).mean()
        self.log("../../x", loss)
        return loss

    inside = tmp_path / "a" / "b"
    keeps = ModelCheckpoint(filename="{../../x:.1f}", monitor="../../x", every_n_train_steps=1)
    run = runs.trainer(inside, callbacks=keeps, logger=CSVLogger(inside), log_every_n_steps=1)
    run.fit(module(step), [data(6, 3)])
    run.report()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in inside.parent.iterdir()] == ["b"]
    assert all(path.is_file() for path in inside.iterdir())


# -- F42: text that a reader would execute -------------------------------------------------------

FORMULA, SCRIPT = "=cmd|' /C calc'!A0", "<script>alert(1)</script>"


def test_f42_formulas_and_html_in_names(tmp_path: Path, tells: Tells) -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        loss = self.net(x).mean()
        for name in (FORMULA, SCRIPT):
            self.log(name, loss)
        return loss

    net = module(step)
    type(net).__name__ = SCRIPT
    net.save_hyperparameters({FORMULA: SCRIPT})
    logger = CSVLogger(tmp_path)
    run = runs.trainer(tmp_path, logger=logger, log_every_n_steps=1)
    run.fit(net, [data(6, 3)])
    with open(logger.path, newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert "'" + FORMULA in cells and SCRIPT in cells
    assert not any(cell.startswith(("=", "@", "\t")) for cell in cells)
    page = run.report().read_text(encoding="utf-8")
    assert "alert(1)" in page and "<script>alert" not in page.lower()
    assert FORMULA.split("|")[0] in page
    tells("formulas get an apostrophe in front, `<` is written `&lt;`: both are shown, not run")


# -- F43: torch itself ---------------------------------------------------------------------------


def test_f43_releases_of_torch_whose_safe_load_is_none(tells: Tells) -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    needs = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    (needed,) = [one.specifier for one in map(Requirement, needs) if one.name == "torch"]
    assert not any(needed.contains(old) for old in ("2.5.1", "2.6.0", "2.9.1"))
    assert needed.contains("2.10.0") and needed.contains(torch.__version__, prereleases=True)
    tells(
        f"is not installed with this package, which needs torch {needed} (CVE-2025-32434, "
        "CVE-2026-24747)"
    )


def test_f43_nothing_is_loaded_without_care() -> None:
    loads = 0
    for path in (Path(__file__).parents[2] / "src").rglob("*.py"):
        if "ranks" in path.parts:
            continue  # messages between the processes of one job, which run the same code anyway
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert not re.match(r"(pickle|marshal|dill|joblib|torch\.jit)\.loads?$", called), path
            if called == "torch.load":
                loads += 1
                assert "weights_only=True" in ast.unparse(node), path
    assert loads
