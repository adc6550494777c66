"""Adding up gradients over the ranks, in buckets that are on their way while the backward goes on.

Which parameters a loss reaches is known in advance only from the last time: the *plan*. What is
planned travels in buckets, and with the last bucket travel three numbers: how many planned
gradients a rank has not got, how many it has got beyond the plan, and how many of a kind that no
bucket holds. They are zero as a rule; only where their sum is not, ranks tell each other which. So
a parameter that an update does not reach costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from composefit.ranks.world import BUCKET_BYTES, World

Gradients = list["Tensor | None"]

# The first bucket to go is small, so that the network is busy early (as in
# torch.nn.parallel.DistributedDataParallel).
_FIRST_BYTES = 2**20

# What a rank has of a parameter.
_NONE, _DENSE, _SPARSE = 0, 1, 2

_FLAGS = 3


class Sending(Protocol):
    """The gradients of one key in one update, on their way to their sum."""

    def __enter__(self) -> object:
        """Around the backward: gradients go as they come."""

    def __exit__(self, *_: object) -> None:
        """At its end."""

    def hand_over(self, gradients: Sequence[Tensor | None], spare: bool = False) -> None:
        """This rank's gradients; none of them counts where it has no samples (`spare`)."""

    def finish(self, kept: bool = False) -> Gradients:
        """Their sums; `kept` where they stay in use after the next reduction."""


class Reducer(Protocol):
    """Adds up gradients over the ranks."""

    def begin(self, key: str, parameters: Sequence[Tensor], gate: Callable[[], None]) -> Sending:
        """One reduction; see `GradientReducer.begin`."""


