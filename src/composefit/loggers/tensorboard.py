"""Curves, pictures and settings in TensorBoard."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composefit.images import Image
from composefit.loggers.extras import require
from composefit.loggers.logger import Logger, run_folder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(Logger):
    """Writes event files: look at them with `tensorboard --logdir <save_dir>`.

    TensorBoard keeps numbers in single precision. A resumed run goes on in a new file of the same
    folder, which tells TensorBoard to forget what was logged after the checkpoint.

    Args:
        save_dir: the folder of all runs; made when there is something to write.
        name: a folder in it; `""` for none.
        version: a folder in that one; `""` for none.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed: `pip install "composefit[tensorboard]"`.
        TypeError: `name` or `version` is no str.
        ValueError: one of them leads out of its folder.

    Source: `torch.utils.tensorboard.SummaryWriter`.
    """

    log_dir: Path

    def __init__(self, save_dir: str | os.PathLike[str], name: str = "", version: str = "") -> None:
        self.log_dir = run_folder(save_dir, name, version)
        self._writer_class = require("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None

    @property
    def experiment(self) -> SummaryWriter:
        """The writer itself, for what only TensorBoard has; it begins with the first use."""
        if self._writer is None:
            if self._purge_step is not None:
                _wait_for_a_later_name(self.log_dir)
            self._writer = self._writer_class(self.log_dir, purge_step=self._purge_step)
            self._purge_step = None
        return self._writer

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Add a point to each curve."""
        writer = self.experiment
        for name, value in metrics.items():
            writer.add_scalar(name, float(value), step)

    def log_image(self, name: str, image: Image, step: int) -> None:
        """Add a picture; TensorBoard has no place for a caption."""
        self.experiment.add_image(name, image.array(), step, dataformats="HWC")

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        """Show the settings in the HParams tab; nested ones as `net/depth`, others as `repr`."""
        # Not add_hparams, which begins another run in a folder of its own.
        summary = require("torch.utils.tensorboard.summary", "tensorboard")
        settings, start, _ = summary.hparams(dict(_flat(params)), {})
        file: Any = self.experiment.file_writer
        file.add_summary(settings)
        file.add_summary(start)

    def flush(self) -> None:
        """Write what the writer's thread still has to write."""
        if self._writer is not None:
            self._writer.flush()

    def finalize(self, status: str) -> None:
        """Close the file and end the writer's thread; a run that follows begins another file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have TensorBoard forget what was logged after the checkpoint."""
        self.finalize("finished")  # only the beginning of a file can say so
        self._purge_step = state["step"] + 1


def _wait_for_a_later_name(folder: Path) -> None:
    """Files are read in the order of their names, which hold the second in which they began."""
    begun = [
        int(file.name.split(".")[3])
        for file in folder.glob("events.out.tfevents.*")
        if file.name.split(".")[3].isdecimal()
    ]
    latest = max(begun, default=0)
    if int(time.time()) == latest:
        time.sleep(max(0.0, latest + 1 - time.time()))


def _flat(params: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}/")
        else:
            plain = isinstance(value, (bool, int, float, str))
            yield f"{above}{name}", value if plain else repr(value)
