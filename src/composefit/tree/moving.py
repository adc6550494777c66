"""Bringing a batch to a device."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from composefit.tree.kinds import SCALARS
from composefit.tree.structure import is_structure, map_children


def move(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Bring the tensors of a batch to a device, without waiting for the copy.

    Objects with a ``to`` method of their own are asked to move themselves (mappings are not: their
    values are moved, since a ``to`` such as BatchEncoding's changes the loader's object). NumPy
    arrays stay what and where they are.

    Args:
        batch: anything a loader gives.
        device: where to.
        dtype: what floating-point tensors become; integers, booleans and complex numbers, and
            objects that move themselves, keep theirs.

    Returns:
        A batch of the same types; the very same object if nothing had to change.

    Example:
        >>> batch = [torch.zeros(2), torch.arange(2)]
        >>> move(batch, torch.device("cpu")) is batch
        True
        >>> [x.dtype for x in move(batch, torch.device("cpu"), torch.float64)]
        [torch.float64, torch.int64]
    """
    if dtype is None and device.type == "cpu" and _on_cpu(batch):
        return batch
    return _move(batch, device, dtype)


def _on_cpu(batch: Any) -> bool:
    """Whether a batch is a tensor, or a list or dict of nothing else, on the CPU; a quick look."""
    if type(batch) is Tensor:
        return batch.is_cpu
    if type(batch) is dict:
        batch = batch.values()
    elif type(batch) is not list and type(batch) is not tuple:
        return False
    for item in batch:  # noqa: SIM110 (all() takes twice as long)
        if type(item) is not Tensor or not item.is_cpu:
            return False
    return True


def _move(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if type(value) in SCALARS:
        return value
    if isinstance(value, Tensor | PackedSequence):
        data = value if isinstance(value, Tensor) else value.data
        to: Any = value.to
        if dtype is None or not data.is_floating_point():
            return to(device=device, non_blocking=True)
        return to(device=device, dtype=dtype, non_blocking=True)
    if callable(getattr(type(value), "to", None)) and not isinstance(value, Mapping):
        return value.to(device, **_non_blocking(type(value)))
    if not is_structure(value):
        return value
    return map_children(lambda child: _move(child, device, dtype), value)


def _non_blocking(kind: type[Any]) -> dict[str, bool]:
    """The keyword, for classes whose ``to`` takes it."""
    try:
        parameters = inspect.signature(kind.to).parameters.values()
    except ValueError:  # some methods written in C have no signature
        return {}
    takes = any(p.name == "non_blocking" or p.kind is p.VAR_KEYWORD for p in parameters)
    return {"non_blocking": True} if takes else {}
