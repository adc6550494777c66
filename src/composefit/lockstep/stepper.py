"""From total gradients to new weights: check, unscale, clip, step, with the hooks around it.

Every gradient of a simultaneous update is checked before any optimizer steps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from composefit.lockstep import gradients
from composefit.lockstep.contract import Lanes
from composefit.lockstep.gradients import Gradients
from composefit.optimizers import NamedOptimizer, needs_closure
from composefit.precision import LossScale, Precision

OnNonfinite = Literal["raise", "skip", "ignore"]

#: Evaluates a loss anew, over all shards: the loss and its gradients.
Again: TypeAlias = Callable[[], tuple[Tensor, Gradients]]


class Hooks(Protocol):
    """Who wants to know of an optimizer's step."""

    def before_optimizer_step(self, optimizer: Optimizer, name: str) -> None:
        """`.grad` holds the total gradients, unscaled, not yet clipped."""

    def before_zero_grad(self, optimizer: Optimizer) -> None:
        """The weights have changed, `.grad` is still there."""

    def after_optimizer_step(self, optimizer: Optimizer, name: str) -> None:
        """The weights have changed."""


class NoHooks:
    """Nobody."""

    def before_optimizer_step(self, optimizer: Optimizer, name: str) -> None:
        """Nothing."""

    def before_zero_grad(self, optimizer: Optimizer) -> None:
        """Nothing."""

    def after_optimizer_step(self, optimizer: Optimizer, name: str) -> None:
        """Nothing."""


