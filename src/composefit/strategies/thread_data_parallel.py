"""`ThreadDataParallel`: shards side by side in threads, on shared parameters."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from composefit.lockstep import gradients
from composefit.lockstep.gradients import Gradients
from composefit.lockstep.guards import NoParametrizationCache
from composefit.strategies.base import Strategy
from composefit.strategies.splitting import WORTHWHILE, SplitOptimizer, add_split, dense

_NO_CACHE = NoParametrizationCache()


class _Uncached:
    """Refuses `parametrize.cached()` while any strategy of the process runs shards side by side.

    Both calls may be repeated, as they are after an interrupt between two of their instructions.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[Strategy] = set()
        self._cache = parametrize._cache

    def begin(self, strategy: Strategy) -> None:
        with self._lock:
            if parametrize._cache is not _NO_CACHE:
                self._cache = parametrize._cache
            self._running.add(strategy)
            parametrize._cache = _NO_CACHE

    def end(self, strategy: Strategy) -> None:
        with self._lock:
            if self._running == {strategy}:
                parametrize._cache = self._cache
            self._running.discard(strategy)


_uncached = _Uncached()


class ThreadDataParallel(Strategy):
    """Data parallelism in one process: each thread runs its shard on its own core.

    The workers share the parameters and own their buffers. The calling thread is one of them, the
    others live as long as the run. Autograd runs a CPU graph in the thread that calls for it, and
    torch's kernels release the GIL, so forward and backward both run in parallel.

    Args:
        threads: how many; None for the cores that this process may use.
        intra_op_threads: torch's own threads within each.

    Raises:
        ValueError: a number that is less than one.
    """

    concurrent = True

    def __init__(self, threads: int | None = None, intra_op_threads: int = 1) -> None:
        for name, value in (("threads", threads), ("intra_op_threads", intra_op_threads)):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and (not whole or value < 1):
                raise ValueError(
                    f"ThreadDataParallel({name}=...) expects a positive number, got {value!r}"
                )
        self.lanes = usable_cores() if threads is None else threads
        self.intra_op_threads = intra_op_threads
        self._workers: list[_Worker] = []
        self._split: WeakKeyDictionary[Optimizer, SplitOptimizer] = WeakKeyDictionary()
        self._threads_before = 1
        self._running = False

    def open(self) -> None:
        """Start the workers; where one cannot be, all is as before."""
        self._threads_before = torch.get_num_threads()
        try:
            torch.set_num_threads(self.intra_op_threads)
            self._workers = [_Worker(i, self.intra_op_threads) for i in range(1, self.lanes)]
            for worker in self._workers:
                worker.thread.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the workers, and give the calling thread its number of intra-op threads back."""
        workers, self._workers = self._workers, []
        try:
            for worker in workers:
                worker.stop()
            for worker in workers:
                worker.join()
        finally:
            self._split.clear()
            torch.set_num_threads(self._threads_before)

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Task 0 in the calling thread, the others in theirs.

        Ctrl-C waits until all have ended: a worker must not be left in the middle of a step.

        Raises:
            RuntimeError: it is running already, in another thread or around this call.
        """
        own, *others = tasks
        workers = self._workers[: len(others)]
        interrupt: BaseException | None = None
        # Neither another thread nor an interrupt comes between: nothing is called up to `try`.
        if self._running:
            raise RuntimeError(
                "this ThreadDataParallel is already running, in another thread or around this "
                "call, and its workers do one thing at a time: use another strategy object here"
            )
        self._running = True
        try:
            _uncached.begin(self)
            for worker, task in zip(workers, others, strict=True):
                worker.start(task)
            own()
        except BaseException as error:  # a KeyboardInterrupt: tasks raise nothing
            interrupt = error
        while True:
            try:
                for worker in workers:
                    if interrupt is not None:
                        worker.wake()  # the interrupt may have come just before `start` did
                    worker.wait()
                _uncached.end(self)
                self._running = False
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def add_up(self, lanes: Sequence[Gradients], parameters: Sequence[Parameter]) -> Gradients:
        """As `Strategy.add_up`; large gradients are added by all workers, each its part."""
        total, *others = lanes
        for other in others:
            small = list(other)
            targets: list[Tensor] = []
            summands: list[Tensor] = []
            for i, (target, summand) in enumerate(zip(total, other, strict=True)):
                if target is not None and summand is not None and _splittable(target, summand):
                    targets.append(target)
                    summands.append(summand)
                    small[i] = None
            if sum(t.numel() for t in targets) >= WORTHWHILE:
                add_split(targets, summands, self.lanes, self.run)
                gradients.add_(total, small, parameters)
            else:
                gradients.add_(total, other, parameters)
        return total

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Tensor] | None = None
    ) -> None:
        """As `Strategy.optimizer_step`; large elementwise optimizers by all workers."""
        many = self.lanes > 1 and self._workers and closure is None
        if many and SplitOptimizer.suits(optimizer):
            split = self._split.get(optimizer)
            if split is None:
                split = self._split[optimizer] = SplitOptimizer(optimizer, self.lanes)
            if split.step(self.run):
                return
        super().optimizer_step(optimizer, closure)

    def describe(self, samples: int) -> str:
        """As `Strategy.describe`."""
        return f"{samples} = {self.lanes} threads x {-(-samples // self.lanes)}"


def _splittable(target: Tensor, summand: Tensor) -> bool:
    return (
        target.layout is summand.layout is torch.strided
        and target.stride() == summand.stride()
        and dense(target)
    )


class _Worker:
    """A thread that runs one task at a time.

    Two raw locks: of the ways to hand over in Python the quickest but for spinning (43 us a round
    trip; condition variables 47, queues 59). They only wake the other side, the truth is in `task`
    and `busy`: a wake too many does no harm, so an interrupt between any two instructions does
    none.
    """

    def __init__(self, index: int, intra_op_threads: int) -> None:
        self.intra_op_threads = intra_op_threads
        self.task: Callable[[], None] | None = None
        self.busy = False
        self.stopping = False
        self.go = threading.Lock()
        self.ended = threading.Lock()
        self.go.acquire()
        self.ended.acquire()
        self.thread = threading.Thread(
            target=self._loop, name=f"composefit-lane-{index}", daemon=True
        )

    def _loop(self) -> None:
        torch.set_num_threads(self.intra_op_threads)
        while not self.stopping:
            self.go.acquire()
            task = self.task
            if task is not None:  # else a wake too many, and `start` may be about to set one
                self.task = None
                try:
                    task()
                finally:
                    del task  # it holds the shards
                    self.busy = False
                    _release(self.ended)

    def start(self, task: Callable[[], None]) -> None:
        self.busy = True
        self.task = task
        self.wake()

    def wake(self) -> None:
        _release(self.go)

    def wait(self) -> None:
        while self.busy:
            # The time-out is for an interrupt between the wake-up and the look at `busy`.
            self.ended.acquire(timeout=1.0)

    def stop(self) -> None:
        self.stopping = True
        self.wake()

    def join(self) -> None:
        if self.thread.ident is not None:  # it was started
            self.thread.join()


def _release(lock: threading.Lock) -> None:
    if lock.locked():
        lock.release()


def usable_cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1
