"""Adding up gradients over the ranks where each keeps its own rows of the sum.

The same calls as `composefit.ranks.reduction.GradientReducer`, which does it for the parameters
that are whole on every rank. What a unit's parameters were reached in the last time is its *plan*:
as soon as all of that is there, in the middle of the backward, it is sent and its memory is free.
With the last unit travel two numbers: how many planned gradients a rank has not got, and how many
it has got beyond the plan. Only where their sum is not zero, ranks tell each other which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from composefit.ranks.reduction import GradientReducer, Reduction
from composefit.ranks.world import World
from composefit.strategies.sharding.internals import ShardedParameter

Gradients = list["Tensor | None"]

# Sums of at most this many units are on their way at once: each holds a unit's gradients.
_ON_THE_WAY = 2

_FLAGS = 2


class ShardedReducer:
    """Adds up the gradients of one module's optimizers.

    Args:
        world: the ranks.
        sharded: the sharded parameters by the id of their leaf.
        group: carries the sums. One of its own: where a rank has not reached a parameter, its sums
            and its gathering of weights come in another order than elsewhere.
        whole: adds up gradients of other parameters.
    """

    def __init__(
        self,
        world: World,
        sharded: Mapping[int, ShardedParameter],
        group: dist.ProcessGroup,
        whole: GradientReducer,
    ) -> None:
        self.world = world
        self.sharded = sharded
        self.group = group
        self.whole = whole
        self._plans: dict[tuple[str, int], set[int]] = {}

    def begin(
        self, key: str, parameters: Sequence[Tensor], gate: Callable[[], None]
    ) -> ShardedReduction:
        """One reduction.

        Args:
            key: whose gradients they are; what was reached under it the last time is the plan.
            parameters: the leaves, the same on all ranks.
            gate: returns once it is known that all ranks reduce the same.
        """
        return ShardedReduction(self, key, list(parameters), gate)

    def plan(self, key: str, parameters: Sequence[Tensor]) -> set[int]:
        """The sharded parameters that are expected to be reached, by their place; at first all."""
        found = self._plans.get((key, len(parameters)))
        if found is None:
            found = {i for i, one in enumerate(parameters) if id(one) in self.sharded}
        return found

    def remember(self, key: str, parameters: Sequence[Tensor], reached: set[int]) -> None:
        """Expect these the next time."""
        if len(self._plans) > 64:
            self._plans.clear()
        self._plans[key, len(parameters)] = reached


class _Bucket:
    """The gradients of one unit that travel together."""

    def __init__(self, places: list[int], flags: int) -> None:
        self.places = places
        self.gradients: dict[int, Tensor] = {}
        self.flags = flags
        self.own: Tensor | None = None  # this rank's part of the sum
        self.work: dist.Work | None = None
        self.flat: Tensor | None = None


class ShardedReduction:
    """The gradients of one key in one update, on their way to their sum.

    `with reduction:` around the backward lets each unit's gradients go as soon as they are there;
    `hand_over` gives those that there are at its end, and `finish` the sums.
    """

    def __init__(
        self,
        reducer: ShardedReducer,
        key: str,
        parameters: list[Tensor],
        gate: Callable[[], None],
    ) -> None:
        self._reducer = reducer
        self._world = reducer.world
        self._key = key
        self._parameters = parameters
        self._gate = gate
        self._sharded = {
            i: reducer.sharded[id(one)]
            for i, one in enumerate(parameters)
            if id(one) in reducer.sharded
        }
        self._others = [i for i in range(len(parameters)) if i not in self._sharded]
        self._whole: Reduction | None = None
        if self._others:
            rest = [parameters[i] for i in self._others]
            self._whole = reducer.whole.begin(key, rest, gate)
        self._planned = reducer.plan(key, parameters)
        self._buckets = self._by_unit(self._planned, _FLAGS)
        self._bucket_of = {i: bucket for bucket in self._buckets for i in bucket.places}
        self._next = 0
        self._sent: list[_Bucket] = []
        self._handles: list[RemovableHandle] = []
        self._filled: set[int] = set()
        self._own: Gradients = []
        self._spare = False

    def _by_unit(self, places: set[int], flags: int = 0) -> list[_Bucket]:
        """Units in the order in which a backward reaches them, as a rule."""
        units: dict[tuple[int, torch.dtype], list[int]] = {}
        for i in sorted(places, reverse=True):
            one = self._sharded[i]
            units.setdefault((id(one.group), one.leaf.dtype), []).append(i)
        last = len(units) - 1
        return [
            _Bucket(members, flags if n == last else 0) for n, members in enumerate(units.values())
        ]

    # -- while the backward goes on ------------------------------------------------------------

    def __enter__(self) -> ShardedReduction:
        if self._whole is not None:
            self._whole.__enter__()
        for i in self._planned:
            hook = partial(self._ready, i)
            self._handles.append(self._parameters[i].register_hook(hook))  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._whole is not None:
            self._whole.__exit__(*error)

    def _ready(self, index: int, gradient: Tensor) -> Tensor:
        """A gradient is complete: in its place nothing is kept but its shape."""
        self._put(index, gradient)
        # The last one carries what is known at the end only.
        while self._next < len(self._buckets) - 1 and self._is_full(self._buckets[self._next]):
            self._send(self._buckets[self._next])
        return gradient.new_zeros(()).expand(gradient.shape)

    def _put(self, index: int, gradient: Tensor) -> None:
        self._bucket_of[index].gradients[index] = gradient
        self._filled.add(index)

    @staticmethod
    def _is_full(bucket: _Bucket) -> bool:
        return len(bucket.gradients) == len(bucket.places)

    def _send(self, bucket: _Bucket, flags: Sequence[float] = ()) -> None:
        world = self._world
        if not self._sent:
            self._gate()
            world.busy += 1
        if len(self._sent) >= _ON_THE_WAY:
            self._arrive(self._sent[-_ON_THE_WAY])
        bucket.flat = self._flat(bucket, flags)
        bucket.own = bucket.flat.new_empty(bucket.flat.numel() // world.size)
        bucket.work = dist.reduce_scatter_single(
            bucket.own, bucket.flat.view(-1), group=self._reducer.group, async_op=True
        )
        self._sent.append(bucket)
        self._next += 1

    def _flat(self, bucket: _Bucket, flags: Sequence[float]) -> Tensor:
        """A row for each rank: its rows of every gradient, one after another."""
        size = self._world.size
        parts: list[Tensor] = []
        for i in bucket.places:
            one = self._sharded[i]
            gradient = bucket.gradients.pop(i, None)
            parts.append(_in_rows(gradient, one, size, one.group.reduce_dtype))
        if bucket.flags:
            told = torch.tensor([flags], dtype=parts[0].dtype, device=parts[0].device)
            parts.append(told.expand(size, -1))
        return torch.cat(parts, dim=1)

    def _arrive(self, bucket: _Bucket) -> None:
        """Wait for a sum (on a GPU its stream does), and free what it was made of."""
        self._world.wait(bucket.work, f"the gradients of {self._key!r}")
        bucket.work = bucket.flat = None

    # -- at its end ----------------------------------------------------------------------------

    def hand_over(self, gradients: Sequence[Tensor | None], spare: bool = False) -> None:
        """This rank's gradients; what has gone already is not looked at again.

        Args:
            gradients: one for each parameter; none at all counts as None for each.
            spare: this rank has no samples, so that its gradients are zero and say nothing.
        """
        self._own = list(gradients) or [None] * len(self._parameters)
        self._spare = spare
        if self._whole is not None:
            self._whole.hand_over([self._own[i] for i in self._others], spare)
        extra = 0
        for i in self._sharded:
            gradient = self._own[i]
            if gradient is None or i in self._filled:
                continue
            if gradient.layout is not torch.strided:
                raise RuntimeError(
                    f"a sparse gradient under {self._key!r} of a sharded parameter: write "
                    "nn.Embedding(..., sparse=False), or leave it out in configure_sharding"
                )
            if i in self._planned:
                self._put(i, gradient)
            else:
                extra += not spare
        missing = 0 if spare else len(self._planned - self._filled)
        while self._next < len(self._buckets):
            self._send(self._buckets[self._next], (missing, extra))

    def finish(self, kept: bool = False) -> Gradients:
        """This rank's rows of the sums over all ranks; None for a parameter that none has reached.

        For parameters that are not sharded, the whole sums.

        Args:
            kept: they stay in use after the next reduction of this key.
        """
        sums: Gradients = [None] * len(self._parameters)
        told = self._take_in(self._buckets, sums)
        if told is None or told.any():
            self._settle(sums)
        self._world.busy -= bool(self._sent)
        if self._whole is not None:
            for i, total in zip(self._others, self._whole.finish(kept), strict=True):
                sums[i] = total
        return sums

    def _take_in(self, buckets: Sequence[_Bucket], sums: Gradients) -> Tensor | None:
        """Put the sums into their places; what the ranks told with them."""
        told = None
        for bucket in buckets:
            self._arrive(bucket)
            own = bucket.own
            assert own is not None
            start = 0
            for i in bucket.places:
                one = self._sharded[i]
                count = one.rows * one.leaf.shape[1:].numel()
                part = own[start : start + count]
                sums[i] = one.local(part.to(one.parameter.dtype))
                start += count
            if bucket.flags:
                told = own[start:]
        return told

    def _settle(self, sums: Gradients) -> None:
        """Something came otherwise than planned, or nothing was: ranks say what they have."""
        if not self._sharded:
            return
        mine = {i for i in self._sharded if self._own[i] is not None and not self._spare}
        what = f"which gradients of {self._key!r} there are"
        reached: set[int] = set().union(*self._world.gather(what, mine))
        for i in self._sharded.keys() - reached:
            sums[i] = None
        late = self._by_unit(reached - self._planned)
        for bucket in late:
            for i in bucket.places:
                gradient = self._own[i]
                if gradient is not None:
                    bucket.gradients[i] = gradient
            self._send(bucket)
        self._take_in(late, sums)
        self._reducer.remember(self._key, self._parameters, reached)


def _in_rows(
    gradient: Tensor | None, one: ShardedParameter, size: int, dtype: torch.dtype | None
) -> Tensor:
    """A gradient as a matrix with a row for each rank, padded to equal lengths; zero for None."""
    leaf = one.leaf
    row = leaf.shape[1:].numel()
    if gradient is None:
        return torch.zeros(
            (size, one.rows * row), dtype=dtype or leaf.dtype, device=one.parameter.device
        )
    flat = gradient.detach().reshape(-1)
    if dtype is not None:
        flat = flat.to(dtype)
    padding = one.rows * size * row - flat.numel()
    if padding:
        flat = torch.cat([flat, flat.new_zeros(padding)])
    return flat.view(size, -1)
