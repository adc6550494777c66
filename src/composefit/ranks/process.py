"""What a process does for being a rank: it dies with its launcher, and its errors are told.

Nothing here talks to other ranks.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from composefit.ranks.environment import Job
from composefit.ranks.world import PeerFailed

__all__ = ["as_rank", "die_with_parent", "show_rank"]

# A rank that fails because of another one leaves it so much time to say what has happened.
_AFTER_YOU = 2.0

_PR_SET_PDEATHSIG = 1


@contextmanager
def as_rank(job: Job | None) -> Iterator[None]:
    """Around what a rank does that somebody else's launcher has started.

    The rank is killed when torchrun is, its lines begin with its number where
    `COMPOSEFIT_DEBUG=1` or `TORCH_DISTRIBUTED_DEBUG` ask for it, and torchrun's report names the
    rank whose own error came first. Whatever is raised goes on.

    Args:
        job: what `found_job` gives. None, or a job that this package has launched: nothing is done,
            since its launcher has done it.

    Source: `torch.distributed.elastic.multiprocessing.errors`, whose files torchrun reads.
    """
    if job is None or job.launcher == "composefit":
        yield
        return
    if job.launcher == "torchrun":  # the parent of SLURM's tasks looks after them itself
        die_with_parent()
    show_rank(job.rank)
    try:
        yield
    except Exception as error:
        secondary = isinstance(error, PeerFailed)
        _tell_torchrun(error, time.time() + (60.0 if secondary else 0.0))
        if secondary:
            time.sleep(_AFTER_YOU)
        raise


def _tell_torchrun(error: Exception, when: float) -> None:
    """Write the file from which torchrun tells what has happened, and which rank was the first.

    torchrun's own way (`record`) is not used, since it knows of whole seconds: another rank's
    "connection closed", a millisecond later, would look as old as its cause.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or os.path.exists(path):  # the first error of a rank counts
        return
    message: dict[str, Any] = {
        "message": f"{type(error).__name__}: {error}",
        "extraInfo": {
            "py_callstack": "".join(traceback.format_exception(error)),
            "timestamp": str(int(when)),
        },
    }
    with suppress(OSError), open(path, "w") as file:
        json.dump({"message": message}, file)


# -- the parent --------------------------------------------------------------------------------


def die_with_parent(parent: int | None = None) -> None:
    """On Linux: let the system kill this process, and what it forks, when its parent ends.

    Once for all: called again it does nothing. Of the processes that this one forks, those of its
    main thread follow it (the workers of a `DataLoader`): the system's bond is to a thread, and
    other threads may end before what they have forked. Elsewhere than on Linux nothing is done.

    Args:
        parent: the parent's process id, where it is known; if it has ended already, so does this
            process.

    Source: `PR_SET_PDEATHSIG` of prctl(2).
    """
    global _bound
    if _bound or sys.platform != "linux":
        return
    _bound = True
    _bind()
    if parent is not None and os.getppid() != parent:
        os._exit(1)
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


_bound = False
_in_main_thread = False


def _bind() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _before_fork() -> None:
    # Asked here: in the child, the only thread is the main one.
    global _in_main_thread
    _in_main_thread = threading.current_thread() is threading.main_thread()


def _after_fork() -> None:
    if _in_main_thread:
        _bind()


# -- its lines ---------------------------------------------------------------------------------


def show_rank(rank: int) -> None:
    """Begin each line that Python writes to the standard streams with `[rank 1] `, if asked to.

    `COMPOSEFIT_DEBUG=1`, or torch's `TORCH_DISTRIBUTED_DEBUG` (other than `OFF`), asks for it.

    Args:
        rank: this process's number.
    """
    asked = os.environ.get("COMPOSEFIT_DEBUG", "0") != "0"
    if not asked and os.environ.get("TORCH_DISTRIBUTED_DEBUG", "OFF").upper() == "OFF":
        return
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Numbered):
            setattr(sys, name, _Numbered(stream, f"[rank {rank}] "))


class _Numbered:
    """A text stream whose lines begin with the same words, each written in one piece."""

    def __init__(self, stream: TextIO, words: str) -> None:
        self._stream = stream
        self._words = words
        self._kept = ""  # of a line that is not whole yet
        self._begun = False  # the stream is within a line

    def write(self, text: str) -> int:
        *whole, self._kept = (self._kept + text).split("\n")
        for line in whole:
            self._put(line + "\n")
        if whole:
            self._stream.flush()
        return len(text)

    def _put(self, text: str) -> None:
        self._stream.write(text if self._begun else self._words + text)
        self._begun = not text.endswith("\n")

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._kept:
            self._put(self._kept)
            self._kept = ""
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
