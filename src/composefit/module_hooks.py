"""`ModuleHooks`: what a module may define, and a trainer then calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from composefit.optimizers import clip


class ModuleHooks:
    """The optional methods of a `LoopModule`, with the names of Lightning; they do nothing.

    A hook may declare fewer arguments than it is offered. It runs once, for all shards, after the
    callbacks' hook of the same name. What begins ends, also where something in between fails:
    `self.trainer.exception` is then the error.
    """

    # -- before a run --------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build what is large, or needs the data module, before the optimizers; may run again."""

    def configure_sharding(self) -> Any:
        """Under `FullySharded`: the modules within this one to shard, inner ones too.

        None where it has called `torch.distributed.fsdp.fully_shard` on them by itself;
        NotImplemented leaves the choice to the strategy.
        """
        return NotImplemented

    def configure_callbacks(self) -> Any:
        """Callbacks that this module brings along: one or several."""
        return []

    def prepare_data(self) -> None:
        """Download and the like, once per machine, before `setup`; assign nothing here."""

    def train_dataloader(self) -> Any:
        """The loader of `trainer.fit(module)`, where none is given."""
        raise NotImplementedError

    def val_dataloader(self) -> Any:
        """The loader or loaders of validation, where none is given."""
        raise NotImplementedError

    def test_dataloader(self) -> Any:
        """The loader or loaders of `trainer.test(module)`, where none is given."""
        raise NotImplementedError

    def predict_dataloader(self) -> Any:
        """The loader or loaders of `trainer.predict(module)`, where none is given."""
        raise NotImplementedError

    # -- what an update consists of, for those who want to change it ---------------------------

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step an optimizer; override it for a warm-up, say.

        Args:
            epoch: the epoch that runs.
            batch_idx: the index of the step's first loader batch.
            optimizer: its parameters' `.grad` holds the total, unscaled and clipped.
            optimizer_closure: returns the reduced loss; it computes nothing.
        """
        optimizer.step(optimizer_closure)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a scheduler when it is due; `metric`: the monitored value, or None."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of an optimizer's parameters, in `.grad`."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip `.grad` of an optimizer's parameters by `"norm"` (the default) or `"value"`."""
        if gradient_clip_val is not None:
            own = [p for group in optimizer.param_groups for p in group["params"]]
            clip(own, gradient_clip_val, gradient_clip_algorithm or "norm")

    # -- hooks, in the order in which they run -------------------------------------------------

    def setup(self, stage: str) -> None:
        """Before anything else of a run; `stage`: "fit", "validate", "test" or "predict"."""

    def on_fit_start(self) -> None:
        """Before anything else of a fit, parameters placed."""

    def on_train_start(self) -> None:
        """Before the first epoch."""

    def on_train_epoch_start(self) -> None:
        """Before an epoch's first batch; not where an epoch is resumed within."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Once per loader batch, before the step; return -1 to leave out the rest of the epoch."""

    def on_after_backward(self) -> None:
        """Once per update and optimizer: `.grad` holds the total, unscaled, not yet clipped."""

    def on_before_optimizer_step(self, optimizer: Optimizer, name: str) -> None:
        """Once per update and optimizer: `.grad` holds the total, unscaled, not yet clipped."""

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Once per update and optimizer, after the weights changed, `.grad` still there."""

    def on_after_optimizer_step(self, optimizer: Optimizer, name: str) -> None:
        """Once per update and optimizer, after the weights changed: EMA, weight clamping."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Once per loader batch, after the step; `outputs`: the reduced losses by name."""

    def on_validation_start(self) -> None:
        """Before a validation run."""

    def on_validation_epoch_start(self) -> None:
        """Before a validation run's first batch."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Before a validation batch."""

    def on_validation_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """After a validation batch; `outputs`: what the step returned, joined over shards."""

    # (*args) lets a type checker accept both forms of what overrides it.
    def on_validation_epoch_end(self, *args: Any) -> None:
        """After a validation run's last batch, metrics computed.

        `on_validation_epoch_end(self)`, or `(self, outputs)`: what the steps returned, an entry for
        each loader batch in order, joined over shards; with several loaders a list for each.
        """

    def on_validation_end(self) -> None:
        """After a validation run."""

    def on_train_epoch_end(self) -> None:
        """After an epoch's last batch and its validation."""

    def on_train_end(self) -> None:
        """After the last epoch."""

    def on_fit_end(self) -> None:
        """After everything."""

    def on_test_start(self) -> None:
        """As `on_validation_start`."""

    def on_test_epoch_start(self) -> None:
        """As `on_validation_epoch_start`."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """As `on_validation_batch_start`."""

    def on_test_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As `on_validation_batch_end`."""

    def on_test_epoch_end(self, *args: Any) -> None:
        """As `on_validation_epoch_end`."""

    def on_test_end(self) -> None:
        """As `on_validation_end`."""

    def on_predict_start(self) -> None:
        """Before prediction."""

    def on_predict_epoch_start(self) -> None:
        """Before the first batch of a prediction."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Before a batch of a prediction."""

    def on_predict_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """After a batch; `outputs`: what `predict_step` returned, joined over shards."""

    def on_predict_epoch_end(self) -> None:
        """After the last batch of a prediction."""

    def on_predict_end(self) -> None:
        """After a prediction."""

    def teardown(self, stage: str) -> None:
        """After everything else of a run, also of one that failed."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before a checkpoint is written: add plain data of your own."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before a checkpoint is taken back."""
