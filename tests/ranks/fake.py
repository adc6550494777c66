"""Ranks as threads of one process: for what ranks tell each other, without any process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from composefit.ranks.world import Says, packed, unpacked

Result = TypeVar("Result")

#: Seconds after which a rank that waits alone fails.
PATIENCE = 20.0


class FakeWorld:
    """What `composefit.ranks.World` is to code that only sends and receives.

    As there, every rank has to be at the same place with every message, and gets copies.

    Attributes:
        places: the places of all messages so far, in their order.
    """

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, table: list[Any]) -> None:
        self.rank = self.local_rank = rank
        self.size = size
        self.device = torch.device("cpu")
        self.closed = False
        self.failures = 0
        self.mine, self.agreed = Says(), Says()
        self.places: list[str] = []
        self._meeting = meeting
        self._table = table

    def agree(self, what: str, *words: float, patient: bool = False) -> list[tuple[float, ...]]:
        return [tuple(float(word) for word in own) for own in self.gather(what, words)]

    def gather(self, what: str, value: Any, patient: bool = False) -> list[Any]:
        self.places.append(what)
        self._table[self.rank] = what, packed(value)
        self._meeting.wait(PATIENCE)
        everyone = list(self._table)
        self._meeting.wait(PATIENCE)  # nobody writes the next message before all have read this one
        places = [place for place, _ in everyone]
        if len(set(places)) > 1:
            raise RuntimeError(f"the ranks are at different places: {places}")
        return [unpacked(one) for _, one in everyone]

    def broadcast(self, what: str, value: Any, patient: bool = False) -> Any:
        return self.gather(what, value if self.rank == 0 else None)[0]

    def add_up_(self, tensors: Sequence[Tensor]) -> None:
        everyone = self.gather("tensors to be added up", [tensor.clone() for tensor in tensors])
        for tensor, *parts in zip(tensors, *everyone, strict=True):
            tensor.copy_(torch.stack(parts).sum(0))

    def first_here(self, function: Callable[[], None]) -> None:
        if self.rank == 0:
            function()
        self.barrier("a turn that one rank of each machine takes")

    def fail(self, error: BaseException) -> bool:
        self.closed = True
        self.failures += 1
        return False

    def barrier(self, what: str) -> None:
        self.gather(what, None)


def ranks(size: int, function: Callable[[Any], Result]) -> list[Result]:
    """What a function of its world returns on each rank; the first error of a rank, if any.

    Args:
        size: how many ranks there are.
        function: is called on each, in a thread of its own.
    """
    meeting, table = threading.Barrier(size), [None] * size
    found: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = function(FakeWorld(rank, size, meeting, table))
        except BaseException as error:
            errors[rank] = error
            meeting.abort()  # the others wait in vain

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    own = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    for error in [*own, *errors]:
        if error is not None:
            raise error
    return found
