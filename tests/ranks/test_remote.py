"""A trainer whose runs happen in processes of their own: afterwards all is as if they had not.

The strategy here is `SingleDevice`, in one process of its own, so that what the caller has
afterwards can be compared with what a run in its own process gives, bit by bit.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from composefit import DataModule, LoopModule, Trainer
from composefit.callbacks import EMA, Callback, ModelCheckpoint
from composefit.ranks.environment import found_job
from composefit.strategies import SingleDevice

# Each launches processes, which takes seconds: all of them with `make laws`.
pytestmark = pytest.mark.full


class Elsewhere(SingleDevice):
    """One device, in a process that is launched for it."""

    def __init__(self) -> None:
        super().__init__("cpu")

    def processes_to_launch(self) -> int | None:
        return 1 if found_job() is None else None


class Net(LoopModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.register_buffer("rows", torch.zeros(()), persistent=False)
        self.epochs: list[int] = []
        self.processes: set[int] = set()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def training_step(self, batch: Any) -> Tensor:
        (x,) = batch
        self.rows += len(x)
        loss = (self.layers(x + 0.1 * torch.randn_like(x)) ** 2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val", (self.layers(batch[0]) ** 2).mean())

    def predict_step(self, batch: Any) -> Tensor:
        return self.layers(batch[0])

    def on_train_epoch_end(self) -> None:
        self.epochs.append(self.trainer.global_step)
        self.processes.add(os.getpid())


class Counter(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []
        self.count = 0

    def on_train_batch_end(self, trainer: Trainer, module: LoopModule, outputs: Any) -> None:
        self.count += 1
        self.seen.append(float(outputs["loss"]))


def loader() -> DataLoader[Any]:
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(rows), batch_size=8, shuffle=True)


class Side:
    """What one fit and what comes after it gives, here or elsewhere."""

    def __init__(self, strategy: SingleDevice, folder: Path, **limits: int) -> None:
        torch.manual_seed(3)
        self.net = Net()
        self.weight = self.net.layers[0].weight
        self.epochs = self.net.epochs
        self.counter, self.ema = Counter(), EMA(0.5)
        self.seen = self.counter.seen
        self.checkpoints = ModelCheckpoint(monitor="val")
        self.trainer = Trainer(
            strategy=strategy,
            **(limits or {"max_epochs": 2}),
            callbacks=[self.counter, self.ema, self.checkpoints],
            default_root_dir=folder,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def fit(self) -> Side:
        self.trainer.fit(self.net, loader(), loader())
        return self


# Two launches serve several tests, since each takes seconds.
_sides: list[Side] = []


@pytest.fixture
def sides(tmp_path_factory: pytest.TempPathFactory) -> list[Side]:
    if not _sides:
        found = [
            Side(SingleDevice("cpu"), tmp_path_factory.mktemp("here")).fit(),
            Side(Elsewhere(), tmp_path_factory.mktemp("elsewhere")).fit(),
        ]
        _sides.extend(found)
    return _sides


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_weights_and_buffers_are_bitwise_those_of_a_run_here(sides: list[Side]) -> None:
    here, elsewhere = sides
    assert elsewhere.net.layers[0].weight is elsewhere.weight
    same(elsewhere.net.state_dict(), here.net.state_dict())
    same(elsewhere.net.rows, here.net.rows)
    assert here.net.rows == 40
    assert elsewhere.net.processes.isdisjoint(here.net.processes)


def test_objects_that_the_user_holds_are_updated_in_place(sides: list[Side]) -> None:
    here, elsewhere = sides
    assert elsewhere.net.epochs is elsewhere.epochs
    assert elsewhere.epochs == [3, 6]
    assert elsewhere.counter.seen is elsewhere.seen
    assert elsewhere.seen == here.seen
    assert elsewhere.counter.count == 6
    same(elsewhere.ema.state_dict(), here.ema.state_dict())


def test_the_trainer_knows_what_the_run_has_left(sides: list[Side]) -> None:
    here, elsewhere = (side.trainer for side in sides)
    for name in ("global_step", "current_epoch", "updates", "samples_seen", "world_size"):
        assert getattr(elsewhere, name) == getattr(here, name), name
    same(elsewhere.callback_metrics, here.callback_metrics)
    assert set(elsewhere.history.tracks) == set(here.history.tracks)
    assert elsewhere.module is sides[1].net
    assert sides[1].net.trainer is elsewhere
    assert elsewhere.callbacks[0] is sides[1].counter
    assert elsewhere.run_in_progress is None


def test_optimizers_and_schedulers_are_those_of_the_callers_parameters(sides: list[Side]) -> None:
    here, elsewhere = (side.trainer.optimizers["optimizer"] for side in sides)
    assert elsewhere.optimizer.param_groups[0]["params"][0] is sides[1].weight
    same(elsewhere.optimizer.state_dict(), here.optimizer.state_dict())
    assert elsewhere.schedulers[0].scheduler.get_last_lr() == [0.05 / 4]


def test_checkpoints_are_where_the_callback_says(sides: list[Side]) -> None:
    best = Path(sides[1].checkpoints.best_model_path)
    assert best.is_file()
    assert best.name == Path(sides[0].checkpoints.best_model_path).name
    assert sides[1].checkpoints.best_model_score == sides[0].checkpoints.best_model_score


def test_a_checkpoint_and_a_report_can_be_written_afterwards(
    sides: list[Side], tmp_path: Path
) -> None:
    states = []
    for number, side in enumerate(sides):
        path = tmp_path / f"{number}.ckpt"
        side.trainer.save_checkpoint(path)
        states.append(torch.load(path, weights_only=True))
    here, elsewhere = states
    same(elsewhere["state_dict"], here["state_dict"])
    for state in states:
        assert state["optimizers"]["optimizer"].pop("class") == "Adam"
    same(elsewhere["optimizers"], here["optimizers"])
    for state in states:
        state["loop"].pop("seconds")
    for name in ("global_step", "epoch", "loop", "samples_seen", "seed"):
        assert elsewhere[name] == here[name], name
    for name in ("torch", "python"):
        same(elsewhere["random"][name], here["random"][name])
    assert sides[1].trainer.report(tmp_path / "report.html").stat().st_size > 1000


def test_a_later_run_goes_on_from_there(sides: list[Side]) -> None:
    results = []
    for side in sides:
        best = side.trainer.validate(None, loader(), verbose=False)
        assert side.trainer.global_step == 6
        predictions = side.trainer.predict(side.net, loader())
        side.fit()  # from the start, with the weights as they are
        assert side.trainer.global_step == 6
        assert side.epochs == [3, 6, 3, 6]
        results.append((best, predictions, side.net.state_dict()))
    same(results[1], results[0])


def test_a_resumed_run_is_bitwise_the_same(tmp_path: Path) -> None:
    results = []
    for kind in ("here", "elsewhere"):
        strategy = SingleDevice("cpu") if kind == "here" else Elsewhere()
        side = Side(strategy, tmp_path / kind, max_steps=4).fit()
        side = Side(strategy, tmp_path / kind, max_steps=9)
        side.trainer.fit(side.net, loader(), loader(), ckpt_path="last")
        results.append((side.trainer.global_step, side.net.state_dict()))
    same(results[1], results[0])
    assert results[0][0] == 9


# -- what goes wrong ---------------------------------------------------------------------------


def quiet(**arguments: Any) -> Trainer:
    return Trainer(
        strategy=Elsewhere(),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        **arguments,
    )


class Failing(Net):
    def training_step(self, batch: Any) -> Tensor:
        if self.global_step == 2:
            raise ZeroDivisionError("in the third step")
        self.file = threading.Lock()
        return super().training_step(batch)


def test_an_error_is_the_users_own_and_what_was_trained_is_there() -> None:
    net = Failing()
    weight = net.layers[0].weight.clone()
    trainer = quiet(max_epochs=2)
    with (
        pytest.warns(UserWarning, match="Failing.file did not come back .* cannot be pickled"),
        pytest.raises(ZeroDivisionError, match="in the third step") as caught,
    ):
        trainer.fit(net, loader())
    assert 'raise ZeroDivisionError("in the third step")' in str(caught.value.__cause__)
    assert trainer.global_step == 2
    assert net.rows == 16
    assert not torch.equal(net.layers[0].weight, weight)
    assert not hasattr(net, "file")
    assert net.trainer is trainer


def test_what_cannot_be_sent_is_named_with_what_to_write() -> None:
    trainer = quiet(max_epochs=1)
    lines = (torch.ones(2, 3) for _ in range(3))
    with pytest.raises(TypeError, match=r"train_dataloaders is a builtins.generator, and cannot"):
        trainer.fit(Net(), lines)
    net = Net()
    net.layers[1].lock = threading.Lock()
    with pytest.raises(TypeError, match=r"module\.layers\.1\.lock is a _thread\.lock.*torchrun"):
        trainer.fit(net, loader())


class Rows(DataModule):
    def setup(self, stage: str) -> None:
        self.lock = threading.Lock()  # made where it is needed, it need not be sent
        self.loader = loader()

    def train_dataloader(self) -> Any:
        return self.loader


def test_a_data_module_sets_itself_up_there() -> None:
    rows, net = Rows(), Net()
    trainer = quiet(max_epochs=1)
    trainer.fit(net, datamodule=rows)
    assert net.rows == 20
    assert trainer.datamodule is rows
    assert not hasattr(rows, "loader")


def test_a_trainer_without_processes_of_its_own_sends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("composefit.remote.launch", None)
    with contextlib.suppress(KeyError):
        monkeypatch.delenv("RANK")
    trainer = Trainer(strategy="single", max_steps=1, logger=False, enable_checkpointing=False)
    trainer.fit(Net(), loader())
    assert trainer.global_step == 1
