"""The page of the recipes: its table is counted and read, and every picture is of a run."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from composefit import LoopModule, SingleDevice, Trainer
from composefit.callbacks import EMA
from tests.laws.recipes.gallery import FOLDER, example
from tests.test_docs import ROOT, load

SCRIPT = ROOT / "docs" / "pictures" / "recipes.py"
PAGE = ROOT / "docs" / "recipes.md"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.name[0] != "_")
CHEAP = {"dcgan", "simclr", "pinn", "sac"}  # one of each kind of picture


@pytest.fixture
def script() -> Iterator[Any]:
    yield load(SCRIPT)


def submodule(name: str) -> Any:
    example("_pictures")
    return importlib.import_module(f"_pictures.{name}")


# -- the page --------------------------------------------------------------------------------------


def test_every_recipe_has_its_row_its_picture_and_its_way_to_draw_it(script: Any) -> None:
    pictures = sorted(path.stem for path in script.PICTURES.glob("*.png"))
    assert sorted(script.ROWS) == pictures == sorted(example("_pictures").PICTURES) == NAMES


def test_tables_of_the_page_are_what_its_script_finds(script: Any) -> None:
    page = PAGE.read_text("utf-8")
    found = {table[1]: table[0] for table in script.TABLE.finditer(page)}
    assert found == {"recipes": script.table(), "sources": script.sources()}


@pytest.mark.parametrize("name", NAMES)
def test_recipe_has_a_section_with_its_file_and_its_picture(name: str, script: Any) -> None:
    page = PAGE.read_text("utf-8")
    section = page.split(f"### {script.ROWS[name].title}\n")[1].split("\n#")[0]
    assert f"](pictures/recipes/{name}.png)" in section
    assert f"[`{name}.py`](../examples/recipes/{name}.py)" in section


@pytest.mark.parametrize("name", NAMES)
def test_picture_is_small_and_of_a_run_that_reached_its_target(name: str, script: Any) -> None:
    path = script.PICTURES / f"{name}.png"
    assert path.stat().st_size <= 60_000
    with Image.open(path) as picture:
        assert picture.width == 960
    value, target, control = script.reached(name)
    least, bound = target[0] == "≥", number(target[2:])
    assert (number(value) >= bound) is least or number(value) == bound
    assert (number(control) >= bound) is not least


def number(text: str) -> float:
    return float(text.replace(",", ""))


# -- lines -----------------------------------------------------------------------------------------


def test_lines_are_those_of_the_step_and_of_what_it_calls(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "RECIPES", tmp_path)
    (tmp_path / "_views.py").write_text(
        "@torch.no_grad()\ndef follow(a, b):\n    a.lerp_(b, 0.1)\n\n\ndef view(x):\n    return x\n"
    )
    (tmp_path / "one.py").write_text(
        '''
from _views import follow
class Teacher:
    def training_step(self, batch):
        return 1
class One:
    def __init__(self):
        self.view = self.loss(1)
    def forward(self, x):
        return x
    def training_step(self, batch):  # 1
        """Says what it is."""
        view = 2  # 2

        # Why.
        yield self.loss(self.forward(batch), view)  # 3
        yield from Once(self.write, batch)  # 4
    def loss(self, x, view):  # 5
        return helper(
            x  # 6, and a line before and after it
        )
    def write(self, x):  # 9
        self.x = x  # 10
    def on_after_optimizer_step(self, *_):  # 11
        follow(self.a, self.b)  # 12, and three of its own
    def test_step(self, batch):
        return self.measure(batch)
    def measure(self, batch):
        return batch
def helper(x):  # 16
    return x  # 17
'''
    )
    assert script.step_lines("one") == 17


# -- drawing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in CHEAP else pytest.mark.full) for n in NAMES]
)
def test_recipe_draws_its_picture(name: str, tmp_path: Path) -> None:
    if name == "lora":
        pytest.importorskip("transformers")
    recipe, path = example(name), tmp_path / "picture.png"
    record = example("_pictures").record
    result = record(recipe.main, recipe, path, strategy="single", devices=1, quick=True)
    assert not example("_common").watchers
    with Image.open(path) as picture:
        assert picture.info["Description"] == str(result)
        assert picture.width == 960
        assert len(picture.convert("L").getcolors() or []) > 10


def test_picture_is_asked_for_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, path = example("sac"), tmp_path / "sac.png"
    monkeypatch.syspath_prepend(ROOT / "examples" / "recipes")  # as Python does for a script
    arguments = ["--strategy", "single", "--devices", "1", "--quick", "--picture", str(path)]
    monkeypatch.setattr(sys, "argv", ["sac.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        example("_common").run(recipe.main)
    assert ended.value.code is False
    with Image.open(path) as picture:
        assert f"{picture.info['Description']}\n" == capsys.readouterr().out


class Walk(LoopModule):
    """Draws from every stream, and has a buffer that BatchNorm would move."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.net.append(nn.Linear(4, 1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()


