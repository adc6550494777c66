"""What a checkpoint holds, and that what does not fit changes nothing."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, StepLR
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from composefit import (
    Callback,
    DataModule,
    LoopModule,
    OptimizerConfig,
    SingleDevice,
    Step,
    Strategy,
    ThreadDataParallel,
    Trainer,
)
from composefit.callbacks import EMA, ModelCheckpoint
from composefit.loggers import CSVLogger, Logger
from composefit.snapshot import take

BATCHES = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(4)]


class Pair(LoopModule):
    """Two networks, an optimizer and a scheduler each, a metric and a buffer."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.a, self.b = nn.Linear(3, width), nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(3)
        self.mean = MeanMetric()

    def configure_optimizers(self) -> Any:
        a = SGD([*self.a.parameters(), *self.norm.parameters()], lr=0.1, momentum=0.9)
        b = Adam(self.b.parameters(), lr=0.1)
        return {
            "a": OptimizerConfig(a, StepLR(a, 1, gamma=0.5)),
            "b": OptimizerConfig(b, ExponentialLR(b, 0.9), interval="step"),
        }

    def training_step(self, x: Tensor) -> Step:
        x = self.norm(x)
        loss = self.a(x).square().mean()
        self.mean.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        yield {"a": loss}
        yield {"b": self.b(self.norm(BATCHES[0])).square().mean()}

    def validation_step(self, x: Tensor) -> None:
        self.log("val", self.a(x).mean())


