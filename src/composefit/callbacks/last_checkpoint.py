"""The checkpoint that is always there: the end of the latest epoch."""

from pathlib import Path
from typing import Any

from composefit.callbacks.callback import Callback


class LastCheckpoint(Callback):
    """Keeps ``<trainer.default_root_dir>/last.ckpt`` at the end of the latest epoch.

    The trainer brings it along for ``enable_checkpointing=True``. It runs after all other callbacks
    and the module's own hooks, so that the file holds what these did at the end of the epoch. It
    calls ``trainer.save_checkpoint(path)`` at the end of each training epoch and at the end of fit,
    which may stop within an epoch; that the file is replaced atomically is the work of
    ``save_checkpoint``. Every rank calls it, since gathering the state may need them all. After an
    exception nothing is written: the file keeps the last state that was whole.
    """

    filename = "last.ckpt"
    saves_state = True

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Write the checkpoint of this epoch."""
        self._save(trainer)

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        """Write the final checkpoint."""
        # Again after the last epoch's: only now does the state say that the fit is over.
        self._save(trainer)

    def _save(self, trainer: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / self.filename)
