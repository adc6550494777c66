"""Comparing the gradients of two runs of a step, optimizer by optimizer."""

from __future__ import annotations

import math
from itertools import zip_longest

import torch
from torch import Tensor

from composefit.check.recording import Recording
from composefit.lockstep.gradients import Gradients

# A gradient that is nothing but rounding, of a bias that a softmax takes out again say, is compared
# as if it were so large.
_SMALL = {torch.float64: 1e-6, torch.float32: 1e-3}

_LITTLE = 1e-3  # of the largest parameter's: less than that in one parameter is compared as that


class Comparison:
    """Sums of squares over several pairs of runs.

    Attributes:
        names: of the optimizers.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._parameters: dict[str, list[str]] = {}
        self._sums: dict[str, list[list[float]]] = {}  # of each parameter: difference, expected
        self._updates: dict[str, int] = {}
        self._failed = False
        self._small = 1e-3

    def begin(self, whole: Recording) -> None:
        """Take note of what there is to compare."""
        named = {id(p): name for name, p in whole.module.named_parameters()}
        for name, parameters in whole.parameters.items():
            self._parameters[name] = [named.get(id(p), "no parameter of its") for p in parameters]
            self._sums[name] = [[0.0, 0.0] for _ in parameters]
            self._updates[name] = 0
        dtypes = [p.dtype for p in whole.module.parameters() if p.is_floating_point()]
        self._small = _SMALL.get(dtypes[0] if dtypes else torch.float32, 1e-2)
        self.names = list(self._sums)

    def add(self, whole: Recording, cut: Recording) -> dict[str, float]:
        """Compare two runs: the relative difference of each optimizer that was updated."""
        found = {}
        for name in self.names:
            expected, given = whole.gradients[name], cut.gradients[name]
            if not expected and not given:
                continue
            self._updates[name] += len(expected)
            own = [[0.0, 0.0] for _ in self._sums[name]]
            for one, other in zip_longest(expected, given):
                self._add(own, one, other)
            for total, part in zip(self._sums[name], own, strict=True):
                total[0] += part[0]
                total[1] += part[1]
            found[name] = math.inf if cut.error is not None else self._relative(own)
        self._failed = self._failed or cut.error is not None
        return found

    def _add(self, sums: list[list[float]], one: Gradients | None, other: Gradients | None) -> None:
        for i, total in enumerate(sums):
            a = None if one is None else one[i]
            b = None if other is None else other[i]
            total[0] += _square(a if b is None else b if a is None else b - a)
            total[1] += _square(a)

    def _relative(self, sums: list[list[float]]) -> float:
        difference = math.sqrt(sum(total[0] for total in sums))
        return difference / max(math.sqrt(sum(total[1] for total in sums)), self._small)

    def differences(self) -> dict[str, float | None]:
        """The relative difference of each optimizer over all that was added; None: no update."""
        return {
            name: None
            if not self._updates[name]
            else math.inf
            if self._failed
            else self._relative(self._sums[name])
            for name in self.names
        }

    def largest(self, name: str) -> str | None:
        """The optimizer's parameter that differs most, for its size."""
        sums = self._sums[name]
        size = math.sqrt(max((total[1] for total in sums), default=0.0))
        floor = max(_LITTLE * size, self._small)
        own = [math.sqrt(total[0]) / max(math.sqrt(total[1]), floor) for total in sums]
        if not own or not max(own) > 0:
            return None
        return self._parameters[name][own.index(max(own))]


def _square(gradient: Tensor | None) -> float:
    if gradient is None:
        return 0.0
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return float(torch.linalg.vector_norm(gradient.detach()).double().square())
