"""A buffer of the owner and its clone: which of the two has been written."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

MISSING: Any = object()  # in place of a buffer or an attribute that is not there


class Buffer:
    """A buffer of the owner, its clone in one replica, and what the clone was at the start."""

    def __init__(self, source: Tensor, statistic: bool) -> None:
        self.source = source
        self.statistic = statistic
        self.shape, self.dtype = source.shape, source.dtype
        self.dense = is_dense(source)
        self.before: Tensor | None = None
        self.behind = False  # has been written without its version counter moving
        with _counted():
            self.clone = source.detach().clone()
        self.note()

    def note(self) -> None:
        """Remembers the version counters of both."""
        self.source_version = _version(self.source)
        self.version = self.clone._version

    def remember(self, thorough: bool) -> None:
        """Makes room for the clone's values at the start, where they will be asked for."""
        if not (thorough or self.statistic or self.behind):
            self.before = None
        elif self.before is None:
            with _counted():
                self.before = torch.empty_like(self.clone)

    def source_moved(self) -> bool:
        """Whether the owner's has been written since."""
        return _version(self.source) != self.source_version

    def moved(self) -> bool:
        """Whether the owner's has been written since, and not only the clone."""
        if self.source_moved():
            return True
        # `queue.data[...] = ` moves no counter. A statistic's clone moves without one too.
        unwritten = not self.statistic and self.clone._version == self.version
        return unwritten and self.dense and not same(self.clone, self.source)

    def written(self) -> bool:
        """Whether the shard has written the clone."""
        if self.clone._version != self.version:
            return True
        if self.before is not None and not same(self.clone, self.before):
            self.behind = True
        return self.behind

    def fits(self) -> bool:
        """Whether the clone can serve again: ``source.data = ...`` may have changed the shape."""
        source = self.source
        if source.shape != self.shape or source.dtype is not self.dtype or source.requires_grad:
            return False
        # A sparse one cannot be copied into, and serves as long as nobody writes it.
        return self.dense or (self.clone._version == self.version and not self.source_moved())

    def takes(self, value: Tensor) -> bool:
        """Whether the owner's can take this value in place."""
        source = self.source
        same = value.shape == source.shape and value.dtype is source.dtype
        return same and value.device == source.device and is_dense(value) and is_dense(source)


def _counted() -> AbstractContextManager[Any]:
    """Tensors that are made in inference mode have no version counters."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor can be copied into."""
    return tensor.layout is torch.strided


def _version(tensor: Tensor) -> float:
    """The version counter; inference tensors have none, and count as always changed."""
    return math.nan if tensor.is_inference() else tensor._version


def same(a: Any, b: Any) -> bool:
    """Whether two buffers are equal bit by bit, NaN equal to NaN."""
    if a is b:
        return True
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    if a.shape != b.shape or a.dtype is not b.dtype or a.device != b.device:
        return False
    if not (is_dense(a) and is_dense(b)):
        a, b = a.to_dense(), b.to_dense()
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
