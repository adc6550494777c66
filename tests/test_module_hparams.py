"""Hyperparameters in checkpoints, and modules that are made again from them."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from composefit import LoopModule, Trainer

BATCHES = [torch.ones(4, 3)]


class Net(LoopModule):
    def __init__(self, width: int, lr: float = 0.1, extra: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(3, width)

    def training_step(self, x: Tensor) -> Tensor:
        return self.layer(x).square().mean()

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=self.hparams.lr)


class Given(Net):
    """Takes all of its settings as one argument."""

    def __init__(self, config: Any) -> None:
        LoopModule.__init__(self)
        self.save_hyperparameters(config)
        self.config = config
        self.layer = nn.Linear(3, self.hparams.width)


class WithoutThem(Net):
    def __init__(self, width: int) -> None:
        LoopModule.__init__(self)
        self.layer = nn.Linear(3, width)

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.1)


@dataclasses.dataclass
class Config:
    width: int = 5
    lr: float = 0.01


def saved(net: LoopModule, path: Path, **how: Any) -> Path:
    trainer = Trainer(
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path.parent,
    )
    trainer.fit(net, BATCHES)
    trainer.save_checkpoint(path, **how)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.ckpt"


def same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


def test_a_module_is_made_again_with_its_arguments_and_weights(path: Path) -> None:
    net = Net(4, lr=0.2, extra={"depth": [1, 2]})
    again = Net.load_from_checkpoint(saved(net, path))
    assert again.hparams == net.hparams == {"width": 4, "lr": 0.2, "extra": {"depth": [1, 2]}}
    assert same(again, net) and again.layer.out_features == 4


def test_it_is_made_from_a_checkpoint_of_weights_alone(path: Path) -> None:
    net = Net(4)
    assert same(Net.load_from_checkpoint(saved(net, path, weights_only=True)), net)


def test_overrides_take_the_place_of_what_was_kept(path: Path) -> None:
    again = Net.load_from_checkpoint(saved(Net(4, lr=0.2), path), lr=0.3)
    assert again.hparams.lr == 0.3 and again.hparams.width == 4


def test_an_override_that_changes_a_shape_says_what_does_not_fit(path: Path) -> None:
    saved(Net(4), path)
    with pytest.raises(RuntimeError, match=r"of another shape \(layer\.weight \(4, 3\) for \(6, 3"):
        Net.load_from_checkpoint(path, width=6)


def test_an_override_that_is_no_argument_names_the_nearest(path: Path) -> None:
    saved(Net(4), path)
    with pytest.raises(TypeError, match="no argument 'widht'; did you mean 'width'"):
        Net.load_from_checkpoint(path, widht=6)


def test_an_argument_that_was_not_kept_is_asked_for(path: Path) -> None:
    saved(WithoutThem(4), path)
    with pytest.raises(TypeError, match=r"needs 'width', .*load_from_checkpoint\(path, width=..."):
        WithoutThem.load_from_checkpoint(path)
    assert WithoutThem.load_from_checkpoint(path, width=4).layer.out_features == 4


@pytest.mark.parametrize(
    "config", [{"width": 5, "lr": 0.01}, Namespace(width=5, lr=0.01), Config()], ids=type
)
def test_settings_that_come_as_one_argument_go_back_as_one(config: Any, path: Path) -> None:
    net = Given(config)
    again = Given.load_from_checkpoint(saved(net, path))
    assert again.hparams == {"width": 5, "lr": 0.01}
    assert again.config.width == 5 and again.config["lr"] == 0.01
    assert same(again, net)
    assert Given.load_from_checkpoint(path, lr=0.5).config.lr == 0.5  # an item of it


def test_strict_wants_every_name_and_no_other(path: Path) -> None:
    class More(Net):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.head = nn.Linear(width, 1)

    net = Net(4)
    saved(net, path)
    with pytest.raises(RuntimeError, match=r"2 missing in the file \(head\.weight, head\.bias\)"):
        More.load_from_checkpoint(path)
    loose = More.load_from_checkpoint(path, strict=False)
    assert torch.equal(loose.layer.weight, net.layer.weight)
    with pytest.raises(RuntimeError, match=r"of another shape"):  # shapes have to fit all the same
        More.load_from_checkpoint(path, strict=False, width=6)


def test_map_location_says_where_the_weights_go(path: Path) -> None:
    saved(Net(4), path)
    assert Net.load_from_checkpoint(path, map_location="cpu").device.type == "cpu"
    again = Net.load_from_checkpoint(path, map_location=None)
    assert again.device.type == "cpu"
    with torch.device("meta"):
        on_meta = Net(4)
    assert on_meta.layer.weight.is_meta


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        (nn.Linear(1, 1), r'hparams\["extra"\] is a torch\.nn\.modules\.linear\.Linear'),
        ({"folder": Path("x")}, r'hparams\["extra"\]\["folder"\] is a pathlib'),
        ([lambda: None], r'hparams\["extra"\]\[0\] is a builtins\.function'),
    ],
)
def test_what_no_checkpoint_could_hold_is_refused_before_training(
    extra: Any, what: str, path: Path
) -> None:
    net = Net(4, extra=extra)
    weight = net.layer.weight.clone()
    with pytest.raises(TypeError, match=what) as caught:
        saved(net, path)
    assert "save_hyperparameters(ignore=[...])" in caught.value.__notes__[0]
    assert torch.equal(net.layer.weight, weight) and not path.exists()


def test_what_is_ignored_is_given_again(path: Path) -> None:
    class Wraps(Net):
        def __init__(self, trunk: nn.Module, width: int) -> None:
            LoopModule.__init__(self)
            self.save_hyperparameters(ignore=["trunk"])
            self.hparams.lr = 0.1
            self.trunk, self.layer = trunk, nn.Linear(3, width)

    net = Wraps(nn.Linear(3, 3).requires_grad_(False), 4)
    saved(net, path)
    again = Wraps.load_from_checkpoint(path, trunk=nn.Linear(3, 3).requires_grad_(False))
    assert same(again, net) and again.hparams.width == 4


def test_frozen_parts_that_were_left_out_are_those_of_the_new_module(path: Path) -> None:
    class Tuned(Net):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.trunk = nn.Linear(3, 3).requires_grad_(False)

    net = Tuned(4)
    saved(net, path, trainable_only=True)
    again = Tuned.load_from_checkpoint(path)
    assert torch.equal(again.layer.weight, net.layer.weight)
    assert not torch.equal(again.trunk.weight, net.trunk.weight)
