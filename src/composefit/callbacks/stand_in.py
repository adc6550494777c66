"""Other values in the place of a module's weights, for a while."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class StandIn:
    """Other values in the place of a module's own, until they are put back.

    Meanwhile `module.state_dict()` still gives the module's own.

    Args:
        module: the module.
        tensors: name -> a parameter or buffer of it.
        values: name -> what stands in for it; of the same shape, on any device, of any dtype.

    Raises:
        ValueError: a value for something that the module does not have in this shape; then
            nothing has changed.
    """

    def __init__(
        self, module: nn.Module, tensors: dict[str, Tensor], values: dict[str, Tensor]
    ) -> None:
        wrong = [n for n, a in values.items() if _shape(tensors.get(n)) != a.shape]
        if wrong:
            raise ValueError(
                f"EMA holds averages of {wrong[:10]}, which {type(module).__name__} does not have "
                "in this shape: evaluate the module that was averaged"
            )
        self.pairs = {name: tensors[name] for name in values}
        with torch.no_grad():
            self.own = {name: tensor.detach().clone() for name, tensor in self.pairs.items()}
            # First, so that no state dict is ever wrong. (torch marks the hook with an attribute,
            # which a bound method cannot have.)
            self.hook: Any = module.register_state_dict_post_hook(  # type: ignore[no-untyped-call]
                partial(_in_state_dict, self.own)
            )
            for name, tensor in self.pairs.items():
                # In place: fused and flattened weights stay where they are.
                tensor.copy_(values[name])

    def put_back(self) -> None:
        """The module's own values are back, bit by bit."""
        with torch.no_grad():
            for name, tensor in self.pairs.items():
                tensor.copy_(self.own[name])
        self.hook.remove()


def _in_state_dict(
    values: Mapping[str, Tensor],
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: Any,
) -> None:
    substitute(module, state_dict, values, prefix)


def tensors_of(module: nn.Module, prefix: str, buffers: bool) -> dict[str, Tensor]:
    """Name -> parameter, tied ones once, and with `buffers` floating-point buffers as well."""
    found: dict[str, Tensor] = dict(module.named_parameters(prefix))
    if buffers:
        found.update((n, b) for n, b in module.named_buffers(prefix) if b.is_floating_point())
    return found


def substitute(
    module: nn.Module, state: dict[str, Any], values: Mapping[str, Tensor], prefix: str = ""
) -> None:
    """Put values in the place of tensors in a state dict, under every name that these have."""
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    by_tensor = {id(tensor): values[name] for name, tensor in named if name in values}
    for name, tensor in named:
        if id(tensor) in by_tensor and prefix + name in state:
            state[prefix + name] = by_tensor[id(tensor)].to(tensor.dtype, copy=True)


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None
