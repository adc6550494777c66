"""`EvaluateLoop`: one pass over a validation loader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from composefit.data import Batches

if TYPE_CHECKING:
    from composefit.module import LoopModule
    from composefit.trainer import Trainer


class EvaluateLoop:
    """Runs `validation_step` over a loader, with the module in evaluation mode and no gradients.

        on_validation_start, on_validation_epoch_start
        for each loader batch:
            on_validation_batch_start
            trainer.evaluate(module, batch)
            on_validation_batch_end
        the means of what was logged
        on_validation_epoch_end, on_validation_end

    Args:
        trainer: runs steps and hooks.
        module: is evaluated.
        batches: the loader.
    """

    def __init__(self, trainer: Trainer, module: LoopModule, batches: Batches) -> None:
        self.trainer = trainer
        self.module = module
        self.batches = batches
        self.batch_idx = 0

    def run(self) -> dict[str, float]:
        """One pass; the means of what was logged."""
        trainer, module, call = self.trainer, self.module, self.trainer.call
        self.batch_idx = 0
        with trainer.evaluation(module):
            call("on_validation_start")
            call("on_validation_epoch_start")
            for i, batch in enumerate(self.batches.epoch()):
                call("on_validation_batch_start", batch, i)
                outputs = trainer.evaluate(module, batch, i)
                call("on_validation_batch_end", outputs, batch, i)
                self.batch_idx = i + 1
            trainer.end_evaluation()
            call("on_validation_epoch_end")
            call("on_validation_end")
            return trainer.write_evaluation()

    def state_dict(self) -> dict[str, Any]:
        """The loader batches done."""
        return {"batch_idx": self.batch_idx}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.batch_idx = state["batch_idx"]
