"""Logging learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from composefit.callbacks.callback import Callback


class LearningRateMonitor(Callback):
    """Logs each optimizer's learning rate as `lr/<optimizer>`, before it is used.

    An optimizer with several parameter groups has one value each: `lr/<optimizer>/pg1`, `/pg2`
    and so on, or the group's own `"name"` in its place.

    Args:
        logging_interval: `"step"`: at the steps that loggers get; `"epoch"`: at the beginning of
            each epoch; None: each optimizer as often as its schedulers step, without a scheduler
            once an epoch.
        log_momentum: log `momentum/<optimizer>` as well: the group's `momentum`, or the first of
            its `betas`; 0 for one that has neither.

    Raises:
        ValueError: another interval.

    Example:
        >>> LearningRateMonitor("batch")
        Traceback (most recent call last):
            ...
        ValueError: logging_interval must be 'step', 'epoch' or None, got 'batch'
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        log_momentum: bool = False,
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise ValueError(
                f"logging_interval must be 'step', 'epoch' or None, got {logging_interval!r}"
            )
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Log what is logged by epochs."""
        self._log(trainer, module, "epoch")

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Log what is logged by steps, at those that loggers get."""
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            self._log(trainer, module, "step")

    def _log(self, trainer: Any, module: Any, now: str) -> None:
        by_step = now == "step"
        for name, one in trainer.optimizers.items():
            if self._interval(one) == now:
                for label, value in self._values(name, one.optimizer.param_groups):
                    module.log(label, value, on_step=by_step, on_epoch=not by_step)

    def _interval(self, one: Any) -> str:
        if self.logging_interval is not None:
            return self.logging_interval
        by_step = any(schedule.interval == "step" for schedule in one.schedulers)
        return "step" if by_step else "epoch"

    def _values(self, name: str, groups: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
        for number, group in enumerate(groups, 1):
            label = group.get("name")
            if label is None and len(groups) > 1:
                label = f"pg{number}"
            where = name if label is None else f"{name}/{label}"
            yield f"lr/{where}", group["lr"]
            if self.log_momentum:
                betas = group.get("betas")
                yield f"momentum/{where}", betas[0] if betas else group.get("momentum", 0)
