"""`World`: what a process knows of the job it is a rank of, and how it talks to the other ranks.

Ranks run the same code on their own data and meet at messages. A *control message* is small, of
fixed size, and says where a rank is; a rank that is elsewhere is found by it, before anything of
another size is sent. Control messages have a CPU group of their own, so that they neither wait for
data on its way nor for a GPU.
"""

from __future__ import annotations

import atexit
import io
import os
import pickle
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import AllgatherOptions  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

#: So many numbers fit into one control message.
WORDS = 40

# In front of the words: the place, how many words, and what each rank says of itself every time.
_PLACE, _COUNT, _SIGNAL, _STOP, _CLOCK, _HEAD = 0, 1, 2, 3, 4, 5

# The place of a rank that has failed. No checksum is negative.
_FAILED = -1.0

# A rank that fails waits this long for the others to fail alike, or to hear of it.
_LAST_WORD = 3.0

# How long a rank waits for what may take any time: until the others come, or one has died.
_PATIENCE = timedelta(days=365).total_seconds()

#: Tensors are sent together up to this size.
BUCKET_BYTES = 25 * 2**20


class PeerFailed(RuntimeError):
    """Another rank has failed, died or hangs: the error is there, and this rank cannot go on."""


class _Elsewhere(RuntimeError):
    """Ranks are at different places."""


@dataclass(slots=True)
class Says:
    """What a rank says with every control message.

    Attributes:
        signal: the number of a signal that it has got, or 0.
        stop: it asks to end the training.
        clock: its clock, in seconds; that of rank 0 counts.
    """

    signal: int = 0
    stop: bool = False
    clock: float = 0.0


