"""`DistributedDataParallel` over gloo, its ranks kept alive so that they can take turns."""

from __future__ import annotations

import functools
import gc
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from models import GAN, WORKLOADS
from peaks import PeakResident, private_resident
from timing import Lap, StampedBatches, fingerprint
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel


class Ranks:
    """Processes that train one workload together, a segment at a time.

    Between segments they wait on a pipe and use no processor time. Each rank has one torch thread
    and its own rows of every batch ready in memory.

    Args:
        name: of the workload in `WORKLOADS`.
        world_size: how many processes.
        count: how many batches are cycled through.
    """

    def __init__(self, name: str, world_size: int = 2, count: int = 4) -> None:
        # `spawn`: a forked child would inherit torch's thread pool in an undefined state.
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name, "store").as_uri()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank, args=(rank, world_size, store, name, count, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def segment(self, steps: int) -> Lap:
        """Train for that many steps; the time is that of the slowest rank."""
        laps: list[Lap] = self._order("segment", steps)
        return max(laps, key=lambda lap: lap.seconds)

    def resident(self, steps: int) -> tuple[int, int]:
        """Growth of resident memory while training, and private memory before it, in bytes.

        Sums over the ranks, after a run of one step that warms up; see `peaks.PeakResident`.
        """
        self._order("resident", 1)
        growths, befores = zip(*self._order("resident", steps), strict=True)
        return sum(growths), sum(befores)

    def _order(self, what: str, steps: int) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((what, steps))
        return [pipe.recv() for pipe in self._pipes]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.terminate()
        self._folder.cleanup()


def _rank(
    rank: int, world_size: int, store: str, name: str, count: int, orders: Connection
) -> None:
    """A rank's process: trains when told to, until the pipe is closed."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", store, rank=rank, world_size=world_size)
    work = WORKLOADS[name]
    # Two forwards of a critic with BatchNorm: DDP's broadcast of its statistics before the second
    # one would write in place what the first one's backward needs, and raise.
    options: dict[str, Any] = {"forward_sync_buffers": False} if isinstance(work, GAN) else {}
    wrap = functools.partial(DistributedDataParallel, **options)
    batches = [
        tuple(tensor.tensor_split(world_size)[rank].clone() for tensor in batch)
        for batch in work.batches(count)
    ]

    def segment(steps: int) -> Lap:
        stamped = StampedBatches(batches, steps)
        trained = work.train(stamped, wrap)
        return Lap(stamped.seconds_per_step(), fingerprint(trained) if work.comparable else ())

    def resident(steps: int) -> tuple[int, int]:
        gc.collect()
        before = private_resident()
        with PeakResident() as peak:
            work.train(batches[:steps], wrap)
        return peak.bytes, before

    answers: dict[str, Callable[[int], Any]] = {"segment": segment, "resident": resident}
    try:
        while True:
            what, steps = orders.recv()
            orders.send(answers[what](steps))
    except EOFError:
        distributed.destroy_process_group()
