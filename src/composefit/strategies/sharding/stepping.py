"""Stepping an optimizer of sharded parameters on this rank's rows alone.

An optimizer that treats each number by itself needs no other rows. On the sharded tensors each of
its operations would pass through DTensor's dispatch (14 ms for the Adam of 12 small parameters, in
place of 0.3 ms), and those that take many tensors at once (`foreach`, `fused`) refuse parameters of
which some are sharded and some are not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

from composefit.strategies.sharding import state
from composefit.strategies.sharding.internals import of_rows
from composefit.strategies.sharding.norms import local
from composefit.strategies.splitting import ELEMENTWISE as ELEMENTWISE
from composefit.strategies.stepping import bare_step


def step_locally(optimizer: Optimizer) -> bool:
    """As `optimizer.step()`; False, and nothing done, where it cannot be done by rows.

    It can be for torch's elementwise optimizers without hooks. The optimizer's state is the same
    as otherwise, sharded tensors included.
    """
    bare = bare_step(optimizer)
    if bare is None or type(optimizer) not in ELEMENTWISE:
        return False
    if optimizer.defaults.get("differentiable"):
        return False
    stand_in: Any = object.__new__(type(optimizer))
    vars(stand_in).update(vars(optimizer))
    vars(stand_in).pop("step", None)  # a scheduler's
    stand_in.state = defaultdict(dict)
    stand_in.param_groups = []
    pairs: list[tuple[Tensor, Tensor]] = []
    for group in optimizer.param_groups:
        parts: list[Tensor] = []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            part = local(parameter).detach()
            part.grad = local(parameter.grad)
            parts.append(part)
            pairs.append((parameter, part))
            if kept := optimizer.state.get(parameter):
                stand_in.state[part] = {
                    key: local(value) if isinstance(value, Tensor) else value
                    for key, value in kept.items()
                }
        stand_in.param_groups.append({**group, "params": parts})
    with torch.no_grad():
        bare(stand_in)
    for parameter, part in pairs:
        if found := stand_in.state.get(part):
            _take_over(optimizer.state[parameter], found, parameter, part)
    optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers look at it
    return True


def step_whole(optimizer: Optimizer, closure: Callable[[], Tensor]) -> None:
    """As `optimizer.step(closure)`, on whole parameters, by every rank alike.

    An optimizer that asks for its loss anew (L-BFGS) makes one vector of all its parameters, and
    takes products of such vectors: rows of them alone would not do. While it steps, it sees whole
    copies; where it asks, their rows become the parameters'.

    Args:
        optimizer: its parameters have their total gradients.
        closure: evaluates the loss; sets new gradients at each call but the first.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    for group in optimizer.param_groups:
        parameters = group["params"]
        copies = [_whole_copy(parameter) for parameter in parameters]
        pairs += [
            (parameter, copy)
            for parameter, copy in zip(parameters, copies, strict=True)
            if copy is not parameter
        ]
        parameters[:] = copies  # in place: L-BFGS holds this list
    _move_state(optimizer, pairs)

    def write_back() -> None:
        with torch.no_grad():
            for parameter, copy in pairs:
                local(parameter).copy_(local(state.cut_like(copy, parameter)))

    begun = [copy._version for _, copy in pairs]

    def whole_closure() -> Tensor:
        if begun == [copy._version for _, copy in pairs] and all(
            copy.grad is not None for _, copy in pairs
        ):
            return closure()  # the loss that is there
        write_back()
        loss = closure()
        for parameter, copy in pairs:
            copy.grad = state.everybodys(parameter.grad)
        return loss

    try:
        optimizer.step(whole_closure)  # type: ignore[arg-type]  # a tensor, as torch's own do
    finally:
        write_back()
        back = {id(copy): parameter for parameter, copy in pairs}
        for group in optimizer.param_groups:
            group["params"][:] = [back.get(id(p), p) for p in group["params"]]
        _move_state(optimizer, [(copy, parameter) for parameter, copy in pairs])


def _whole_copy(parameter: Tensor) -> Tensor:
    """A parameter with all rows and its whole gradient; one that is whole as it is."""
    if not isinstance(parameter, DTensor):
        return parameter
    copy = Parameter(state.whole(parameter, True, parameter.device), parameter.requires_grad)
    copy.grad = state.everybodys(parameter.grad)
    return copy


def _move_state(optimizer: Optimizer, pairs: list[tuple[Tensor, Tensor]]) -> None:
    for old, new in pairs:
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)


def _take_over(
    kept: dict[str, Any], found: dict[str, Any], parameter: Tensor, part: Tensor
) -> None:
    """Keep the state that a step has made anew, sharded like its parameter."""
    for key, value in found.items():
        before = kept.get(key)
        if isinstance(before, Tensor) and local(before) is value:
            continue  # changed in place
        cut = isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.dim()
        kept[key] = of_rows(value, parameter) if cut and value.shape == part.shape else value
