"""What a logger is."""

from abc import ABC, abstractmethod
from typing import Any


class Logger(ABC):
    """Base of all loggers: override what yours keeps, `log_metrics` at least.

    The trainer calls it in one process and one thread, with numbers that are already reduced.

    Example:
        >>> class Printing(Logger):
        ...     def log_metrics(self, metrics, step):
        ...         print(step, metrics)
        >>> Printing().log_metrics({"loss": 0.5}, step=10)
        10 {'loss': 0.5}
    """

    @abstractmethod
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Keep these numbers.

        Args:
            metrics: name -> value; the epoch, from 0, among them as `"epoch"`.
            step: steps done so far, the x axis of all curves. Several calls may have the same one.
        """

    def log_hyperparams(self, params: dict[str, Any]) -> None:  # noqa: B027
        """Keep the settings of the run; by default nothing is kept."""

    def finalize(self, status: str) -> None:  # noqa: B027
        """A run is over: write what is buffered. Another run may follow.

        Args:
            status: how it ended, such as `"finished"` or `"failed"`.
        """