class Counter(Callback):
    """Counts batches; an instance each."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Other(Counter):
    pass


def made(root: Path, **how: Any) -> Trainer:
    return Trainer(
        **{
            "strategy": SingleDevice("cpu"),
            "max_epochs": 1,
            "logger": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": root,
            **how,
        },
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """The checkpoint of a fit that stopped in mid-epoch."""
    made(tmp_path, max_steps=3, callbacks=[Counter()]).fit(Pair(), BATCHES, BATCHES[:1])
    return tmp_path / "last.ckpt"


def loaded(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def edited(path: Path, **changes: Any) -> Path:
    torch.save({**loaded(path), **changes}, path.with_name("edited.ckpt"))
    return path.with_name("edited.ckpt")


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(plain, value)) and all(map(plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or isinstance(value, bool | int | float | str | bytes | Tensor)


# -- contents --------------------------------------------------------------------------------------


def test_a_checkpoint_is_one_plain_dict(last: Path) -> None:
    state = loaded(last)
    assert type(state) is dict and plain(state)
    assert set(state) == {
        *("composefit_checkpoint", "versions", "state_dict", "trainable_only"),
        *("hyper_parameters", "hparams_name", "global_step", "epoch", "mid_step"),
        *("optimizers", "schedulers", "loss_scales", "updates", "samples_seen", "loop"),
        *("metrics", "logs", "evaluation_logs", "callbacks", "loggers", "history"),
        *("data", "seed", "random"),
    }
    assert (state["global_step"], state["epoch"], state["mid_step"]) == (3, 0, False)
    assert state["updates"] == {"a": 3, "b": 3} and state["samples_seen"] == 12
    assert {n: o["class"] for n, o in state["optimizers"].items()} == {"a": "SGD", "b": "Adam"}
    assert {n: [s["class"] for s in found] for n, found in state["schedulers"].items()} == {
        "a": ["StepLR"],
        "b": ["ExponentialLR"],
    }
    assert state["hyper_parameters"] == {"width": 2}
    assert state["callbacks"]["Counter"] == {"count": 3}
    assert state["metrics"]["mean"]["updates"] == 3
    assert state["loop"]["class"] == "FitLoop" and state["loop"]["train"]["batch_idx"] == 3
    assert state["versions"]["torch"] == str(torch.__version__)


def test_float16_keeps_the_scale_of_each_optimizer(tmp_path: Path) -> None:
    trainer = made(tmp_path, precision="16-mixed")
    trainer.fit(Pair(), BATCHES)
    scales = loaded(tmp_path / "last.ckpt")["loss_scales"]
    assert trainer.training is not None
    kept = {name: scale.state_dict() for name, scale in trainer.training.stepper.scales.items()}
    assert scales == kept and set(scales) == {"a", "b"}
    # The first overflows, and the scale halves; the other three do not.
    assert scales["a"] == {"scale": 2.0**15, "_growth_tracker": 3}


def test_weights_only_holds_no_training_and_is_refused_by_fit(tmp_path: Path, last: Path) -> None:
    trainer = made(tmp_path)
    net = Pair()
    trainer.fit(net, BATCHES)
    path = tmp_path / "weights.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    state = loaded(path)
    assert "optimizers" not in state and "callbacks" not in state and "random" not in state
    again = Pair.load_from_checkpoint(path)
    assert all(torch.equal(v, net.state_dict()[n]) for n, v in again.state_dict().items())
    with pytest.raises(ValueError, match=r"weights only.*Pair\.load_from_checkpoint\(path\)"):
        made(tmp_path).fit(Pair(), BATCHES, ckpt_path=path)


def test_trainable_only_leaves_out_frozen_parameters_and_keeps_buffers(tmp_path: Path) -> None:
    class Frozen(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Linear(3, 3).requires_grad_(False)

    trainer = made(tmp_path)
    net = Frozen()
    trainer.fit(net, BATCHES)
    path = tmp_path / "part.ckpt"
    trainer.save_checkpoint(path, trainable_only=True)
    names = set(loaded(path)["state_dict"])
    assert names == {n for n in net.state_dict() if not n.startswith("trunk")}
    assert "norm.running_mean" in names
    # The frozen part stays the one that the module was made with.
    torch.manual_seed(9)
    again = Frozen.load_from_checkpoint(path)
    assert torch.equal(again.a.weight, net.a.weight)
    assert not torch.equal(again.trunk.weight, net.trunk.weight)
    resumed = made(tmp_path, max_epochs=2)
    other = Frozen()
    trunk = other.trunk.weight.clone()
    resumed.fit(other, BATCHES, ckpt_path=path)
    assert resumed.global_step == 8 and torch.equal(other.trunk.weight, trunk)


# -- what does not fit changes nothing (F32-F34) ---------------------------------------------------


class Wider(Pair):
    def __init__(self) -> None:
        super().__init__(width=5)


class More(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(3, 2)


class OtherClass(Pair):
    def configure_optimizers(self) -> Any:
        return {"a": SGD(self.a.parameters(), lr=0.1), "b": SGD(self.b.parameters(), lr=0.1)}


class OtherNames(Pair):
    def configure_optimizers(self) -> Any:
        return {"x": SGD(self.a.parameters(), lr=0.1), "b": Adam(self.b.parameters(), lr=0.1)}


class OtherGroups(Pair):
    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        a = SGD(self.a.parameters(), lr=0.1)
        return {**found, "a": OptimizerConfig(a, StepLR(a, 1))}


class OtherSchedulers(Pair):
    def configure_optimizers(self) -> Any:
        a, b = (
            SGD([*self.a.parameters(), *self.norm.parameters()], lr=0.1),
            Adam(self.b.parameters()),
        )
        return {"a": OptimizerConfig(a, ExponentialLR(a, 0.9)), "b": b}


#: what is wrong -> the module, its batches, the error
MISFITS: dict[str, tuple[type[Pair], Any, type[Exception], str]] = {
    "shapes": (Wider, BATCHES, RuntimeError, r"of another shape \(a\.weight \(2, 3\) for \(5, 3\)"),
    "missing": (More, BATCHES, RuntimeError, r"2 missing in the file \(c\.weight, c\.bias\)"),
    "class": (OtherClass, BATCHES, ValueError, r"a \(SGD\), b \(Adam\), and .* b \(SGD\)"),
    "names": (OtherNames, BATCHES, ValueError, r"x \(SGD\), b \(Adam\)"),
    "groups": (OtherGroups, BATCHES, ValueError, r"'a' had groups of \[4\] parameters, now of \[2"),
    "schedulers": (OtherSchedulers, BATCHES, ValueError, r"\['StepLR'\], now \['ExponentialLR'\]"),
    "batches": (Pair, BATCHES[:3], ValueError, "has 3 batches an epoch, but .* with 4 batches"),
    "loader": (Pair, DataLoader(torch.randn(16, 3), 4), ValueError, "a DataLoader, .* of a list"),
}


class Watch(Counter):
    """Whether it was told anything of the checkpoint."""

    told = False

    def on_load_checkpoint(self, *_: Any) -> None:
        self.told = True


@pytest.mark.filterwarnings("ignore:trainable parameters in no optimizer")
@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_raises_before_anything_has_changed(misfit: str, last: Path) -> None:
    make, batches, error, message = MISFITS[misfit]
    net, watch = make(), Watch(7)
    weights = copy.deepcopy(net.state_dict())
    trainer = made(last.parent / "other", callbacks=[watch])
    with pytest.raises(error, match=message):
        trainer.fit(net, batches, BATCHES[:1], ckpt_path=last)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in weights.items())
    assert all(not one.optimizer.state for one in trainer.optimizers.values())
    rates = [g["lr"] for one in trainer.optimizers.values() for g in one.optimizer.param_groups]
    assert all(rate in (0.1, 0.001) for rate in rates)
    assert watch.told and watch.count == 7  # told of it, so that it may rename keys, say
    assert trainer.global_step == 0
    assert trainer.updates == dict.fromkeys(trainer.updates, 0) and not trainer.known_values()
    assert not (last.parent / "other").exists()  # no last.ckpt of a run that never began
    # And it can be used.
    trainer.fit(Pair(), BATCHES)
    assert trainer.global_step == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda state: state["state_dict"], "is a state_dict, weights without the state"),
        (lambda state: {**state, "composefit_checkpoint": 99}, "format 99, and this release"),
        (lambda state: {"x": 1}, r"no checkpoint of a composefit Trainer: its keys are \['x'\]"),
        (
            lambda state: {"pytorch-lightning_version": "2.6", "state_dict": {}},
            "is a checkpoint of Lightning's",
        ),
    ],
)
def test_another_kind_of_file_is_refused_before_any_work(
    content: Callable[[dict[str, Any]], Any], message: str, last: Path
) -> None:
    torch.save(content(loaded(last)), last)
    trainer = made(last.parent)
    with pytest.raises(ValueError, match=message):
        trainer.fit(Pair(), BATCHES, ckpt_path=last)
    assert trainer.module is None


def test_another_kind_of_loop_is_refused(last: Path) -> None:
    path = edited(last, loop={**loaded(last)["loop"], "class": "MyLoop"})
    with pytest.raises(ValueError, match="was written by MyLoop, and FitLoop is to go on"):
        made(last.parent).fit(Pair(), BATCHES, ckpt_path=path)


# -- callbacks and loggers -------------------------------------------------------------------------


def resumed(last: Path, callbacks: list[Callback], **how: Any) -> Trainer:
    trainer = made(last.parent, callbacks=callbacks, **how)
    trainer.fit(Pair(), BATCHES, ckpt_path=last)
    return trainer


def test_callbacks_find_their_states_by_name_in_any_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first: list[Callback] = [Counter(10), Other(20), EMA(decay=0.5), EMA(decay=0.9)]
    made(tmp_path, max_steps=2, callbacks=first).fit(Pair(), BATCHES)
    kept = loaded(tmp_path / "last.ckpt")["callbacks"]
    assert kept["Counter"] == {"count": 12} and kept["Other"] == {"count": 22}
    slow, fast, other, counter = EMA(decay=0.9), EMA(decay=0.5), Other(), Counter()
    resumed(tmp_path / "last.ckpt", [slow, fast, other, counter])
    assert (counter.count, other.count) == (14, 24)
    # Each average is that of its own decay.
    whole: list[EMA] = [EMA(decay=0.5), EMA(decay=0.9)]
    torch.manual_seed(0)
    made(tmp_path / "whole", callbacks=whole).fit(Pair(), BATCHES)
    for one, other_one in zip(whole, (fast, slow), strict=True):
        theirs = other_one.averaged_state_dict()
        for name, value in one.averaged_state_dict().items():
            assert torch.equal(value, theirs[name]), name


def test_several_of_one_name_are_numbered_in_their_order(tmp_path: Path) -> None:
    made(tmp_path, max_steps=2, callbacks=[Counter(10), Counter(20)]).fit(Pair(), BATCHES)
    kept = loaded(tmp_path / "last.ckpt")["callbacks"]
    assert kept["Counter"] == {"count": 12} and kept["Counter#2"] == {"count": 22}
    first, second = Counter(), Counter()
    resumed(tmp_path / "last.ckpt", [first, second])
    assert (first.count, second.count) == (14, 24)


def test_a_callback_that_is_new_begins_and_one_that_is_gone_is_warned_of(last: Path) -> None:
    with pytest.warns(UserWarning, match=r"callbacks that are not there: \['Counter'\]"):
        trainer = resumed(last, [(new := Other())])
    assert new.count == 1 and trainer.global_step == 4


class Keeps(Logger):
    """Counts its rows in the checkpoint."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.given: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append(step)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": len(self.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not self.rows  # before the first row
        self.given = state


def test_loggers_get_their_states_back_with_the_step(tmp_path: Path) -> None:
    first = Keeps()
    every = {"log_every_n_steps": 1}
    made(tmp_path, max_steps=3, logger=first, **every).fit(Pair(), BATCHES)
    again = Keeps()
    made(tmp_path, logger=again, **every).fit(Pair(), BATCHES, ckpt_path="last")
    assert again.given == {"step": 3, "rows": 3}
    assert again.rows == [4, 4]


def test_loggers_may_be_added_or_left_out(tmp_path: Path) -> None:
    made(tmp_path, max_steps=3, logger=Keeps(), log_every_n_steps=1).fit(Pair(), BATCHES)
    made(tmp_path, max_steps=4).fit(Pair(), BATCHES, ckpt_path="last")
    made(tmp_path, max_epochs=2, logger=[CSVLogger(tmp_path), Keeps()]).fit(
        Pair(), BATCHES, ckpt_path="last"
    )


def test_the_history_goes_on(tmp_path: Path) -> None:
    every = {"log_every_n_steps": 1}
    made(tmp_path, max_steps=2, **every).fit(Pair(), BATCHES)
    trainer = made(tmp_path, **every)
    trainer.fit(Pair(), BATCHES, ckpt_path="last")
    steps, _ = trainer.history.curves()["loss_step"]
    assert steps.tolist() == [1, 2, 3, 4]


# -- data modules ----------------------------------------------------------------------------------


class Rounds(DataModule):
    """Its state says which batches its loader gives."""

    def __init__(self, rounds: int = 1) -> None:
        self.rounds = rounds

    def train_dataloader(self) -> Any:
        return BATCHES * self.rounds

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self.rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rounds = state["rounds"]


def test_a_data_module_gets_its_state_back_before_it_is_asked_for_loaders(tmp_path: Path) -> None:
    made(tmp_path, max_steps=3).fit(Pair(), datamodule=Rounds(2))
    assert loaded(tmp_path / "last.ckpt")["data"] == {"rounds": 2}
    trainer = made(tmp_path)
    trainer.fit(Pair(), datamodule=(data := Rounds()), ckpt_path="last")
    assert data.rounds == 2 and trainer.global_step == 8


# -- seeds and strategies --------------------------------------------------------------------------


class Draws(Pair):
    def training_step(self, x: Tensor) -> Step:
        x = x + self.random.normal(len(x), 3)
        yield {"a": self.a(nn.functional.dropout(x)).square().mean()}
        yield {"b": self.b(x + self.random.shared.normal(3)).square().mean()}


@pytest.mark.parametrize(
    "strategy", [lambda: SingleDevice("cpu"), lambda: ThreadDataParallel(2)], ids=["one", "threads"]
)
@pytest.mark.parametrize("seed", [None, 5])
def test_a_resumed_run_draws_from_the_seed_of_the_first(
    seed: int | None, strategy: Callable[[], Strategy], tmp_path: Path
) -> None:
    def run(global_seed: int, **how: Any) -> Trainer:
        ckpt_path = how.pop("ckpt_path", None)
        torch.manual_seed(3)
        net = Draws()
        torch.manual_seed(global_seed)
        trainer = made(tmp_path, strategy=strategy(), seed=seed, **how)
        trainer.fit(net, BATCHES, ckpt_path=ckpt_path)
        return trainer

    whole = run(1)
    run(1, max_steps=2)
    again = run(2, ckpt_path="last")
    assert again.run_seed == whole.run_seed == (1 if seed is None else 5)
    assert whole.module is not None and again.module is not None
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[name]), name


