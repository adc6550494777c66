"""A step's dealings with the other ranks: who has which samples, what they yield, their buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from composefit import tree
from composefit.data.rows import Rows
from composefit.effects import Effect
from composefit.lockstep.ranked_state import LoneAttributes, Parts, RankedBuffers
from composefit.lockstep.scatter import (
    Part,
    batch_size,
    counts_its_own_way,
    cuts_its_own_way,
    rows_of,
)
from composefit.losses import Loss
from composefit.module import LoopModule
from composefit.ranks import World
from composefit.ranks.world import WORDS, Meeting, checksum
from composefit.tree import move

if TYPE_CHECKING:
    from composefit.lockstep.driver import Lockstep


@dataclass(slots=True)
class RemoteShard:
    """A shard of the step, here or on another rank: what an effect may ask of it."""

    rank: int
    samples: int


class Ranks:
    """What one driver knows of the other ranks.

    Args:
        lock: the driver of this rank.
        world: the ranks.

    Attributes:
        shards: those of all ranks, in sample order.
        own: the places in it of this rank's, spare ones at place 0.
        counts: how many each rank has.
        spare: this rank has no samples in this step.
        alone: it has one shard, which runs on the module itself.
        reducer: adds up gradients.
    """

    def __init__(self, lock: Lockstep, world: World) -> None:
        self.lock = lock
        self.world = world
        self.shards: list[RemoteShard] = []
        self.own: list[int] = []
        self.counts: list[int] = []
        self.spare = False
        self.alone = False
        self.reducer = lock.lanes.reducer()
        self.parts = Parts(lock.owner)
        self.buffers = RankedBuffers(self.parts, world)
        self.attributes = LoneAttributes(self.parts)
        self._meeting: Meeting | None = None
        self._met: list[tuple[Any, ...]] = []
        self._shape: tuple[Any, ...] = ()
        self._words: list[float] = []
        self._many = False
        self._counted: list[Effect[Any]] = []
        self._all: list[Effect[Any]] | None = None
        self._effect: Effect[Any] | None = None
        self._places: dict[Any, int] = {}

    # -- who has which samples -----------------------------------------------------------------

    def scatter(self, batches: Sequence[Any], first: int) -> list[Part]:
        """This rank's parts of the step's loader batches.

        Args:
            batches: each the world's, or this rank's `Rows` of it.
            first: the index of the first of them.
        """
        lock, world = self.lock, self.world
        owner = lock.owner
        rows = [
            batch if isinstance(batch, Rows) else rows_of(owner, batch, world.rank, world.size)
            for batch in batches
        ]
        sizes = self._sizes(rows)
        self.shards.clear()
        self.own.clear()
        parts: list[Part] = []
        spares: list[Part] = []
        here: list[list[Part]] = []
        for n, (row, by_rank) in enumerate(zip(rows, sizes, strict=True)):
            batch = move(row.batch, lock.device, lock.precision.dtype)
            mine = by_rank[world.rank]
            own = lock.scatter(owner, batch, first + n, lock.lanes.lanes, lock.microbatch)
            if mine and len(own) == 1:
                own = [own[0]._replace(samples=mine)]
            spare = own[0]._replace(spare=True)
            if spare.samples is None:
                spare = spare._replace(samples=batch_size(owner, batch))
            spares.append(spare)
            here.append(own if mine else [])
        for own, spare, cuts in zip(here, spares, self._cuts(here, sizes), strict=True):
            most = 0
            for rank, cut in enumerate(cuts):
                if rank == world.rank:
                    self.own += range(len(self.shards), len(self.shards) + len(cut))
                most = max(most, len(cut))
                self.shards += [RemoteShard(rank, one) for one in cut]
            parts += own
            if lock.lanes.together:
                parts += [spare] * (most - len(own))
                self.own += [0] * (most - len(own))
        self.counts = [sum(one.rank == rank for one in self.shards) for rank in range(world.size)]
        self.spare = all(part.spare for part in parts)
        if not parts:
            self.own.append(0)
            parts = spares[:1]
        self.alone = len(parts) == 1 and not self.spare
        self.parts.look()
        if self.alone:
            self.attributes.begin()
        return parts

    def _cuts(
        self, here: Sequence[Sequence[Part]], sizes: Sequence[tuple[int, ...]]
    ) -> list[list[list[int]]]:
        """For each loader batch, for each rank, the samples of its shards."""
        lock = self.lock
        lanes, most = lock.lanes.lanes, lock.microbatch
        if cuts_its_own_way(lock.owner) and (lanes > 1 or most is not None):
            mine = [[part.samples or 0 for part in parts] for parts in here]
            theirs = self.world.gather("how scatter_batch has cut the batches", mine)
            return [list(of_ranks) for of_ranks in zip(*theirs, strict=True)]
        group = getattr(lock.owner, "samples_per_group", 1)
        return [
            [list(chain(*tree.shard_sizes(size, lanes, most, group))) for size in by_rank]
            for by_rank in sizes
        ]

    def _sizes(self, rows: Sequence[Rows]) -> list[tuple[int, ...]]:
        """For each loader batch, the samples of each rank."""
        owner = self.lock.owner
        if not (isinstance(owner, LoopModule) and counts_its_own_way(owner)):
            known = [row.sizes for row in rows if row.sizes is not None and row.counted]
            if len(known) == len(rows):
                return known
        mine = [0 if row.spare else batch_size(owner, row.batch) for row in rows]
        what = f"the beginning of step {self.lock.number} over {len(rows)} batches"
        if len(mine) <= WORDS:
            theirs: Sequence[Sequence[float]] = self.world.agree(what, *mine)
        else:
            theirs = self.world.gather(what, mine)
        return [tuple(int(size) for size in column) for column in zip(*theirs, strict=True)]

    # -- what they yield -----------------------------------------------------------------------

    def meet(self, effects: Sequence[Effect[Any]]) -> None:
        """Say what this rank's shards yielded; the answer is not waited for."""
        effect = effects[0]
        self._effect, self._all = effect, None
        self._counted = [
            one for one, shard in zip(effects, self.lock.shards, strict=True) if not shard.spare
        ]
        self._met = [one.values() for one in self._counted]
        self._shape = effect.values() if self.spare else self._met[0]
        room = max(self.counts) * (len(self._shape) + 1)
        self._words = [word for values in self._met for word in _words(values)]
        self._many = room + 1 > WORDS
        words = [self.buffers.written(self.lock.counted_replicas(), self.spare)]
        if not self._many:
            words += self._words + [0.0] * (room - len(self._words))
        place = self._place(effect, room)
        self._meeting = self.world.meet(place, self.describe, words)

    def settle(self) -> None:
        """Wait until it is known that all ranks yielded the same."""
        meeting = self._meeting
        if meeting is None:
            return
        rows = meeting.wait()
        self._meeting = None
        self.buffers.compare([row[0] for row in rows])
        effect = self._effect
        assert effect is not None
        words: list[Sequence[float]] = [row[1:] for row in rows]
        if self._many:
            words = self.world.gather("the numbers that shards yielded", self._words)
        shape, width = self._shape, len(self._shape) + 1
        bulk = self._bulk(shape, words)
        taken = [0] * self.world.size
        here = iter(self._counted)
        found: list[Effect[Any]] = []
        for shard in self.shards:
            start = taken[shard.rank] * width
            taken[shard.rank] += 1
            if shard.rank == self.world.rank:
                found.append(next(here))
                continue
            own = words[shard.rank][start : start + width]
            found.append(effect.of_another_rank(_values(shape, own, bulk[shard.rank])))
        self._all = found

    def effects(self) -> list[Effect[Any]]:
        """Those of all ranks' shards, in sample order."""
        self.settle()
        assert self._all is not None
        return self._all

    def column(self, key: str) -> list[Loss | Tensor]:
        """The losses of all ranks' shards whose gradients are taken under a key."""
        return [effect.loss_of(key) for effect in self.effects()]

    def describe(self) -> str:
        """Where this rank is, in words."""
        shard = self.lock.shards[0]
        effect = shard.effect
        did = "returned" if shard.done else "yielded"
        return f"step {self.lock.number}, {did} {effect!r} ({shard.where()})"

    def _place(self, effect: Effect[Any], count: int) -> int:
        agreement = effect.agreement()
        found = self._places.get(agreement)
        if found is None:
            if len(self._places) > 256:
                self._places.clear()
            found = self._places[agreement] = checksum(repr(agreement))
        return (found + 7919 * self.lock.number + 104729 * count) % 2**32

    def _bulk(self, shape: Sequence[Any], words: Sequence[Sequence[float]]) -> list[Any]:
        """For each rank an iterator over the tensors of its shards, in their order."""
        places = [i for i, value in enumerate(shape) if _is_bulk(value)]
        if not places:
            return [iter(()) for _ in words]
        world, width = self.world, len(shape) + 1
        sizes = [
            [
                (int(words[rank][n * width + 1 + i]) if shape[i].dim() else 1, shape[i])
                for n in range(self.counts[rank])
                for i in places
            ]
            for rank in range(world.size)
        ]
        room = max(sum(rows * _row_bytes(like) for rows, like in of_rank) for of_rank in sizes)
        far = any(not shape[i].is_cpu for i in places)
        device = world.device if far else torch.device("cpu")
        sent = torch.zeros(room, dtype=torch.uint8, device=device)
        start = 0
        for values in self._met:
            for i in places:
                part = _bytes(values[i].detach())
                sent[start : start + len(part)] = part
                start += len(part)
        got = world.all_gather(sent, "the tensors that shards yielded")
        return [self._cut(one, of_rank) for one, of_rank in zip(got, sizes, strict=True)]

    def _cut(self, flat: Tensor, sizes: Sequence[tuple[int, Tensor]]) -> Any:
        start = 0
        for rows, like in sizes:
            count = rows * _row_bytes(like)
            part = flat[start : start + count].clone().view(like.dtype)
            start += count
            yield part.view(rows, *like.shape[1:]) if like.dim() else part.view(())

    @contextmanager
    def at_barrier(self) -> Iterator[None]:
        """Around what runs at a barrier, alike on every rank: hooks, optimizers, `Once`."""
        if not self.alone:
            yield
            self.buffers.pass_over()
            return
        with self.attributes.aside():
            yield
        self.buffers.pass_over()

    def back_in(self) -> AbstractContextManager[None]:
        """Within `at_barrier`: a part of the step runs again."""
        return self.attributes.back_in() if self.alone else nullcontext()

    # -- the end of a step ---------------------------------------------------------------------

    def end(self) -> None:
        """Merge what the step did to normalisation statistics, and drop what ends with it.

        What was written since its last effect is compared with the next message.
        """
        buffers, world = self.buffers, self.world
        if self.alone:
            self.attributes.end()
        if not self.spare:
            buffers.look(self.lock.counted_replicas())
        some_spare = 0 in self.counts
        if not (buffers.differ or some_spare):
            return
        # Somebody may still be at an effect: that is found here, before data is sent.
        world.agree(f"the end of step {self.lock.number}")
        if some_spare:
            first = next(rank for rank, count in enumerate(self.counts) if count)
            buffers.take_over(first, self.spare)
        if buffers.differ:
            total = sum(shard.samples for shard in self.shards)
            own = sum(shard.samples for shard in self.shards if shard.rank == world.rank)
            buffers.end(own / total)

    def finish(self) -> None:
        """After the last of several steps: compare what no message has asked for."""
        rows = self.world.agree("the end of what ran step by step", self.buffers.written((), False))
        self.buffers.compare([value for (value,) in rows])

    # -- gradients through barriers ------------------------------------------------------------

    def add_up_leaves(self, totals: list[Tensor | None], like: Sequence[Tensor]) -> None:
        """Add up, over the ranks, the gradients of what all shards were given; in place.

        Args:
            totals: this rank's, None where there is none.
            like: the leaves.
        """
        wanted = [i for i, leaf in enumerate(like) if leaf.requires_grad]
        sums = [torch.zeros_like(like[i]) if totals[i] is None else totals[i] for i in wanted]
        exists = torch.tensor(
            [float(totals[i] is not None) for i in wanted], dtype=torch.float32
        ).to(self.world.device)
        own = [total.detach().clone() for total in sums if total is not None]
        self.world.add_up_([*own, exists])
        for i, total, there in zip(wanted, own, exists.tolist(), strict=True):
            totals[i] = total if there else None