class World:
    """A job of several ranks, as one of them sees it.

    All methods that send something must be called by all ranks in the same order, from the main
    thread; where ranks are at different places, each raises an error that names them.

    Args:
        rank: this process's number.
        size: how many there are.
        local_rank: its number on this machine.
        device: where its data is.
        data: the group that carries tensors.
        control: the group that carries control messages, on the CPU.
        store: where a rank that fails leaves its last word.
        timeout: so many seconds a rank waits for the others.

    Attributes:
        mine: what this rank says with its next control message.
        agreed: what all ranks said with the last one: the largest signal, whether any wants to
            stop, and the clock of rank 0.
        ending: a signal that all ranks know of ends the run.
        closed: this rank has left: nothing can be sent any more.
        busy: so many sums are on their way, which the others wait for.
        failures: how many errors of this rank the others were told of.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        local_rank: int,
        device: torch.device,
        data: dist.ProcessGroup,
        control: dist.ProcessGroup,
        store: Store,
        timeout: float,
    ) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.device = device
        self.data = data
        self.control = control
        self.store = store
        self.timeout = timeout
        self.mine = Says()
        self.agreed = Says()
        self.closed = False
        self.ending = False
        self.busy = 0
        self.failures = 0
        self._messages = 0
        self._patient: dist.ProcessGroup | None = None

    # -- control messages ----------------------------------------------------------------------

    def agree(self, what: str, *words: float, patient: bool = False) -> list[tuple[float, ...]]:
        """Meet all ranks at a place.

        Args:
            what: the place, in words; equal on all ranks.
            words: numbers to tell the others, at most `WORDS`, equally many on all ranks.
            patient: wait for the others however long they take, as long as none of them has died.

        Returns:
            Each rank's numbers, in rank order.

        Raises:
            RuntimeError: ranks are at different places.
            PeerFailed: another rank has failed, died, or did not come within the timeout.
        """
        return self.meet(checksum(what), lambda: what, words, patient).wait()

    def meet(
        self,
        place: int,
        describe: Callable[[], str],
        words: Sequence[float],
        patient: bool = False,
    ) -> Meeting:
        """As `agree`, without waiting.

        Args:
            place: a checksum of the place.
            describe: the place in words, for the error where ranks are at different ones.
            words: as in `agree`.
            patient: as in `agree`.
        """
        if len(words) > WORDS:
            raise ValueError(f"a control message holds at most {WORDS} numbers, got {len(words)}")
        seconds = _PATIENCE if patient else self.timeout
        return Meeting(self, float(place), describe, words, seconds)

    def barrier(self, what: str) -> None:
        """Wait until all ranks are here."""
        self.agree(what)

    def first_here(self, function: Callable[[], None]) -> None:
        """Call a function on one rank of each machine; the others wait, however long it takes.

        Raises:
            PeerFailed: it failed on another rank, or that rank has died.
        """
        self.agree("a turn that one rank of each machine takes")
        if self.local_rank == 0:
            function()
        self.agree("the end of a turn that one rank of each machine takes", patient=True)

    # -- objects -------------------------------------------------------------------------------

    def gather(self, what: str, value: Any, patient: bool = False) -> list[Any]:
        """Every rank's value, in rank order, on every rank.

        Args:
            what: the place, in words.
            value: is pickled; its tensors must be on the CPU.
            patient: as in `agree`.
        """
        mine = packed(value)
        sizes = [int(size) for (size,) in self.agree(what, len(mine), patient=patient)]
        room = max(sizes)
        if not room:
            return [None] * self.size
        sent = torch.zeros(room, dtype=torch.uint8)
        sent[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        got = [torch.empty(room, dtype=torch.uint8) for _ in range(self.size)]
        self._waited(self._exchange(got, sent), lambda: what)
        return [
            unpacked(one[:size].numpy().tobytes()) for one, size in zip(got, sizes, strict=True)
        ]

    def broadcast(self, what: str, value: Any, patient: bool = False) -> Any:
        """The value of rank 0, on every rank; see `gather`."""
        return self.gather(what, value if self.rank == 0 else None, patient)[0]

    def _exchange(self, got: list[Tensor], sent: Tensor, seconds: float | None = None) -> dist.Work:
        """Begin to send a tensor to all ranks, and to get theirs, by the control group."""
        options = AllgatherOptions()
        options.timeout = timedelta(seconds=self.timeout if seconds is None else seconds)
        work: dist.Work = self.control.allgather([got], [sent], options)
        return work

    def patient_group(self) -> dist.ProcessGroup:
        """A group on the CPU for what may take any time; all ranks must ask for it the first time.

        For libraries that send by themselves: a rank that waits in it is told of one that has died,
        but not of one that hangs.
        """
        if self._patient is None:
            self._patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=_PATIENCE))
        return self._patient

    # -- tensors -------------------------------------------------------------------------------

    def add_up_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, in place; as many and as large on each."""
        for bucket in buckets_of(tensors):
            flat = flatten(bucket)
            self.wait(self.add_up_flat(flat), "tensors to be added up")
            for tensor, part in zip(bucket, unflatten(flat, bucket), strict=True):
                tensor.copy_(part)

    def add_up_flat(self, flat: Tensor) -> dist.Work:
        """Begin to replace a tensor by its sum over all ranks."""
        self._refuse_closed()
        work: dist.Work | None = dist.all_reduce(flat, group=self._group(flat), async_op=True)
        assert work is not None
        return work

    def all_gather(self, tensor: Tensor, what: str) -> list[Tensor]:
        """Every rank's tensor, all of one shape."""
        self._refuse_closed()
        got = [torch.empty_like(tensor) for _ in range(self.size)]
        work = dist.all_gather(got, tensor.contiguous(), group=self._group(tensor), async_op=True)
        self.wait(work, what)
        return got

    def send_from_first_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of rank 0, in place."""
        self._refuse_closed()
        for bucket in buckets_of(tensors):
            flat = flatten(bucket)
            work = dist.broadcast(flat, 0, group=self._group(flat), async_op=True)
            self.wait(work, "tensors of rank 0")
            for tensor, part in zip(bucket, unflatten(flat, bucket), strict=True):
                tensor.copy_(part)

    def wait(self, work: dist.Work | None, what: str) -> None:
        """Wait for what was sent; on a GPU only its stream does."""
        self._waited(work, lambda: what)

    def _group(self, tensor: Tensor) -> dist.ProcessGroup:
        """What carries a tensor: NCCL, say, takes none from the CPU."""
        on_data = tensor.device.type == self.device.type
        return self.data if on_data else self.control

    # -- the end -------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> bool:
        """This rank fails; tell the others.

        Returns:
            Whether all ranks fail at the same place: then they can still talk, to save what there
            is. Otherwise this rank has left.
        """
        self.failures += 1
        if self.closed:
            return False
        if isinstance(error, PeerFailed) or self.busy:
            self.leave(error)
            return False
        self._last_word(error)
        try:
            # Where a signal ends all ranks, all are known to come.
            seconds = self.timeout if self.ending else _LAST_WORD
            met = Meeting(self, _FAILED, lambda: "", (), seconds, last=True)
            met.wait()
        except RuntimeError:
            self.leave(error)
            return False
        self.ending = False
        if all(place == _FAILED for place in met.places):
            with suppress(Exception):  # nobody is to find it later
                self.store.delete_key(f"composefit/failed/{self.rank}")
            return True
        self.leave(error)
        return False

    def leave(self, error: BaseException | None = None) -> None:
        """Close this rank's connections: whoever waits for it is told so at once."""
        if self.closed:
            return
        self.closed = True
        if error is not None and not isinstance(error, PeerFailed):
            self._last_word(error)
        with suppress(Exception):
            dist.destroy_process_group()

    def _last_word(self, error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}".strip()
        with suppress(Exception):
            self.store.set(f"composefit/failed/{self.rank}", text[:2000])

    def _refuse_closed(self) -> None:
        if self.closed:
            raise RuntimeError(
                "this rank has left its job after an error, and cannot talk to the others any "
                "more: start the job anew"
            )

    def _waited(
        self, work: dist.Work | None, describe: Callable[[], str], seconds: float | None = None
    ) -> None:
        """Wait for a message, and say what it means that it did not come.

        Args:
            work: the message.
            describe: where this rank waits.
            seconds: how long the message may take; the timeout by default.
        """
        if work is None:
            return
        began = time.monotonic()
        try:
            while seconds == _PATIENCE and not work.is_completed():
                time.sleep(0.01)  # here a second Ctrl-C is heard
            work.wait()
        except RuntimeError as error:
            late = time.monotonic() - began >= 0.9 * (self.timeout if seconds is None else seconds)
            raise self._explained(error, describe(), late) from error

    def _explained(self, error: RuntimeError, what: str, late: bool) -> PeerFailed:
        """What has become of the ranks that did not come."""
        said = self._failed()
        if not said:
            # Nobody has said why. Those that are alive find themselves here as well, and say so.
            with suppress(Exception):
                self.store.set(f"composefit/here/{self._messages}/{self.rank}", "")
            missing = self._missing(2.0)
            said = self._failed()
        if said:
            return PeerFailed("; ".join(said) + f" (rank {self.rank} was waiting at {what})")
        names = ", ".join(f"rank {rank}" for rank in missing) or "another rank"
        if late:
            return PeerFailed(
                f"{names} did not come to {what} within {self.timeout:g} s, where rank {self.rank} "
                "was waiting: it hangs, is much slower, or has gone another way. If it was just "
                "slow, give the strategy a longer timeout="
            )
        return PeerFailed(
            f"{names} has died while rank {self.rank} was waiting at {what} ({error})"
        )

    def _failed(self) -> list[str]:
        found = []
        for rank in range(self.size):
            key = f"composefit/failed/{rank}"
            with suppress(Exception):
                if rank != self.rank and self.store.check([key]):
                    found.append(f"rank {rank} failed with {self.store.get(key).decode()}")
        return found

    def _missing(self, seconds: float) -> list[int]:
        """The ranks that do not say that they are here, for so long."""
        keys = {
            rank: f"composefit/here/{self._messages}/{rank}"
            for rank in range(self.size)
            if rank != self.rank
        }
        until = time.monotonic() + seconds
        while keys and time.monotonic() < until:
            try:
                keys = {rank: key for rank, key in keys.items() if not self.store.check([key])}
            except Exception:  # the store has gone, with the process that kept it
                break
            if keys:
                time.sleep(0.05)
        return list(keys)


