"""Activation checkpointing in shards: a recomputation finds what the forward left.

`torch.utils.checkpoint` runs a part of the forward again during backward. Two things can have
changed in between: the position of the random stream, and the weights. Of the first, torch takes
care: it stores and restores the state of the default generator, which is the stream's (see
`streams`) if only the recomputation is in that stream, too. It enters it here, in whatever thread
it runs: backward on a device runs in threads of torch's own. The second is for a guard to find.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch.utils.checkpoint

from composefit.random.current import current_generator, drawing_from
from composefit.random.installation import Installation

Token = TypeVar("Token")


class Recompute(Protocol[Token]):
    """What wants to know of checkpointed forwards and their recomputations."""

    def forward(self) -> Token:
        """Called when a checkpointed forward starts, in its thread."""

    def recompute(self, token: Token, /) -> contextlib.AbstractContextManager[Any]:
        """Entered around each recomputation, in the thread that runs backward.

        Args:
            token: what `forward` returned for it.
        """


class _Guarded(threading.local):
    guard: Recompute[Any] | None = None


_guarded = _Guarded()


@contextlib.contextmanager
def recomputation(guard: Recompute[Any]) -> Iterator[None]:
    """Tell `guard` of the checkpointed forwards that this thread starts in the `with` block.

    It is remembered with the forward, so that its `recompute` also surrounds recomputations in
    other threads and after the block. Works with and without a stream. Inside the block of
    another guard only the inner one is told.

    Raises:
        RuntimeError: from `checkpoint(..., use_reentrant=True)` within the block.
    """
    with checkpoints.used():
        outer = exchange_guard(guard)
        try:
            yield
        finally:
            exchange_guard(outer)


def exchange_guard(guard: Recompute[Any] | None) -> Recompute[Any] | None:
    """Set this thread's guard; the one it had. For who keeps `recomputation` open elsewhere."""
    outer = _guarded.guard
    _guarded.guard = guard
    return outer


# torch declares no types for what is private in it.
_torch: Any = torch.utils.checkpoint
_Frame: Any = _torch._CheckpointFrame
_apply = _torch.CheckpointFunction.apply


def _install() -> None:
    # `checkpoint` looks both up when it runs, so that every caller is reached, however and
    # whenever it imported `checkpoint`.
    _torch._CheckpointFrame = _RewoundFrame
    _torch.CheckpointFunction.apply = _apply_reentrant


def _uninstall() -> None:
    _torch._CheckpointFrame = _Frame
    del _torch.CheckpointFunction.apply


checkpoints = Installation(_install, _uninstall)


class _RewoundFrame(_Frame):  # type: ignore[misc]
    """torch's record of a checkpointed forward, made when the forward starts."""

    def __init__(self, recompute_fn: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        super().__init__(_as_in_forward(recompute_fn), *args, **kwargs)


def _as_in_forward(recompute: Callable[..., None]) -> Callable[..., None]:
    generator, guard = current_generator(), _guarded.guard
    token = None if guard is None else guard.forward()

    def recompute_as_in_forward(*args: Any) -> None:
        with contextlib.ExitStack() as contexts:
            if generator is not None:
                contexts.enter_context(drawing_from(generator))
            if guard is not None:
                contexts.enter_context(guard.recompute(token))
            recompute(*args)

    return recompute if generator is None and guard is None else recompute_as_in_forward


def _apply_reentrant(*args: Any, **kwargs: Any) -> Any:
    if current_generator() is not None or _guarded.guard is not None:
        raise RuntimeError(
            "expected activation checkpointing with use_reentrant=False, got use_reentrant=True: "
            "it runs a whole backward of its own, which can neither be limited to the parameters "
            "of one optimizer nor find the random numbers of its forward. "
            "Write `checkpoint(function, *args, use_reentrant=False)`."
        )
    return _apply(*args, **kwargs)
