"""The kinds of values that batches are made of."""

import enum
import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

from composefit.tree.registry import NOBODY, samples_of
from composefit.tree.structure import is_structure, is_unnamed


class Kind(enum.Enum):
    """What a value is to a batch."""

    ARRAY = enum.auto()
    CUSTOM = enum.auto()  # of a registered type
    PLAIN = enum.auto()  # a constant
    NAMED = enum.auto()  # structure for certain: its children have names
    LIST = enum.auto()  # structure or samples
    OPAQUE = enum.auto()  # an object of an unknown type


SCALARS: frozenset[type] = frozenset({str, bytes, int, float, bool, type(None)})
_PLAIN: tuple[type, ...] = (
    *SCALARS,
    numbers.Number,
    enum.Enum,
    np.generic,
    torch.dtype,
    torch.device,
    torch.Size,
)


def kind_of(value: Any) -> Kind:
    """The kind of a value."""
    if type(value) is Tensor:
        return Kind.ARRAY
    if type(value) in SCALARS:
        return Kind.PLAIN
    if samples_of.dispatch(type(value)) is not NOBODY:
        return Kind.CUSTOM
    if isinstance(value, Tensor | np.ndarray):
        return Kind.ARRAY
    if isinstance(value, _PLAIN):
        return Kind.PLAIN
    if not is_structure(value):
        return Kind.OPAQUE
    return Kind.LIST if is_unnamed(value) else Kind.NAMED
