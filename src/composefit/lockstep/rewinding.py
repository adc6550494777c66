"""Losses as functions: each evaluation starts from the random streams and buffers of the first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from composefit import tree
from composefit.metric_types import Metric
from composefit.replicas import MetricState
from composefit.replicas.buffers import same

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


class Beginning(Rewinding):
    """Where a shard begins a step that may be run again, on the same batch.

    Args:
        shard: is given its batch in containers of its own.
    """

    def __init__(self, shard: Shard) -> None:
        super().__init__(shard)
        self._batch = shard.batch
        self._versions = [(tensor, tensor._version) for tensor in tree.tensors(shard.batch)]
        shard.batch = self.batch()

    def batch(self) -> Any:
        """The shard's batch in containers of its own.

        Raises:
            RuntimeError: the step has written into its tensors.
        """
        if any(tensor._version != version for tensor, version in self._versions):
            raise RuntimeError(
                "training_step writes into its batch (x.mul_(...), say), and is run again by an "
                "optimizer that evaluates its loss several times: write x = x * ..., or yield a "
                "function that computes the loss"
            )
        return _in_new_containers(self._batch)


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
        """The same from the same start; what it logs and counts is that of its first evaluation."""
        self.start.back()
        context = self.shard.context
        logs = dict(context.logs)
        counted = [
            MetricState(part) for part in self.shard.module.modules() if isinstance(part, Metric)
        ]
        try:
            return self()
        finally:
            context.logs = logs
            for one in counted:
                one.put_back()


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
                # Written through .data, its version stays.
                if buffer._version != version or not same(buffer, value):
                    buffer.copy_(value)
                    self.values[name] = (buffer._version, value)


def _in_new_containers(value: Any) -> Any:
    """The same tensors in dicts and lists of their own, from which a step may take items out."""
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update({key: _in_new_containers(item) for key, item in value.items()})
        return copied
    if type(value) in (list, tuple):
        return type(value)(map(_in_new_containers, value))
    return value