def test_the_global_generators_go_on(tmp_path: Path) -> None:
    def draws() -> list[float]:
        return [torch.rand(()).item(), float(np.random.rand()), random.random()]

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "at 2.ckpt")
                self.drawn = draws()

    class Sees(Callback):
        def on_train_start(self, *_: Any) -> None:
            self.drawn = draws()

    made(tmp_path, callbacks=[saves := Saves()]).fit(Pair(), BATCHES)
    made(tmp_path, callbacks=[sees := Sees()]).fit(
        Pair(), BATCHES, ckpt_path=tmp_path / "at 2.ckpt"
    )
    assert sees.drawn == saves.drawn


def test_another_strategy_goes_on_from_the_same_state(last: Path) -> None:
    """Not bitwise: its shards draw from other streams, and sum in another order."""
    found = []
    for strategy in (SingleDevice("cpu"), SingleDevice("cpu", shards=2), ThreadDataParallel(2)):
        net = Pair()
        trainer = made(last.parent / "x", strategy=strategy, callbacks=[Counter()])
        trainer.fit(net, BATCHES, ckpt_path=last)
        assert trainer.global_step == 4 and trainer.updates == {"a": 4, "b": 4}
        found.append(net.b.weight.detach())
    assert torch.allclose(found[1], found[2], atol=0.0)
    assert torch.allclose(found[0], found[1], atol=1e-2)