class Stepper:
    """Owns the named optimizers of a run and steps them.

    Args:
        module: the owner, for parameters' names in messages.
        optimizers: by name.
        precision: whether losses are scaled.
        places: the strategy: where parameters are, and what is done with them there.
        step: how an optimizer is stepped: `strategy.optimizer_step`, or the module's own way. It
            is given a closure besides where the loss is a function.
        hooks: told before and after each.
        on_nonfinite: what to do with a NaN or infinite gradient: `"raise"` an error before
            anything steps, `"skip"` the update, or `"ignore"` it.
        clipped: clips in place of `clip`: given optimizer, limit and algorithm.

    Attributes:
        loss: the reduced loss of the optimizer that steps; None where there is none.
        closures: the optimizers that ask for their loss several times: `torch.optim.LBFGS`.
        asks_again: whether there are any.
        updates: name -> how often it was updated.
        left_out: name -> how many of its updates were not finite and left out.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Mapping[str, NamedOptimizer],
        precision: Precision,
        places: Lanes,
        step: Callable[..., None],
        hooks: Hooks | None = None,
        on_nonfinite: OnNonfinite = "raise",
        clipped: Callable[[Optimizer, float | None, str | None], None] | None = None,
    ) -> None:
        self.module = module
        self.optimizers = dict(optimizers)
        self.closures = {n for n, one in optimizers.items() if needs_closure(one.optimizer)}
        self.asks_again = bool(self.closures)
        self.places = places
        device = places.device
        self.scales: dict[str, LossScale] = {}
        if precision.scales_losses:
            self.scales = {name: LossScale(device) for name in optimizers}
        self.step = step
        self.hooks = hooks or NoHooks()
        self.on_nonfinite = on_nonfinite
        self.clipped = clipped
        self.loss: Tensor | None = None
        self.updates = dict.fromkeys(self.optimizers, 0)
        self.left_out: Counter[str] = Counter()
        self.on_cpu = device.type == "cpu"
        # Whatever the default dtype is, the fused check takes float32.
        self.one = torch.ones((), dtype=torch.float32, device=device)
        self.found = torch.zeros((), dtype=torch.float32, device=device)
        self.late: dict[str, LateCheck] = {}

    def scale(self, key: str) -> LossScale | None:
        """The loss scale of an optimizer, or of other gradients that a step asks for; if any."""
        if not self.scales:
            return None
        found = self.scales.get(key)
        if found is None:  # shards may come here at the same time: the first one's counts
            found = self.scales.setdefault(key, LossScale(self.found.device))
        return found

    def unscale(self, key: str, found: Gradients) -> None:
        """Divide gradients that are asked for by their loss scale, in place.

        Where that was too large they are infinite, which an update made of them finds.
        """
        scale = self.scale(key)
        if scale is None:
            return
        _coalesce_(found)
        self._check(self._values(found), self.found, scale.inverse())
        self.places.agree_found_(self.found)
        scale.adapt(self.found)
        self.found.zero_()

    def update(
        self,
        totals: dict[str, tuple[list[Parameter], Gradients]],
        losses: dict[str, Tensor],
        step: int,
        again: Mapping[str, Again] | None = None,
        given: Collection[str] = (),
    ) -> bool:
        """Step these optimizers with these gradients; False if the update was skipped.

        Args:
            totals: name -> its parameters and their gradients, times the loss scale.
            losses: name -> the reduced loss, where there is one.
            step: the number of the step, for messages.
            again: name -> evaluates its loss anew, where that is a function.
            given: the names whose gradients the step has made itself, without a loss scale.

        Raises:
            FloatingPointError: a loss or gradient is not finite, and `on_nonfinite="raise"`.
            ValueError: a loss that is a function, with a loss scale.
        """
        if self.scales:
            if again:
                raise ValueError(
                    f"the loss of {next(iter(again))!r} is a function, which its optimizer calls "
                    "by itself, and precision='16-mixed' scales losses: use 'bf16-mixed' or '32'"
                )
            if not self._unscale(totals, given):
                self.left_out.update(totals.keys())
                return False
        elif self.on_nonfinite != "ignore" and not self._finite(totals, losses, step):
            self.left_out.update(totals.keys())
            return False
        for name, (parameters, found) in totals.items():
            self.loss = losses.get(name)
            try:
                self._apply(name, parameters, found, again.get(name) if again else None, step)
            except _TooFar:
                if self.on_nonfinite == "raise":
                    raise
                self.left_out[name] += 1
        return True

    def _apply(
        self,
        name: str,
        parameters: list[Parameter],
        found: Gradients,
        again: Again | None,
        step: int,
    ) -> None:
        named = self.optimizers[name]
        optimizer = named.optimizer
        try:
            _set(parameters, found)
            self.hooks.before_optimizer_step(optimizer, name)
            self._clip(named, parameters)
            changed = [p for p in parameters if p.grad is not None]
            if again is None:
                self.step(optimizer)
            else:
                self._step_asking(named, parameters, again, step)
            # Fused optimizers change weights without a trace: a stale graph must raise.
            torch.autograd.graph.increment_version(changed)
            self.places.stepped(changed)
            self.hooks.before_zero_grad(optimizer)
        finally:
            for parameter in parameters:
                parameter.grad = None
        self.updates[name] += 1
        self.hooks.after_optimizer_step(optimizer, name)

    def _step_asking(
        self, named: NamedOptimizer, parameters: list[Parameter], again: Again, step: int
    ) -> None:
        """Step an optimizer that may evaluate its loss again; after an error all is as before.

        Raises:
            FloatingPointError: a later evaluation was not finite, and so are the weights now.
        """
        before = [p.detach().clone() for p in parameters]
        asking = _Asking(self, named, parameters, again)
        try:
            self.step(named.optimizer, asking)
            if asking.lost is not None and self.on_nonfinite != "ignore":
                self._check(self._values(list(parameters)), self.found, self.one)
                self.places.agree_found_(self.found)
                lost = bool(self.found.item())
                self.found.zero_()
                if lost:
                    raise self._went_too_far(named, asking.lost, step)
        except BaseException as error:
            if not asking.asked:  # as any other optimizer
                raise
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
            self.places.stepped(parameters)
            # What it had noted of this step is half done, and torch's L-BFGS would trip over it.
            named.optimizer.state.clear()
            kind = type(named.optimizer).__name__
            error.add_note(
                f"the weights of {named.name!r} are those before this update; {kind} has forgotten "
                "its history"
            )
            raise

    def _went_too_far(self, named: NamedOptimizer, loss: Tensor, step: int) -> FloatingPointError:
        searches = any(group.get("line_search_fn") for group in named.optimizer.param_groups)
        hint = "" if searches else ', or give it a line search (line_search_fn="strong_wolfe")'
        return _TooFar(
            f"the loss of {named.name!r} in step {step} is not finite where "
            f"{type(named.optimizer).__name__} has evaluated it anew: {loss:.4g}. It has gone too "
            f"far: lower its learning rate{hint}"
        )

    def _clip(self, named: NamedOptimizer, parameters: list[Parameter]) -> None:
        limit, algorithm = named.gradient_clip_val, named.gradient_clip_algorithm
        if self.clipped is not None:
            self.clipped(named.optimizer, limit, algorithm)
        elif limit is not None:
            self.places.clip(parameters, limit, algorithm)

    # -- finite? -------------------------------------------------------------------------------

    def _finite(
        self,
        totals: dict[str, tuple[list[Parameter], Gradients]],
        losses: dict[str, Tensor],
        step: int,
    ) -> bool:
        if not self.on_cpu:
            return self._finite_late(totals, step)
        for name, (parameters, found) in totals.items():
            if not self._is_finite(found, losses.get(name)):
                if self.on_nonfinite == "skip":
                    return False
                raise self._error(name, parameters, found, losses.get(name), step)
        return True

    def _is_finite(self, found: Gradients, loss: Tensor | None) -> bool:
        """Whether these gradients and their loss are; waits for the device."""
        self._check(self._values(found), self.found, self.one)
        self.places.agree_found_(self.found)
        if self.found.item() or not (loss is None or math.isfinite(loss.item())):
            self.found.zero_()
            return False
        return True

    def _values(self, found: Gradients) -> list[Tensor]:
        return self.places.local(gradients.values(found))

    def _check(self, values: list[Tensor], found: Tensor, inverse_scale: Tensor) -> None:
        """Set `found` where a number is not finite, multiply by `inverse_scale` in place."""
        if not values:
            return
        dtype = values[0].dtype
        for value in values:
            if value.dtype is not dtype:  # the fused check takes one dtype at a time
                others = [other for other in values if other.dtype is not dtype]
                self._check(others, found, inverse_scale)
                values = [other for other in values if other.dtype is dtype]
                break
        if dtype.is_complex:
            values = [torch.view_as_real(v.conj() if v.is_conj() else v) for v in values]
        torch._amp_foreach_non_finite_check_and_unscale_(values, found, inverse_scale)

    def _finite_late(self, totals: dict[str, tuple[list[Parameter], Gradients]], step: int) -> bool:
        """On a GPU: without waiting for it, so that a fault shows one update late."""
        for name, (_, found) in totals.items():
            late = self.late.setdefault(name, LateCheck(self.one.device))
            late.raise_if_found(name, self.on_nonfinite)
            late.found.zero_()
            self._check(self._values(found), late.found, self.one)
            self.places.agree_found_(late.found)
            late.ask(step)
            optimizer = self.optimizers[name].optimizer
            if all(group.get("fused") for group in optimizer.param_groups):
                # A fused optimizer leaves the weights alone where this is set, on the device.
                optimizer.found_inf = late.found  # type: ignore[attr-defined]
        return True

    def finish(self) -> None:
        """At the end of a run: report what a GPU has found since."""
        for name, late in self.late.items():
            late.raise_if_found(name, self.on_nonfinite)

    def _error(
        self,
        name: str,
        parameters: list[Parameter],
        found: Gradients,
        loss: Tensor | None,
        step: int,
    ) -> FloatingPointError:
        names = {id(p): n for n, p in self.module.named_parameters()}
        bad = [
            names.get(id(p), "a parameter outside the module")
            for p, g in zip(parameters, found, strict=True)
            if g is not None and not all(torch.isfinite(v).all() for v in self._values([g]))
        ]
        first = ""
        if bad:
            share = f"{len(bad)} of {len(parameters)} parameters"
            first = f", first in the gradient of {bad[0]} ({share})"
        value = "gradients given" if loss is None else f"loss {loss.item():.4g}"
        return FloatingPointError(
            f"the update of {name!r} in step {step} is not finite: {value}{first}. "
            "No weight was changed. Lower the learning rate, clip (gradient_clip_val=...), look "
            'for log(0) or a division by zero; Trainer(on_nonfinite="skip") leaves such updates out'
        )

    # -- fp16 ----------------------------------------------------------------------------------

    def _unscale(
        self, totals: dict[str, tuple[list[Parameter], Gradients]], given: Collection[str]
    ) -> bool:
        """Divide by the loss scales; where anything is infinite, skip all and lower the scales."""
        for name, (_, found) in totals.items():
            _coalesce_(found)
            inverse = self.one if name in given else self.scales[name].inverse()
            self._check(self._values(found), self.found, inverse)
        self.places.agree_found_(self.found)
        finite = not self.found.item()
        for name in totals:
            self.scales[name].adapt(self.found)
        self.found.zero_()
        return finite


def _coalesce_(found: Gradients) -> None:
    """Make the values of sparse gradients their own: those of a copy would be written otherwise."""
    for i, gradient in enumerate(found):
        if gradient is not None and gradient.is_sparse:
            found[i] = gradient.coalesce()


def _set(parameters: list[Parameter], found: Gradients) -> None:
    """Give parameters their total gradients."""
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient
        if parameter._post_accumulate_grad_hooks and gradient is not None:
            for hook in parameter._post_accumulate_grad_hooks.values():
                hook(parameter)


class _TooFar(FloatingPointError):
    """An optimizer has evaluated its loss where it is not finite, and stayed there."""


class _Asking:
    """What an optimizer calls: first for the loss that is there, then for new ones.

    Attributes:
        asked: the loss was evaluated anew.
        lost: a loss of those that was not finite.
    """

    def __init__(
        self, stepper: Stepper, named: NamedOptimizer, parameters: list[Parameter], again: Again
    ) -> None:
        self.stepper = stepper
        self.named = named
        self.parameters = parameters
        self.again = again
        self.asked = False
        self.lost: Tensor | None = None
        # As long as weights and gradients are these, the loss that is there is theirs.
        self._first: list[tuple[Parameter, int, Tensor | None]] | None = [
            (p, p._version, p.grad) for p in parameters
        ]

    def __call__(self) -> Tensor:
        stepper = self.stepper
        first, self._first = self._first, None
        if first is not None and all(p._version == v and p.grad is g for p, v, g in first):
            assert stepper.loss is not None
            return stepper.loss
        self.asked = True
        # What the optimizer has written since, other ranks' copies have not.
        torch.autograd.graph.increment_version(self.parameters)
        stepper.places.stepped(self.parameters)
        loss, found = self.again()
        stepper.loss = loss
        if not stepper._is_finite(found, loss):
            self.lost = loss
        _set(self.parameters, found)
        stepper._clip(self.named, self.parameters)
        return loss


class LateCheck:
    """A flag on a GPU that is read once its computation is known to be over."""

    def __init__(self, device: torch.device) -> None:
        self.found = torch.zeros((), dtype=torch.float32, device=device)
        self.host = torch.zeros((), dtype=torch.float32, pin_memory=True)
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.step = -1

    def ask(self, step: int) -> None:
        """Copy the flag to the host, some time."""
        self.host.copy_(self.found, non_blocking=True)
        self.event.record()
        self.step = step

    def raise_if_found(self, name: str, on_nonfinite: OnNonfinite) -> None:
        """Raise for the update before, if it was not finite."""
        if self.step < 0:
            return
        self.event.synchronize()
        if self.host.item() and on_nonfinite == "raise":
            raise FloatingPointError(
                f"the update of {name!r} in step {self.step} was not finite (found one update "
                "late, since the GPU was not waited for; a fused optimizer has left its weights "
                "alone, another one has not)"
            )
