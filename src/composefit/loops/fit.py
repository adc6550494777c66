"""`FitLoop`: epochs of training, each with its validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from composefit.loops.evaluate import EvaluateLoop
from composefit.loops.train_epoch import TrainEpochLoop

if TYPE_CHECKING:
    from composefit.trainer import Trainer


class FitLoop:
    """Trains epoch after epoch.

        on_fit_start, on_train_start
        while epochs and steps are left:
            train one epoch
            validate, if there is something to validate with
            step the schedulers that count epochs
            on_train_epoch_end
        on_train_end, on_fit_end

    Args:
        trainer: runs steps and hooks.
        max_epochs: how many epochs, or None for no limit.
        train: the loop of one epoch.
        validate: the loop of one validation, or None.
    """

    def __init__(
        self,
        trainer: Trainer,
        max_epochs: int | None,
        train: TrainEpochLoop,
        validate: EvaluateLoop | None,
    ) -> None:
        self.trainer = trainer
        self.max_epochs = max_epochs
        self.train = train
        self.validate = validate
        self.epoch = 0

    def run(self) -> None:
        """Run all epochs that are left."""
        trainer = self.trainer
        trainer.call("on_fit_start")
        trainer.call("on_train_start")
        while self.epochs_left > 0 and self.train.steps_left > 0 and not trainer.should_stop:
            self.train.run()
            if self.validate is not None:
                self.validate.run()
            trainer.end_epoch()
            trainer.call("on_train_epoch_end")
            trainer.write_epoch()
            self.epoch += 1
        trainer.call("on_train_end")
        trainer.call("on_fit_end")
        trainer.write_epoch()

    @property
    def epochs_left(self) -> float:
        """How many epochs are still to come."""
        return float("inf") if self.max_epochs is None else self.max_epochs - self.epoch

    def state_dict(self) -> dict[str, Any]:
        """The epochs done, and the epoch loop's state."""
        return {"epoch": self.epoch, "train": self.train.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.epoch = state["epoch"]
        self.train.load_state_dict(state["train"])
