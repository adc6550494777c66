"""Taking back what sharding has done to a module, so that it is an ordinary one again.

FSDP2 gives a module another class, hooks, attributes and parameters, and has no way back. What was
there before is remembered, and everything else of these goes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter


class Before:
    """What a module tree was before it was sharded.

    Args:
        module: the root.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts = [(part, _Part(part)) for part in module.modules()]

    def empty_(self, parameters: Mapping[int, object]) -> None:
        """Free the memory of parameters that others now stand for.

        Args:
            parameters: by the id of each that is still in place.
        """
        for _, before in self._parts:
            for parameter in before.parameters.values():
                if parameter is not None and id(parameter) not in parameters:
                    parameter.data = parameter.data.new_empty(0)

    def put_back(self, whole: Mapping[int, Tensor]) -> dict[int, Parameter]:
        """Everything is as before, but for the numbers.

        Args:
            whole: by the id of a sharded parameter, what it is as a whole.

        Returns:
            By the id of a sharded parameter the one that it was made of, and is back in place.
        """
        found: dict[int, Parameter] = {}
        for part, before in self._parts:
            for name, parameter in before.parameters.items():
                current = part._parameters.get(name)
                if parameter is not None and current is not None and id(current) in whole:
                    with torch.no_grad():
                        parameter.data = whole[id(current)]
                    parameter.requires_grad_(current.requires_grad)
                    found[id(current)] = parameter
        for part, before in self._parts:
            before.put_back(part, found)
        return found


class _Part:
    """What one module was."""

    def __init__(self, part: nn.Module) -> None:
        self.kind = type(part)
        self.names = set(vars(part))
        self.hooks = {n: set(v) for n, v in vars(part).items() if isinstance(v, OrderedDict)}
        self.parameters: dict[str, Parameter | None] = dict(part._parameters)

    def put_back(self, part: nn.Module, whole: Mapping[int, Parameter]) -> None:
        attributes: dict[str, Any] = vars(part)
        part.__class__ = self.kind
        for name in attributes.keys() - self.names:
            del attributes[name]
        for name, known in self.hooks.items():
            for key in set(attributes[name]) - known:
                del attributes[name][key]
        shown = attributes["_parameters"]
        attributes["_parameters"] = {
            name: whole.get(id(parameter), parameter) for name, parameter in shown.items()
        }
        if isinstance(part, nn.RNNBase):
            part._init_flat_weights()
