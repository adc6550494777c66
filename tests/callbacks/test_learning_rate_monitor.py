from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR

from composefit.callbacks import LearningRateMonitor
from composefit.loggers import Logger
from composefit.optimizers import NamedOptimizer, Schedule
from tests.callbacks.fake import Pair, SteppedTrainer, fit


class Scheduled(SteppedTrainer):
    """Steps the optimizers and their schedulers, as a step of training does."""

    def update(self) -> None:
        for one in self.optimizers.values():
            one.optimizer.step()
            for schedule in one.schedulers:
                if schedule.interval == "step":
                    schedule.scheduler.step()


def weight() -> Parameter:
    parameter = Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    return parameter


def halving(optimizer: Any, interval: Any) -> Schedule:
    return Schedule(ExponentialLR(optimizer, gamma=0.5), interval=interval)


def test_the_rate_that_a_step_uses_is_logged_at_the_steps_that_loggers_get():
    optimizer = torch.optim.SGD([weight()], lr=1.0)
    named = {"critic": NamedOptimizer("critic", optimizer, [halving(optimizer, "step")])}
    trainer = Scheduled(Path(), LearningRateMonitor("step"), optimizers=named, log_every_n_steps=2)
    trainer.begin()
    for _ in range(5):
        trainer.step()
    # Steps 2 and 4 use what one and three steps of the scheduler have made of 1.
    assert trainer.module.logged == {"lr/critic": [0.5, 0.125]}
    assert trainer.module.options["lr/critic"] == {"on_step": True, "on_epoch": False}


def test_by_epochs_it_is_logged_at_their_beginning():
    optimizer = torch.optim.SGD([weight()], lr=1.0)
    named = {"critic": NamedOptimizer("critic", optimizer, [halving(optimizer, "step")])}
    trainer = Scheduled(Path(), LearningRateMonitor("epoch"), optimizers=named)
    trainer.begin()
    for _ in range(2):
        trainer.call("on_train_epoch_start")
        trainer.epoch()
    assert trainer.module.logged == {"lr/critic": [1.0, 0.25]}
    assert trainer.module.options["lr/critic"] == {"on_step": False, "on_epoch": True}


def test_without_an_interval_each_optimizer_is_logged_as_often_as_it_changes():
    fast, slow, still = (torch.optim.SGD([weight()], lr=1.0) for _ in range(3))
    named = {
        "fast": NamedOptimizer("fast", fast, [halving(fast, "step")]),
        "slow": NamedOptimizer("slow", slow, [halving(slow, "epoch")]),
        "still": NamedOptimizer("still", still),
    }
    trainer = Scheduled(Path(), LearningRateMonitor(), optimizers=named)
    trainer.begin()
    trainer.call("on_train_epoch_start")
    trainer.epoch()
    assert trainer.module.logged == {
        "lr/slow": [1.0],
        "lr/still": [1.0],
        "lr/fast": [1.0, 0.5],
    }


def test_groups_have_values_of_their_own():
    optimizer = torch.optim.SGD(
        [{"params": [weight()], "lr": 0.1}, {"params": [weight()], "lr": 0.2, "name": "head"}],
        lr=1.0,
    )
    named = {"net": NamedOptimizer("net", optimizer)}
    trainer = SteppedTrainer(Path(), LearningRateMonitor("epoch"), optimizers=named)
    trainer.call("on_train_epoch_start")
    assert trainer.module.logged == {"lr/net/pg1": [0.1], "lr/net/head": [0.2]}


def test_momentum_is_logged_on_request():
    named = {
        "sgd": NamedOptimizer("sgd", torch.optim.SGD([weight()], lr=0.1, momentum=0.9)),
        "adam": NamedOptimizer("adam", torch.optim.Adam([weight()], lr=0.2, betas=(0.8, 0.99))),
        "rprop": NamedOptimizer("rprop", torch.optim.Rprop([weight()], lr=0.3)),
    }
    trainer = SteppedTrainer(
        Path(), LearningRateMonitor("epoch", log_momentum=True), optimizers=named
    )
    trainer.call("on_train_epoch_start")
    assert trainer.module.logged == {
        "lr/sgd": [0.1],
        "momentum/sgd": [0.9],
        "lr/adam": [0.2],
        "momentum/adam": [0.8],
        "lr/rprop": [0.3],
        "momentum/rprop": [0],
    }


class Recorder(Logger):
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))


def test_in_a_run_loggers_get_the_rate_of_the_step_that_they_get(tmp_path):
    class Halving(Pair):
        def configure_optimizers(self) -> Any:
            both = super().configure_optimizers()
            schedule = {"scheduler": ExponentialLR(both["critic"], 0.5), "interval": "step"}
            return {**both, "critic": {"optimizer": both["critic"], "lr_scheduler": schedule}}

    recorder = Recorder()
    fit(tmp_path, Halving(), LearningRateMonitor(), logger=recorder, log_every_n_steps=2)
    rates = {step: row["lr/critic"] for step, row in recorder.rows if "lr/critic" in row}
    assert rates == {2: 0.01 / 2, 4: 0.01 / 8, 6: 0.01 / 32}
    assert [(s, row["lr/generator"]) for s, row in recorder.rows if "lr/generator" in row] == [
        (6, 0.01)
    ]


def test_another_interval_is_refused():
    with pytest.raises(ValueError, match="'step', 'epoch' or None, got 'batch'"):
        LearningRateMonitor("batch")  # type: ignore[arg-type]
