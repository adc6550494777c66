"""Signals that ask a run to end: noted when they come, obeyed where it can be stopped and resumed.

A cluster sends SIGTERM or SIGUSR1 before it takes the machine back, a user presses Ctrl-C. Each
means "stop and keep what there is", and a step that is cut in two cannot be kept.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["Signals", "leave_signals_to_parent"]

# Ctrl-C comes first, so that it is put back last: from then on it may raise at any instruction.
_ENDING: tuple[int, ...] = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)

# The runs that are in progress, the innermost last: that one holds the signal. It changes in the
# main thread only, where handlers run too.
_runs: list[Signals] = []


class Signals:
    """Around a run: SIGINT (Ctrl-C), SIGTERM and SIGUSR1 are noted instead of acted on.

    The run looks at `received` at its step boundaries, and calls `obey` when it has saved what it
    wants to save. A second Ctrl-C raises KeyboardInterrupt at once; a second SIGTERM is as polite
    as the first.

    A signal is taken over only from the handler that Python starts with. One that the user or a
    library has set (a scheduler's requeueing, `faulthandler.register`, a debugger's) stays, and so
    does a signal that is ignored, as Ctrl-C is under `nohup`. Outside of the main thread nothing is
    taken over, since Python runs handlers in the main thread. On exit every handler is put back,
    unless somebody has changed it in the meantime.

    It may be nested: the innermost run is the first to obey, and hands on what it did not get to. A
    signal that comes after a run's last look is obeyed on exit, if the run ended without an
    error; beside an error it becomes a note.

    **Waits.** Python runs the handler while the main thread waits for a lock, a queue, a child
    process or `time.sleep`, and then goes on waiting (PEP 475): the signal is obeyed when that
    returns, so a batch that takes a minute to come delays the end by a minute. A second Ctrl-C ends
    the wait. A computation inside torch is not interrupted by either.

    **Children.** A forked child gets the default handlers back, so that it dies of a SIGTERM. The
    terminal sends Ctrl-C, and some schedulers send SIGUSR1, to the whole group of processes: in
    daemonic children, such as the workers of a `DataLoader`, they do nothing, since the parent will
    want their batches until its step is done, and ends them. Workers that are not forked have to
    ask for that, by `leave_signals_to_parent`. Once a signal is noted, `DataLoader` no longer
    raises in the middle of a step because a worker has died: it was most likely told to, too.

    Attributes:
        received: the number of the signal that waits to be obeyed, or 0.

    Example:
        >>> with Signals() as signals:
        ...     for step in range(3):
        ...         if signals.received:  # at a step boundary
        ...             signals.obey()
    """

    def __init__(self) -> None:
        self.received = 0
        self._interrupted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        outer = _runs[-1] if _runs else None
        _runs.append(self)
        if outer is not None:
            self._take_from(outer)
        for signum in _ENDING:
            if _is_default(signum):
                self._before[signum] = signal.getsignal(signum)
                signal.signal(signum, _note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self not in _runs:
            return
        try:
            for signum, before in reversed(self._before.items()):
                if signal.getsignal(signum) in (_note, _nothing):
                    signal.signal(signum, before)
        finally:
            self._before.clear()
            _runs.remove(self)
        if _runs:
            _runs[-1]._take_from(self)
        elif self.received and isinstance(error, Exception):
            error.add_note(f"{signal.Signals(self.received).name} came as well; this came first")
        else:
            self.obey()

    def obey(self) -> None:
        """End the run by the exception that the noted signal stands for; without one do nothing.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
            SystemExit: for the others, with the code that a shell reports for a process which the
                signal has killed, 128 + its number: 143 for SIGTERM, 138 for SIGUSR1 on Linux.
        """
        # Nothing is called in between, so no handler runs in between.
        signum, self.received = self.received, 0
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        if signum:
            raise SystemExit(128 + signum)

    def _take_from(self, other: Signals) -> None:
        self._interrupted |= other._interrupted
        if other.received:
            self.received, other.received = other.received, 0


def leave_signals_to_parent() -> None:
    """In a worker process: let the parent alone decide what Ctrl-C and SIGUSR1 mean.

    Call it where a worker begins (`worker_init_fn`). Forked workers of a run need it only if they
    were forked before the run; others ("spawn", "forkserver") always: Ctrl-C would end them while
    the parent still waits for a batch, and its `DataLoader` would raise five seconds later.
    Handlers other than Python's own stay, and so does SIGTERM's.
    """
    if threading.current_thread() is threading.main_thread():
        for signum in _ENDING:
            if signum != signal.SIGTERM and _is_default(signum):
                # Not SIG_IGN, which the worker's own subprocesses would inherit.
                signal.signal(signum, _nothing)


# -- handlers ----------------------------------------------------------------------------------


def _note(signum: int, frame: FrameType | None) -> None:
    run = _runs[-1]
    if signum == signal.SIGINT:
        if run._interrupted:
            if run.received == signal.SIGINT:
                run.received = 0
            raise KeyboardInterrupt
        run._interrupted = True
    # The others end the process, which a KeyboardInterrupt in a notebook does not.
    if signum != signal.SIGINT or not run.received:
        run.received = signum
    _expect_workers_to_die(run)


def _nothing(signum: int, frame: FrameType | None) -> None:
    """Unlike SIG_IGN it is not inherited by what the process executes."""


def _expect_workers_to_die(run: Signals) -> None:
    """Keep torch from raising, wherever the main thread is, because a loader's worker has died.

    Its handler of SIGCHLD is set when the first loader with workers is iterated over, so before or
    within the run. A loader that waits for a dead worker finds that out without it.
    """
    child = getattr(signal, "SIGCHLD", None)
    if child is not None:
        handler = signal.getsignal(child)
        if getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling":
            run._before[child] = handler
            signal.signal(child, _nothing)


def _in_child() -> None:
    """After a fork: the child is not the run, and dies of what would kill it without one."""
    for run in _runs:
        for signum in run._before:
            if signal.getsignal(signum) is _note:
                ask = signum != signal.SIGTERM
                signal.signal(signum, _nothing_if_daemonic if ask else signal.SIG_DFL)
    _runs.clear()


def _nothing_if_daemonic(signum: int, frame: FrameType | None) -> None:
    # Asked only now: when it is forked, a child does not know yet what it will be.
    if not multiprocessing.current_process().daemon:
        signal.signal(signum, _default(signum))
        signal.raise_signal(signum)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


# -- what is in place --------------------------------------------------------------------------


def _default(signum: int) -> Callable[[int, FrameType | None], Any] | signal.Handlers:
    return signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL


def _is_default(signum: int) -> bool:
    if signal.getsignal(signum) != _default(signum):
        return False
    # Python does not know of a handler that was set in C, as `faulthandler.register` does, and
    # could not put it back.
    return signum == signal.SIGINT or sys.platform == "win32" or not _handler_in_c(signum)


def _handler_in_c(signum: int) -> int:
    """The address of the function that the operating system calls; 0 for SIG_DFL."""
    action = ctypes.create_string_buffer(512)  # a struct sigaction is 152 bytes on Linux
    ctypes.CDLL(None).sigaction(signum, None, action)
    # POSIX leaves the order open; in glibc, musl and macOS the handler comes first.
    return ctypes.c_void_p.from_buffer(action).value or 0
