"""What stands for a logger on ranks that write nothing."""

from __future__ import annotations

from typing import Any

from composefit.loggers.logger import Logger


class Silent(Logger):
    """In place of a logger on every rank but the first: takes everything, and keeps nothing.

    So code that logs by itself, `self.logger.experiment.add_figure(...)`, needs no look at its
    rank. Where files go (`log_dir`) and the logger's other attributes can be asked for.

    Args:
        logger: it stands for this one, which is not begun.
    """

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self.log_dir = logger.log_dir

    @property
    def experiment(self) -> _Nothing:
        """Whatever is done with it does nothing."""
        return _Nothing()

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name == "logger":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.logger, name)


class _Nothing:
    """Anything may be called on it, entered, or asked of it: it does nothing, and gives itself."""

    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):  # what copies and pickles ask for
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> _Nothing:
        return self

    def __getitem__(self, _: Any) -> _Nothing:
        return self

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def __setattr__(self, _: str, __: Any) -> None:
        pass

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass
