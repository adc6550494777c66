"""`launch`: run a function in several new processes of this machine, as the ranks of one job.

new interpreters, by torch's elastic launcher; nothing is forked
each runs the function, and leaves a report of how that ended
meanwhile: hand on signals, show warnings, end the job where a rank has failed
return all results, or raise the error of the rank that failed first
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from composefit.ranks.environment import OWN_RUN_ID, found_job
from composefit.ranks.mirror import Sent
from composefit.ranks.parcels import culprit, pack, unpack
from composefit.ranks.rank import value_file
from composefit.ranks.watch import GRACE, Watch
from composefit.signals import Signals

__all__ = ["launch"]

# What a new interpreter does first: before torch is imported, since that reads the environment, and
# before anything else is, since the launcher's folders are where imports come from.
_START = """
import json, os, sys
with open(sys.argv[1] + "/start") as file:
    start = json.load(file)
folder, sys.argv, sys.path[:] = sys.argv[1], start["argv"], start["path"]
os.environ.setdefault("OMP_NUM_THREADS", start["threads"])
import multiprocessing
multiprocessing.set_start_method(start["start_method"])
for name, value in start["main"].items():
    setattr(sys.modules["__main__"], name, value)
from composefit.ranks.rank import main
main(folder, start["parent"])
"""


def launch(
    function: Callable[..., Any],
    processes: int,
    *arguments: Any,
    timeout: float | None = None,
) -> list[Any]:
    """Run `function(*arguments)` in so many new processes, and wait for all of them.

    Each process finds in its environment which rank it is (`RANK`, `WORLD_SIZE`, `MASTER_ADDR` and
    the others that torch's `env://` reads). The main script is not run again in them: functions and
    classes of it are sent along, so that it needs no `if __name__ == "__main__"`, and a notebook
    will do. What it has changed in other modules is not there.

    A rank that raises, dies or ends too early ends the job: the others have four seconds for
    finding that out by themselves. Ctrl-C, SIGTERM and SIGUSR1 are handed on to all ranks, once
    each; when these have ended, they act here. If this process is killed, so are the ranks (on
    Linux).

    Warnings that rank 0 does not handle are shown here, those of others are not. Where the user has
    not set `OMP_NUM_THREADS`, the ranks share the cores that this process may use.

    Args:
        function: may be a lambda, or a function or method of the main script.
        processes: how many.
        arguments: what can be pickled; tensors arrive on the CPU.
        timeout: when the first ranks have returned, the others have so many seconds for it, too;
            None for no limit.

    Returns:
        What each rank's function has returned, in the order of the ranks.

    Raises:
        TypeError: a part of the function or of its arguments cannot be pickled; it is named.
        RuntimeError: this process is a rank already; or a rank was killed, or has ended the process
            itself; the message has its number, and the signal or exit code.
        TimeoutError: ranks have returned, and another has not within `timeout`.
        KeyboardInterrupt, SystemExit: the signal that came, or what all ranks have raised.
        Whatever a rank's function raises: that of the rank which failed first on its own account
            (one that failed because of another one raises `PeerFailed`), with its traceback as the
            cause, and what has become of the others as notes.

    Source: `torch.distributed.launcher.api.elastic_launch`.
    """
    if (job := found_job()) is not None:
        raise RuntimeError(
            f"this process is rank {job.rank} of {job.size} already, and a rank launches no others"
        )
    if multiprocessing.parent_process() is not None and multiprocessing.current_process().daemon:
        raise RuntimeError(
            "this is the worker process of something else, which must not have processes of its own"
        )
    folder = Path(tempfile.mkdtemp(prefix="composefit-"))
    try:
        # What comes back may be of classes that have been sent along: it is of the caller's own.
        sent = Sent(definitions_only=True)
        _write_work(folder, processes, function, arguments, sent)
        with Signals() as signals:
            watch = Watch(folder, processes, signals, timeout)
            codes = _run(folder, processes, watch)
            error = watch.error(codes)
            if error is not None:
                raise error
        files = [value_file(folder, rank) for rank in range(processes)]
        return [unpack(file, sent.resolve)[0] for file in files]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- before ------------------------------------------------------------------------------------


def _write_work(
    folder: Path,
    processes: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    sent: Sent,
) -> None:
    settings = {
        "dtype": torch.get_default_dtype(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "warnings": warnings.filters,
    }
    try:
        pack(folder / "work", [settings, function, arguments, sent.objects], sent.known)
    except Exception as error:
        raise _refusal(function, arguments) or error from error
    start = {
        "argv": sys.argv,
        "path": [os.path.abspath(one) for one in sys.path],
        "threads": str(max(1, _cores() // processes)),
        "start_method": multiprocessing.get_start_method(allow_none=True),
        "main": _main_script(),
        "parent": os.getpid(),
    }
    (folder / "start").write_text(json.dumps(start))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _main_script() -> dict[str, str]:
    """Where processes that a rank spawns find what is pickled by name, as those of this one do."""
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is None or not os.path.exists(path):  # a notebook, `python -c`
        return {}
    return {"__file__": os.path.abspath(path)}


def _refusal(function: Callable[..., Any], arguments: tuple[Any, ...]) -> TypeError | None:
    name = getattr(function, "__qualname__", repr(function))
    found = culprit(function, name)
    for index, argument in enumerate(arguments):
        found = found or culprit(argument, f"argument {index}")
    if found is None:
        return None
    path, value, error = found
    return TypeError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be sent to "
        f"another process ({error}): make it there, when it is first needed, or leave it out of "
        "what its owner's __getstate__ gives"
    )


# -- meanwhile ---------------------------------------------------------------------------------


def _run(folder: Path, processes: int, watch: Watch) -> dict[int, int]:
    """Start the ranks and wait for their end.

    Returns:
        rank -> exit code, of those that have not ended with 0; negative for a signal. In the order
        in which they were found.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=OWN_RUN_ID + secrets.token_hex(8),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.05,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "elastic")),
        signals_to_handle="",  # they are handed on here, and end the job in their own time
        shutdown_timeout=int(GRACE),
    )
    # A command, and not a function for multiprocessing to spawn: that would run the main script
    # again in each rank, and would wait for ever for one that has called os._exit(0).
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    entry = elastic_launch(config, sys.executable)
    try:
        with _quiet(), watch:
            entry(*flags, "-P", "-c", _START, str(folder))
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    return {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines of torch's launcher, which tell of each end of a process as an error.

    What it changes in this process is put back. `LOGLEVEL`, torch's own variable, shows the lines.
    """
    name = "TORCHELASTIC_SIGNALS_TO_HANDLE"
    before = os.environ.get(name)
    noisy: list[logging.Logger] = []
    if "LOGLEVEL" not in os.environ:
        known = [one for one in logging.root.manager.loggerDict if one.startswith(_NOISY)]
        noisy = [logging.getLogger(one) for one in {*known, _EVENTS}]
    were_disabled = [logger.disabled for logger in noisy]
    for logger in noisy:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(noisy, were_disabled, strict=True):
            logger.disabled = disabled
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


_NOISY = ("torch.distributed.elastic", "torch.distributed.launcher")
_EVENTS = "torchelastic-events-null"  # made when it is first used, with a level of its own
