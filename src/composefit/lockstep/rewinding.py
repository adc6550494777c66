"""Losses as functions: each evaluation starts from the random streams and buffers of the first."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from composefit.lockstep.shard import Shard


class Rewinding:
    """Where a shard stands: what its code draws and which buffers it writes from now on.

    Made, and gone back to, in the shard's worker. What draws come next after several evaluations
    does not depend on how many there were, since each ends where the first one did.

    Args:
        shard: its streams and its module's buffers are looked at.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._random = shard.random.state()
        with self._draws():
            self._streams = [generator.get_state() for generator in self._generators()]
        self._buffers = [_Buffers(module) for module in shard.module.modules() if module._buffers]

    def back(self) -> None:
        """Random streams and buffers are what they were."""
        self.shard.random.rewind(self._random)
        with self._draws():
            for generator, state in zip(self._generators(), self._streams, strict=True):
                generator.set_state(state)
        for one in self._buffers:
            one.put_back()

    def _draws(self) -> AbstractContextManager[object]:
        return self.shard.draws or nullcontext()

    def _generators(self) -> list[Any]:
        """That of the CPU, which is the shard's own within its stream, and the device's."""
        found: list[Any] = [vars(torch.random)["default_generator"]]
        device = self.shard.lock.device
        if device.type == "cuda":
            found.append(torch.cuda.default_generators[device.index or 0])
        return found


class Function:
    """A loss that can be evaluated again.

    Args:
        shard: whose loss it is.
        function: without arguments.
        start: where its first evaluation began; None for here.
    """

    def __init__(
        self, shard: Shard, function: Callable[[], Any], start: Rewinding | None = None
    ) -> None:
        self.shard = shard
        self.function = function
        self.start = start or Rewinding(shard)

    def __call__(self) -> Any:
        """The loss, evaluated where the step is: with its grad mode, autocast and streams."""
        return self.shard.run(self.function)

    def again(self) -> Any:
        """The same from the same start."""
        self.start.back()
        return self()


class _Buffers:
    """The buffers of one module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kept = dict(module._buffers)
        self.values = {
            name: (buffer._version, buffer.clone())
            for name, buffer in self.kept.items()
            if isinstance(buffer, Tensor) and not buffer.is_inference()
        }

    def put_back(self) -> None:
        own = self.module._buffers
        if any(own.get(name) is not buffer for name, buffer in self.kept.items()):
            own.update(self.kept)
        with torch.no_grad():
            for name, (version, value) in self.values.items():
                buffer = self.kept[name]
                assert buffer is not None
                if buffer._version != version:
                    buffer.copy_(value)
                    self.values[name] = (buffer._version, value)
