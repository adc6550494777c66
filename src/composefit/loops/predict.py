"""`PredictLoop`: what the module says of each batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from composefit.loops.evaluate import batches_of
from composefit.loops.loop import Loop

if TYPE_CHECKING:
    from composefit.module import LoopModule
    from composefit.trainer import Trainer


class PredictLoop(Loop):
    """Runs `predict_step` over loaders, with the module in evaluation mode and no gradients.

        on_predict_start, on_predict_epoch_start
        for each loader, for each of its batches:
            on_predict_batch_start
            trainer.evaluate(module, batch)
            on_predict_batch_end
        on_predict_epoch_end, on_predict_end

    Args:
        loaders: a loader, or `Batches`; several in a list or dict run one after another.
        keep: return what the steps return; without it nothing stays in memory.
    """

    stage = "predict"
    trains = False

    def __init__(self, loaders: Any, keep: bool = True) -> None:
        self.loaders = batches_of(loaders, "dataloaders")
        self.keep = keep

    def run(self, trainer: Trainer, module: LoopModule) -> list[Any] | None:
        """One pass.

        Returns:
            One entry for each loader batch, in order, joined over shards; with several loaders one
            such list for each; None without `keep`.
        """
        call = trainer.call
        found: list[list[Any]] = [[] for _ in self.loaders]
        with (
            trainer.evaluation.running(module, "predict", self.loaders, self.keep),
            call.span("on_predict_start", "on_predict_end", restores=True),
            call.span("on_predict_epoch_start", "on_predict_epoch_end", restores=True),
        ):
            for index, batches in enumerate(self.loaders):
                for i, batch in enumerate(trainer.evaluation.batches(batches)):
                    with call.batch_span("predict", [batch], i, index) as span:
                        span.outputs = trainer.evaluate(module, batch, i, index)
                    if self.keep:
                        found[index].append(span.outputs)
                    trainer.between_steps()
        if not self.keep:
            return None
        return found[0] if len(found) == 1 else found

    def close(self) -> None:
        """End the loaders' workers."""
        for batches in self.loaders:
            batches.close()
