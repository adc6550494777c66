"""`overfit_batches` and `fast_dev_run`: a few batches to see whether it works at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from composefit import LoopModule, Trainer
from composefit.callbacks import EMA, EarlyStopping, ModelCheckpoint
from composefit.loggers import CSVLogger
from tests.lockstep.steps import linear, trainer


class Net(LoopModule):
    """Notes which samples it gets; a sample holds its number."""

    def __init__(self) -> None:
        super().__init__()
        self.net = linear(1, 1)
        self.seen: dict[str, list[list[float]]] = {
            "train": [],
            "val": [],
            "test": [],
            "predict": [],
        }

    def note(self, stage: str, batch: Any) -> Tensor:
        self.seen[stage].append(batch[0].flatten().tolist())
        loss: Tensor = self.net(batch[0]).square().mean() * 1e-3
        return loss

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=1e-3)

    def training_step(self, batch: Any) -> Tensor:
        loss = self.note("train", batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val", self.note("val", batch))

    def test_step(self, batch: Any) -> None:
        self.log("test", self.note("test", batch))

    def predict_step(self, batch: Any) -> Any:
        return self.note("predict", batch)


def numbers(first: int, count: int, **options: Any) -> Any:
    """A loader of batches of two samples: the numbers from `first` on."""
    rows = torch.arange(first, first + count, dtype=torch.float64).reshape(-1, 1)
    return DataLoader(TensorDataset(rows), 2, **options)


@pytest.mark.parametrize("overfit", [2, 0.4])
@pytest.mark.parametrize("shuffle", [True, False])
def test_overfitting_takes_the_first_batches_of_the_data_in_every_epoch(
    overfit: Any, shuffle: bool
) -> None:
    net = Net()
    run = trainer(overfit_batches=overfit, max_epochs=3)
    run.fit(net, numbers(0, 10, shuffle=shuffle), numbers(100, 10))
    assert net.seen["train"] == [[0, 1], [2, 3]] * 3
    assert net.seen["val"] == [[100, 101], [102, 103]] * 3
    run.test(net, numbers(200, 10), verbose=False)
    assert net.seen["test"] == [[200, 201], [202, 203]]
    assert run.num_training_batches == 2


def test_overfitting_turns_the_other_limits_off_and_can_be_off_itself() -> None:
    net = Net()
    run = trainer(overfit_batches=1, limit_train_batches=4, limit_val_batches=3)
    run.fit(net, numbers(0, 10), numbers(100, 10))
    assert (len(net.seen["train"]), len(net.seen["val"])) == (1, 1)
    for off in (0, 0.0):
        run = trainer(overfit_batches=off, limit_train_batches=4)
        run.fit(net, numbers(0, 10))
        assert run.global_step == 4


@pytest.mark.parametrize("overfit", [-1, 1.5, "2", True])
def test_so_many_batches_cannot_be(overfit: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"overfit_batches .*(must be|as a fraction)"):
        trainer(overfit_batches=overfit)


@pytest.mark.parametrize(("fast", "number"), [(True, 1), (1, 1), (3, 3)])
def test_a_fast_run_takes_so_many_batches_of_everything_and_writes_nothing(
    fast: Any, number: int, tmp_path: Path
) -> None:
    net = Net()
    run = Trainer(
        strategy="single",
        fast_dev_run=fast,
        max_epochs=50,
        default_root_dir=tmp_path / "root",
        num_sanity_val_steps=5,
        limit_train_batches=0.9,
        limit_val_batches=0,
        val_check_interval=0.25,
        check_val_every_n_epoch=7,
        log_every_n_steps=1,
        logger=CSVLogger(tmp_path / "logs"),
        callbacks=[
            ModelCheckpoint(tmp_path / "checkpoints", monitor="val", every_n_train_steps=1),
            EMA(),
        ],
        enable_progress_bar=False,
    )
    run.fit(net, numbers(0, 10), numbers(100, 10))
    run.validate(net, numbers(100, 10), verbose=False)
    run.test(net, numbers(200, 10), verbose=False)
    run.predict(net, numbers(300, 10))
    taken = {stage: len(batches) for stage, batches in net.seen.items()}
    assert taken == {"train": number, "val": 2 * number, "test": number, "predict": number}
    assert (run.global_step, run.current_epoch) == (number, 1)
    assert list(Path.cwd().iterdir()) == []  # which is also tmp_path
    assert run.loggers == []
    assert run.fast_dev_run


def test_a_fast_run_is_not_stopped_by_a_callback_that_looks_for_progress() -> None:
    run = trainer(fast_dev_run=3, callbacks=EarlyStopping("never_logged"))
    run.fit(Net(), numbers(0, 10), numbers(100, 10))
    assert run.global_step == 3


@pytest.mark.parametrize("fast", [-1, 1.5, "yes", None])
def test_a_fast_run_of_something_else_is_refused(fast: Any) -> None:
    with pytest.raises(ValueError, match="fast_dev_run must be True, False or a number of batches"):
        trainer(fast_dev_run=fast)


@pytest.mark.parametrize("off", [False, 0])
def test_an_ordinary_run(off: Any) -> None:
    run = trainer(fast_dev_run=off)
    run.fit(Net(), numbers(0, 10))
    assert (run.global_step, run.fast_dev_run) == (5, False)


# -- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "number"),
    [(None, 5), (2, 2), (9, 5), (0.5, 2), (0.1, 1), (0.99, 4), (1.0, 5), (1, 1)],
)
def test_each_stage_has_its_own_limit_a_number_or_a_fraction(limit: Any, number: int) -> None:
    loader = numbers(0, 10)
    for name in ("train", "val", "test", "predict"):
        net = Net()
        run = trainer(**{f"limit_{name}_batches": limit})
        run.fit(net, loader, loader)
        run.test(net, loader, verbose=False)
        run.predict(net, loader)
        taken = {stage: len(batches) for stage, batches in net.seen.items()}
        assert taken == {"train": 5, "val": 5, "test": 5, "predict": 5, name: number}


@pytest.mark.parametrize("name", ["train", "test", "predict"])
def test_a_run_of_no_batches_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"limit_{name}_batches must be at least 1 batch, got 0"):
        trainer(**{f"limit_{name}_batches": 0})


@pytest.mark.parametrize("value", [-1, 1.01, -0.5, "all", True])
@pytest.mark.parametrize("name", ["train", "val", "test", "predict"])
def test_a_limit_that_cannot_be_is_refused(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"limit_{name}_batches .*got {value!r}"):
        trainer(**{f"limit_{name}_batches": value})


def test_without_validation_batches_nothing_is_asked_of_validation() -> None:
    net = Net()

    class Never:
        def __iter__(self) -> Any:
            raise AssertionError

    run = trainer(limit_val_batches=0, num_sanity_val_steps=2)
    run.fit(net, numbers(0, 10), Never())
    assert net.seen["val"] == []
    assert run.num_val_batches == []
    assert run.validate(net, numbers(0, 10), verbose=False) == [{}]
    assert net.seen["val"] == []
