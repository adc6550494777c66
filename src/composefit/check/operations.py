"""One operation of torch's, as `Trace` looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

MEAN = 1  # what reduction="mean" is to a kernel


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Linear in what they are given, if the rest is constant; or no gradient goes through them.
_LINEAR = _words(
    """
    add add_ sub sub_ rsub neg neg_ sum mean mul mul_ div div_ mm bmm addmm addmv mv dot
    baddbmm convolution clone copy_ _to_copy detach detach_ lift_fresh alias cat stack expand
    _unsafe_view t transpose permute squeeze unsqueeze repeat trace diagonal tril triu where
    masked_fill masked_fill_ isfinite isnan isinf lt le gt ge eq ne any all logical_and
    logical_or logical_not bitwise_and bitwise_or bitwise_not argmax argmin addcmul addcdiv
    index_add scatter_add segment_reduce
    """
)

# What comes out are some of the rows that went in.
_PICKING = _words(
    """
    select slice index index_select gather take unbind split split_with_sizes chunk narrow
    as_strided embedding _embedding_bag unfold diagonal select_copy slice_copy _unsafe_index
    tensor_split unsafe_split unsafe_chunk masked_select nonzero unique2 _unique2
    """
)

# How many rows come out depends on their values.
_CHOOSING = _words("index masked_select nonzero _unique2 unique2")

# Along a dimension, what comes out in one place is of what went in elsewhere.
_ALONG = _words("_softmax _log_softmax cumsum cumprod logcumsumexp cummax cummin sort roll flip")


class Operation:
    """An operation, with its arguments.

    Attributes:
        name: such as `"native_batch_norm"`, whatever the overload.
        args: those by position.
        writes: it works in place.
        draws: it draws random numbers.
        picks: what comes out are some of the rows that went in.
        chooses: and how many depends on their values.
        shapes: it looks at nothing of what it is given but the shape.
    """

    __slots__ = ("args", "chooses", "draws", "func", "kwargs", "name", "picks", "shapes", "writes")

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.name: str = func._schema.name.partition("::")[2]
        self.writes: bool = func._schema.is_mutable
        self.draws = torch.Tag.nondeterministic_seeded in func.tags
        self.chooses = self.name in _CHOOSING
        self.picks = self.chooses or self.name in _PICKING
        self.shapes = not self.draws and (
            self.name.endswith("_like") or self.name.startswith("new_") or self.name == "zero_"
        )

    def named(self) -> dict[str, Any]:
        """The arguments by name."""
        arguments = self.func._schema.arguments
        found = {one.name: one.default_value for one in arguments if one.has_default_value()}
        names = (argument.name for argument in arguments)
        return {**found, **dict(zip(names, self.args, strict=False)), **self.kwargs}

    def numbers(self) -> Iterator[float]:
        """The numbers among the arguments of arithmetic."""
        if self.name.rstrip("_") in ("add", "sub", "mul", "div", "rsub"):
            for value in self.args:
                if isinstance(value, int | float) and not isinstance(value, bool):
                    yield float(value)

    def means(self) -> bool:
        """Whether it is a mean over all that it is given."""
        return self.name == "mean" or (self._is_loss() and self.named().get("reduction") == MEAN)

    def adds_up(self) -> bool:
        """Whether what it makes of all samples is the sum of what it makes of each."""
        return self.name in _LINEAR or self.name.endswith("_backward") or self._is_loss()

    def _is_loss(self) -> bool:
        return "loss" in self.name or "cross_entropy" in self.name

    @property
    def is_linear(self) -> bool:
        """Whether it is linear in what it is given, if the rest is constant."""
        return self.name in _LINEAR

    def dims(self) -> Iterator[int]:
        """The dimensions along which it works, where that mixes what they hold."""
        if self.name in _ALONG:
            named = self.named()
            found = named.get("dim", named.get("dims"))
            dims = found if isinstance(found, list | tuple) else [found]
            yield from (dim for dim in dims if isinstance(dim, int))
