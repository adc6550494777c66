"""`LoopModule`: what one training step means, and what a step logs."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

from composefit import checkpoint
from composefit.hyperparameters import Hyperparameters, build, collect
from composefit.images import Image
from composefit.losses import Loss, Term, describe
from composefit.optimizers import clip
from composefit.random import SampleRandom
from composefit.steps import helper

if TYPE_CHECKING:
    from composefit.trainer import Trainer


#: How several values become one: by name, or a function of a 1-dim tensor of them.
Reduce: TypeAlias = Literal["mean", "sum", "min", "max"] | Callable[[Tensor], Any]

_REDUCTIONS: dict[object, Reduce] = {
    **{name: name for name in ("mean", "sum", "min", "max")},
    **{torch.mean: "mean", torch.sum: "sum", torch.min: "min", torch.max: "max"},
    **{torch.amin: "min", torch.amax: "max", sum: "sum", min: "min", max: "max"},
}


@dataclass(frozen=True, slots=True)
class LogOptions:
    """How a logged value is reduced over an epoch and where it is shown."""

    prog_bar: bool
    logger: bool
    on_step: bool
    on_epoch: bool
    reduce: Reduce = "mean"


@dataclass(slots=True)
class Logged:
    """One value as a shard logged it: `weight` None stands for the shard's samples."""

    value: Any
    weight: float | None
    options: LogOptions


class Context:
    """What a module sees of the step that runs: set by the driver for its duration."""

    __slots__ = ("logs", "random", "samples", "suffix", "training")

    def __init__(
        self, random: SampleRandom | None, samples: Callable[[], int] | None = None
    ) -> None:
        self.random = random
        self.samples = samples
        self.logs: dict[str, Logged] = {}
        self.training = True
        self.suffix = ""  # of names, where several loaders are evaluated


class LoopModule(nn.Module):
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

    def configure_model(self) -> None:
        """Build what is large, or needs the data module, before the optimizers; may run again."""

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
            value = _one_term(name, value)
        elif not isinstance(value, (int, float, Metric, Image)):
            raise _not_loggable(name, value)
        if enable_graph:
            raise ValueError("self.log(enable_graph=True): a logged value has no graph; return it")
        if context.suffix and add_dataloader_idx:
            name += context.suffix
        options = _options(
            prog_bar,
            logger is not False,
            context.training if on_step is None else on_step,
            not context.training if on_epoch is None else on_epoch,
            reduce_fx,
        )
        if batch_size is None and options.on_epoch and context.samples is not None:
            batch_size = _samples(value, context.samples)
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
            'opt.step() write `yield {"name": loss}`, with the names of configure_optimizers'
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

    untoggle_optimizer = toggle_optimizer

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
        state = checkpoint.load(checkpoint_path, map_location)
        checkpoint.of_trainer(state, checkpoint_path)
        module = build(cls, state.get("hyper_parameters", {}), overrides, state.get("hparams_name"))
        partly = not strict or state.get("trainable_only", False)
        checkpoint.load_module(module, state["module"], checkpoint_path, strict=not partly)
        module.on_load_checkpoint(state)
        return module.to(map_location) if map_location is not None else module

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


@functools.lru_cache(maxsize=256)
def _options(
    prog_bar: bool, logger: bool, on_step: bool, on_epoch: bool, reduce_fx: Any
) -> LogOptions:
    if not on_step and not on_epoch:
        raise ValueError("self.log(on_step=False, on_epoch=False) logs nothing: one must be True")
    reduce = _REDUCTIONS.get(reduce_fx, reduce_fx)
    if not callable(reduce) and reduce not in _REDUCTIONS:
        raise ValueError(
            "self.log(reduce_fx=...) must be 'mean', 'sum', 'min', 'max' or a function of a tensor "
            f"of values, got {reduce_fx!r}"
        )
    return LogOptions(prog_bar, logger, on_step, on_epoch, reduce)


def _one_term(name: str, loss: Loss) -> Loss:
    """A logged `Mean` or `Sum` without its graph, which would be kept as long as the value."""
    if len(loss.terms) != 1:
        raise ValueError(
            f"self.log({name!r}, ...) expects one Mean or Sum, got {loss!r}: log its terms under "
            "names of their own"
        )
    (term,) = loss.terms
    return Loss((Term(term.total.detach().clone(), term.weight),))


def _samples(value: object, samples: Callable[[], int]) -> int | None:
    """The weight of a value in an epoch's mean; a size is not asked where nobody needs it."""
    if isinstance(value, (Metric, Image)) or (
        isinstance(value, Loss) and value.terms[0].weight is not None
    ):
        return None
    return samples()


def _not_loggable(name: str, value: object) -> TypeError:
    hint = ""
    if isinstance(value, MetricCollection):
        hint = ": a collection is several values, write self.log_dict(collection)"
    return TypeError(
        f"self.log({name!r}, ...) expects a number, a 0-dim tensor, Mean, Sum, Image or a "
        f"torchmetrics Metric, got {describe(value)}{hint}"
    )


def has_helpers(module: nn.Module) -> bool:
    """Whether a LoopModule in this tree has generator methods beside its `training_step`."""
    classes = {c for m in module.modules() if isinstance(m, LoopModule) for c in type(m).__mro__}
    return any(hasattr(value, "makes_helpers") for c in classes for value in vars(c).values())


def overridden(module: LoopModule, name: str) -> bool:
    """Whether a module has written this method of LoopModule's itself."""
    return name in vars(module) or getattr(type(module), name) is not getattr(LoopModule, name)
