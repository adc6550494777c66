"""Averaged weights, used in place of the trained ones wherever a module is evaluated."""

from __future__ import annotations

import os
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from composefit import checkpoint
from composefit.callbacks.callback import Callback
from composefit.callbacks.monitor import check_count
from composefit.callbacks.stand_in import StandIn, substitute, tensors_of


class EMA(Callback):
    """Keeps an exponential moving average of weights, and evaluates with it.

    With decay `d`, the average of a weight `w` is at first a copy of it, and then
    `d * average + (1 - d) * w`. That happens once a step, at its end, for the parameters of the
    optimizers that were updated in it, however often they were: a generator that is trained at
    every fifth step is averaged at every fifth step, five critic steps within one count once, and
    so does a parameter that two optimizers share. Parameters that no optimizer updates have no
    average: they are what they are.

    The averages stand in for the weights during validation, test and prediction, from
    `on_validation_start` to `on_validation_end`, also if that fails. The trained weights are in
    every checkpoint all the same, and in every `module.state_dict()`, whenever it is taken; the
    averages are in the checkpoint's state of this callback, and a resumed run goes on with them
    exactly. So a `ModelCheckpoint` that monitors a validation keeps, with the weights, the averages
    that it judged. To use them afterwards::

        EMA.load_into(module, "best.ckpt")

    The averages are plain tensors beside the module, none of its parameters; of weights with less
    than 32 bits they are kept in float32, where a small change is not lost.

    Args:
        decay: `d`, from 0 (no averaging) to below 1.
        modules: names of the children to average, such as `["generator"]`; None for the whole
            module.
        update_after_step: the first average is taken after this many steps.
        every_n_updates: average at every n-th step that updates an optimizer, counted for each
            optimizer by itself.
        use_buffers: average floating-point buffers as well (BatchNorm's statistics), at each step
            at which something is averaged. Otherwise evaluation uses the module's own.
        validate: whether validations use the averages; test and prediction always do.

    Raises:
        TypeError, ValueError: an argument that cannot be, or a child that does not exist.

    Source: `torch.optim.swa_utils.get_ema_multi_avg_fn`.
    """

    def __init__(
        self,
        decay: float = 0.999,
        modules: Sequence[str] | None = None,
        update_after_step: int = 0,
        every_n_updates: int = 1,
        use_buffers: bool = False,
        validate: bool = True,
    ) -> None:
        if not isinstance(decay, (int, float)) or isinstance(decay, bool):
            raise TypeError(f"decay must be a number, got {decay!r}")
        if not 0 <= decay < 1:
            raise ValueError(
                f"decay must be at least 0 and below 1, got {decay}: with 1 the average would "
                "never change"
            )
        if isinstance(modules, str):
            raise TypeError(f"modules must be a list of names, got a str: write [{modules!r}]")
        check_count("update_after_step", update_after_step, least=0)
        check_count("every_n_updates", every_n_updates)
        self.decay = float(decay)
        self.modules = None if modules is None else list(modules)
        self.update_after_step = update_after_step
        self.every_n_updates = every_n_updates
        self.use_buffers = use_buffers
        self.validate = validate
        self._mean = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]
        self._stand_in: StandIn | None = None
        self._begin()

    def _begin(self) -> None:
        self._begun = False
        self._averages: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._updated: dict[str, None] = {}  # optimizers, in this step
        self._names: dict[int, str] = {}
        self._owner: weakref.ref[nn.Module] | None = None

    @property
    def state_key(self) -> str:
        """Tells several of them apart: by their decay and what they average."""
        return f"{type(self).__qualname__}{ {'decay': self.decay, 'modules': self.modules} }"

    # -- averaging -----------------------------------------------------------------------------

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Begin anew with a fit; what is resumed comes back after this."""
        if stage == "fit":
            self._begin()

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Find the parameters; begin anew with a second fit in a run, as of a loop over folds."""
        if self._begun:
            self._begin()
        self._begun = True
        self._owner = weakref.ref(module)
        self._find_names(module)
        self._place(trainer, module)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Find them again: some may be new."""
        self._find_names(module)

    def _place(self, trainer: Any, module: nn.Module) -> None:
        """In a checkpoint averages are whole; here they are sharded as their weights are."""
        place = getattr(getattr(trainer, "strategy", None), "load_weights", None)
        if place is not None and self._averages:
            self._averages = dict(place(module, self._averages))

    def _find_names(self, module: nn.Module) -> None:
        self._names = {id(tensor): name for name, tensor in self._tensors(module).items()}

    def on_after_optimizer_step(self, trainer: Any, module: Any, optimizer: Any, name: str) -> None:
        """Note that this optimizer's parameters have changed."""
        self._updated[name] = None

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of a step: average what has changed. Its other batches find nothing to do."""
        if not self._updated:
            return
        updated, self._updated = self._updated, {}
        # After a fault the step is none: its averages would not be those of any step.
        if trainer.exception is not None or trainer.global_step <= self.update_after_step:
            return
        values: dict[str, Tensor] = {}
        for optimizer in updated:
            count = self._counts[optimizer] = self._counts.get(optimizer, 0) + 1
            if count % self.every_n_updates == 0:
                values.update(self._of(trainer.optimizers[optimizer].optimizer))
        if values and self.use_buffers:
            found = self._tensors(module).items()
            values.update((n, t) for n, t in found if not isinstance(t, nn.Parameter))
        self._average(values)

    def _of(self, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self._names.get(id(parameter))
                if name is not None:
                    yield name, parameter

    def _average(self, values: Mapping[str, Tensor]) -> None:
        # Sharded tensors and whole ones cannot be taken together either.
        alike: dict[tuple[torch.device, torch.dtype, type], tuple[list[Tensor], list[Tensor]]]
        alike = defaultdict(lambda: ([], []))
        for name, tensor in values.items():
            value = tensor.detach()
            average = self._averages.get(name)
            dtype = torch.promote_types(value.dtype, torch.float32)
            if average is None:
                self._averages[name] = value.to(dtype, copy=True)
                continue
            if average.device != value.device:  # from a checkpoint
                average = self._averages[name] = average.to(value.device)
            averages, current = alike[average.device, average.dtype, type(average)]
            averages.append(average)
            current.append(value.to(average.dtype))
        for averages, current in alike.values():
            self._mean(averages, current, 0)

    # -- standing in ---------------------------------------------------------------------------

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        """The averages stand in for the weights."""
        if self.validate:
            self._step_in(trainer, module)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """The weights are back."""
        self._step_back()

    def on_test_start(self, trainer: Any, module: Any) -> None:
        """The averages stand in for the weights."""
        self._step_in(trainer, module)

    def on_test_end(self, trainer: Any, module: Any) -> None:
        """The weights are back."""
        self._step_back()

    def on_predict_start(self, trainer: Any, module: Any) -> None:
        """The averages stand in for the weights."""
        self._step_in(trainer, module)

    def on_predict_end(self, trainer: Any, module: Any) -> None:
        """The weights are back."""
        self._step_back()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """The weights are back, if somebody's end hook has kept them from it."""
        self._step_back()

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        """The same."""
        self._step_back()

    def _step_in(self, trainer: Any, module: nn.Module) -> None:
        # Another module than the one that was averaged is evaluated as it is.
        others = self._owner is not None and self._owner() is not module
        if self._stand_in is None and self._averages and not others:
            # A sharded tensor cannot be detached in inference mode.
            with torch.inference_mode(False):
                self._place(trainer, module)
                self._stand_in = StandIn(module, self._tensors(module), self._averages)

    def _step_back(self) -> None:
        stand_in, self._stand_in = self._stand_in, None
        if stand_in is not None:
            with torch.inference_mode(False):
                stand_in.put_back()

    def _tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """What may have an average, by its name in the module; tied parameters once."""
        if self.modules is None:
            return tensors_of(module, "", self.use_buffers)
        found: dict[str, Tensor] = {}
        for name in self.modules:
            try:
                child = module.get_submodule(name)
            except AttributeError:
                known = [child for child, _ in module.named_children()]
                raise ValueError(
                    f"EMA(modules=[{name!r}]): {type(module).__name__} has no such child; it has "
                    f"{known}"
                ) from None
            found.update(tensors_of(child, name, self.use_buffers))
        return found

    # -- what to take away ---------------------------------------------------------------------

    def averaged_state_dict(self, module: nn.Module | None = None) -> dict[str, Any]:
        """`module.state_dict()` with the averages in place of the weights that have one.

        Args:
            module: the module; None for the one of the last fit.

        Returns:
            Copies: nothing in it changes as the training goes on.

        Raises:
            RuntimeError: nothing was averaged yet, or `module` is needed.
        """
        if not self._averages:
            raise RuntimeError("nothing was averaged yet: EMA averages at the end of a step")
        if module is None and self._owner is not None:
            module = self._owner()
        if module is None:
            raise RuntimeError("no fit has shown EMA its module: write averaged_state_dict(module)")
        state = {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in module.state_dict().items()
        }
        substitute(module, state, self._averages)
        return state

    @staticmethod
    def load_into(
        module: nn.Module, path: str | os.PathLike[str], state_key: str | None = None
    ) -> None:
        """Load a checkpoint's weights into a module, the averages in place of those that have one.

        Args:
            module: the module, of the kind that was trained.
            path: a checkpoint of a trainer with an EMA.
            state_key: which one's averages, where there were several.

        Raises:
            ValueError: it is no checkpoint of a trainer, or has no averages, or several.
            RuntimeError: it is damaged, or another module's; then nothing was loaded.
            FileNotFoundError: there is none.
        """
        found = checkpoint.load(path, next((p.device for p in module.parameters()), "cpu"))
        checkpoint.of_trainer(found, path)
        candidates = {
            key: state["averages"]
            for key, state in found.get("callbacks", {}).items()
            if isinstance(state, dict) and "averages" in state
        }
        if state_key is None and len(candidates) == 1:
            (state_key,) = candidates
        if state_key not in candidates:
            which = ""
            if candidates:
                which = f": choose one, EMA.load_into(module, path, {next(iter(candidates))!r})"
            raise ValueError(
                f"{path} holds the averages of {sorted(candidates) or 'no EMA'}{which}"
            )
        weights, averages = dict(found["state_dict"]), candidates[state_key]
        substitute(module, weights, averages)
        # Of a file with trainable weights alone, the others stay as they are here.
        checkpoint.load_module(module, weights, path, strict=not found["trainable_only"])

    def state_dict(self) -> dict[str, Any]:
        """The averages and what they have counted."""
        return {"averages": dict(self._averages), "counts": dict(self._counts)}

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """The averages belong to the weights: those of other weights must not stand in for these.

        Also where a checkpoint is read to be evaluated only.
        """
        nothing: dict[str, Any] = {"averages": {}, "counts": {}}
        self.load_state_dict(checkpoint.get("callbacks", {}).get(self.state_key, nothing))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on averaging."""
        self._averages = dict(state_dict["averages"])
        self._counts = dict(state_dict["counts"])
        self._owner = None  # whichever module is resumed
