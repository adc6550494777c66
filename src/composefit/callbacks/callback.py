"""The hooks of a run, in the order in which the trainer calls them."""

from typing import Any, ClassVar


class Callback:
    """Something that happens at given moments of a run, without the module's knowledge.

    Subclass it, override the hooks you need and pass an instance to ``Trainer(callbacks=[...])``.
    The trainer calls every hook, on the thread that called ``fit`` or ``validate``, callback by
    callback in the order of that list; names and signatures are those of Lightning. A hook may
    declare fewer arguments than it is offered. All hooks of this class do nothing.

    One fit calls them in this order::

        setup(stage="fit")
        on_fit_start
          on_train_start
            on_train_epoch_start                    every epoch
              on_train_batch_start                  every loader batch
                on_before_optimizer_step            every update of an optimizer
                on_after_optimizer_step
              on_train_batch_end
              on_validation_start ... on_validation_end
            on_train_epoch_end
          on_train_end
        on_fit_end
        teardown(stage="fit")

    Batch hooks run once per loader batch. A step that takes several (gradient accumulation) starts
    all of them, updates, and then ends all of them.

    A hook's callbacks run before the module's own hook, but for those with ``saves_state``, which
    run after everybody else: what they save is then whole.

    ``trainer`` and ``module`` are typed as ``Any`` so that an override may name the classes it
    expects (``module: MyGAN``), which a narrower type here would forbid.

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

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Before anything else of a run; ``stage`` is ``"fit"`` or ``"validate"``."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Module placed, optimizers built and any checkpoint loaded; nothing trained yet."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Before the first epoch of this fit."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Before the first batch of an epoch is fetched."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Before the step that takes this batch, as the loader gave it; once per loader batch."""

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

    def on_after_optimizer_step(self, trainer: Any, module: Any, optimizer: Any, name: str) -> None:
        """After an update, once per update and optimizer: the place for EMA and weight clamping."""

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the step that took this batch.

        Args:
            trainer: The running trainer.
            module: The module being trained.
            outputs: What the trainer keeps of the step: its detached, reduced losses.
            batch: The loader's batch.
            batch_idx: Its index in the epoch.
        """

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
        """After ``validation_step``, whose return value is ``outputs``."""

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        """After the last validation batch."""

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """After validation, its metrics known."""

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """After the last batch of an epoch and the validation that belongs to it."""

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """After the last epoch."""

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        """After everything of a fit that succeeded."""

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """When a run ends by an exception, ``KeyboardInterrupt`` included, before it is raised.

        The hooks that would still have ended something (``on_train_end``, ``on_fit_end``) do not
        run then: let go here of what they would have let go of.
        """

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        """After everything else of a run, also of one that failed."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback: tensors, numbers, strings and containers.

        Only such values load with ``weights_only=True``.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave, before ``on_fit_start`` of a resumed fit."""
