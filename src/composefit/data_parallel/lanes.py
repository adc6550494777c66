"""Lanes of a wrapper, and what runs in them: replicas, random streams, the caller's modes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import nn

from composefit.lockstep import guards
from composefit.random import Stream, hash_key, thread_local_generators
from composefit.replicas import Replica
from composefit.strategies import Strategy, ThreadDataParallel


class Here(threading.local):
    """What this thread is doing."""

    in_lane = False


here = Here()


class Crew:
    """Replicas of one module and their random streams: what one forward needs.

    Replicas own buffers, and a graph may have saved them: a crew serves the next forward only when
    the graph of its last one is gone.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.replicas: list[Replica] = []
        self.streams: list[Stream] = []

    def refresh(self, shards: int) -> None:
        """Read the owner anew for so many shards."""
        for replica in self.replicas[:shards]:
            replica.refresh()
        while len(self.replicas) < shards:
            self.replicas.append(Replica(self.owner))
            self.streams.append(Stream())


class Pool:
    """The lanes of one wrapper, opened when they are first needed, and its crews."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self._crews: list[Crew] = []
        self._lock = threading.Lock()
        self._intra_op_threads = 1
        self._opened = False
        self._stack = ExitStack()
        weakref.finalize(self, _close, self._stack)

    @classmethod
    def of(cls, threads: int | None, strategy: Strategy | None) -> Pool:
        """Threads, or lanes of another kind."""
        return cls(ThreadDataParallel(threads) if strategy is None else strategy)

    def hire(self, owner: nn.Module, shards: int) -> Crew:
        """A crew that no graph needs, as the owner is now."""
        try:
            crew = self._crews.pop()
        except IndexError:
            crew = Crew(owner)
        if crew.owner is not owner:
            crew = Crew(owner)
        crew.refresh(shards)
        return crew

    def dismiss(self, crew: Crew) -> None:
        """Let another forward have it."""
        self._crews.append(crew)

    def open(self) -> None:
        """Start the lanes, unless they are."""
        if self._opened:
            return
        threads = torch.get_num_threads()
        self._stack.enter_context(self.strategy.session())
        self._stack.enter_context(thread_local_generators())
        self._intra_op_threads = torch.get_num_threads()
        self.strategy.run([self._settle] * self.strategy.lanes)
        # Between the calls the loop has as many as it had.
        torch.set_num_threads(threads)
        self._opened = True

    def _settle(self) -> None:
        # A thread takes over the caller's number of intra-op threads at its first use of them; the
        # question counts as one, and what is set afterwards lasts.
        torch.get_num_threads()
        torch.set_num_threads(self._intra_op_threads)

    def close(self) -> None:
        """Stop the lanes."""
        with self._lock:
            _close(self._stack)
            self._opened = False

    def each(self, shards: int, function: Callable[[int], None], crew: Crew, what: str) -> None:
        """Run `function(i)` for every shard in its lane, in the modes of the calling thread.

        Raises:
            Whatever a function raises, of several the first shard's, with a note.
        """
        caller = threading.get_ident()
        ambient = _Ambient(crew.owner)
        errors: list[tuple[int, BaseException]] = []

        def lane(i: int) -> None:
            here = threading.get_ident() == caller
            try:
                modes = self._intra_op() if here else ambient.entered()
                with modes, _in_lane(), crew.streams[i]:
                    function(i)
            except BaseException as error:
                thread = threading.current_thread().name
                error.add_note(f"shard {i} of {shards} (thread {thread}), {what}")
                errors.append((i, error))

        with self._lock:
            self.open()
            self.strategy.run([lambda i=i: lane(i) for i in range(shards)])  # type: ignore[misc]
        if errors:
            # Ctrl-C and the like before errors: they were meant for everybody.
            errors.sort(key=lambda found: (isinstance(found[1], Exception), found[0]))
            first = errors[0][1]
            errors.clear()
            try:
                raise first
            finally:
                del first  # its traceback holds this frame, and with it the graph

    @contextmanager
    def _intra_op(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._intra_op_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _close(stack: ExitStack) -> None:
    threads = torch.get_num_threads()
    stack.close()
    torch.set_num_threads(threads)


class _Ambient:
    """All modes of the calling thread, for its workers."""

    def __init__(self, module: nn.Module) -> None:
        parameter = next(module.parameters(), None)
        self.modes = guards.Ambient("cpu" if parameter is None else parameter.device.type)
        self.grad = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()

    @contextmanager
    def entered(self) -> Iterator[None]:
        with (
            torch.inference_mode() if self.inference else nullcontext(),
            torch.set_grad_enabled(self.grad),
            self.modes.entered(),
        ):
            yield


@contextmanager
def _in_lane() -> Iterator[None]:
    before, here.in_lane = here.in_lane, True
    try:
        yield
    finally:
        here.in_lane = before


@contextmanager
def seeded(streams: Sequence[Stream]) -> Iterator[None]:
    """Start the shards' streams from torch's default generator.

    It moves on, by one draw, only if a shard has drawn: what the loop itself draws (noise, the
    order of samples) is not changed by wrapping a module without dropout.
    """
    state = torch.get_rng_state()
    key = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
    for i, stream in enumerate(streams):
        stream.seed(hash_key(key, i))
    before = [stream.generator.get_state() for stream in streams]
    yield
    after = [stream.generator.get_state() for stream in streams]
    if all(map(torch.equal, before, after)):
        torch.set_rng_state(state)
