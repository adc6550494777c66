"""What a process that `launch` has started runs: its function, and a report of how that ended."""

from __future__ import annotations

import atexit
import faulthandler
import os
import pickle
import signal
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from composefit.ranks import process
from composefit.ranks.mirror import Mirror
from composefit.ranks.outcome import Outcome
from composefit.ranks.parcels import pack, unpack

__all__ = [
    "STACK_SIGNAL",
    "main",
    "outcome_file",
    "pid_file",
    "stack_file",
    "value_file",
    "warnings_file",
]

#: On this signal a launched rank writes down where it is; None where the system has no such signal.
STACK_SIGNAL: int | None = getattr(signal, "SIGUSR2", None)


def pid_file(folder: Path, rank: int) -> Path:
    """Holds the process id of a rank, from its beginning on."""
    return folder / f"pid-{rank}"


def outcome_file(folder: Path, rank: int) -> Path:
    """Holds how a rank has ended, once its function has."""
    return folder / f"outcome-{rank}"


def value_file(folder: Path, rank: int) -> Path:
    """Holds what the function of a rank has returned, once its outcome is there."""
    return folder / f"value-{rank}"


def stack_file(folder: Path, rank: int) -> Path:
    """Holds where a rank was when it was asked."""
    return folder / f"stack-{rank}"


def warnings_file(folder: Path, number: int) -> Path:
    """Holds the so-many-th warning of rank 0."""
    return folder / f"warning-{number}"


def main(folder: str, parent: int) -> None:
    """Run the function in `folder`, and leave there how it ended; what it raised is told there.

    Args:
        folder: private to the job; made by `launch`.
        parent: the process id of the launcher.
    """
    rank, place = int(os.environ["RANK"]), Path(folder)
    process.die_with_parent(parent)
    _replace(pid_file(place, rank), str(os.getpid()).encode())
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # else lines wait in a pipe until the end
            stream.reconfigure(line_buffering=True)
    process.show_rank(rank)
    faulthandler.enable()
    with open(stack_file(place, rank), "w") as stack:
        _write_stack_when_asked(stack)
        outcome = _run(place, rank)
        _replace(outcome_file(place, rank), pickle.dumps(outcome))
    if outcome.kind is not None:
        # Connections that are in use bring the process down with a core dump where it ends as
        # usual, and a thread that waits for another rank would keep it.
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)


def _run(folder: Path, rank: int) -> Outcome:
    try:
        settings, function, arguments, sent = unpack(folder / "work")
        _take_over(settings)
        with warnings.catch_warnings():
            warnings.filters[:] = settings["warnings"]  # type: ignore[index]
            warnings.showwarning = _Teller(folder) if rank == 0 else _nothing
            value = function(*arguments)
        ended = time.monotonic()
    except BaseException as error:
        return Outcome.of_error(rank, error)
    try:
        pack(value_file(folder, rank), [value], Mirror(sent).known)
    except Exception as error:
        error.add_note(f"what rank {rank} has returned cannot be sent to its launcher")
        return Outcome.of_error(rank, error)
    return Outcome(rank, ended)


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_bytes(data)
    os.replace(beside, path)


def _take_over(settings: dict[str, Any]) -> None:
    """Settings of torch that a step's numbers depend on, as they are in the launcher."""
    torch.set_default_dtype(settings["dtype"])
    torch.set_float32_matmul_precision(settings["matmul"])
    torch.set_deterministic_debug_mode(settings["deterministic"])


def _write_stack_when_asked(file: TextIO) -> None:
    if STACK_SIGNAL is not None and signal.getsignal(STACK_SIGNAL) is signal.SIG_DFL:
        faulthandler.register(STACK_SIGNAL, file, all_threads=False)


def _nothing(*arguments: Any, **named: Any) -> None:
    """Other ranks warn of the same."""


class _Teller:
    """In place of `warnings.showwarning`: leaves the warning to the launcher to show."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        path = warnings_file(self._folder, self._number)
        beside = path.with_suffix(".tmp")
        self._number += 1
        with suppress(Exception):
            try:
                pack(beside, [(message, category, filename, lineno)])
            except Exception:  # of a class that only it knows
                pack(beside, [(str(message), UserWarning, filename, lineno)])
            os.replace(beside, path)