class Meeting:
    """A control message on its way.

    Args:
        world: the ranks.
        place: a number of the place.
        describe: the place in words.
        words: what this rank tells the others.
        seconds: how long it may take.
        last: this rank has failed, and does not mind where the others are.

    Attributes:
        places: each rank's place, once it has come.
    """

    def __init__(
        self,
        world: World,
        place: float,
        describe: Callable[[], str],
        words: Sequence[float],
        seconds: float,
        last: bool = False,
    ) -> None:
        world._refuse_closed()
        self._world = world
        self._describe = describe
        self._seconds = seconds
        self._last = last
        self.places: list[float] = []
        world._messages += 1
        mine = world.mine
        mine.clock = time.monotonic()
        head = [place, len(words), mine.signal, mine.stop, mine.clock]
        sent = torch.tensor([*head, *words, *[0.0] * (WORDS - len(words))], dtype=torch.float64)
        self._count = len(words)
        self._got = [torch.empty_like(sent) for _ in range(world.size)]
        self._sent = sent  # gloo reads it until the message is through
        self._work = world._exchange(self._got, sent, seconds)
        self._words: list[tuple[float, ...]] | None = None

    def wait(self) -> list[tuple[float, ...]]:
        """Each rank's words, in rank order; raises as `World.agree`."""
        if self._words is not None:
            return self._words
        world = self._world
        if self._last:
            self._work.wait()
        else:
            world._waited(self._work, self._describe, self._seconds)
        rows = [one.tolist() for one in self._got]
        world.agreed = Says(
            signal=int(max(row[_SIGNAL] for row in rows)),
            stop=any(row[_STOP] for row in rows),
            clock=rows[0][_CLOCK],
        )
        self.places = [row[_PLACE] for row in rows]
        first = rows[0]
        if not self._last and any(
            row[_PLACE] != first[_PLACE] or row[_COUNT] != first[_COUNT] for row in rows
        ):
            self._raise_elsewhere()
        self._words = [tuple(row[_HEAD : _HEAD + self._count]) for row in rows]
        return self._words

    def _raise_elsewhere(self) -> None:
        world = self._world
        if _FAILED in self.places:
            said = world._failed()
            where = f" (rank {world.rank} was at {self._describe()})"
            raise PeerFailed("; ".join(said or ["another rank has failed"]) + where)
        # All ranks have seen the same places, so all are here to say what theirs is.
        text = self._describe().encode()[:2000]
        sent = torch.zeros(2000, dtype=torch.uint8)
        sent[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        got = [torch.empty_like(sent) for _ in range(world.size)]
        world._waited(world._exchange(got, sent), self._describe)
        said = [one.numpy().tobytes().rstrip(b"\0").decode(errors="replace") for one in got]
        places = "\n".join(f"  rank {rank}: {place}" for rank, place in enumerate(said))
        raise RuntimeError(
            "the ranks went different ways; each must yield the same effects, and call the same "
            f"methods of the trainer:\n{places}"
        )


def checksum(text: str) -> int:
    """The same number for a text in every process (`hash` is not)."""
    return zlib.crc32(text.encode())


# -- joining -----------------------------------------------------------------------------------

_joined: World | None = None


def join(backend: str, timeout: float, device: torch.device) -> World:
    """Become a rank of the job that the environment names (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`...).

    A process joins once: called again it gives the same world.

    Args:
        backend: of torch.distributed, for tensors on `device`.
        timeout: so many seconds to wait for other ranks, in everything.
        device: where this rank's tensors are.

    Raises:
        RuntimeError: the other ranks did not come.

    Source: `torch.distributed.init_process_group`.
    """
    global _joined
    if _joined is not None:
        _joined._refuse_closed()
        return _joined
    limit = timedelta(seconds=timeout)
    if dist.is_initialized():  # by the user's script
        store = dist.distributed_c10d._get_default_store()
    else:
        store, rank, size = next(iter(rendezvous("env://", timeout=limit)))
        # torchrun keeps one store over restarts of the job: not what was left there before.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"composefit/attempt{attempt}", store)
        dist.init_process_group(
            backend,
            store=PrefixStore("default", store),
            rank=rank,
            world_size=size,
            timeout=limit,
            device_id=device if device.type == "cuda" and backend == "nccl" else None,
        )
        atexit.register(_close)
    control = dist.new_group(backend="gloo", timeout=limit)
    data = dist.distributed_c10d._get_default_group()
    _joined = World(
        dist.get_rank(),
        dist.get_world_size(),
        int(os.environ.get("LOCAL_RANK", 0)),
        device,
        data,
        control,
        store,
        timeout,
    )
    return _joined


def _close() -> None:
    """At the end of the process: torch complains of a group that nobody has destroyed."""
    if dist.is_initialized():
        with suppress(Exception):
            dist.destroy_process_group()


# -- objects as bytes --------------------------------------------------------------------------


def packed(value: Any) -> bytes:
    """A value that another rank of this job unpacks."""
    if isinstance(value, bytes):
        return b"b" + value
    file = io.BytesIO()
    file.write(b"t")
    # Not torch's protocol 2, which makes an OSError of a FileNotFoundError.
    torch.save(value, file, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    return file.getvalue()


def unpacked(data: bytes) -> Any:
    """The value that `packed` was given; its tensors are on the CPU."""
    if data[:1] == b"b":
        return data[1:]
    return torch.load(io.BytesIO(data[1:]), map_location="cpu", weights_only=False)


# -- tensors in one piece ----------------------------------------------------------------------


def buckets_of(tensors: Sequence[Tensor], size: int = BUCKET_BYTES) -> list[list[Tensor]]:
    """Tensors of one dtype and device together, in their order, up to a size."""
    buckets: list[list[Tensor]] = []
    open_ones: dict[Any, tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        bucket, used = open_ones.get(kind, ([], size))
        bytes_ = tensor.numel() * tensor.element_size()
        if used + bytes_ > size:
            bucket, used = [], 0
            buckets.append(bucket)
        bucket.append(tensor)
        open_ones[kind] = (bucket, used + bytes_)
    return buckets


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor of one dimension with all their numbers, a copy."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of it, in the shapes of others."""
    sizes = [tensor.numel() for tensor in like]
    parts: Sequence[Tensor] = flat.split(sizes)  # type: ignore[no-untyped-call]
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
