"""`DataModule`: when what is called, and what a checkpoint keeps of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from composefit import DataModule
from tests.lockstep.steps import data, every_strategy, module, trainer


class Rows(DataModule):
    """Notes its calls, and counts the fits that it has seen."""

    def __init__(self, size: int = 4, secret: str = "x") -> None:
        self.save_hyperparameters(ignore="secret")
        self.size = size
        self.calls: list[str] = []
        self.fits = 0

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")
        self.fits += stage == "fit"

    def teardown(self, stage: str) -> None:
        self.calls.append(f"teardown {stage}")

    def _loader(self, name: str) -> Any:
        self.calls.append(name)
        return [data(self.size, 3)] * 2

    def train_dataloader(self) -> Any:
        return self._loader("train")

    def val_dataloader(self) -> Any:
        return self._loader("val")

    def test_dataloader(self) -> Any:
        return self._loader("test")

    def predict_dataloader(self) -> Any:
        return self._loader("predict")

    def state_dict(self) -> dict[str, Any]:
        return {"fits": self.fits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls.append("load_state_dict")
        self.fits = state_dict["fits"]


def net() -> Any:
    def step(self: Any, x: Tensor) -> Tensor:
        loss: Tensor = self.net(x).square().mean()
        return loss

    found = module(step)
    kind = type(found)
    kind.validation_step = kind.test_step = lambda self, x: None
    kind.predict_step = lambda self, x: self.net(x)
    return found


@every_strategy
def test_each_stage_has_its_own_loaders_between_setup_and_teardown(strategy: Any) -> None:
    rows, run, one = Rows(), trainer(strategy(), max_epochs=2), net()
    for stage, loaders in {
        "fit": ["train", "val"],
        "validate": ["val"],
        "test": ["test"],
        "predict": ["predict"],
    }.items():
        rows.calls.clear()
        getattr(run, stage)(one, datamodule=rows)
        assert rows.calls[:2] == ["prepare_data", f"setup {stage}"]
        assert sorted(rows.calls[2:-1]) == loaders
        assert rows.calls[-1] == f"teardown {stage}"


def test_it_is_torn_down_after_a_fault_and_knows_its_trainer() -> None:
    class Failing(Rows):
        def train_dataloader(self) -> Any:
            assert self.trainer is run
            raise OSError("disk")

    rows, run = Failing(), trainer()
    assert rows.trainer is None
    with pytest.raises(OSError, match="disk"):
        run.fit(net(), rows)
    assert rows.calls[0] == "prepare_data"
    assert rows.calls[-1] == "teardown fit"


def test_after_a_fit_other_stages_ask_the_same_one() -> None:
    rows, run = Rows(), trainer()
    run.fit(net(), datamodule=rows)
    rows.calls.clear()
    run.test(verbose=False)
    assert rows.calls == ["prepare_data", "setup test", "test", "teardown test"]


def test_its_state_is_in_a_checkpoint_and_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    rows, run, one = Rows(), trainer(), net()
    rows.fits = 41
    run.fit(one, datamodule=rows)
    run.save_checkpoint(file)
    kept = torch.load(file, weights_only=True)
    assert any(value == {"fits": 42} for value in kept.values())
    other = Rows()
    trainer(max_epochs=2).fit(net(), datamodule=other, ckpt_path=file)
    assert other.fits == 42
    assert other.calls[:2] == ["prepare_data", "setup fit"]
    assert "load_state_dict" in other.calls


def test_one_without_a_state_needs_none(tmp_path: Path) -> None:
    class Stateless(DataModule):
        def train_dataloader(self) -> Any:
            return [data(4, 3)] * 2

    file = tmp_path / "a.ckpt"
    run = trainer()
    run.fit(net(), datamodule=Stateless())
    run.save_checkpoint(file)
    trainer(max_epochs=2).fit(net(), datamodule=Stateless(), ckpt_path=file)
    assert Stateless().state_dict() == {}
    Stateless().load_state_dict({})


def test_hyperparameters_are_arguments_by_name_and_attribute() -> None:
    rows = Rows(size=7, secret="not kept")
    assert dict(rows.hparams) == {"size": 7}
    assert rows.hparams.size == 7
    assert dict(DataModule().hparams) == {}


@pytest.mark.parametrize("name", ["train", "val", "test", "predict"])
def test_loaders_that_are_not_written_are_not_there(name: str) -> None:
    with pytest.raises(NotImplementedError):
        getattr(DataModule(), f"{name}_dataloader")()
