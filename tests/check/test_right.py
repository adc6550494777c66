"""Right modules are found right, and those with BatchNorm are named so."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from composefit import LoopModule, SingleDevice, ThreadDataParallel
from composefit.check import CheckReport, is_loader
from composefit.trainer import Trainer
from tests.laws.recipes import RECIPES
from tests.laws.recipes.gallery import FOLDER, example
from tests.recipes.test_part_1 import needs

EXAMPLES = sorted(file.stem for file in FOLDER.glob("[a-z]*.py"))
# Their layers normalise over a batch, and nothing else about them depends on how it is cut.
BATCH_NORM = {"byol", "clip", "dcgan", "dino", "fixmatch", "moco", "simclr"}


def checked(module: LoopModule, batch: Any, strategy: Any) -> CheckReport:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(strategy=strategy, logger=False, **quiet).check(module, batch, show=False)


def differences(report: CheckReport) -> list[float]:
    found = (one.difference for one in report.optimizers.values())
    return [difference for difference in found if difference is not None]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_the_laws_are_right(name: str) -> None:
    module = RECIPES[name].make()
    report = checked(module.double(), RECIPES[name].batches([11])[0], SingleDevice("cpu"))
    assert report.ok, str(report)
    assert max(differences(report)) < 1e-12
    assert report.notes == []


@pytest.mark.parametrize("name", ["GAN, critic first", "MoCo", "balance by Gradient", "GroupNorm"])
def test_recipes_are_right_side_by_side(name: str) -> None:
    module = RECIPES[name].make()
    report = checked(module.double(), RECIPES[name].batches([11])[0], ThreadDataParallel(2))
    assert report.ok, str(report)
    assert max(differences(report)) < 1e-12


@pytest.mark.parametrize("name", EXAMPLES)
def test_recipes_of_the_gallery_are_right_but_for_batch_norm(name: str) -> None:
    needs(name)
    torch.manual_seed(0)
    module, loader = example(name).build(quick=True)
    batch = loader if is_loader(loader) and not isinstance(loader, Iterator) else next(iter(loader))
    report = checked(module, batch, SingleDevice("cpu"))
    assert differences(report)
    if name not in BATCH_NORM:
        assert report.ok, str(report)
        return
    assert not report.ok
    for found in report.optimizers.values():
        assert [cause.name for cause in found.causes] == ["BatchNorm"], str(report)


class Masked(LoopModule):
    """Dropout in every form."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 8, num_layers=2, dropout=0.5, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.net = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 4), nn.AlphaDropout(0.5))

    def training_step(self, batch: Any) -> Any:
        x, y = batch
        x, _ = self.rnn(F.dropout(x, 0.5))
        x = self.attention(x, x, x)[0] + F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        return F.cross_entropy(self.net(torch.dropout(x.mean(1), 0.5, True)), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("strategy", [SingleDevice("cpu"), ThreadDataParallel(2)])
def test_dropout_is_off(strategy: Any) -> None:
    module = Masked()
    batch = [torch.randn(11, 5, 6), torch.randint(4, (11,))]
    report = checked(module, batch, strategy)
    assert report.ok, str(report)
    assert module.net[0].training
    assert module.rnn.dropout == 0.5


def test_part_of_a_step_in_float32_is_no_fault() -> None:
    """Of weights in float64, as the normalisations and losses of language models do it."""

    class Rounding(RECIPES["classifier"].make):  # type: ignore[name-defined,misc]
        def training_step(self, batch: Any) -> Any:
            x, y = batch
            return torch.nn.functional.cross_entropy(self.net(x).float(), y)

    report = checked(Rounding(), RECIPES["classifier"].batches([11])[0], SingleDevice("cpu"))
    assert report.ok
    assert max(differences(report)) > 1e-12
    assert "rounds to fewer bits" in report.notes[0]


def test_a_step_that_does_not_run_in_float64_is_checked_in_its_own_dtype() -> None:
    class Single(RECIPES["classifier"].make):  # type: ignore[name-defined,misc]
        def training_step(self, batch: Any) -> Any:
            x, y = batch
            return torch.nn.functional.cross_entropy(self.net(x.float()), y)

    x, y = RECIPES["classifier"].batches([11])[0]
    report = checked(Single(), (x.float(), y), SingleDevice("cpu"))
    assert report.ok
    assert report.dtype == "float32"
    assert "does not run in float64" in report.notes[0]
