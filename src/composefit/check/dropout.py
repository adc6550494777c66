"""A step without dropout, whose masks would differ from cut to cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

# What draws masks on purpose, in torch and in the libraries of the field.
_NAMED = re.compile("dropout|droppath|stochasticdepth|rrelu", re.IGNORECASE)

_DROPOUTS = {
    getattr(where, name + suffix)
    for where in (F, torch)
    for name in ("dropout", "alpha_dropout", "feature_alpha_dropout", "feature_dropout")
    for suffix in ("", "_")
    if hasattr(where, name + suffix)
} | {F.dropout1d, F.dropout2d, F.dropout3d, torch.native_dropout}


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Dropout lets everything through: layers of the module, and functions that its step calls.

    Args:
        module: its dropout layers stay in evaluation mode, which `train()` undoes.
    """
    for part in module.modules():
        if _NAMED.search(type(part).__name__) and not list(part.children()):
            part.training = False
        elif isinstance(part, nn.RNNBase | nn.MultiheadAttention):
            part.dropout = 0.0
    with _NoDropout():
        yield


class _NoDropout(TorchFunctionMode):
    """Dropout as a function."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)
