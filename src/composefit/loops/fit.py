"""`FitLoop`: epochs of training, each with its validation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from composefit.loops.limits import Limits
from composefit.loops.loop import Loop
from composefit.loops.train_epoch import TrainEpochLoop

if TYPE_CHECKING:
    from composefit.module import LoopModule
    from composefit.trainer import Trainer


def _nothing() -> None:
    """There are no other loaders."""


class FitLoop(Loop):
    """Trains epoch after epoch.

        on_fit_start
        a few batches of validation, to see that it works
        on_train_start
        until the limits are reached:
            train one epoch, with its validation
        on_train_end, on_fit_end

    Args:
        train: the loop of one epoch; it knows when to validate.
        limits: when the fit is over; `max_epochs` stands for `Limits(max_epochs)`. Without either,
            the trainer's limits.
        sanity_batches: so many batches of each validation loader at first; -1 for all.
        reload: gives the epoch loop new loaders, before each `reload_every`-th epoch.
        reload_every: epochs; 0 for never.
    """

    def __init__(
        self,
        train: TrainEpochLoop,
        limits: Limits | None = None,
        *,
        max_epochs: int | None = None,
        sanity_batches: int = 0,
        reload: Callable[[], None] = _nothing,
        reload_every: int = 0,
    ) -> None:
        self.train = train
        if limits is None and max_epochs is not None:
            limits = Limits(max_epochs=max_epochs)
        self._given = limits
        self.limits = train.limits = limits or Limits()
        self.sanity_batches = sanity_batches
        self.reload = reload
        self.reload_every = reload_every

    @property
    def epoch(self) -> int:
        """The epoch that runs, from 0."""
        return self.train.epoch

    def run(self, trainer: Trainer, module: LoopModule) -> None:
        """Train until the limits are reached."""
        if self._given is None:  # those of the trainer, and what a resumed run has used of them
            self.limits = self.train.limits = replace(trainer.limits, elapsed=self.limits.elapsed)
        call, limits, train = trainer.call, self.limits, self.train
        trainer.fit_loop = self
        trainer.num_training_batches = train.batches.number
        validation = [] if train.validate is None else train.validate.loaders
        trainer.num_val_batches = [one.number for one in validation]
        limits.now = trainer.clock
        with (
            limits.clock(),
            call.span("on_fit_start", "on_fit_end", settle=trainer.write_epoch),
        ):
            self._check_validation(trainer, module)
            if limits.reached(train.epoch, trainer.global_step, False) and trainer.global_step:
                warnings.warn(
                    f"nothing is left to train: the state is that of epoch {train.epoch}, step "
                    f"{trainer.global_step}, and max_epochs={limits.max_epochs}, "
                    f"max_steps={limits.max_steps}: raise them to go on",
                    stacklevel=3,
                )
            with call.span("on_train_start", "on_train_end", settle=trainer.write_epoch):
                while not limits.reached(train.epoch, trainer.global_step, trainer.asked_to_stop()):
                    trainer.between_steps()
                    if self._reload_due():
                        self.reload()
                    train.run(trainer, module)

    def _reload_due(self) -> bool:
        epoch, every = self.train.epoch, self.reload_every
        return every > 0 and epoch > 0 and epoch % every == 0 and not self.train.batch_idx

    def _check_validation(self, trainer: Trainer, module: LoopModule) -> None:
        train = self.train
        if train.validate is None or not self.sanity_batches or train.epoch or train.batch_idx:
            return
        with trainer.evaluation.sanity_check(self.sanity_batches):
            train.validate.run(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        """The epoch loop's state, and the seconds of training so far."""
        return {**super().state_dict(), "seconds": self.limits.seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        super().load_state_dict(state)
        self.limits.elapsed = state["seconds"]
