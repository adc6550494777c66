"""Stepping an optimizer without the marks that torch puts around it for nobody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.autograd import profiler
from torch.optim import Optimizer, optimizer

_pre_hooks = getattr(optimizer, "_global_optimizer_pre_hooks", None)
_post_hooks = getattr(optimizer, "_global_optimizer_post_hooks", None)
_torch_is_known = (
    _pre_hooks is not None and _post_hooks is not None and hasattr(profiler, "_is_profiler_enabled")
)


def step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> None:
    """As `optimizer.step(closure)`.

    torch wraps every step in a profiler's mark and a walk over hooks, some 20 us, which is a tenth
    of a tiny model's whole step. Where no profiler runs and nobody has a hook they change nothing,
    and the step itself is called.
    """
    bare = bare_step(optimizer)
    if closure is not None:
        optimizer.step(closure)
    elif bare is None:
        optimizer.step()
    else:
        bare(optimizer)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers look at it


def bare_step(optimizer: Optimizer) -> Callable[[Any], Any] | None:
    """The optimizer's own step without torch's wrapper; None where the wrapper is needed.

    It is needed where a profiler runs, a hook is registered, or somebody has replaced
    `optimizer.step` (schedulers do, to see whether it was called; that is allowed for).
    """
    wrapped = type(optimizer).step
    if (
        not _torch_is_known
        or not getattr(wrapped, "hooked", False)
        or profiler._is_profiler_enabled
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _pre_hooks
        or _post_hooks
    ):
        return None
    replaced = vars(optimizer).get("step")
    if replaced is not None and not hasattr(replaced, "_wrapped_by_lr_sched"):
        return None
    found: Callable[[Any], Any] | None = getattr(wrapped, "__wrapped__", None)
    return found
