"""`LoopModule`: what one training step means, and what a step logs."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from composefit import checkpoint, saved
from composefit.hyperparameters import Hyperparameters, build, collect
from composefit.images import Image
from composefit.logged import Context, Logged, log_options, not_loggable, one_term, samples_of
from composefit.losses import Loss
from composefit.metric_types import Metric
from composefit.module_hooks import ModuleHooks
from composefit.random import SampleRandom
from composefit.steps import helper

if TYPE_CHECKING:
    from composefit.trainer import Trainer


class LoopModule(ModuleHooks, nn.Module):
    """A module that says what one training step means, and nothing of how it is carried out.

    Subclasses write `training_step(self, batch)` or `(self, batch, batch_idx)` and
    `configure_optimizers(self)`. The step returns a loss, or yields effects: see `docs/step.md`.

    Attributes:
        batch_dim: the dimension that counts samples in every tensor of a batch.
        samples_per_group: a batch is cut into shards at multiples of this many samples only.
        running_statistics: names of this module's own buffers that are running means, merged over
            shards as BatchNorm's are (a class attribute, on any `nn.Module`).
    """

    batch_dim: int = 0
    samples_per_group: int = 1

    trainer: Trainer | None
    _context: Context | None
    _replica: bool

    def __init__(self) -> None:
        super().__init__()
        # Straight into the dict: nn.Module would register a trainer that is a module.
        self.__dict__.update(trainer=None, _context=None, _replica=False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, value in list(vars(cls).items()):
            if inspect.isgeneratorfunction(value) and name != "training_step":
                setattr(cls, name, helper(value))

    # -- what a user writes --------------------------------------------------------------------

    # (*args, **kwargs) lets a type checker accept both forms of what overrides it.
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """What one step means: `training_step(self, batch)` or `(self, batch, batch_idx)`.

        Returns a loss, or yields effects.
        """
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        """The optimizers: one, or a dict of named ones; see `OptimizerConfig` for the rest."""
        raise NotImplementedError

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """What is measured on a validation batch, through `self.log`; no gradients.

        `validation_step(self, batch)`, `(self, batch, batch_idx)` or
        `(self, batch, batch_idx, dataloader_idx)`.
        """
        raise NotImplementedError

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """As `validation_step`, for `trainer.test`."""
        raise NotImplementedError

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """What `trainer.predict` returns for a batch, by default `self(batch)`."""
        return self(args[0])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes for its users; the step may use it or not."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward()")

    def batch_size(self, batch: Any) -> int:
        """The number of samples in a batch; override it where dimension 0 does not tell."""
        raise NotImplementedError

    def scatter_batch(self, batch: Any, n: int) -> list[Any]:
        """Cut a batch into n parts (fewer where there are fewer samples); override as needed."""
        raise NotImplementedError

    # -- what a step may use -------------------------------------------------------------------

    @property
    def random(self) -> SampleRandom:
        """Draws for the whole world's batch, of which each shard gets its own rows.

        Raises:
            RuntimeError: outside a step.
        """
        found = self._in_step("self.random").random
        if found is None:
            raise RuntimeError("self.random belongs in a step: hooks have no samples to draw for")
        return found

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log a value, reduced over all shards to one; the device is not waited for.

        Args:
            name: its name; logged twice in a step, the last one counts.
            value: a number, a 0-dim tensor, `Mean`, `Sum`, an `Image` (the first shard's), or a
                torchmetrics `Metric`, whose states are merged over the shards, not averaged. A
                metric stands for the epoch so far, and is reset when the epoch ends.
            prog_bar: show it in the progress bar.
            logger: hand it to the loggers (default: yes).
            on_step: hand over the step's value (default: in a training step, and in hooks around
                one).
            on_epoch: hand over the value of the epoch (default: elsewhere).
            reduce_fx: how the values of shards and of an epoch become one: `"mean"`, weighted,
                `"sum"`, `"min"`, `"max"`, the torch function of that name, or any function of a
                1-dim tensor of them. `Mean` and `Sum` say so themselves.
            add_dataloader_idx: with several evaluation loaders, append `/dataloader_idx_0`.
            batch_size: the weight of this value, in samples (default: the shard's).
            enable_graph: must be False: what is logged has no graph.
            sync_dist: for code that comes from Lightning: a value is always reduced over all
                shards.
            sync_dist_group: the same.
            metric_attribute: the same.
            rank_zero_only: the same; a value is always logged once.

        Raises:
            RuntimeError: outside a step or hook.
            TypeError: a value of another type.
            ValueError: a tensor that is not 0-dim, a sum of `Mean`s, an unknown `reduce_fx`, or
                neither `on_step` nor `on_epoch`.
        """
        context = self._in_step("self.log")
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"self.log({name!r}, ...) expects one number, got shape {tuple(value.shape)}: "
                    "log its mean, or one value under a name of its own each"
                )
            # A copy: `loss += penalty` afterwards, or a parameter's update, would change it. On a
            # CPU there is nobody to wait for, and a number is the cheapest.
            value = value.item() if value.is_cpu else value.detach().clone().reshape(())
        elif isinstance(value, Loss):
            value = one_term(name, value)
        elif not isinstance(value, (int, float, Metric, Image)):
            raise not_loggable(name, value)
        if enable_graph:
            raise ValueError("self.log(enable_graph=True): a logged value has no graph; return it")
        if context.suffix and add_dataloader_idx:
            name += context.suffix
        options = log_options(
            prog_bar,
            logger is not False,
            context.training if on_step is None else on_step,
            not context.training if on_epoch is None else on_epoch,
            reduce_fx,
        )
        if batch_size is None and options.on_epoch and context.samples is not None:
            batch_size = samples_of(value, context.samples)
        context.logs[name] = Logged(value, batch_size, options)

    def log_dict(self, dictionary: Mapping[str, Any], **options: Any) -> None:
        """`self.log` for each item, with the same options; also of a `MetricCollection`."""
        for name, value in dictionary.items():
            self.log(name, value, **options)

    def print(self, *values: Any, **options: Any) -> None:
        """As `print`, once per job: on rank 0, and above a progress bar."""
        if self.trainer is None or self.trainer.is_global_zero:
            print(*values, **options)

    @property
    def global_rank(self) -> int:
        """The rank of this process in the job."""
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def local_rank(self) -> int:
        """Its rank on this machine."""
        return 0 if self.trainer is None else self.trainer.local_rank

    @property
    def logger(self) -> Any:
        """The trainer's first logger, or None."""
        return None if self.trainer is None else self.trainer.logger

    @property
    def loggers(self) -> list[Any]:
        """The trainer's loggers."""
        return [] if self.trainer is None else self.trainer.loggers

    def lr_schedulers(self) -> Any:
        """The schedulers that `configure_optimizers` returned: None, one, or a list."""
        named = {} if self.trainer is None else self.trainer.optimizers
        found = [s.scheduler for one in named.values() for s in one.schedulers]
        return found if len(found) > 1 else (found[0] if found else None)

    def freeze(self) -> None:
        """No parameter takes a gradient; evaluation mode."""
        self.requires_grad_(False)
        self.eval()

    def unfreeze(self) -> None:
        """All parameters take gradients; training mode."""
        self.requires_grad_(True)
        self.train()

    @property
    def global_step(self) -> int:
        """The number of steps done (not of optimizer calls)."""
        return 0 if self.trainer is None else self.trainer.global_step

    @property
    def current_epoch(self) -> int:
        """The epoch that runs, from 0."""
        return 0 if self.trainer is None else self.trainer.current_epoch

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating parameter."""
        found = (p.dtype for p in self.parameters() if p.is_floating_point())
        return next(found, torch.get_default_dtype())

    def _in_step(self, what: str) -> Context:
        context: Context | None = self.__dict__.get("_context")
        if context is None:
            raise RuntimeError(f"{what} belongs in a step, which a Trainer runs: none is running")
        return context

    # -- what Lightning needs for several optimizers, and what to write here -------------------

    def optimizers(self, *_: Any) -> Any:
        """Not needed: raises with what to write instead."""
        raise RuntimeError(
            "self.optimizers() is not needed: instead of opt.zero_grad(), manual_backward(loss), "
            'opt.step() write `yield {"name": loss}`, with the names of configure_optimizers; to '
            'read one, self.trainer.optimizers["name"].optimizer'
        )

    def manual_backward(self, *_: Any, **__: Any) -> Any:
        """Not needed: raises with what to write instead."""
        raise RuntimeError('instead of self.manual_backward(loss) write `yield {"name": loss}`')

    def toggle_optimizer(self, *_: Any) -> Any:
        """Not needed: raises with what to write instead."""
        raise RuntimeError(
            "self.toggle_optimizer() is not needed: an update takes gradients of the named "
            'optimizer\'s parameters only; write `yield {"name": loss}`'
        )

    untoggle_optimizer = toggled_optimizer = toggle_optimizer

    # -- hyperparameters -----------------------------------------------------------------------

    def save_hyperparameters(
        self, *names: Any, ignore: str | Sequence[str] = (), logger: bool = True
    ) -> None:
        """Keep the arguments of `__init__` in `self.hparams`, in checkpoints and with loggers.

        Args:
            names: only these arguments; or one dict, namespace or dataclass to keep instead.
            ignore: not these.
            logger: hand them to the loggers.
        """
        frame = inspect.currentframe()
        assert frame is not None and frame.f_back is not None
        self.hparams.merge(collect(frame.f_back, self, names, ignore))
        self.__dict__["_log_hparams"] = logger

    @property
    def hparams(self) -> Hyperparameters:
        """What `save_hyperparameters` kept; a dict, also by attribute."""
        return self.__dict__.setdefault("_hparams", Hyperparameters())  # type: ignore[no-any-return]

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | os.PathLike[str],
        map_location: Any = "cpu",
        strict: bool = True,
        **overrides: Any,
    ) -> Self:
        """A module with the weights of a checkpoint, built with the hyperparameters in it.

        Args:
            checkpoint_path: a file that a trainer wrote. No code in it is run.
            map_location: the device of the weights.
            strict: every parameter and buffer must be there, and no other.
            overrides: arguments of `__init__`, in place of those kept or beside them.

        Raises:
            TypeError: an argument that `__init__` needs is neither kept nor given.
            RuntimeError: the file is damaged, or of another module: the difference is listed.
        """
        state = saved.load(checkpoint_path)
        checkpoint.of_trainer(state, checkpoint_path)
        module = build(cls, state.get("hyper_parameters", {}), overrides, state.get("hparams_name"))
        partly = not strict or state.get("trainable_only", False)
        module.configure_model()
        module.on_load_checkpoint(state)
        checkpoint.load_module(module, state["state_dict"], checkpoint_path, strict=not partly)
        return module.to(map_location) if map_location is not None else module

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the trainer, which holds threads and files."""
        return {**self.__dict__, "trainer": None, "_context": None}

    def __setattr__(self, name: str, value: Any) -> None:
        state = self.__dict__
        if state.get("_replica"):
            raise RuntimeError(
                f"self.{name} = ... in a step that runs in several shards: each shard would set a "
                "value of its own. Write `yield from Once(self.method, tensors)` and set it in the "
                "method, which is called once; a value for this step alone is a local variable"
            )
        if isinstance(value, (nn.Module, nn.Parameter)) and "_modules" not in state:
            raise TypeError(
                f"self.{name} = {type(value).__name__}(...) before super().__init__(): write that "
                f"first in {type(self).__name__}.__init__"
            )
        if name == "trainer" and "_modules" in state:
            state["trainer"] = value  # not a submodule, whatever it is
        elif name == "automatic_optimization":
            if not value:
                raise RuntimeError(
                    "automatic_optimization = False is not needed for several optimizers: name "
                    "them in configure_optimizers, and update them from the step with "
                    '`yield {"name": loss}`, as often and in whichever order you like'
                )
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self.__dict__.get("_replica"):
            raise RuntimeError(
                f"del self.{name} in a step that runs in several shards would be lost with the "
                "shard: write `yield from Once(self.method)` and delete it in the method"
            )
        super().__delattr__(name)


def has_helpers(module: nn.Module) -> bool:
    """Whether a LoopModule in this tree has generator methods beside its `training_step`."""
    classes = {c for m in module.modules() if isinstance(m, LoopModule) for c in type(m).__mro__}
    return any(hasattr(value, "makes_helpers") for c in classes for value in vars(c).values())


def overridden(module: LoopModule, name: str) -> bool:
    """Whether a module has written this method of LoopModule's itself."""
    return name in vars(module) or getattr(type(module), name) is not getattr(LoopModule, name)
