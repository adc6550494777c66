"""The hooks of a run, in the order in which the trainer calls them."""

from __future__ import annotations

from typing import Any, ClassVar


class Callback:
    """Something that happens at given moments of a run, without the module's knowledge.

    Subclass it, override the hooks you need and pass an instance to ``Trainer(callbacks=[...])``.
    The trainer calls every hook, on the thread that called ``fit`` or ``validate``, callback by
    callback in the order of that list; names and signatures are those of Lightning. A hook may
    declare fewer arguments than it is offered. All hooks of this class do nothing.

    One fit calls them in this order:

        setup(stage="fit")
        on_fit_start
          on_sanity_check_start ... on_sanity_check_end
          on_train_start
            on_train_epoch_start                    every epoch
              on_train_batch_start                  every loader batch
                on_before_optimizer_step            every update of an optimizer
                on_before_zero_grad
                on_after_optimizer_step
              on_train_batch_end
              on_validation_start                   when it is due
                on_validation_epoch_start
                  on_validation_batch_start         every batch of every loader
                  on_validation_batch_end
                on_validation_epoch_end
              on_validation_end
            on_train_epoch_end
          on_train_end
        on_fit_end
        teardown(stage="fit")

    Batch hooks run once per loader batch. A step that takes several (gradient accumulation) starts
    all of them, updates, and then ends all of them.

    What has begun ends, also where the step between the two hooks fails: in the end hooks of a run
    that failed, ``trainer.exception`` is the error, otherwise None. ``on_exception`` comes before
    the end hooks of the training, when nothing has changed since the fault, and after those of a
    validation, when what was swapped in for it is swapped back.

    A hook's callbacks run before the module's own hook, but for those with ``saves_state``, which
    run after everybody else: what they save is then whole.

    ``trainer`` and ``module`` are typed as ``Any`` so that an override may name the classes it
    expects (``module: MyGAN``), which a narrower type here would forbid.

    Attributes:
        saves_state: its hooks run after all others.
        counts_samples: it reads ``trainer.samples_seen``, so the size of a batch has to be asked.
        batch_interval: its batch hooks of training are called at most once in so many seconds, and
            for an epoch's first batch. 0 for every batch; what only shows progress needs less, and
            calling hooks is not free.
        runs_before: kinds of callbacks that must not come before this one in the list.

    Example:
        >>> class CountUpdates(Callback):
        ...     def __init__(self):
        ...         self.counts = {}
        ...
        ...     def on_after_optimizer_step(self, trainer, module, optimizer, name):
        ...         self.counts[name] = self.counts.get(name, 0) + 1
        ...
        ...     def state_dict(self):
        ...         return {"counts": self.counts}
        ...
        ...     def load_state_dict(self, state_dict):
        ...         self.counts = state_dict["counts"]
        >>> counter = CountUpdates()
        >>> counter.on_after_optimizer_step(None, None, None, "critic")
        >>> counter.state_dict()
        {'counts': {'critic': 1}}
    """

    saves_state: ClassVar[bool] = False
    counts_samples: ClassVar[bool] = False
    batch_interval: float = 0.0
    runs_before: ClassVar[tuple[type[Callback], ...]] = ()

    @property
    def state_key(self) -> str:
        """The name of its state in a checkpoint; several of one name are numbered."""
        return type(self).__qualname__

    # The module of the run; set by the trainer.
    _module: Any = None

    def log(self, name: str, value: Any, **options: Any) -> None:
        """``module.log`` of the run, within a hook."""
        if self._module is None:
            raise RuntimeError("self.log belongs in a hook, which a Trainer runs: none is running")
        self._module.log(name, value, **options)

    def log_dict(self, dictionary: Any, **options: Any) -> None:
        """``module.log_dict`` of the run, within a hook."""
        for name, value in dictionary.items():
            self.log(name, value, **options)

    # -- any run -------------------------------------------------------------------------------

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Before anything else; ``stage``: "fit", "validate", "test" or "predict"."""

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """When a run ends by an exception, ``KeyboardInterrupt`` included, before it is raised."""

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        """After everything else of a run, also of one that failed."""

    # -- training ------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Module placed, optimizers built and any checkpoint loaded; nothing trained yet."""

    def on_sanity_check_start(self, trainer: Any, module: Any) -> None:
        """Before the few validation batches that show that validation works."""

    def on_sanity_check_end(self, trainer: Any, module: Any) -> None:
        """After them; what they logged is forgotten."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Before the first epoch of this fit."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Before the first batch of an epoch is fetched; not when an epoch is resumed within."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> Any:
        """Before the step that takes this batch, as the loader gave it; once per loader batch.

        Returns:
            -1 to leave out its step and the rest of the epoch.
        """

    def on_before_optimizer_step(
        self, trainer: Any, module: Any, optimizer: Any, name: str
    ) -> None:
        """Before an update: ``.grad`` holds the reduced, unscaled gradients, not yet clipped.

        Args:
            trainer: The running trainer.
            module: The module being trained.
            optimizer: The torch optimizer about to step.
            name: Its name in ``configure_optimizers``.
        """

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """After an update, ``.grad`` still there."""

    def on_after_optimizer_step(self, trainer: Any, module: Any, optimizer: Any, name: str) -> None:
        """After an update, once per update and optimizer: the place for EMA and weight clamping."""

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the step that took this batch.

        Args:
            trainer: The running trainer.
            module: The module being trained.
            outputs: The step's reduced losses, detached: ``{"loss": ...}`` with one optimizer,
                else by optimizer; None where the step failed.
            batch: The loader's batch.
            batch_idx: Its index in the epoch.
        """

    def on_train_interrupted(self, trainer: Any, module: Any) -> None:
        """Training stops within an epoch, between two steps.

        By ``max_steps``, ``max_time`` or ``should_stop``. Runs before the end hooks: a state saved
        here goes on as if never stopped.
        """

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """After the last batch of an epoch and the validation that belongs to it."""

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """After the last epoch."""

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        """After everything of a fit."""

    # -- evaluation ----------------------------------------------------------------------------

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        """Before validation, whether inside a fit or by ``trainer.validate``."""

    def on_validation_epoch_start(self, trainer: Any, module: Any) -> None:
        """Before the first validation batch is fetched."""

    def on_validation_batch_start(
        self, trainer: Any, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before ``validation_step``; ``batch_idx`` counts within loader ``dataloader_idx``."""

    def on_validation_batch_end(
        self,
        trainer: Any,
        module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """After ``validation_step``; ``outputs``: what it returned, joined over shards."""

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        """After the last validation batch, the means of what was logged known."""

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """After validation."""

    def on_test_start(self, trainer: Any, module: Any) -> None:
        """As ``on_validation_start``."""

    def on_test_epoch_start(self, trainer: Any, module: Any) -> None:
        """As ``on_validation_epoch_start``."""

    def on_test_batch_start(
        self, trainer: Any, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As ``on_validation_batch_start``."""

    def on_test_batch_end(
        self,
        trainer: Any,
        module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """As ``on_validation_batch_end``."""

    def on_test_epoch_end(self, trainer: Any, module: Any) -> None:
        """As ``on_validation_epoch_end``."""

    def on_test_end(self, trainer: Any, module: Any) -> None:
        """As ``on_validation_end``."""

    def on_predict_start(self, trainer: Any, module: Any) -> None:
        """Before prediction."""

    def on_predict_epoch_start(self, trainer: Any, module: Any) -> None:
        """Before the first batch is fetched."""

    def on_predict_batch_start(
        self, trainer: Any, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before ``predict_step``."""

    def on_predict_batch_end(
        self,
        trainer: Any,
        module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """After ``predict_step``; ``outputs``: what it returned, joined over shards."""

    def on_predict_epoch_end(self, trainer: Any, module: Any) -> None:
        """After the last batch."""

    def on_predict_end(self, trainer: Any, module: Any) -> None:
        """After prediction."""

    # -- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback: tensors, numbers, strings and containers.

        Only such values load with ``weights_only=True``.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, before ``on_fit_start`` of a resumed fit."""

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Before a checkpoint is written: ``checkpoint`` may be added to, as plain data."""

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Before a checkpoint is taken back."""
