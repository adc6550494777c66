"""`EvaluateLoop`: one pass over the loaders of a validation or test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import DataLoader

from composefit.data import Batches, CombinedLoader, PerRank
from composefit.data.loaders import one_after_another
from composefit.loops.loop import Loop

if TYPE_CHECKING:
    from composefit.module import LoopModule
    from composefit.trainer import Trainer


class EvaluateLoop(Loop):
    """Runs `validation_step` over loaders, with the module in evaluation mode and no gradients.

        on_validation_start, on_validation_epoch_start
        for each loader, for each of its batches:
            on_validation_batch_start
            trainer.evaluate(module, batch)
            on_validation_batch_end
        the means of what was logged
        on_validation_epoch_end, on_validation_end

    The same for `test_step`, with `test` in the hooks' names.

    Args:
        loaders: a loader, or `Batches`; several in a list or dict run one after another.
        stage: `"validate"` or `"test"`.
    """

    trains = False

    def __init__(self, loaders: Any, stage: Literal["validate", "test"] = "validate") -> None:
        self.loaders = batches_of(loaders, "val_dataloaders")
        self.stage = stage  # type: ignore[misc]
        self.name = "validation" if stage == "validate" else "test"

    def run(self, trainer: Trainer, module: LoopModule) -> list[dict[str, float]]:
        """One pass.

        Returns:
            For each loader, name -> mean over it of what was logged; where a limit of 0 leaves out
            all batches, no hook runs.
        """
        if all(one.available and not one.number for one in self.loaders):  # limited to none
            return [{} for _ in self.loaders]
        call, name = trainer.call, self.name
        if name == "validation":
            trainer.num_val_batches = [one.number for one in self.loaders]
        collect = call.takes(f"on_{name}_epoch_end", 1)
        collected: list[list[Any]] = [[] for _ in self.loaders]
        with (
            trainer.evaluation.running(module, name, self.loaders),
            call.span(
                f"on_{name}_start",
                f"on_{name}_end",
                settle=trainer.evaluation.write,
                restores=True,
            ),
        ):
            with call.span(
                f"on_{name}_epoch_start", f"on_{name}_epoch_end", restores=True, outputs=True
            ) as epoch:
                for index, batches in enumerate(self.loaders):
                    for i, batch in enumerate(trainer.evaluation.batches(batches)):
                        with call.batch_span(name, [batch], i, index) as span:
                            span.outputs = trainer.evaluate(module, batch, i, index)
                        if collect:
                            collected[index].append(span.outputs)
                        trainer.between_steps()
                trainer.evaluation.end()
                epoch.outputs = collected[0] if len(collected) == 1 else collected
            del collected, epoch
        return trainer.evaluation.results()

    def close(self) -> None:
        """End the loaders' workers."""
        for batches in self.loaders:
            batches.close()


def batches_of(loaders: Any, name: str) -> list[Batches]:
    """Each loader as `Batches`."""
    several: Sequence[Any] = [loaders]
    if isinstance(loaders, Mapping | CombinedLoader):
        several = one_after_another(loaders)
    elif isinstance(loaders, list) and loaders:  # of loaders, or of batches: then it is one
        kinds = (Batches, DataLoader, PerRank, CombinedLoader)
        several = loaders if all(isinstance(one, kinds) for one in loaders) else several
    return [one if isinstance(one, Batches) else Batches(one, name) for one in several]