# -- what a safe load could not read (F39) ---------------------------------------------------------


class BadState(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"best": [Path("x")]}


class Adds(Callback):
    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"array": np.zeros(2)}


class AddsItself(Pair):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["net"] = {1: self.a}


@pytest.mark.parametrize(
    ("make", "callback", "where"),
    [
        (Pair, BadState(), r'state\["callbacks"\]\["BadState"\]\["best"\]\[0\] is a pathlib'),
        (Pair, Adds(), r'state\["mine"\]\["array"\] is a numpy\.ndarray'),
        (AddsItself, Counter(), r'state\["net"\]\[1\] is a torch\.nn\.modules\.linear\.Linear'),
    ],
)
def test_what_a_safe_load_could_not_read_is_refused_at_save_with_its_path(
    make: type[Pair], callback: Callback, where: str, tmp_path: Path
) -> None:
    trainer = made(tmp_path, callbacks=[callback], enable_checkpointing=False)
    trainer.fit(make(), BATCHES)
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"the previous one")
    with pytest.raises(TypeError, match=where):
        trainer.save_checkpoint(path)
    assert path.read_bytes() == b"the previous one"


def test_hooks_add_to_a_checkpoint_and_read_it_back(tmp_path: Path) -> None:
    class Remembers(Pair):
        told: Any = None

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = {"step": self.global_step}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.told = checkpoint["mine"]

    made(tmp_path, max_steps=3).fit(Remembers(), BATCHES)
    net = Remembers()
    made(tmp_path).fit(net, BATCHES, ckpt_path="last")
    assert net.told == {"step": 3}
    assert Remembers.load_from_checkpoint(tmp_path / "last.ckpt").told == {"step": 4}


