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
        limit: no more than this many loader batches.
    """

    def __init__(
        self, trainer: Trainer, module: LoopModule, batches: Batches, limit: float
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.batches = batches
        self.limit = limit
        self.batch_idx = 0

    def run(self) -> dict[str, float]:
        """One pass; the means of what was logged."""
        trainer, module = self.trainer, self.module
        self.batch_idx = 0
        training = {m: m.training for m in module.modules()}
        module.eval()
        trainer.begin_evaluation()
        try:
            trainer.call("on_validation_start")
            trainer.call("on_validation_epoch_start")
            for i, batch in enumerate(self.batches.epoch()):
                trainer.call("on_validation_batch_start", batch, i)
                outputs = trainer.evaluate(module, batch, i)
                trainer.call("on_validation_batch_end", outputs, batch, i)
                self.batch_idx = i + 1
                if self.batch_idx >= self.limit:
                    break
            values = trainer.end_evaluation()
            trainer.call("on_validation_epoch_end")
            trainer.call("on_validation_end")
        finally:
            for part, was_training in training.items():
                part.training = was_training
        return values

    def state_dict(self) -> dict[str, Any]:
        """The loader batches done."""
        return {"batch_idx": self.batch_idx}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.batch_idx = state["batch_idx"]