def batches(count: int) -> Iterator[Tensor]:
    """Drawn as they are asked for: who draws in between changes them."""
    for _ in range(count):
        yield torch.randn(8, 2)


def trained(*callbacks: Any) -> Walk:
    torch.manual_seed(0)
    module = Walk()
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False
    )
    fitter = Trainer(
        strategy=SingleDevice("cpu"), seed=0, max_epochs=1, callbacks=list(callbacks), **quiet
    )
    fitter.fit(module, batches(6))
    return module


def test_training_that_is_looked_at_is_the_same_bit_for_bit() -> None:
    def look(module: Walk) -> Tensor:
        return module.net(torch.randn(8, 2))

    recorder = submodule("recording").Recorder(look, every=2)
    seen, unseen = trained(recorder).state_dict(), trained().state_dict()
    assert all(torch.equal(seen[name], unseen[name]) for name in unseen)
    (run,) = recorder.runs
    assert run.steps == [0, 2, 4, 6]
    assert not any(found.requires_grad for found in run.seen)


def test_look_sees_averaged_weights_and_no_dropout() -> None:
    def look(module: Walk) -> tuple[bool, Tensor]:
        return module.net.training, module.net[0].weight.clone()

    ema = EMA(0.9)
    recorder = submodule("recording").Recorder(look, every=3)
    module = trained(ema, recorder)
    (run,) = recorder.runs
    assert [training for training, _ in run.seen] == [False] * 3
    average = ema.averaged_state_dict(module)["net.0.weight"]
    assert torch.equal(run.seen[-1][1], average)
    assert not torch.equal(module.net[0].weight, average)
    assert module.net.training


def test_look_that_fails_leaves_the_module_as_it_was() -> None:
    def look(module: Walk) -> None:
        if module.global_step:
            raise ValueError("nothing to see")

    ema, recorder = EMA(0.9), submodule("recording").Recorder(look, every=3)
    with pytest.raises(ValueError, match="nothing to see"):
        trained(ema, recorder)
    (run,) = recorder.runs
    assert run.steps == [0]
    assert run.module.net.training
    average = ema.averaged_state_dict(run.module)["net.0.weight"]
    assert not torch.equal(run.module.net[0].weight, average)


def test_picture_has_as_many_colours_as_make_it_small(tmp_path: Path) -> None:
    drawing = submodule("drawing")
    noise = torch.rand(400, 900, generator=torch.Generator().manual_seed(0))
    colours = {}
    for name, values in {"smooth": noise.sort(1).values, "busy": noise}.items():
        drawn, path = drawing.figure(), tmp_path / name
        drawn.subplots().imshow(values.numpy(), cmap=drawing.INKED)
        drawing.save(drawn, path, "what it is")
        with Image.open(path) as picture:
            assert picture.info["Description"] == "what it is"
            colours[name] = len(picture.convert("RGB").getcolors(256) or [])
        if name == "smooth":
            assert path.stat().st_size <= drawing.LARGEST
    assert colours["busy"] <= 16 < colours["smooth"]
