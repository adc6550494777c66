"""`DataModule`: the loaders of all stages in one place."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from composefit.hyperparameters import Hyperparameters, collect

if TYPE_CHECKING:
    from composefit.trainer import Trainer


class DataModule:
    """Downloads, splits and loads data, for `trainer.fit(module, datamodule=data)`.

    Override what is needed. The trainer calls `prepare_data()`, `setup(stage)`, the loaders of the
    stage, and at the end `teardown(stage)`.

    Attributes:
        trainer: the trainer that uses it, or None.

    Example:
        >>> class Numbers(DataModule):
        ...     def setup(self, stage):
        ...         self.rows = [torch.full((4, 1), float(i)) for i in range(8)]
        ...
        ...     def train_dataloader(self):
        ...         return self.rows[:6]
        ...
        ...     def val_dataloader(self):
        ...         return self.rows[6:]
        >>> import torch
    """

    trainer: Trainer | None = None

    def prepare_data(self) -> None:
        """Download and the like, once per machine; assign nothing here."""

    def setup(self, stage: str) -> None:
        """Make datasets; `stage` is "fit", "validate", "test" or "predict"."""

    def train_dataloader(self) -> Any:
        """The loader of training: an iterable of batches, or a dict of such."""
        raise NotImplementedError

    def val_dataloader(self) -> Any:
        """The loader of validation, or several in a list or dict."""
        raise NotImplementedError

    def test_dataloader(self) -> Any:
        """The loader of the test, or several in a list or dict."""
        raise NotImplementedError

    def predict_dataloader(self) -> Any:
        """The loader of prediction, or several in a list or dict."""
        raise NotImplementedError

    def teardown(self, stage: str) -> None:
        """After a run, also one that failed."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as plain data."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, before the loaders are asked for."""

    def save_hyperparameters(
        self, *names: Any, ignore: str | Sequence[str] = (), logger: bool = True
    ) -> None:
        """Keep the arguments of `__init__` in `self.hparams`; see `LoopModule`."""
        frame = inspect.currentframe()
        assert frame is not None and frame.f_back is not None
        self.hparams.merge(collect(frame.f_back, self, names, ignore))
        self.__dict__["_log_hparams"] = logger

    @property
    def hparams(self) -> Hyperparameters:
        """What `save_hyperparameters` kept; a dict, also by attribute."""
        return self.__dict__.setdefault("_hparams", Hyperparameters())  # type: ignore[no-any-return]
