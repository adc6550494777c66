"""Calling hooks: callbacks first, then the module; only those that somebody has written."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

from composefit.callbacks import Callback
from composefit.module import Context, Logged, LoopModule
from composefit.steps import offered

_CALLBACK_ONLY = {"setup", "teardown", "on_exception"}

# What these log is a value of the step, as in Lightning; what others log, one of the epoch.
_IN_A_STEP = {
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_after_optimizer_step",
    "on_train_batch_end",
}

_HOOKS = [name for name in vars(LoopModule) if name.startswith("on_")]
_ALL_HOOKS = [*_HOOKS, *_CALLBACK_ONLY]

_AFTER_GRADIENTS = "write on_before_optimizer_step(self, optimizer, name), which sees the gradients"
_YIELD = 'write what an update is in training_step: yield {"name": loss}'
_WHOLE_BATCH = "write `outputs = yield from Gather(tensor)` in training_step"
_OUTPUTS = "collect in a list with self.outputs.append(...) in the step, and write "
_IN_THE_LOADER = "do it in the data loader, or in the step"

# Lightning's hooks of a module that are not called here, and what to write instead.
_NOT_CALLED = {
    "on_before_backward": _AFTER_GRADIENTS,
    "on_after_backward": _AFTER_GRADIENTS,
    "on_before_zero_grad": "write on_after_optimizer_step(self, optimizer, name)",
    "optimizer_step": _YIELD,
    "optimizer_zero_grad": "leave it out: gradients never outlive an update",
    "configure_gradient_clipping": "write OptimizerConfig(optimizer, gradient_clip_val=...)",
    "lr_scheduler_step": 'write OptimizerConfig(optimizer, scheduler, interval="step")',
    "training_step_end": _WHOLE_BATCH,
    "validation_step_end": "write on_validation_batch_end(self, outputs, batch, batch_idx)",
    "training_epoch_end": _OUTPUTS + "on_train_epoch_end(self)",
    "validation_epoch_end": _OUTPUTS + "on_validation_epoch_end(self)",
    "on_epoch_start": "write on_train_epoch_start(self)",
    "on_epoch_end": "write on_train_epoch_end(self)",
    "on_batch_start": "write on_train_batch_start(self, batch, batch_idx)",
    "on_batch_end": "write on_train_batch_end(self, outputs, batch, batch_idx)",
    "on_validation_model_eval": "call self.part.eval() in on_validation_start(self)",
    "on_validation_model_train": "call self.part.train() in on_validation_end(self)",
    "on_before_batch_transfer": _IN_THE_LOADER,
    "on_after_batch_transfer": _IN_THE_LOADER,
    "transfer_batch_to_device": _IN_THE_LOADER,
    "configure_callbacks": "write Trainer(callbacks=[...])",
    "on_save_checkpoint": "keep it in a buffer, or in state_dict(self) of a callback",
    "on_load_checkpoint": "keep it in a buffer, or in load_state_dict(self, state) of a callback",
}


class HookCaller:
    """The hooks of one run, found once.

    A hook may declare fewer arguments than it is offered. Callbacks get the trainer and the module
    first. What a hook logs counts once, also where a hook runs within a step: it belongs to no
    shard.

    Args:
        trainer: what callbacks get as such.
        module: whose own hooks run after the callbacks', and before those of callbacks that
            save state.
        callbacks: in their order.
        heard: called after every group of hooks, with what they logged.

    Raises:
        TypeError: a hook is a generator, or the module has one that nobody calls.
    """

    def __init__(
        self,
        trainer: Any,
        module: LoopModule,
        callbacks: Sequence[Callback],
        heard: Callable[[dict[str, Logged]], None],
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._callbacks = list(callbacks)
        self._heard = heard
        self._context = Context(None)
        self._found: dict[str, list[Callable[..., Any]]] = {}
        _refuse_uncalled(module)
        _refuse_generators(module, _HOOKS)
        for callback in self._callbacks:
            _refuse_generators(callback, _ALL_HOOKS)

    def anybody(self, name: str, count: int) -> bool:
        """Whether somebody has written this hook, which is offered `count` arguments.

        Asked once by who would call it at every step.
        """
        return bool(self.hooks(name, count))

    def hooks(self, name: str, count: int) -> list[Callable[..., Any]]:
        """The hooks of this name, each to be called with `count` arguments."""
        found = self._found.get(name)
        if found is None:
            found = self._found[name] = self._find(name, count)
        return found

    def __call__(self, name: str, *arguments: Any) -> None:
        """Run all hooks of this name."""
        hooks = self.hooks(name, len(arguments))
        if not hooks:
            return
        context, state = self._context, vars(self._module)
        context.training = name in _IN_A_STEP
        context.logs = {}
        outer = state["_context"]
        state["_context"] = context
        try:
            for hook in hooks:
                hook(*arguments)
        finally:
            state["_context"] = outer
        if context.logs:
            self._heard(context.logs)

    def _find(self, name: str, count: int) -> list[Callable[..., Any]]:
        first = [one for one in self._callbacks if not one.saves_state]
        last = [one for one in self._callbacks if one.saves_state]
        of_module = []
        if name not in _CALLBACK_ONLY and _written(self._module, LoopModule, name):
            of_module = [_fitted(getattr(self._module, name), count, ())]
        return [*self._of(first, name, count), *of_module, *self._of(last, name, count)]

    def _of(self, callbacks: Sequence[Callback], name: str, count: int) -> list[Callable[..., Any]]:
        given = (self._trainer, self._module)
        return [
            _fitted(getattr(callback, name), count + 2, given)
            for callback in callbacks
            if _written(callback, Callback, name)
        ]


def _refuse_uncalled(module: LoopModule) -> None:
    """Refuse methods that look like hooks, and would be ignored without a word."""
    known = LoopModule.__mro__
    written = {
        name
        for kind in type(module).__mro__
        if kind not in known
        for name, value in vars(kind).items()
        if callable(value)
    }
    for name in sorted(written.difference(_ALL_HOOKS)):
        instead = _NOT_CALLED.get(name)
        if instead is None and name.startswith("on_"):
            usual = name.replace("on_val_", "on_validation_").replace("on_training_", "on_train_")
            close = get_close_matches(usual, _HOOKS, n=1, cutoff=0.9)
            instead = f"did you mean {close[0]}?" if close else None
        if instead is not None:
            raise TypeError(f"{type(module).__name__}.{name} is no hook that is called: {instead}")


def _refuse_generators(owner: object, names: Iterable[str]) -> None:
    for name in names:
        hook = getattr(owner, name, None)
        if inspect.isgeneratorfunction(hook) or hasattr(hook, "makes_helpers"):
            raise TypeError(
                f"{type(owner).__name__}.{name} contains a yield, and hooks are called as plain "
                "functions: they run once, for all shards, and need no effects; leave it out, or "
                "write `yield` in training_step"
            )


def _written(owner: object, base: type, name: str) -> bool:
    if name in vars(owner):
        return True
    return getattr(type(owner), name, None) is not getattr(base, name, None)


def _fitted(hook: Callable[..., Any], count: int, first: tuple[Any, ...]) -> Callable[..., Any]:
    """The hook with its first arguments, given as many of the others as it declares."""
    takes = offered(hook, count)
    bound = partial(hook, *first[:takes]) if first else hook
    if takes == count:
        return bound
    rest = max(takes - len(first), 0)
    return lambda *arguments: bound(*arguments[:rest])
