"""`Watch`: looks after the processes of a job while it runs, and says what was wrong with it."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from composefit.ranks.outcome import Outcome
from composefit.ranks.parcels import unpack
from composefit.ranks.rank import (
    STACK_SIGNAL,
    outcome_file,
    pid_file,
    stack_file,
    warnings_file,
)
from composefit.signals import Signals

__all__ = ["GRACE", "Watch"]

#: When a rank has failed, the others have so many seconds to find that out and end by themselves.
GRACE = 4.0

_INTERVAL = 0.05


class Watch:
    """While it is entered, a thread looks at the ranks' processes every 50 ms.

    Args:
        folder: private to the job.
        processes: how many ranks there are.
        signals: those that this process gets; they are handed on.
        timeout: when the first ranks have returned, the others have so many seconds.
    """

    def __init__(
        self, folder: Path, processes: int, signals: Signals, timeout: float | None
    ) -> None:
        self._folder = folder
        self._signals = signals
        self._timeout = timeout
        self._running = dict.fromkeys(range(processes), 0)  # rank -> process id, once it is known
        self._ended: dict[int, Outcome] = {}
        self._died: dict[int, float] = {}  # without an outcome; when they were last seen alive
        self._seen = time.monotonic()
        self._killed: dict[int, str] = {}  # by this watch; rank -> where it was
        self._late: list[int] = []
        self._handed_on = 0
        self._warned = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="composefit ranks", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        if kind is KeyboardInterrupt:  # the second one
            self._kill()
        self._look()

    # -- in the thread -------------------------------------------------------------------------

    def _look_on(self) -> None:
        failed: float | None = None
        while not self._over.wait(_INTERVAL):
            self._hand_on()
            self._look()
            now = time.monotonic()
            if failed is None and self._has_failed():
                failed = now
            if failed is None and self._are_late(now):
                self._late = list(self._running)
                failed = now - GRACE
            if failed is not None and now >= failed + GRACE:
                self._kill()

    def _has_failed(self) -> bool:
        kinds = {one.kind for one in self._ended.values()}
        if self._signals.received:  # they are asked to end, each in its own time
            return bool(kinds & {"own", "peer's"})
        return bool(self._died or kinds - {None})

    def _hand_on(self) -> None:
        received = self._signals.received
        if received and received != self._handed_on:
            self._handed_on = received
            for pid in self._running.values():
                if pid:
                    with suppress(ProcessLookupError):
                        os.kill(pid, received)

    def _look(self) -> None:
        """Which have ended since, and how; show what rank 0 has warned of."""
        seen, self._seen = self._seen, time.monotonic()
        for rank, pid in list(self._running.items()):
            if not pid:
                self._running[rank] = self._pid(rank)
            alive = not pid or _is_alive(pid)
            # Asked after the process: an outcome that is not there now will not come.
            path = outcome_file(self._folder, rank)
            if path.exists():
                self._ended[rank] = pickle.loads(path.read_bytes())
                del self._running[rank]
            elif not alive:
                self._died[rank] = seen
                del self._running[rank]
        while (path := warnings_file(self._folder, self._warned)).exists():
            self._warned += 1
            warnings.showwarning(*unpack(path)[0])

    def _pid(self, rank: int) -> int:
        path = pid_file(self._folder, rank)
        return int(path.read_text()) if path.exists() else 0

    def _are_late(self, now: float) -> bool:
        if self._timeout is None or not self._ended or not self._running:
            return False
        return now > min(one.when for one in self._ended.values()) + self._timeout

    def _kill(self) -> None:
        """End what is left, with all processes that it has started."""
        running = {rank: pid for rank, pid in self._running.items() if pid}
        for rank, pid in running.items():
            if rank not in self._killed:
                self._killed[rank] = self._where(rank, pid)
            with suppress(ProcessLookupError, PermissionError):
                # The launcher has given each a process group of its own.
                os.killpg(pid, signal.SIGKILL)

    def _where(self, rank: int, pid: int) -> str:
        """Where a rank is, as `faulthandler` writes it from outside of the interpreter."""
        if STACK_SIGNAL is None:
            return ""
        path = stack_file(self._folder, rank)
        with suppress(OSError):
            os.kill(pid, STACK_SIGNAL)
            for _ in range(20):
                time.sleep(0.01)
                if path.stat().st_size:
                    time.sleep(0.01)  # for the rest of it
                    return path.read_text()
        return ""

    # -- afterwards ----------------------------------------------------------------------------

    def error(self, codes: dict[int, int]) -> BaseException | None:
        """What is to be raised for a job that has ended.

        Args:
            codes: rank -> exit code, of those whose process has not ended with 0.

        Returns:
            The error of the rank that failed first on its own account; None if all have returned,
            or if they have ended because of a signal that this process has got.
        """
        processes = len(self._running) + len(self._ended) + len(self._died)
        dead = [*self._died, *self._running]
        failed = [one for one in self._ended.values() if one.kind is not None]
        if not dead and not failed:
            return None
        if self._signals.received and not any(one.kind == "own" for one in failed):
            return None
        exits = [one for one in failed if one.kind == "exit"]
        if len(exits) == processes:
            return min(exits, key=_when).raised()
        error, culprit = self._first(failed, dead, codes, processes)
        self._add_notes(error, [one for one in failed if one.rank != culprit])
        return error

    def _first(
        self, failed: list[Outcome], dead: list[int], codes: dict[int, int], processes: int
    ) -> tuple[BaseException, int]:
        # Those that the launcher has ended are no cause, unless nobody else is one.
        causes = [rank for rank in dead if rank not in self._killed]
        causes = [rank for rank in causes if codes.get(rank) != -signal.SIGTERM] or causes
        causes.sort(key=self._death)
        own = sorted((one for one in failed if one.kind != "peer's"), key=_when)
        if own and not (causes and self._death(causes[0]) < own[0].when):
            first = own[0]
            return first.raised() if first.kind == "own" else _left(first, processes), first.rank
        if causes:
            how = _end(codes.get(causes[0], 0))
            return RuntimeError(f"rank {causes[0]} of {processes} {how}"), causes[0]
        if self._late:
            names = ", ".join(f"rank {rank}" for rank in self._late)
            return TimeoutError(
                f"{names} of {processes} did not return within {self._timeout:g} s after the first"
            ), -1
        first = min(failed, key=_when)
        return first.raised(), first.rank

    def _death(self, rank: int) -> float:
        """When a process was last seen alive: what it has caused came later."""
        return self._died.get(rank, 0.0)

    def _add_notes(self, error: BaseException, others: list[Outcome]) -> None:
        for one in others:
            error.add_note(f"then rank {one.rank} ended with {one.text}")
        for rank, where in self._killed.items():
            note = f"rank {rank} was still running, and was killed"
            error.add_note(f"{note}, here:\n{where.rstrip()}" if where else note)


def _when(outcome: Outcome) -> float:
    return outcome.when


def _end(code: int) -> str:
    if code >= 0:
        return f"has ended its process with exit code {code}, before its function returned"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ""
    if name == "SIGKILL":
        hint = " (by the system, where the memory was used up, or by somebody)"
    return f"was killed by {name}{hint}"


def _left(outcome: Outcome, processes: int) -> RuntimeError:
    error = RuntimeError(
        f"rank {outcome.rank} of {processes} has ended by itself while others were running: "
        f"{outcome.text}"
    )
    error.__cause__ = outcome.raised().__cause__
    return error


def _is_alive(pid: int) -> bool:
    """Whether a child runs; it is left to the launcher to ask for its exit code."""
    if hasattr(os, "waitid"):  # not on macOS
        with suppress(ChildProcessError):
            look = os.WEXITED | os.WNOWAIT | os.WNOHANG
            return os.waitid(os.P_PID, pid, look) is None
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