# -- which file ------------------------------------------------------------------------------------


def test_auto_begins_where_there_is_none_and_last_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no .*last\.ckpt yet: write ckpt_path='auto'"):
        made(tmp_path).fit(Pair(), BATCHES, ckpt_path="last")
    trainer = made(tmp_path)
    trainer.fit(Pair(), BATCHES, ckpt_path="auto")
    assert trainer.global_step == 4
    trainer = made(tmp_path, max_epochs=2)
    trainer.fit(Pair(), BATCHES, ckpt_path="auto")
    assert trainer.global_step == 8 and trainer.samples_seen == 32


def test_best_needs_a_file_of_this_trainer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no ModelCheckpoint.* has written one yet"):
        made(tmp_path).fit(Pair(), BATCHES, ckpt_path="best")


def test_best_is_the_best_of_its_checkpoints(tmp_path: Path) -> None:
    keeps = ModelCheckpoint(monitor="val", mode="max")
    trainer = made(tmp_path, max_epochs=3, callbacks=[keeps])
    trainer.fit(Pair(), BATCHES, BATCHES[:1])
    (score,) = [keeps.best_model_score]
    assert score is not None
    found = trainer.validate(ckpt_path="best", verbose=False, dataloaders=BATCHES[:1])
    assert found[0]["val"] == pytest.approx(score.item(), abs=1e-6)


def test_a_link_is_no_file_here(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="download it first"):
        made(tmp_path).fit(Pair(), BATCHES, ckpt_path="https://example.com/x.ckpt")


def test_taking_the_state_changes_nothing(tmp_path: Path) -> None:
    class Takes(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            take(trainer)

    nets = []
    for callbacks in ([], [Takes()]):
        torch.manual_seed(4)
        nets.append(Draws())
        made(tmp_path, callbacks=callbacks, seed=2).fit(nets[-1], BATCHES)
    for name, value in nets[0].state_dict().items():
        assert torch.equal(value, nets[1].state_dict()[name]), name
