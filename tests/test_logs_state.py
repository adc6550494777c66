"""Logs in a checkpoint: a mean over an epoch that was resumed is over all of its batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torchmetrics import CatMetric, MaxMetric, MeanMetric

from composefit import LoopModule, Mean, SingleDevice, Strategy, Sum, ThreadDataParallel, Trainer
from composefit.loggers import Logger

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "one shard": lambda: SingleDevice("cpu"),
    "2 shards": lambda: SingleDevice("cpu", shards=2),
    "2 threads": lambda: ThreadDataParallel(2),
}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)

#: Whole numbers, whose sums are exact; ragged, so that weights count.
BATCHES = [torch.arange(n, n + size).float() for n, size in ((0, 4), (10, 7), (40, 2), (60, 5))]
ALL = torch.cat(BATCHES).double()


class Fixed(LoopModule):
    """Logs what it is given, and trains nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.metric, self.biggest, self.cat = MeanMetric(), MaxMetric(), CatMetric()

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.1)

    def training_step(self, x: Tensor) -> Tensor:
        self.write(x)
        return self.w * 0.0

    def write(self, x: Tensor) -> None:
        raise NotImplementedError


class Rows(Logger):
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, {k: v for k, v in metrics.items() if k != "epoch"}))


def writes(write: Callable[[Any, Tensor], None], **hooks: Callable[..., Any]) -> Fixed:
    return type("Writes", (Fixed,), {"write": write, **hooks})()  # type: ignore[no-any-return]


def fit(net: Fixed, strategy: str, root: Path, **how: Any) -> Any:
    ckpt_path = how.pop("ckpt_path", None)
    run = Trainer(
        strategy=STRATEGIES[strategy](),
        **{"max_epochs": 1, "logger": False, **how},
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    run.fit(net, BATCHES, ckpt_path=ckpt_path)
    return run


def resumed(make: Callable[[], Fixed], strategy: str, root: Path, **how: Any) -> Any:
    """A fit that was stopped after two of an epoch's four steps."""
    fit(make(), strategy, root, max_steps=2)
    return fit(make(), strategy, root, ckpt_path="last", **how)


def reductions(self: Any, x: Tensor) -> None:
    self.log("mean", x.mean(), on_epoch=True, on_step=False)
    self.log("sum", Sum(x.sum()), on_epoch=True, on_step=False)
    self.log("own weight", Mean(x[x > 11].sum(), (x > 11).sum()), on_epoch=True, on_step=False)
    self.log("min", x.min(), on_epoch=True, on_step=False, reduce_fx="min")
    self.log("max", x.max(), on_epoch=True, on_step=False, reduce_fx="max")
    self.log("range", x.max(), on_epoch=True, on_step=False, reduce_fx=lambda v: v.max() - v.min())


@every_strategy
def test_what_an_epoch_comes_to_is_of_all_its_batches(strategy: str, tmp_path: Path) -> None:
    values = resumed(lambda: writes(reductions), strategy, tmp_path).known_values()
    assert values["mean"] == pytest.approx(ALL.mean().item(), abs=1e-12)
    assert values["sum"] == ALL.sum().item()
    assert values["own weight"] == pytest.approx(ALL[ALL > 11].mean().item(), abs=1e-12)
    assert (values["min"], values["max"]) == (0.0, 64.0)
    if strategy == "one shard":
        assert values["range"] == 64.0 - 3.0


def metrics(self: Any, x: Tensor) -> None:
    self.metric.update(x)
    self.biggest.update(-x)
    self.cat.update(x)
    self.log("metric", self.metric, on_step=True, on_epoch=True)
    self.log("biggest", self.biggest, on_step=False, on_epoch=True)


def log_all(self: Any) -> None:
    self.log("count", float(len(self.cat.compute())))


@every_strategy
def test_metrics_go_on_from_their_states(strategy: str, tmp_path: Path) -> None:
    run = resumed(lambda: writes(metrics, on_train_epoch_end=log_all), strategy, tmp_path)
    values = run.known_values()
    assert values["metric_epoch"] == pytest.approx(ALL.mean().item(), abs=1e-5)
    assert values["biggest"] == 0.0
    assert values["count"] == len(ALL)  # also of a metric that no step logs


def test_names_and_the_last_values_are_known_before_the_next_step(tmp_path: Path) -> None:
    def write(self: Any, x: Tensor) -> None:
        self.log("loss", x.mean(), on_step=True, on_epoch=True, prog_bar=True)

    seen: list[dict[str, float]] = []

    def look(self: Any) -> None:
        seen.append(self.trainer.known_values())

    fit(writes(write), "one shard", tmp_path, max_steps=6, max_epochs=2)  # in the second epoch
    fit(writes(write, on_train_start=look), "one shard", tmp_path, ckpt_path="last", max_epochs=2)
    (known,) = seen
    mean = pytest.approx(ALL.mean().item(), abs=1e-12)
    assert known == {"loss": mean, "loss_epoch": mean, "loss_step": BATCHES[1].mean().item()}


def test_the_rows_of_loggers_are_those_of_a_run_that_was_not_stopped(tmp_path: Path) -> None:
    whole, rest = Rows(), Rows()
    fit(writes(reductions), "one shard", tmp_path / "whole", logger=whole)
    resumed(lambda: writes(reductions), "one shard", tmp_path, logger=rest)
    assert rest.rows == whole.rows and len(rest.rows) == 1


def test_a_metric_that_is_gone_and_one_that_is_new_are_left_alone(tmp_path: Path) -> None:
    class Other(Fixed):
        def __init__(self) -> None:
            super().__init__()
            del self.metric
            self.later = MeanMetric()

        def write(self, x: Tensor) -> None:
            self.later.update(x)
            self.log("later", self.later, on_epoch=True, on_step=False)

    fit(writes(metrics), "one shard", tmp_path, max_steps=2)
    run = fit(Other(), "one shard", tmp_path, ckpt_path="last")
    rest = torch.cat(BATCHES[2:]).mean().item()
    assert run.known_values()["later"] == pytest.approx(rest, abs=1e-5)


def test_what_the_last_validation_came_to_is_known_before_the_next(tmp_path: Path) -> None:
    def write(self: Any, x: Tensor) -> None:
        self.log("mean", x.mean(), on_epoch=True, on_step=False)

    seen: list[dict[str, float]] = []

    def look(self: Any) -> None:
        seen.append(self.trainer.known_values())

    def validate(self: Any, x: Tensor) -> None:
        self.log("val", x.mean())

    fit(
        writes(write, validation_step=validate, val_dataloader=lambda self: BATCHES),
        "one shard",
        tmp_path,
    )
    again = writes(write, validation_step=validate, on_train_start=look)
    fit(again, "one shard", tmp_path, ckpt_path="last", max_epochs=2)
    mean = pytest.approx(ALL.mean().item(), abs=1e-12)
    assert seen == [{"mean": mean, "val": mean}]
