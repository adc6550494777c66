"""What a logger is."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from composefit.checkpoint import plain_name
from composefit.images import Image


class Logger(ABC):
    """Base of all loggers: override what yours keeps, `log_metrics` at least.

    The trainer calls it in one process and one thread, on rank 0, with numbers that are already
    reduced; other ranks have something in its place that keeps nothing. The x axis of all curves is
    the step, which never goes back within a run, resumed ones included.

    Attributes:
        log_dir: the folder that the run's files go to, where there is one.

    Example:
        >>> class Printing(Logger):
        ...     def log_metrics(self, metrics, step):
        ...         print(step, metrics)
        >>> Printing().log_metrics({"loss": 0.5}, step=10)
        10 {'loss': 0.5}
    """

    log_dir: Path | None = None

    @abstractmethod
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Keep these numbers.

        Args:
            metrics: name -> value; the epoch, from 0, among them as `"epoch"`.
            step: steps done so far. Several calls may have the same one.
        """

    def log_image(self, name: str, image: Image, step: int) -> None:  # noqa: B027
        """Keep a picture; by default it is not kept.

        Args:
            name: what it was logged as; any text.
            image: the picture; its pixels may still be on a device.
            step: steps done so far.
        """

    def log_hyperparams(self, params: dict[str, Any]) -> None:  # noqa: B027
        """Keep the settings of the run; by default nothing is kept."""

    def flush(self) -> None:  # noqa: B027
        """Write what is buffered: a checkpoint follows, and a run may be resumed from it."""

    def finalize(self, status: str) -> None:  # noqa: B027
        """A run is over: write what is buffered and let go of files and processes.

        Another run may follow.

        Args:
            status: `"finished"` or `"failed"`.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue the same curves: plain data for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """A run is resumed: drop, or overwrite in time, what was logged after its checkpoint.

        It comes before the first `log_metrics` of the run.

        Args:
            state: what `state_dict` returned, and `"step"`: the steps that the checkpoint has.
        """


def run_folder(save_dir: str | os.PathLike[str], name: str, version: str) -> Path:
    """The folder `save_dir/name/version` of a run; a name or version of `""` is left out.

    Raises:
        TypeError: a name or version is no str.
        ValueError: one of them could lead out of the folder before it.
    """
    return Path(save_dir, *(plain_name(one) for one in (name, version) if one != ""))
