"""Rank processes that stay for many tests: a job of n ranks, to which functions are handed."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

#: A test that takes longer than this in a rank has hung.
LIMIT = 240.0


class RankPool:
    """`run` calls a function on every rank; where one raises, the processes are replaced."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank returned; a rank's exception (the lowest rank's that raised) is raised."""
        outcomes = self.outcomes(function, *arguments)
        failed = [(rank, one) for rank, one in enumerate(outcomes) if isinstance(one, Failure)]
        if failed:
            text = "\n".join(f"rank {rank}: {one.text}" for rank, one in failed)
            raise AssertionError(text)
        return outcomes

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank returned, or the `Failure` that it ended with."""
        if not self._ranks:
            self._start()
        work = cloudpickle.dumps((function, arguments))
        outcomes: list[Any] = []
        for _, connection in self._ranks:
            connection.send_bytes(work)
        for process, connection in self._ranks:
            try:
                there = connection.poll(LIMIT)
                outcomes.append(
                    cloudpickle.loads(connection.recv_bytes())
                    if there
                    else Failure("TimeoutError", f"nothing came back in {LIMIT} s")
                )
            except EOFError:
                process.join(5)
                outcomes.append(Failure("Died", f"exit code {process.exitcode}"))
        if any(isinstance(one, Failure) for one in outcomes):
            self.close()
        return outcomes

    def close(self) -> None:
        for process, connection in self._ranks:
            with suppress(OSError):
                connection.close()
            process.kill()
            process.join()
        self._ranks.clear()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, rank, self.size, port, sys.path), daemon=True
            )
            process.start()
            there.close()
            self._ranks.append((process, here))


class Failure:
    """An exception of a rank, by its type's name, its text with notes, and its traceback."""

    def __init__(self, kind: str, text: str, trace: str = "") -> None:
        self.kind = kind
        self.text = text
        self.trace = trace

    def __repr__(self) -> str:
        return f"{self.kind}: {self.text}\n{self.trace}"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _serve(connection: Connection, rank: int, size: int, port: int, path: list[str]) -> None:
    sys.path[:] = path
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
    )
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            work = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, arguments = cloudpickle.loads(work)
            torch.manual_seed(0)
            found: Any = function(*arguments)
        except BaseException as error:
            notes = "\n".join(getattr(error, "__notes__", []))
            text = f"{error}\n{notes}"
            found = Failure(type(error).__name__, text, traceback.format_exc())
        connection.send_bytes(cloudpickle.dumps(found))


_pools: dict[int, RankPool] = {}


def pool(size: int) -> RankPool:
    """The pool of so many ranks of this test process."""
    return _pools.setdefault(size, RankPool(size))


@contextmanager
def closing_pools() -> Iterator[None]:
    try:
        yield
    finally:
        for one in _pools.values():
            one.close()
        _pools.clear()
