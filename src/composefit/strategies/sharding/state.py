"""Sharded tensors in a tree of state: made whole for a plain checkpoint, and cut again.

Whole, the state of a sharded training is that of any other, so that checkpoints go from one
strategy to another and from one number of ranks to another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A tree of dicts, lists and tuples with a function's results in place of its tensors.

    What holds no tensor stays the same object.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        found = {key: map_tensors(function, item) for key, item in value.items()}
        if all(found[key] is item for key, item in value.items()):
            return value
        rebuilt = value.copy()  # keeps an OrderedDict and its attributes what they are
        rebuilt.update(found)
        return rebuilt
    if type(value) in (list, tuple):
        items = [map_tensors(function, item) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(items)
    return value


def gathered(state: Any, keep: bool) -> Any:
    """A tree with whole tensors on the CPU in place of sharded ones; all ranks must call it.

    Args:
        state: dicts, lists and tuples of anything.
        keep: whether this rank wants them; elsewhere nothing of them is kept.

    Returns:
        The tree; with `keep=False` an empty tensor stands for each that was sharded.
    """
    cpu = torch.device("cpu")

    def of(tensor: Tensor) -> Tensor:
        return whole(tensor, keep, cpu) if isinstance(tensor, DTensor) else tensor

    return map_tensors(of, state)


def whole(tensor: Tensor, keep: bool, device: torch.device) -> Tensor:
    """All of a sharded tensor; empty with `keep=False`. All ranks must call it."""
    assert isinstance(tensor, DTensor)
    with torch.no_grad():
        full: Tensor = tensor.full_tensor()
        return full.to(device) if keep else full.new_empty(0)


def everybodys(tensor: Tensor | None) -> Tensor | None:
    """All of a sharded tensor, on every rank and in its place; another one as it is."""
    return whole(tensor, True, tensor.device) if isinstance(tensor, DTensor) else tensor


def cut_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's rows of a whole tensor, if `like` is sharded; nothing is sent."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    full = value.detach().to(like.device, like.dtype)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def for_module(module: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """Weights of a plain checkpoint, as `module.load_state_dict` of a sharded module takes them."""
    own = module.state_dict()
    return {
        name: cut_like(value, own[name])
        if isinstance(value, Tensor) and name in own and own[name].shape == value.shape
        else value
        for name, value in weights.items()
    }


def for_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state of a plain checkpoint, as `load_state_dict` takes it here.

    Args:
        optimizer: of sharded parameters.
        state: what `optimizer.state_dict()` gave where they were whole.

    Raises:
        ValueError: the state of a sharded parameter has another shape than the parameter, so that
            nobody knows how to cut it.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kinds = [i for group in state["param_groups"] for i in group["params"]]
    of = dict(zip(kinds, parameters, strict=True))

    def cut(key: str, value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or not isinstance(parameter, DTensor):
            return value
        if value.shape != parameter.shape:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a "
                f"parameter of shape {tuple(parameter.shape)}, which cannot be cut for this rank: "
                "resume with as many ranks from a sharded checkpoint, or with another strategy"
            )
        return distribute_tensor(
            value.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            src_data_rank=None,
        )

    cut_state = {
        i: {key: cut(key, value, of[i]) for key, value in entry.items()}
        for i, entry in state["state"].items()
    }
    return {**state, "state": cut_state}
