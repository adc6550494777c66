"""The page on Lightning's checkpoints, held against files that Lightning wrote.

`write_checkpoint.py` made them: `lightning.ckpt` after two epochs, `objects.ckpt` with an object
among the hyperparameters, and `lightning_checkpoint.json` from going on to the fourth epoch.
"""

import argparse
import json
import pickle
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composefit import LoopModule, Trainer

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "lightning-checkpoints.md"
RESUMED = json.loads((HERE / "lightning_checkpoint.json").read_text(encoding="utf-8"))


def trainer(**arguments: Any) -> Trainer:
    return Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What the page's code gives with Lightning's own file in place of the page's stand-in."""
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    text = PAGE.read_text(encoding="utf-8")
    first, *rest = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(first, vars(module))
    layout = torch.load("lightning.ckpt", weights_only=True)
    real = torch.load(HERE / "lightning.ckpt", weights_only=True)
    assert set(layout) <= set(real)
    assert set(layout["state_dict"]) == set(real["state_dict"])
    assert layout["hyper_parameters"] == real["hyper_parameters"]
    assert len(layout["optimizer_states"]) == len(real["optimizer_states"])
    shutil.copy(HERE / "lightning.ckpt", "lightning.ckpt")
    for code in rest:
        exec(code, vars(module))
    return module


def test_weights_and_hyperparameters_are_those_of_the_file(page: ModuleType) -> None:
    file = torch.load(HERE / "lightning.ckpt", weights_only=True)
    assert page.module.hparams == {"width": 4, "lr": 0.05, "options": None}
    for name, value in page.module.state_dict().items():
        assert torch.equal(value, file["state_dict"][name])
    x = torch.linspace(-1, 1, 12).reshape(6, 2)
    assert torch.equal(page.alone.eval()(x), page.module.net.eval()(x))


def test_training_goes_on_where_lightning_would_have_gone_on(page: ModuleType) -> None:
    x = torch.linspace(-1, 1, 32).reshape(16, 2)
    loader = DataLoader(TensorDataset(x, x.prod(1, keepdim=True)), batch_size=4)
    trainer(max_epochs=2).fit(page.going_on, loader)
    assert set(page.going_on.state_dict()) == set(RESUMED)
    for name, value in page.going_on.state_dict().items():
        expected = torch.tensor(RESUMED[name]).to(value.dtype)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_without_the_optimizers_state_the_training_differs(page: ModuleType) -> None:
    x = torch.linspace(-1, 1, 32).reshape(16, 2)
    loader = DataLoader(TensorDataset(x, x.prod(1, keepdim=True)), batch_size=4)
    trainer(max_epochs=2).fit(page.module, loader)
    name = "net.0.weight"
    difference = page.module.state_dict()[name] - torch.tensor(RESUMED[name])
    assert difference.abs().max() > 1e-3


def test_an_object_among_the_hyperparameters_is_refused_until_its_class_is_allowed() -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(HERE / "objects.ckpt", weights_only=True)
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(HERE / "objects.ckpt", weights_only=True)
    assert state["hyper_parameters"]["options"] == argparse.Namespace(depth=2)
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    net.load_state_dict({k.removeprefix("net."): v for k, v in state["state_dict"].items()})


class Regression(LoopModule):
    def __init__(self, width: int, lr: float, options: Any = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1))

    def training_step(self, batch: Any) -> Any:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_load_from_checkpoint_says_how_lightnings_file_is_read() -> None:
    with pytest.raises(ValueError, match=r"Lightning's: .*load_state_dict.*state_dict"):
        Regression.load_from_checkpoint(HERE / "lightning.ckpt")


def test_resuming_from_lightnings_file_says_how_it_is_read() -> None:
    x = torch.zeros(4, 2)
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=2)
    with pytest.raises(ValueError, match=r"Lightning's: .*load_state_dict.*state_dict"):
        trainer(max_epochs=1).fit(Regression(4, 0.1), loader, ckpt_path=HERE / "lightning.ckpt")


def test_lightnings_files_are_small() -> None:
    assert sum(file.stat().st_size for file in HERE.glob("*.ckpt")) < 100_000
