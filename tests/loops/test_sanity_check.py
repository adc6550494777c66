"""A few validation batches before training: they show that validation works, and leave no trace."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from composefit import Callback, LoopModule, Trainer
from composefit.loggers import CSVLogger
from tests.lockstep.steps import data, every_strategy, linear, same, trainer


class Net(LoopModule):
    """Draws random numbers everywhere, and logs a metric object and a value."""

    samples_per_group = 2

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3).double())
        self.mean = MeanMetric()

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Any) -> Tensor:
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def validation_step(self, batch: Any) -> None:
        self.mean.update(self.net(batch[0] + torch.randn(3)).mean())
        self.log("metric", self.mean)
        self.log("val", batch[0].mean(), on_step=True, on_epoch=True, prog_bar=True)


def loaders() -> tuple[Any, Any]:
    """Both shuffle."""
    train, validate = TensorDataset(data(12, 3)), TensorDataset(data(9, 3, seed=2))
    return DataLoader(train, 4, shuffle=True), DataLoader(validate, 2, shuffle=True)


class Watch(Callback):
    """What there is to see at each validation."""

    def __init__(self) -> None:
        self.batches: list[tuple[bool, int]] = []
        self.values: list[tuple[str, set[str]]] = []

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any) -> None:  # type: ignore[override]
        self.batches.append((trainer.sanity_checking, len(batch[0])))

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if trainer.sanity_checking:
            self.values.append(("end", set(trainer.callback_metrics)))

    def on_train_start(self, trainer: Any, module: Any) -> None:
        known = {*trainer.callback_metrics, *trainer.progress_bar_metrics, *trainer.logged_metrics}
        self.values.append(("train", known))


@pytest.mark.parametrize(
    ("number", "batches"), [(None, 2), (0, 0), (1, 1), (3, 3), (9, 5), (-1, 5)]
)
def test_it_takes_so_many_batches_of_each_loader(number: Any, batches: int) -> None:
    watch = Watch()
    train, validate = loaders()
    run = trainer(callbacks=watch, num_sanity_val_steps=number)
    run.fit(Net(), train, [validate, validate])
    assert sum(sanity for sanity, _ in watch.batches) == 2 * batches
    assert len(watch.batches) == 2 * batches + 10


def test_a_limit_of_validation_holds_here_too() -> None:
    watch = Watch()
    run = trainer(callbacks=watch, num_sanity_val_steps=-1, limit_val_batches=3)
    run.fit(Net(), *loaders())
    assert [sanity for sanity, _ in watch.batches] == [True] * 3 + [False] * 3
    watch.batches.clear()
    trainer(callbacks=watch, num_sanity_val_steps=2, limit_val_batches=1).fit(Net(), *loaders())
    assert [sanity for sanity, _ in watch.batches] == [True, False]
    watch.batches.clear()
    trainer(callbacks=watch, num_sanity_val_steps=2, limit_val_batches=0).fit(Net(), *loaders())
    assert watch.batches == []


@every_strategy
def test_a_run_with_it_is_bitwise_the_run_without(strategy: Any) -> None:
    nets, found = [Net(), Net()], []
    nets[1].load_state_dict(nets[0].state_dict())
    for net, number in zip(nets, (0, -1), strict=True):
        run = trainer(strategy(), num_sanity_val_steps=number, max_epochs=2)
        run.fit(net, *loaders())
        found.append({name: value.item() for name, value in run.callback_metrics.items()})
    assert same(*nets)
    assert found[0] == found[1]
    assert set(found[0]) == {"metric", "val", "val_step", "val_epoch"}


def test_nothing_of_it_is_known_when_training_starts() -> None:
    watch = Watch()
    net = Net()
    seen: list[int] = []
    net.on_train_start = lambda: seen.append(net.mean.update_count)  # type: ignore[method-assign]
    trainer(callbacks=watch, num_sanity_val_steps=2).fit(net, *loaders())
    during = {"metric", "val", "val_step", "val_epoch"}
    assert watch.values == [("end", during), ("train", set())]
    assert seen == [0]


def test_nothing_of_it_is_logged(tmp_path: Path) -> None:
    rows = []
    for number in (0, -1):
        run = Trainer(
            strategy="single",
            max_epochs=1,
            seed=0,
            num_sanity_val_steps=number,
            log_every_n_steps=1,
            logger=CSVLogger(tmp_path / str(number)),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        torch.manual_seed(0)
        run.fit(Net(), *loaders())
        (file,) = (tmp_path / str(number)).rglob("*.csv")
        rows.append(file.read_text())
    assert rows[0] == rows[1]
    assert "val" in rows[0]


def test_a_metric_that_nobody_logs_has_counted_nothing() -> None:
    class Quiet(Net):
        def validation_step(self, batch: Any) -> None:
            self.mean.update(batch[0].mean())

        def on_train_start(self) -> None:
            assert not self.mean.update_called

    trainer(num_sanity_val_steps=2).fit(Quiet(), *loaders())


def test_validation_that_fails_is_found_before_anything_is_trained() -> None:
    class Failing(Net):
        def validation_step(self, batch: Any) -> None:
            raise KeyError("mine")

    run = trainer(num_sanity_val_steps=1)
    with pytest.raises(KeyError, match="mine"):
        run.fit(Failing(), *loaders())
    assert run.global_step == 0
    assert not run.sanity_checking


@pytest.mark.parametrize("number", [-2, 1.5, True, "all"])
def test_a_number_that_cannot_be_is_refused(number: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="num_sanity_val_steps must be"):
        trainer(num_sanity_val_steps=number)


def test_a_run_that_is_resumed_has_none(tmp_path: Path) -> None:
    watch = Watch()
    run = trainer(num_sanity_val_steps=2)
    run.fit(Net(), *loaders())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = trainer(num_sanity_val_steps=2, max_epochs=2, callbacks=watch)
    again.fit(Net(), *loaders(), ckpt_path=tmp_path / "a.ckpt")
    assert [sanity for sanity, _ in watch.batches] == [False] * 5
