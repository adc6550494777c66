"""Calling hooks: callbacks first, then the module; only those that somebody has written."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from types import TracebackType
from typing import Any

from composefit.callbacks import Callback
from composefit.data.rows import Rows
from composefit.logged import Context, Logged
from composefit.module import LoopModule
from composefit.module_hooks import ModuleHooks
from composefit.steps import offered

# No hooks of a module: it does not watch over a run, it takes part in it.
_CALLBACK_ONLY = {
    "on_exception",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_interrupted",
}

# What these log is a value of the step, as in Lightning; what others log, one of the epoch.
_IN_A_STEP = {
    "on_train_batch_start",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_after_optimizer_step",
    "on_train_batch_end",
}

_HOOKS = [name for name in vars(ModuleHooks) if name.startswith("on_")] + ["setup", "teardown"]
_ALL_HOOKS = [*_HOOKS, *_CALLBACK_ONLY]

_BATCH_HOOKS = {
    stage: (f"on_{stage}_batch_start", f"on_{stage}_batch_end")
    for stage in ("train", "validation", "test", "predict")
}

_AFTER_GRADIENTS = "write on_before_optimizer_step(self, optimizer, name), which sees the gradients"
_WHOLE_BATCH = "write `outputs = yield from Gather(tensor)` in training_step"
_OUTPUTS = "collect in a list with self.outputs.append(...) in the step, and write "
_IN_THE_LOADER = "do it in the data loader, or in the step"
_IN_A_CALLBACK = "write it in a Callback, and pass that to Trainer(callbacks=[...])"

# Lightning's hooks of a module that are not called here, and what to write instead.
_NOT_CALLED = {
    "on_before_backward": _AFTER_GRADIENTS,
    "optimizer_zero_grad": "leave it out: gradients never outlive an update",
    "training_step_end": _WHOLE_BATCH,
    "validation_step_end": "write on_validation_batch_end(self, outputs, batch, batch_idx)",
    "test_step_end": "write on_test_batch_end(self, outputs, batch, batch_idx)",
    "training_epoch_end": _OUTPUTS + "on_train_epoch_end(self)",
    "validation_epoch_end": "write on_validation_epoch_end(self, outputs)",
    "test_epoch_end": "write on_test_epoch_end(self, outputs)",
    "on_epoch_start": "write on_train_epoch_start(self)",
    "on_epoch_end": "write on_train_epoch_end(self)",
    "on_batch_start": "write on_train_batch_start(self, batch, batch_idx)",
    "on_batch_end": "write on_train_batch_end(self, outputs, batch, batch_idx)",
    "on_validation_model_eval": "call self.part.eval() in on_validation_start(self)",
    "on_validation_model_train": "call self.part.train() in on_validation_end(self)",
    "on_validation_model_zero_grad": "leave it out: gradients never outlive an update",
    "on_test_model_eval": "call self.part.eval() in on_test_start(self)",
    "on_test_model_train": "call self.part.train() in on_test_end(self)",
    "on_predict_model_eval": "call self.part.eval() in on_predict_start(self)",
    "on_predict_model_train": "call self.part.train() in on_predict_end(self)",
    "on_before_batch_transfer": _IN_THE_LOADER,
    "on_after_batch_transfer": _IN_THE_LOADER,
    "transfer_batch_to_device": _IN_THE_LOADER,
    "backward": 'write what an update is in training_step: yield {"name": loss}',
    "configure_sharded_model": "write configure_model(self)",
    **dict.fromkeys(_CALLBACK_ONLY, _IN_A_CALLBACK),
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

    Attributes:
        exception: what the run has failed with; None while it goes on.
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
        self._profiler = getattr(trainer, "profiler", None)
        self._context = Context(None)
        self._found: dict[str, _Found] = {}
        self._told = False
        self.exception: BaseException | None = None
        self.rows: Rows | None = None  # those of the batch that hooks see
        _refuse_uncalled(module)
        _refuse_generators(module, _HOOKS)
        for callback in self._callbacks:
            _refuse_uncalled(callback)
            _refuse_generators(callback, _ALL_HOOKS)
            callback._module = module

    def anybody(self, name: str, count: int) -> bool:
        """Whether somebody has written this hook, which is offered `count` arguments.

        Asked once by who would call it at every step.
        """
        return bool(self._hooks(name, count).all)

    def takes(self, name: str, count: int) -> bool:
        """Whether a hook of this name declares all of the `count` arguments that it is offered."""
        of_module = _written(self._module, LoopModule, name)
        if of_module and offered(getattr(self._module, name), count) == count:
            return True
        return any(
            offered(getattr(one, name), count + 2) == count + 2
            for one in self._callbacks
            if _written(one, Callback, name)
        )

    def __call__(self, name: str, *arguments: Any) -> bool:
        """Run all hooks of this name.

        Args:
            name: the hook.
            arguments: what it is offered.

        Returns:
            Whether one of them returned -1.
        """
        found = self._hooks(name, len(arguments))
        minus_one = False
        if found.first:
            minus_one = self._run(name, found.first, arguments)
        if found.savers:
            minus_one = self._run(name, found.savers, arguments) or minus_one
        return minus_one

    def end(
        self,
        name: str,
        arguments: tuple[Any, ...],
        settle: Callable[[], None] | None,
        failed: Callable[[BaseException], None],
    ) -> None:
        """Run all end hooks of this name, those after one that raises as well.

        Args:
            name: the hook.
            arguments: what it is offered.
            settle: called before the hooks of callbacks that save state.
            failed: told of an error before the hooks that are left run.
        """
        found = self._hooks(name, len(arguments))
        if not found.all and settle is None:
            return
        first, savers = iter(found.first), iter(found.savers)
        try:
            if found.first:
                self._run(name, first, arguments)
            if settle is not None:
                settle()
            if found.savers:
                self._run(name, savers, arguments)
        except BaseException as error:
            failed(error)
            self._despite(error, name, [*first, *savers], arguments)
            raise

    def span(
        self,
        begin: str,
        end: str,
        *,
        settle: Callable[[], None] | None = None,
        restores: bool = False,
        begun: bool = False,
        outputs: bool = False,
    ) -> Span:
        """`with call.span("on_train_start", "on_train_end"):` both hooks, whatever is in between.

        Args:
            begin: the first hook.
            end: the last.
            settle: called at the end, before the hooks of callbacks that save state.
            restores: after an error the end hooks come before `on_exception`: they put back what
                the others have swapped.
            begun: the begin hooks ran in the process that is resumed.
            outputs: the end hooks are given the span's `outputs`.
        """
        return Span(self, begin, end, [()], settle, restores, begun, outputs)

    def batch_span(self, stage: str, batches: Sequence[Any], first: int, *more: int) -> Span:
        """The batch hooks of these loader batches: all begin, and then all end.

        Args:
            stage: `"train"`, `"validation"`, `"test"` or `"predict"`.
            batches: the loader batches.
            first: the index of the first.
            more: the index of their loader, in evaluations.

        Its `outputs` are set within the span and given to the end hooks.
        """
        if len(batches) == 1:  # at nearly every step, so it is worth a case of its own
            own = [(self._shown(batches[0]), first, *more)]
        else:
            own = [(self._shown(batch), i, *more) for i, batch in enumerate(batches, first)]
        begin, end = _BATCH_HOOKS[stage]
        return Span(self, begin, end, own, None, stage != "train", False, True)

    def _shown(self, batch: Any) -> Any:
        """What hooks see of a batch: where a rank has rows of it, these."""
        if type(batch) is not Rows:
            return batch
        self.rows = batch
        return batch.batch

    def batch_interval(self, stage: str) -> float:
        """Batch hooks are wanted once in so many seconds; 0: at every batch, infinity: hardly."""
        names = _BATCH_HOOKS[stage]
        if any(_written(self._module, LoopModule, name) for name in names):
            return 0.0
        return min(
            (
                callback.batch_interval
                for callback in self._callbacks
                if any(_written(callback, Callback, name) for name in names)
            ),
            default=math.inf,
        )

    def fail(self, error: BaseException) -> None:
        """A run ends by this error: callbacks are told, once, whatever they raise themselves."""
        self.exception = error
        if self._told:
            return
        self._told = True
        world = getattr(self._trainer, "world", None)
        if world is not None:  # before any hook, so that nobody waits in vain
            world.fail(error)
        self.despite(error, "on_exception", error)

    def despite(self, error: BaseException, name: str, *arguments: Any) -> None:
        """Run hooks after an error, which one of their own must not hide."""
        self._despite(error, name, self._hooks(name, len(arguments)).all, arguments)

    def _despite(
        self, error: BaseException, name: str, hooks: Iterable[Callable[..., Any]], arguments: Any
    ) -> None:
        for hook in hooks:
            try:
                self._run(name, [hook], arguments)
            except Exception as other:
                error.add_note(f"then {other!r} was raised as well, by {name}")

    def separately(self, name: str, *arguments: Any) -> list[Callable[[], Any]]:
        """Calls of the hooks of this name, one by one: for those that all have to run."""
        found = self._hooks(name, len(arguments))
        return [partial(self._run, name, [hook], arguments) for hook in found.all]

    def _run(self, name: str, hooks: Iterable[Callable[..., Any]], arguments: Any) -> bool:
        if self._profiler is None:
            return self._call_each(name, hooks, arguments)
        with self._profiler.span(f"hook:{name}"):
            return self._call_each(name, hooks, arguments)

    def _call_each(self, name: str, hooks: Iterable[Callable[..., Any]], arguments: Any) -> bool:
        context, state = self._context, vars(self._module)
        context.training = name in _IN_A_STEP
        context.logs = {}
        outer = state["_context"]
        state["_context"] = context
        minus_one = False
        try:
            for hook in hooks:
                result = hook(*arguments)
                if type(result) is int and result == -1:
                    minus_one = True
        finally:
            state["_context"] = outer
        if context.logs:
            self._heard(context.logs)
        return minus_one

    def _hooks(self, name: str, count: int) -> _Found:
        """The hooks of this name, each to be called with `count` arguments."""
        found = self._found.get(name)
        if found is None:
            found = self._found[name] = self._find(name, count)
        return found

    def _find(self, name: str, count: int) -> _Found:
        first = [one for one in self._callbacks if not one.saves_state]
        last = [one for one in self._callbacks if one.saves_state]
        of_module = []
        if name not in _CALLBACK_ONLY and _written(self._module, LoopModule, name):
            of_module = [_fitted(getattr(self._module, name), count, ())]
        return _Found([*self._of(first, name, count), *of_module], self._of(last, name, count))

    def _of(self, callbacks: Sequence[Callback], name: str, count: int) -> list[Callable[..., Any]]:
        given = (self._trainer, self._module)
        return [
            _fitted(getattr(callback, name), count + 2, given)
            for callback in callbacks
            if _written(callback, Callback, name)
        ]


class _Found:
    """The hooks of one name: everybody's, and then those of callbacks that save state."""

    __slots__ = ("all", "first", "savers")

    def __init__(self, first: list[Callable[..., Any]], savers: list[Callable[..., Any]]) -> None:
        self.first = first
        self.savers = savers
        self.all = [*first, *savers]


