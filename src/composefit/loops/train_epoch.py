"""`TrainEpochLoop`: one epoch of training steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from composefit.data import Batches

if TYPE_CHECKING:
    from composefit.module import LoopModule
    from composefit.trainer import Trainer


class TrainEpochLoop:
    """Takes loader batches, several for a step where gradients are accumulated.

        on_train_epoch_start
        for each window of loader batches:
            on_train_batch_start, for each of them
            trainer.step(module, window)
            on_train_batch_end, for each of them

    Args:
        trainer: runs steps and hooks.
        module: is trained.
        batches: the loader.
        window: loader batches in a step; the last step of an epoch may have fewer.
        max_steps: no more than this many steps in all.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LoopModule,
        batches: Batches,
        window: int,
        max_steps: float,
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.batches = batches
        self.window = window
        self.max_steps = max_steps
        self.batch_idx = 0

    @property
    def steps_left(self) -> float:
        """How many steps may still be done."""
        return self.max_steps - self.trainer.global_step

    def run(self) -> None:
        """Run one epoch."""
        trainer, module, call = self.trainer, self.module, self.trainer.call
        self.batch_idx = 0
        call("on_train_epoch_start")
        tell_start = call.anybody("on_train_batch_start", 2)
        tell_end = call.anybody("on_train_batch_end", 3)
        for window in self._windows():
            first = self.batch_idx
            if tell_start:
                for i, batch in enumerate(window, first):
                    call("on_train_batch_start", batch, i)
            try:
                outputs = trainer.step(module, window, first)
            finally:
                self.batch_idx += len(window)
            if tell_end:
                for i, batch in enumerate(window, first):
                    call("on_train_batch_end", outputs, batch, i)
            if self.steps_left <= 0 or trainer.should_stop:
                break

    def _windows(self) -> Iterator[list[Any]]:
        window: list[Any] = []
        for batch in self.batches.epoch():
            window.append(batch)
            if len(window) == self.window:
                yield window
                window = []
        if window:
            yield window

    def state_dict(self) -> dict[str, Any]:
        """The loader batches taken in this epoch."""
        return {"batch_idx": self.batch_idx}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.batch_idx = state["batch_idx"]
