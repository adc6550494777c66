"""`LoopModule`: what one training step means, and what a step logs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

from composefit.losses import Loss, Term, describe
from composefit.random import SampleRandom
from composefit.steps import helper

if TYPE_CHECKING:
    from composefit.trainer import Trainer


@dataclass(frozen=True, slots=True)
class LogOptions:
    """How a logged value is reduced over an epoch and where it is shown."""

    prog_bar: bool
    logger: bool
    on_step: bool
    on_epoch: bool


@dataclass(slots=True)
class Logged:
    """One value as a shard logged it: `weight` None stands for the shard's samples."""

    value: Any
    weight: float | None
    options: LogOptions


class Context:
    """What a module sees of the step that runs: set by the driver for its duration."""

    __slots__ = ("logs", "random", "samples", "training")

    def __init__(
        self, random: SampleRandom | None, samples: Callable[[], int] | None = None
    ) -> None:
        self.random = random
        self.samples = samples
        self.logs: dict[str, Logged] = {}
        self.training = True


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

        `validation_step(self, batch)` or `(self, batch, batch_idx)`.
        """
        raise NotImplementedError

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
        logger: bool = True,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Log a value, reduced over all shards to one; the device is not waited for.

        Args:
            name: its name; logged twice in a step, the last one counts.
            value: a number, a 0-dim tensor, `Mean`, `Sum`, or a torchmetrics `Metric`, whose states
                are merged over the shards, not averaged. A metric stands for the epoch so far, and
                is reset when the epoch ends.
            prog_bar: show it in the progress bar.
            logger: hand it to the logger.
            on_step: hand over the step's value (default: in a training step, and in hooks around
                one).
            on_epoch: hand over the mean over the epoch (default: elsewhere); of a `Sum`, the sum.
            batch_size: the weight of this value, in samples (default: the shard's).

        Raises:
            RuntimeError: outside a step or hook.
            TypeError: a value of another type.
            ValueError: a tensor that is not 0-dim, a sum of `Mean`s, or neither `on_step` nor
                `on_epoch`.
        """
        context = self._in_step("self.log")
        if isinstance(value, Tensor):
            if value.dim():
                raise ValueError(
                    f"self.log({name!r}, ...) expects one number, got shape {tuple(value.shape)}: "
                    "log its mean, or one value under a name of its own each"
                )
            # A copy: `loss += penalty` afterwards, or a parameter's update, would change it. On a
            # CPU there is nobody to wait for, and a number is the cheapest.
            value = value.item() if value.is_cpu else value.detach().clone()
        elif isinstance(value, Loss):
            value = _one_term(name, value)
        elif not isinstance(value, (int, float, Metric)):
            raise _not_loggable(name, value)
        options = _options(
            prog_bar,
            logger,
            context.training if on_step is None else on_step,
            not context.training if on_epoch is None else on_epoch,
        )
        if batch_size is None and options.on_epoch and context.samples is not None:
            batch_size = _samples(value, context.samples)
        context.logs[name] = Logged(value, batch_size, options)

    def log_dict(self, values: Mapping[str, Any], **options: Any) -> None:
        """`self.log` for each item, with the same options; also of a `MetricCollection`."""
        for name, value in values.items():
            self.log(name, value, **options)

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

    # -- hooks, in the order in which they run -------------------------------------------------

    def on_fit_start(self) -> None:
        """Before anything else of a fit, parameters placed."""

    def on_train_start(self) -> None:
        """Before the first epoch."""

    def on_train_epoch_start(self) -> None:
        """Before an epoch's first batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Once per loader batch, before the step."""

    def on_before_optimizer_step(self, optimizer: Optimizer, name: str) -> None:
        """Once per update and optimizer: `.grad` holds the total, unscaled, not yet clipped."""

    def on_after_optimizer_step(self, optimizer: Optimizer, name: str) -> None:
        """Once per update and optimizer, after the weights changed: EMA, weight clamping."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Once per loader batch, after the step; `outputs`: the reduced losses by name."""

    def on_validation_start(self) -> None:
        """Before a validation run."""

    def on_validation_epoch_start(self) -> None:
        """Before a validation run's first batch."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Before a validation batch."""

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a validation batch; `outputs`: what the step returned, joined over shards."""

    def on_validation_epoch_end(self) -> None:
        """After a validation run's last batch, metrics computed."""

    def on_validation_end(self) -> None:
        """After a validation run."""

    def on_train_epoch_end(self) -> None:
        """After an epoch's last batch and its validation."""

    def on_train_end(self) -> None:
        """After the last epoch."""

    def on_fit_end(self) -> None:
        """After everything."""

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
def _options(prog_bar: bool, logger: bool, on_step: bool, on_epoch: bool) -> LogOptions:
    if not on_step and not on_epoch:
        raise ValueError("self.log(on_step=False, on_epoch=False) logs nothing: one must be True")
    return LogOptions(prog_bar, logger, on_step, on_epoch)


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
    if isinstance(value, Metric) or (isinstance(value, Loss) and value.terms[0].weight is not None):
        return None
    return samples()


def _not_loggable(name: str, value: object) -> TypeError:
    hint = ""
    if isinstance(value, MetricCollection):
        hint = ": a collection is several values, write self.log_dict(collection)"
    return TypeError(
        f"self.log({name!r}, ...) expects a number, a 0-dim tensor, Mean, Sum or a torchmetrics "
        f"Metric, got {describe(value)}{hint}"
    )


def has_helpers(module: nn.Module) -> bool:
    """Whether a LoopModule in this tree has generator methods beside its `training_step`."""
    classes = {c for m in module.modules() if isinstance(m, LoopModule) for c in type(m).__mro__}
    return any(hasattr(value, "makes_helpers") for c in classes for value in vars(c).values())
