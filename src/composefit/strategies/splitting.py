"""Adding up gradients and stepping an optimizer, split over the lanes.

Both pass over every parameter once and are bound by memory: one thread would keep the others
waiting. Tensors are cut in flat chunks at multiples of 64 numbers, so that vectorised kernels treat
each number as they do uncut: the result is bitwise the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.optim import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

from composefit.strategies.stepping import bare_step

#: From this many numbers on it pays: below it the hand-over costs more than it saves.
WORTHWHILE = 1_000_000

_ALIGNED = 64

# Optimizers that treat each number by itself, so that a parameter may be cut. Subclasses may not.
ELEMENTWISE = (SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta)

Run = Callable[[Sequence[Callable[[], None]]], None]


def flat_chunks(tensor: Tensor, lanes: int) -> list[Tensor]:
    """A dense tensor's numbers in memory order, in `lanes` views of about equal length."""
    count = tensor.numel()
    flat = tensor.as_strided((count,), (1,))
    return [flat[a:b] for a, b in pairwise(_bounds(count, lanes))]


def _bounds(count: int, lanes: int) -> list[int]:
    blocks = -(-count // _ALIGNED)
    return [min(count, blocks * i // lanes * _ALIGNED) for i in range(lanes)] + [count]


def add_split(targets: Sequence[Tensor], summands: Sequence[Tensor], lanes: int, run: Run) -> None:
    """`targets[i] += summands[i]`, each lane a part of every tensor.

    Args:
        targets: dense tensors.
        summands: as many, of the same strides.
        lanes: how many parts.
        run: runs one task in each lane.
    """
    cut_targets = [flat_chunks(t, lanes) for t in targets]
    cut_summands = [flat_chunks(s, lanes) for s in summands]

    def task(lane: int) -> Callable[[], None]:
        def add() -> None:
            torch._foreach_add_([c[lane] for c in cut_targets], [c[lane] for c in cut_summands])

        return add

    _run_all(run, [task(lane) for lane in range(lanes)])


class SplitOptimizer:
    """Steps an optimizer in chunks, one lane each.

    Each lane has a stand-in optimizer of the same class over chunks of the parameters and of the
    state. They are made anew when the optimizer's tensors are others than at the last step.

    Args:
        optimizer: one of torch's elementwise optimizers.
        lanes: how many.
    """

    def __init__(self, optimizer: Optimizer, lanes: int) -> None:
        self.optimizer = optimizer
        self.lanes = lanes
        self._tensors: list[Tensor] = []
        self._places: list[int] = []
        # Step counters, and the other lanes' copies of them.
        self._counters: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._stand_ins: list[Optimizer] = []
        self._chunks: list[tuple[Tensor, list[Tensor]]] = []

    @staticmethod
    def suits(optimizer: Optimizer) -> bool:
        """Whether it may be cut, and is large enough to be worth it."""
        if type(optimizer) not in ELEMENTWISE or optimizer.defaults.get("differentiable"):
            return False
        if bare_step(optimizer) is None:
            return False  # hooks and profiler marks are for the whole optimizer
        numbers = 0
        for group in optimizer.param_groups:
            for p in group["params"]:
                gradient = p.grad
                if gradient is None:
                    continue
                if gradient.layout is not torch.strided or p.device.type != "cpu":
                    return False
                numbers += p.numel()
        return numbers >= WORTHWHILE

    def step(self, run: Run) -> bool:
        """Step all chunks; False, and nothing done, where the state is not there yet."""
        tensors = self._current()
        if tensors is None:
            return False
        known = self._tensors
        places = [tensor.data_ptr() for tensor in tensors]  # `p.data = ...` gives a tensor another
        if places != self._places or any(a is not b for a, b in zip(tensors, known, strict=True)):
            self._build()
            self._tensors, self._places = tensors, places
        elif self._copies:
            torch._foreach_copy_(self._copies, self._counters)  # somebody may have set them
        for parameter, chunks in self._chunks:
            gradient = parameter.grad
            assert gradient is not None
            for chunk, part in zip(chunks, flat_chunks(gradient, self.lanes), strict=True):
                chunk.grad = part
        for stand_in in self._stand_ins:
            for own, group in zip(stand_in.param_groups, self.optimizer.param_groups, strict=True):
                own.update((key, value) for key, value in group.items() if key != "params")

        bare = bare_step(self.optimizer)
        assert bare is not None

        def task(stand_in: Optimizer) -> Callable[[], None]:
            return lambda: bare(stand_in)

        try:
            _run_all(run, [task(stand_in) for stand_in in self._stand_ins])
        finally:
            for _, chunks in self._chunks:
                for chunk in chunks:
                    chunk.grad = None
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        return True

    def _current(self) -> list[Tensor] | None:
        """Parameters with a gradient and their state; None where some state is still to be made."""
        found: list[Tensor] = []
        for group in self.optimizer.param_groups:
            stateless = type(self.optimizer) is SGD and not group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.optimizer.state.get(p)
                if not state and not stateless:
                    return None
                if not dense(p) or p.grad.stride() != p.stride():
                    return None
                found.append(p)
                for value in (state or {}).values():
                    if not isinstance(value, Tensor):
                        return None
                    if value.shape == p.shape and value.stride() != p.stride():
                        return None
                    found.append(value)
        return found

    def _build(self) -> None:
        optimizer = self.optimizer
        self._stand_ins, self._counters, self._copies = [], [], []
        for _ in range(self.lanes):
            stand_in = object.__new__(type(optimizer))
            vars(stand_in).update(vars(optimizer))
            vars(stand_in).pop("step", None)
            stand_in.state = defaultdict(dict)
            stand_in.param_groups = [{**g, "params": []} for g in optimizer.param_groups]
            self._stand_ins.append(stand_in)
        self._chunks = []
        for i, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if p.grad is None:
                    continue
                chunks = flat_chunks(p.data, self.lanes)
                self._chunks.append((p, chunks))
                for lane, (stand_in, chunk) in enumerate(zip(self._stand_ins, chunks, strict=True)):
                    stand_in.param_groups[i]["params"].append(chunk)
                    state = optimizer.state.get(p)
                    if state:
                        stand_in.state[chunk] = {
                            key: self._state_chunk(value, p, lane) for key, value in state.items()
                        }

    def _state_chunk(self, value: Tensor, parameter: Tensor, lane: int) -> Tensor:
        if value.shape == parameter.shape and value.dim():
            return flat_chunks(value, self.lanes)[lane]
        # A step counter: the last lane, which always has a part, counts in the optimizer's own.
        if lane == self.lanes - 1:
            return value
        self._counters.append(value)
        self._copies.append(value.clone())
        return self._copies[-1]


def dense(tensor: Tensor) -> bool:
    """Whether its numbers fill its memory without gaps (contiguous or channels_last)."""
    if tensor.is_contiguous():
        return True
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _run_all(run: Run, tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks that may raise; raise the first lane's error."""
    errors: list[BaseException | None] = [None] * len(tasks)

    def guarded(i: int, task: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            try:
                with torch.no_grad():
                    task()
            except BaseException as error:
                errors[i] = error

        return call

    run([guarded(i, task) for i, task in enumerate(tasks)])
    for error in errors:
        if error is not None:
            raise error