class GradientReducer:
    """Adds up the gradients of one module's optimizers over the ranks.

    Args:
        world: the ranks.
        bucket_bytes: gradients travel together up to this size.
    """

    def __init__(self, world: World, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.world = world
        self.bucket_bytes = bucket_bytes
        self._plans: dict[tuple[str, int], _Plan] = {}

    def begin(self, key: str, parameters: Sequence[Tensor], gate: Callable[[], None]) -> Reduction:
        """One reduction.

        Args:
            key: whose gradients they are; what was reached under it the last time is the plan.
            parameters: the same on all ranks.
            gate: returns once it is known that all ranks reduce the same.
        """
        plan = self._plans.get((key, len(parameters)))
        if plan is not None and not plan.fits(parameters):
            plan = None
        return Reduction(self, key, list(parameters), plan, gate)

    def plan(self, key: str, parameters: list[Tensor], kinds: Sequence[int]) -> _Plan:
        """Remember what was reached."""
        plan = _Plan(parameters, kinds, self.bucket_bytes)
        if len(self._plans) > 64:
            self._plans.clear()
        self._plans[key, len(parameters)] = plan
        return plan


class _Bucket:
    """Gradients that travel together.

    Attributes:
        indices: of the parameters, in the order of their places in `flat`.
        flat: their numbers, and at the end of the last bucket the flags.
        views: for each parameter its place, with its shape and strides.
    """

    def __init__(self, parameters: Sequence[Tensor], indices: list[int], flags: int) -> None:
        like = parameters[indices[0]]
        self.indices = indices
        total = sum(parameters[i].numel() for i in indices)
        self.flat = torch.zeros(total + flags, dtype=like.dtype, device=like.device)
        self.views: dict[int, Tensor] = {}
        start = 0
        for i in indices:
            parameter = parameters[i]
            self.views[i] = _placed(self.flat, start, parameter)
            start += parameter.numel()
        self.flags = self.flat[total:]


class _Plan:
    """The buckets of the parameters that were reached the last time."""

    def __init__(self, parameters: list[Tensor], kinds: Sequence[int], bucket_bytes: int) -> None:
        self.ids = [id(parameter) for parameter in parameters]
        self.shapes = [(p.shape, p.stride(), p.dtype) for p in parameters]
        self.kinds = list(kinds)
        groups: list[list[int]] = []
        opened: dict[object, tuple[list[int], int]] = {}
        # Gradients come in the reverse order of the layers.
        for i in reversed(range(len(parameters))):
            if kinds[i] != _DENSE:
                continue
            parameter = parameters[i]
            size = parameter.numel() * parameter.element_size()
            kind = (parameter.dtype, parameter.device)
            limit = bucket_bytes if len(groups) > 1 else _FIRST_BYTES
            group, used = opened.get(kind, ([], limit))
            if not group or used + size > limit:
                group, used = [], 0
                groups.append(group)
            group.append(i)
            opened[kind] = (group, used + size)
        last = len(groups) - 1
        self.buckets = [
            _Bucket(parameters, group, _FLAGS if n == last else 0) for n, group in enumerate(groups)
        ]
        self.bucket_of = {i: n for n, group in enumerate(groups) for i in group}

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        return [id(parameter) for parameter in parameters] == self.ids and self.shapes == [
            (p.shape, p.stride(), p.dtype) for p in parameters
        ]


class Reduction:
    """The gradients of one key in one update, on their way to their sum.

    `with reduction:` around the backward lets each bucket go as soon as it is full; `hand_over`
    gives the gradients that there are at its end, and `finish` the sums.
    """

    def __init__(
        self,
        reducer: GradientReducer,
        key: str,
        parameters: list[Tensor],
        plan: _Plan | None,
        gate: Callable[[], None],
    ) -> None:
        self._reducer = reducer
        self._world = reducer.world
        self._key = key
        self._parameters = parameters
        self._plan = plan
        self._gate = gate
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._filled: set[int] = set()
        self._missing: list[int] = []
        self._next = 0
        self._works: list[dist.Work] = []
        self._own: Gradients = []
        self._flags = (0, 0, 0)
        self._spare = False

    # -- while the backward goes on ------------------------------------------------------------

    def __enter__(self) -> Reduction:
        plan = self._plan
        if plan is not None:
            self._missing = [len(bucket.indices) for bucket in plan.buckets]
            for i in plan.bucket_of:
                handle = self._parameters[i].register_hook(  # type: ignore[no-untyped-call]
                    partial(self._ready, i)
                )
                self._handles.append(handle)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _ready(self, index: int, gradient: Tensor) -> Tensor | None:
        """A gradient is complete; the sum takes its place."""
        plan = self._plan
        assert plan is not None
        if gradient.layout is not torch.strided or gradient.dtype is not plan.shapes[index][2]:
            return None
        number = plan.bucket_of[index]
        view = plan.buckets[number].views[index]
        view.copy_(gradient)
        self._filled.add(index)
        self._missing[number] -= 1
        # In their order, the same on all ranks; the last one carries what is known at the end.
        while self._next < len(plan.buckets) - 1 and not self._missing[self._next]:
            self._send(plan.buckets[self._next])
        return view

    def _send(self, bucket: _Bucket) -> None:
        if not self._works:
            self._gate()
            self._world.busy += 1
        self._works.append(self._world.add_up_flat(bucket.flat))
        self._next += 1

    # -- at its end ----------------------------------------------------------------------------

    def hand_over(self, gradients: Sequence[Tensor | None], spare: bool = False) -> None:
        """This rank's gradients; what has gone already is not looked at again.

        Args:
            gradients: one for each parameter; none at all counts as None for each.
            spare: this rank has no samples, so that its gradients say nothing.
        """
        self._own = list(gradients) or [None] * len(self._parameters)
        self._spare = spare
        plan = self._plan
        if plan is None or not plan.buckets:
            return
        missing = extra = other = 0
        for i, gradient in enumerate(self._own):
            planned = plan.kinds[i] == _DENSE
            if i in self._filled:
                continue
            dense = gradient is not None and gradient.layout is torch.strided
            if gradient is None:
                missing += planned
            elif planned and dense:
                view = plan.buckets[plan.bucket_of[i]].views[i]
                view.copy_(gradient)
                self._filled.add(i)
            elif dense:
                extra += 1
            else:
                other += 1
                missing += planned
        for i, number in plan.bucket_of.items():
            if i not in self._filled:
                plan.buckets[number].views[i].zero_()
        self._flags = (0 if spare else missing, extra, other)
        flags = plan.buckets[-1].flags
        if flags.is_cpu:
            flags.copy_(torch.tensor(self._flags, dtype=torch.float64))
        while self._next < len(plan.buckets):
            self._send(plan.buckets[self._next])

    def finish(self, kept: bool = False) -> Gradients:
        """The sums over all ranks; None for a parameter that none has reached.

        Args:
            kept: they stay in use after the next reduction of this key, which reuses the buckets.
        """
        plan = self._plan
        for work in self._works:
            self._world.wait(work, f"the gradients of {self._key!r}")
        self._world.busy -= bool(self._works)
        sums: Gradients = [None] * len(self._parameters)
        if plan is not None and plan.buckets:
            for bucket in plan.buckets:
                for i, view in bucket.views.items():
                    sums[i] = view.clone() if kept else view
            if self._as_planned(plan.buckets[-1].flags):
                return sums
        self._settle(sums)
        return sums

    def _as_planned(self, flags: Tensor) -> bool:
        if flags.is_cpu:
            return not flags.any()  # also bfloat16 tells zero from more
        # Looking at a number on a GPU would wait for it; the CPU has known its own for long.
        agreed = self._world.agree(f"the gradients of {self._key!r}", *self._flags)
        return not any(map(any, agreed))

    def _settle(self, sums: Gradients) -> None:
        """Something came otherwise than planned, or there was no plan: ranks say what they have."""
        world, plan = self._world, self._plan
        mine = bytes(len(self._own)) if self._spare else bytes(map(_kind, self._own))
        theirs = world.gather(f"which gradients of {self._key!r} there are", mine)
        kinds = [max(kinds) for kinds in zip(*theirs, strict=True)]
        for i, column in enumerate(zip(*theirs, strict=True)):
            if {_DENSE, _SPARSE} <= set(column):
                raise RuntimeError(
                    f"gradient {i} of {self._key!r} is sparse on some ranks and dense on others: "
                    "use the same kind of layer (nn.Embedding(sparse=...)) everywhere"
                )
        planned = set() if plan is None else plan.bucket_of.keys()
        mixed = [i for i, kind in enumerate(kinds) if kind == _SPARSE]
        late = [i for i, kind in enumerate(kinds) if kind == _DENSE and i not in planned]
        for i, kind in enumerate(kinds):
            if kind == _NONE:
                sums[i] = None
        found: list[Tensor] = []
        for i in late:
            gradient, parameter = self._own[i], self._parameters[i]
            flat = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
            total = _placed(flat, 0, parameter)
            if gradient is not None and not self._spare:
                total.copy_(gradient)
            sums[i] = total
            found.append(flat)
        if found:
            world.add_up_(found)
        for i in mixed:
            gradient = None if self._spare else self._own[i]
            sums[i] = _add_up_sparse(world, gradient, self._parameters[i], self._key)
        self._reducer.plan(self._key, self._parameters, kinds)


def _kind(gradient: Tensor | None) -> int:
    if gradient is None:
        return _NONE
    return _DENSE if gradient.layout is torch.strided else _SPARSE


def _placed(flat: Tensor, start: int, parameter: Tensor) -> Tensor:
    """A view of `flat` for a gradient, with the parameter's strides where these leave no gaps."""
    part = flat[start : start + parameter.numel()]
    if parameter.is_contiguous():
        return part.view(parameter.shape)
    dense = torch.ops.aten.is_non_overlapping_and_dense(parameter)
    strides = parameter.stride() if dense else torch.empty(parameter.shape).stride()
    return part.as_strided(parameter.shape, strides, part.storage_offset())


def _add_up_sparse(world: World, gradient: Tensor | None, parameter: Tensor, key: str) -> Tensor:
    """The sum of gradients of which at least one is sparse: by their indices and values."""
    mine = None
    if gradient is not None:
        gradient = gradient.coalesce()
        mine = (gradient.indices().cpu(), gradient.values().cpu())
    found = [one for one in world.gather(f"sparse gradients of {key!r}", mine) if one is not None]
    indices = torch.cat([one[0] for one in found], dim=1)
    values = torch.cat([one[1] for one in found])
    total = torch.sparse_coo_tensor(
        indices, values, parameter.shape, device=parameter.device, check_invariants=False
    )
    return total.coalesce()