class Span:
    """What a pair of hooks encloses; made by `HookCaller.span` and `batch_span`.

    Attributes:
        outputs: what the batches' end hooks are given.
        skipped: whether a begin hook has returned -1.
    """

    __slots__ = (
        "_arguments",
        "_begin",
        "_begun",
        "_call",
        "_end",
        "_gives",
        "_restores",
        "_settle",
        "outputs",
        "skipped",
    )

    def __init__(
        self,
        call: HookCaller,
        begin: str,
        end: str,
        arguments: Sequence[tuple[Any, ...]],
        settle: Callable[[], None] | None = None,
        restores: bool = False,
        begun: bool = False,
        gives: bool = False,
    ) -> None:
        self._call = call
        self._begin = begin
        self._end = end
        self._arguments = arguments
        self._settle = settle
        self._restores = restores
        self._begun = begun
        self._gives = gives
        self.outputs: Any = None
        self.skipped = False

    def __enter__(self) -> Span:
        call = self._call
        if not self._begun and call._hooks(self._begin, len(self._arguments[0])).all:
            begun = 0
            try:
                for arguments in self._arguments:
                    begun += 1
                    self.skipped = call(self._begin, *arguments) or self.skipped
            except BaseException as error:
                self._arguments = self._arguments[:begun]
                self._failed(error)
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._failed(error)
            return
        left = iter(self._arguments)
        try:
            for arguments in left:
                self._call.end(self._end, self._offered(arguments), self._settle, self._tell)
        except BaseException as raised:
            self._arguments = list(left)
            self._failed(raised)
            raise

    def _offered(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.outputs, *arguments) if self._gives else arguments

    def _tell(self, error: BaseException) -> None:
        self._call.exception = error
        if not self._restores:
            self._call.fail(error)

    def _failed(self, error: BaseException) -> None:
        call = self._call
        self._tell(error)
        for arguments in self._arguments:
            call.despite(error, self._end, *self._offered(arguments))


def _refuse_uncalled(owner: LoopModule | Callback) -> None:
    """Refuse methods that look like hooks, and would be ignored without a word."""
    known = (*LoopModule.__mro__, Callback)
    hooks = _HOOKS if isinstance(owner, LoopModule) else _ALL_HOOKS
    written = {
        name
        for kind in type(owner).__mro__
        if kind not in known
        for name, value in vars(kind).items()
        if callable(value)
    }
    for name in sorted(written.difference(hooks)):
        instead = _NOT_CALLED.get(name)
        if instead is None and name.startswith("on_"):
            usual = name.replace("on_val_", "on_validation_").replace("on_training_", "on_train_")
            close = get_close_matches(usual, hooks, n=1, cutoff=0.9)
            instead = f"did you mean {close[0]}?" if close else None
        if instead is not None:
            raise TypeError(f"{type(owner).__name__}.{name} is no hook that is called: {instead}")


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