# -- values in words ---------------------------------------------------------------------------


def _is_bulk(value: Any) -> bool:
    """Whether it is sent as a tensor: it has rows, or is a number on a GPU, nobody waits for."""
    return isinstance(value, Tensor) and (value.dim() > 0 or not value.is_cpu)


def _words(values: Sequence[Any]) -> list[float]:
    """What a control message says of a shard's values.

    Which of them need a gradient, then of each its number, or how many rows it has.
    """
    mask = sum(2**i for i, v in enumerate(values) if isinstance(v, Tensor) and v.requires_grad)
    words = [float(mask)]
    for value in values:
        if not isinstance(value, Tensor):
            words.append(float(value))
        elif value.dim():
            words.append(float(len(value)))
        else:
            words.append(float(value.detach()) if value.is_cpu else 0.0)
    return words


def _values(shape: Sequence[Any], words: Sequence[float], bulk: Any) -> list[Any]:
    """The values of another rank's shard; `shape` are those of one here."""
    mask = int(words[0])
    found: list[Any] = []
    for i, (like, word) in enumerate(zip(shape, words[1:], strict=True)):
        if not isinstance(like, Tensor):
            found.append(type(like)(word))
            continue
        value = next(bulk) if _is_bulk(like) else torch.tensor(word, dtype=like.dtype)
        found.append(value.requires_grad_() if mask >> i & 1 else value)
    return found


def _row_bytes(like: Tensor) -> int:
    rows = like.shape[1:].numel() if like.dim() else 1
    return rows * like.element_size()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
