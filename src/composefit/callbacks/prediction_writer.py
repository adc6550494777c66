"""Predictions on disk instead of in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from composefit import checkpoint, tree
from composefit.callbacks.callback import Callback
from composefit.lockstep.scatter import batch_size


class PredictionWriter(Callback):
    """Writes what `predict_step` returns: each batch as it comes, or all at the end.

    A batch's predictions are whole and in the loader's order, whatever the strategy: the files are
    those of a single device, and rank zero writes them, also where each rank has predicted some.
    With `write_interval="batch"` nothing of it stays in memory
    (`trainer.predict(..., return_predictions=False)` keeps nothing either).

    Override `write_on_batch_end` or `write_on_epoch_end` to write something else. As they are, they
    write files which are replaced as a whole and load without running code:

    - `predictions-<loader>-<batch>.pt`, as in `predictions-0-000012.pt`, each
      `{"predictions": what the step returned}`;
    - `predictions.pt`, `{"predictions": [of each batch]}`, with several loaders a list of these
      for each loader.

    Read them with `torch.load(path, weights_only=True)`; tensors are on the CPU.

    Args:
        output_dir: the folder; it is made when needed.
        write_interval: `"batch"`, `"epoch"` or `"batch_and_epoch"`.

    Raises:
        TypeError: `output_dir` is no path; in a run, predictions that a safe load could not read.
        ValueError: another interval.
        OSError: a file cannot be written.
    """

    def __init__(
        self,
        output_dir: str | Path,
        write_interval: Literal["batch", "epoch", "batch_and_epoch"] = "batch",
    ) -> None:
        if not isinstance(output_dir, (str, Path)):
            raise TypeError(f"output_dir must be a path, got {output_dir!r}")
        if write_interval not in ("batch", "epoch", "batch_and_epoch"):
            hint = ""
            if str(output_dir) in ("batch", "epoch", "batch_and_epoch"):
                hint = f": the folder comes first, PredictionWriter('predictions', {output_dir!r})"
            raise ValueError(
                "write_interval must be 'batch', 'epoch' or 'batch_and_epoch', got "
                f"{write_interval!r}{hint}"
            )
        self.output_dir = Path(output_dir)
        self.by_batch = "batch" in write_interval
        self.by_epoch = "epoch" in write_interval
        self._begin()

    def _begin(self) -> None:
        self._kept: dict[int, list[Any]] = {}
        self._places: dict[int, list[Any]] = {}
        self._counted: dict[int, int | None] = {}

    def write_on_batch_end(
        self,
        trainer: Any,
        module: Any,
        prediction: Any,
        batch_indices: list[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch's predictions.

        Args:
            trainer: the running trainer.
            module: the module that predicts.
            prediction: what the step returned, joined over shards; its tensors on the CPU.
            batch_indices: the places of its samples among all that the loader gives, from 0; None
                where the size of a batch is not known.
            batch: the loader's batch; with several ranks, the rows of rank zero.
            batch_idx: its index in its loader.
            dataloader_idx: its loader's index.
        """
        name = f"predictions-{dataloader_idx}-{batch_idx:06d}.pt"
        checkpoint.save(self.output_dir / name, {"predictions": prediction})

    def write_on_epoch_end(
        self, trainer: Any, module: Any, predictions: list[Any], batch_indices: list[Any]
    ) -> None:
        """Write all predictions.

        Args:
            trainer: the running trainer.
            module: the module that predicts.
            predictions: one entry a batch, in order; with several loaders one list for each.
            batch_indices: the same of the places of their samples.
        """
        checkpoint.save(self.output_dir / "predictions.pt", {"predictions": predictions})

    def on_predict_start(self, trainer: Any, module: Any) -> None:
        """Nothing is kept of an earlier run."""
        self._begin()

    def on_predict_batch_end(
        self,
        trainer: Any,
        module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write, or keep for the end."""
        if trainer.exception is not None or not trainer.is_global_zero:
            return
        prediction = tree.map_tensors(_own, outputs)
        places = self._next_places(trainer, module, batch, dataloader_idx)
        if self.by_batch:
            self.write_on_batch_end(
                trainer, module, prediction, places, batch, batch_idx, dataloader_idx
            )
        if self.by_epoch:
            self._kept.setdefault(dataloader_idx, []).append(prediction)
            self._places.setdefault(dataloader_idx, []).append(places)

    def on_predict_epoch_end(self, trainer: Any, module: Any) -> None:
        """Write what was kept."""
        kept, places = list(self._kept.values()), list(self._places.values())
        self._begin()
        if self.by_epoch and trainer.exception is None and trainer.is_global_zero:
            if len(kept) == 1:
                (kept,), (places,) = kept, places
            self.write_on_epoch_end(trainer, module, kept, places)

    def _next_places(
        self, trainer: Any, module: Any, batch: Any, dataloader_idx: int
    ) -> list[int] | None:
        first = self._counted.get(dataloader_idx, 0)
        if first is None:
            return None
        try:
            if trainer.world is None:
                end = first + batch_size(module, batch)
            else:  # of which the batch here is but a part
                end = first + trainer.evaluation.batch_samples
        except (TypeError, ValueError):  # no step needs the size, so the batch need not tell it
            self._counted[dataloader_idx] = None
            return None
        self._counted[dataloader_idx] = end
        return list(range(first, end))


def _own(tensor: Tensor) -> Tensor:
    """On the CPU, and without the rest of a larger tensor that it may be a part of."""
    tensor = tensor.detach().cpu()
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()
