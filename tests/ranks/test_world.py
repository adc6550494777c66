"""Ranks that wait for one another: how long, and what they hear of one that fails."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composefit import Distributed, LoopModule, SingleDevice, Strategy, Trainer, checkpoint
from tests.ranks.pool import RankPool

# Functions that run in ranks are sent there whole, so they build what they need themselves.

#: Seconds: shorter than what rank 0 is busy with, and long enough for ranks that do nothing else.
TIMEOUT = 4.0
BUSY = 10.0


class Net(LoopModule):
    """A layer to train."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.layer(batch).square().mean()


class Preparing(Net):
    """Rank 0 does something before all others begin."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def prepare_data(self) -> None:
        if self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "fails":
            raise ValueError("no network")
        time.sleep(BUSY)


def trainer(strategy: Strategy | None = None, **arguments: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
    }
    found = strategy or Distributed(accelerator="cpu", timeout=60)
    return Trainer(strategy=found, **{**quiet, **arguments})


def batches() -> list[Tensor]:
    return [torch.ones(4, 3)] * 2


def impatient(fitting: Trainer) -> None:
    """Let this rank give up soon on others that do not come."""
    assert fitting.world is not None
    fitting.world.timeout = TIMEOUT


# -- waiting ---------------------------------------------------------------------------------------


@pytest.mark.full
def test_data_may_take_any_time_to_be_prepared(two_ranks: RankPool) -> None:
    def work() -> int:
        fitting = trainer()
        impatient(fitting)
        fitting.fit(Preparing("is slow"), batches())
        return fitting.global_step

    assert two_ranks.run(work) == [2, 2]


@pytest.mark.full
def test_a_checkpoint_may_take_any_time_to_be_written_and_to_be_read(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    path = tmp_path / "slow.ckpt"

    def work() -> int:
        from composefit import saved

        save, load = checkpoint.save, saved.load

        def slowly_save(*arguments: Any) -> None:
            time.sleep(BUSY)
            save(*arguments)

        def slowly_load(*arguments: Any) -> Any:
            time.sleep(BUSY)
            return load(*arguments)

        fitting = trainer()
        impatient(fitting)
        fitting.fit(Net(), batches())
        if fitting.is_global_zero:
            checkpoint.save, saved.load = slowly_save, slowly_load  # type: ignore[assignment]
        try:
            fitting.save_checkpoint(path)
            again = trainer(max_epochs=2)
            again.fit(Net(), batches(), ckpt_path=path)
            return again.global_step
        finally:
            checkpoint.save, saved.load = save, load

    assert two_ranks.run(work) == [4, 4]


@pytest.mark.full
def test_a_rank_that_does_not_come_is_named_after_the_timeout(two_ranks: RankPool) -> None:
    def work() -> None:
        fitting = trainer()
        world = fitting.world
        assert world is not None
        impatient(fitting)
        if world.rank == 0:
            time.sleep(BUSY)
        world.agree("a place")

    outcomes = two_ranks.outcomes(work)
    assert outcomes[1].kind == "PeerFailed", outcomes
    assert f"rank 0 did not come to a place within {TIMEOUT:g} s" in outcomes[1].text


# -- failing ---------------------------------------------------------------------------------------


def test_ranks_that_wait_for_data_hear_that_the_one_that_prepares_it_has_died(
    two_ranks: RankPool,
) -> None:
    def work() -> None:
        trainer().fit(Preparing("dies"), batches())

    died, waiting = two_ranks.outcomes(work)
    assert died.kind == "Died"
    assert waiting.kind == "PeerFailed", waiting
    assert "rank 0 has died while rank 1 was waiting at the end of a turn" in waiting.text


def test_ranks_that_wait_for_data_hear_why_there_is_none(two_ranks: RankPool) -> None:
    def work() -> None:
        trainer().fit(Preparing("fails"), batches())

    failed, waiting = two_ranks.outcomes(work)
    assert failed.kind == "ValueError"
    assert waiting.kind == "PeerFailed", waiting
    assert "rank 0 failed with ValueError: no network" in waiting.text


class WithoutThreads(SingleDevice):
    """A place within a rank, which rank 1 does not get."""

    def open(self) -> None:
        if os.environ["RANK"] == "1":
            raise OSError("no threads left")


def without_checkpoint(folder: Path) -> None:
    checkpointed = folder / "here" if os.environ["RANK"] == "0" else folder
    os.chdir(checkpointed)  # on a machine of its own, rank 1 has another folder under this name
    trainer().fit(Net(), batches(), ckpt_path="some.ckpt")


def without_loader(folder: Path) -> None:
    trainer().fit(Net(), batches() if os.environ["RANK"] == "0" else 3)


def without_places(folder: Path) -> None:
    strategy = Distributed(accelerator="cpu", timeout=60, per_process=WithoutThreads("cpu"))
    trainer(strategy).fit(Net(), batches())


@pytest.mark.parametrize(
    ("run", "error"),
    [
        (without_checkpoint, "FileNotFoundError"),
        (without_loader, "TypeError"),
        (without_places, "OSError: no threads left"),
    ],
)
def test_an_error_of_one_rank_before_the_run_begins_is_told_to_the_others(
    two_ranks: RankPool, tmp_path: Path, run: Any, error: str
) -> None:
    one = trainer(SingleDevice("cpu"))
    one.fit(Net(), batches())
    one.save_checkpoint(tmp_path / "here" / "some.ckpt")
    waiting, failed = two_ranks.outcomes(run, tmp_path)
    assert failed.kind == error.partition(":")[0]
    assert waiting.kind == "PeerFailed", waiting
    assert f"rank 1 failed with {error}" in waiting.text
