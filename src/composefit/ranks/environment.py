"""`found_job`: whether this process was started as a rank of a job, and as which.

Launchers tell a process by environment variables. Those of torchrun are torch's own (`env://`);
those of SLURM are translated into them, so that torch finds the job whoever has started it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

__all__ = ["OWN_RUN_ID", "Job", "found_job"]

#: How the run ids of jobs begin that `launch` has started.
OWN_RUN_ID = "composefit-"


@dataclass(frozen=True)
class Job:
    """What a process is told of the job that it is a rank of.

    Attributes:
        rank: its number among all processes.
        size: how many there are.
        local_rank: its number among those of its machine.
        local_size: how many those are.
        launcher: `"composefit"` (the processes were started by a plain script), `"torchrun"`,
            `"slurm"`, or `"environment"` (somebody else has set torch's variables).
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str


def found_job(environ: MutableMapping[str, str] | None = None) -> Job | None:
    """The job that this process was started for; None where it was started plainly.

    Under SLURM a process is a rank where `srun` has started several tasks. In the shell of `salloc`
    or of a batch script, which has the variables of the whole job, it is none. torch's variables
    are set from those of SLURM, but for `MASTER_ADDR` and `MASTER_PORT` where they are given.

    Args:
        environ: the variables; those of the process by default.

    Raises:
        ValueError: variables are missing, are no numbers, or contradict each other; the message
            names them, and how to start a job instead.

    Example:
        >>> found_job({}) is None
        True
        >>> variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "7"}
        >>> found_job(variables)
        Job(rank=1, size=2, local_rank=0, local_size=1, launcher='environment')

    Sources: `torch.distributed.init_process_group` and torchrun for the variables of torch, srun's
    manual ("output environment variables") for those of SLURM.
    """
    environ = os.environ if environ is None else environ
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        job = _of_slurm(environ)
        if job is not None:
            _tell_torch(environ, job)
        return job
    return _of_torch(environ)


# -- torch's variables -------------------------------------------------------------------------

_INSTEAD = (
    "start the job with torchrun or srun, which set all of them, or unset RANK and WORLD_SIZE for "
    "a process of its own"
)


def _of_torch(environ: Mapping[str, str]) -> Job:
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in environ]
    if missing:
        there = ", ".join(f"{name}={environ[name]}" for name in needed if name in environ)
        raise ValueError(f"{there} is set and {', '.join(missing)} is not: {_INSTEAD}")
    rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    # Who starts one process a machine need not say so.
    local_rank = _number(environ, "LOCAL_RANK", "0")
    local_size = _number(environ, "LOCAL_WORLD_SIZE", str(local_rank + 1))
    _number(environ, "MASTER_PORT")
    for name, index, total, value in (
        ("RANK", rank, "WORLD_SIZE", size),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_size),
    ):
        if not index < value:
            raise ValueError(f"{name}={index} is no rank of {total}={value}: {_INSTEAD}")
    if local_size > size:
        raise ValueError(f"LOCAL_WORLD_SIZE={local_size} of WORLD_SIZE={size}: {_INSTEAD}")
    return Job(rank, size, local_rank, local_size, _launcher(environ))


def _launcher(environ: Mapping[str, str]) -> str:
    run = environ.get("TORCHELASTIC_RUN_ID")
    if run is not None:
        return "composefit" if run.startswith(OWN_RUN_ID) else "torchrun"
    # As `_tell_torch` has left them for whoever asks again.
    if environ.get("SLURM_STEP_ID") and environ["RANK"] == environ.get("SLURM_PROCID"):
        return "slurm"
    return "environment"


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ[name] if default is None else environ.get(name, default)
    if not re.fullmatch(r"[0-9]+", text.strip()):
        raise ValueError(f"{name}={text!r} is no number: {_INSTEAD}")
    return int(text)


# -- SLURM's -----------------------------------------------------------------------------------

# From here on the numbers of steps are SLURM's own: interactive, batch, extern, pending.
_SHELLS = 2**32 - 6


def _of_slurm(environ: Mapping[str, str]) -> Job | None:
    # The shells of salloc and of a batch script are steps too, whose numbers are the largest.
    if int(environ.get("SLURM_STEP_ID") or _SHELLS) >= _SHELLS:
        return None
    # The step's own number of tasks where it is told: an interactive step has one, and shows the
    # number of the whole job beside it.
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if tasks not in environ or _number(environ, tasks) <= 1:
        return None
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if name not in environ]
    if missing:
        raise ValueError(
            f"this is a task of a SLURM step ({tasks}={environ[tasks]}), and {', '.join(missing)} "
            "is not set: start it with srun, which sets it, or unset SLURM_STEP_ID for a process "
            "of its own"
        )
    rank, size = _number(environ, "SLURM_PROCID"), _number(environ, tasks)
    local_rank = _number(environ, "SLURM_LOCALID")
    if rank >= size:
        raise ValueError(f"SLURM_PROCID={rank} is no rank of {tasks}={size}: start it with srun")
    return Job(rank, size, local_rank, _tasks_here(environ, local_rank), "slurm")


def _tasks_here(environ: Mapping[str, str], local_rank: int) -> int:
    """The number of tasks on this machine: `2(x3),1` is 2, 2, 2, 1."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    node = int(environ.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else local_rank + 1


def _tell_torch(environ: MutableMapping[str, str], job: Job) -> None:
    if "MASTER_ADDR" not in environ:
        nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))
        if not nodes:
            raise ValueError(
                "neither SLURM_STEP_NODELIST nor MASTER_ADDR is set: export MASTER_ADDR, the name "
                "of the machine of rank 0"
            )
        environ["MASTER_ADDR"] = _first_node(nodes)
    if "MASTER_PORT" not in environ:
        # All ranks must find the same one without asking, and jobs that share a machine different
        # ones. Below 32768, where systems begin to give ports away.
        numbers = [int(environ.get(n, "0")) for n in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
        environ["MASTER_PORT"] = str(10_000 + (numbers[0] * 7 + numbers[1]) % 20_000)
    environ["RANK"], environ["WORLD_SIZE"] = str(job.rank), str(job.size)
    environ["LOCAL_RANK"], environ["LOCAL_WORLD_SIZE"] = str(job.local_rank), str(job.local_size)


def _first_node(nodes: str) -> str:
    """The first of a list of nodes, where rank 0 is: `gpu[01-03,7],login` begins with `gpu01`."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])
