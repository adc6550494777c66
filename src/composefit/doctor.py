"""`composefit doctor`: what this machine has, and what a trainer would make of it.

`examine` finds plain data, which `--json` prints; `rows` puts it into words.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from composefit.ranks.environment import found_job
from composefit.strategies.choice import choose

#: What `examine` finds: sections of names and JSON's own types.
Facts: TypeAlias = dict[str, dict[str, Any]]

#: What each extra brings, by the names they are imported under.
EXTRAS = {
    "demo": ("sklearn", "matplotlib"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
}
_PACKAGES = ("composefit", "torch", "torchmetrics", "numpy")
_BACKENDS = ("gloo", "nccl", "ucc", "mpi", "xccl")
_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# What Docker gives a container unless it is told otherwise: too little for a loader's workers.
_SMALL_SHARED_MEMORY = 64 * 2**20


def doctor(as_json: bool = False, console: Console | None = None) -> int:
    """Print what this machine has.

    Args:
        as_json: print JSON, for a program to read or a bug report.
        console: where to; None is standard output. A table where it is a terminal, else plain text.

    Returns:
        The exit status: 0, or 1 where a trainer could not start here.
    """
    console = console or Console()
    facts = examine()
    if as_json:
        console.file.write(json.dumps(facts, indent=2) + "\n")
    elif console.is_terminal:
        console.print(_table(facts))
    else:
        console.file.write(_plain(facts))
    return 0 if facts["strategy"]["auto"] else 1


# -- finding ---------------------------------------------------------------------------------------


def examine() -> Facts:
    """What this machine, this installation and this process's environment have.

    Returns:
        By section. Memory is in bytes; `None` is what could not be found out.

    Example:
        >>> sorted(examine())
        ['backends', 'extras', 'gpus', 'launcher', 'machine', 'strategy', 'versions']
    """
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
        "machine": _machine(),
        "gpus": _gpus(),
        "backends": _backends(),
        "launcher": _launcher(),
        "extras": {
            name: all(find_spec(module) is not None for module in modules)
            for name, modules in EXTRAS.items()
        },
        "strategy": _strategy(),
    }


def _machine() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shared = Path("/dev/shm")
    return {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "quota_cores": quota_of_cores(),
        "memory": _memory(),
        "memory_limit": memory_limit(),
        "shared_memory": shutil.disk_usage(shared).total if shared.is_dir() else None,
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf, others not these names
        return None


def quota_of_cores(root: Path = Path("/")) -> float | None:
    """How many cores' time the control groups of this process grant; None where they do not say.

    Args:
        root: of the file system.

    Source: the kernel's documentation of `cpu.max` (version 2) and `cpu.cfs_quota_us` (version 1).
    """
    quotas = [
        int(quota) / int(period)
        for text in _limits(root, "cpu", "cpu.max")
        for quota, period in [text.split()]
        if quota != "max"
    ]
    periods = _limits(root, "cpu", "cpu.cfs_period_us")
    for quota, period in zip(_limits(root, "cpu", "cpu.cfs_quota_us"), periods, strict=False):
        if int(quota) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """How many bytes the control groups of this process grant; None where they do not say."""
    limits = [
        int(text)
        for name in ("memory.max", "memory.limit_in_bytes")
        for text in _limits(root, "memory", name)
        if text != "max"
    ]
    # Version 1 writes "no limit" as the largest number of pages there is.
    return min((limit for limit in limits if limit < 2**60), default=None)


def _limits(root: Path, controller: str, name: str) -> Iterator[str]:
    """What the files of that name say, from this process's control group up to the root."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        # Version 2 has one hierarchy without a controller's name, version 1 one a controller, or
        # for several together, which has a name of its own or that of all of them.
        if controllers and controller not in controllers.split(","):
            continue
        for mount in dict.fromkeys((controllers, controllers and controller)):
            top = root / "sys/fs/cgroup" / mount
            group = top / path.lstrip("/")
            # A container sees its own group as the root, though its path may be the host's.
            for folder in [group, *group.parents]:
                if folder.is_relative_to(top):
                    with suppress(OSError):
                        yield (folder / name).read_text().strip()


def _gpus() -> dict[str, Any]:
    """Of CUDA (or ROCm, which torch calls so too); Apple's and Intel's by their names alone."""
    found: dict[str, Any] = {"built_for": _built_for(), "driver": nvidia_driver(), "devices": []}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            found["devices"].append(
                {
                    "name": about.name,
                    "memory": about.total_memory,
                    "capability": f"{about.major}.{about.minor}",
                }
            )
    elif torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        count = torch.accelerator.device_count()
        found["devices"] = [{"name": str(kind), "memory": None, "capability": None}] * count
    return found


def _built_for() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"


def nvidia_driver(root: Path = Path("/")) -> str | None:
    """The version of NVIDIA's driver, without asking the GPU; None where there is none."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", text)
    return found[1] if found else None


def _backends() -> dict[str, Any]:
    """The back ends of torch.distributed that this build of torch has."""
    if not dist.is_available():
        return dict.fromkeys(_BACKENDS, False)
    found: dict[str, Any] = {}
    for name in _BACKENDS:
        available = getattr(dist, f"is_{name}_available", None)
        found[name] = bool(available and available())
    if found["nccl"] and torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def _launcher() -> dict[str, Any]:
    """The job that this process is a rank of, by the environment's variables."""
    found: dict[str, Any] = {"name": None, "rank": None, "size": None, "problem": None}
    try:
        job = found_job(dict(os.environ))  # a copy: for SLURM it translates the variables
    except (RuntimeError, ValueError) as error:
        found["problem"] = str(error)
        job = None
    if job is not None:
        found |= {"name": job.launcher, "rank": job.rank, "size": job.size}
    names = [n for n in os.environ if n in _LAUNCH_VARIABLES or n.startswith("SLURM_")]
    # Their names only: of SLURM's values some tell who and where one is.
    return found | {"variables": sorted(names)}


def _strategy() -> dict[str, Any]:
    """What `Trainer(strategy="auto")` would take, or why it would raise."""
    try:
        strategy = choose("auto")
    except Exception as error:
        return {"auto": None, "device": None, "why": f"{type(error).__name__}: {error}"}
    return {
        "auto": type(strategy).__name__,
        "device": str(strategy.device),
        "why": _why(),
    }


def _why() -> str:
    return because(_launcher(), _gpus()["devices"], torch.cuda.is_available())


def because(launcher: dict[str, Any], devices: list[dict[str, Any]], cuda: bool) -> str:
    """Why `"auto"` takes what it takes, in a sentence without its full stop.

    Args:
        launcher: as `examine` finds it.
        devices: the accelerators, likewise.
        cuda: whether they are of CUDA.
    """
    if launcher["size"] is not None:
        return f"this process is rank {launcher['rank']} of {launcher['size']} ({launcher['name']})"
    if len(devices) > 1 and cuda:
        return f"there are {len(devices)} GPUs, each of which gets a process"
    if devices:
        return f"there is one accelerator that torch can use ({devices[0]['name']})"
    return (
        "there is no GPU that torch can use, and one process takes as many of torch's threads as "
        "there are cores; strategy='threads' runs shards side by side on them instead"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its sources
        return None


# -- in words --------------------------------------------------------------------------------------


def rows(facts: Facts) -> Iterator[tuple[str, str, str]]:
    """A section's name, what is asked, and the answer; what may be a problem has a `!` in front.

    Args:
        facts: as `examine` finds them.
    """
    for name, found in facts["versions"].items():
        yield "versions", name, found or "not installed as a package"
    yield from (("machine", *row) for row in _machine_rows(facts["machine"]))
    yield from (("GPUs", *row) for row in _gpu_rows(facts["gpus"]))
    backends = facts["backends"]
    there = [f"{n} {v}" if isinstance(v, str) else n for n, v in backends.items() if v]
    yield "back ends", "in this torch", ", ".join(there) or "! none: it is one process only"
    yield "back ends", "not in it", ", ".join(n for n, v in backends.items() if not v) or "none"
    yield "launcher", "found", _launched(facts["launcher"])
    for name, found in facts["extras"].items():
        missing = f'no: pip install "composefit[{name}]"'
        yield "extras", name, "yes" if found else missing
    strategy = facts["strategy"]
    if strategy["auto"] is None:
        yield "strategy", '"auto"', f"! {strategy['why']}"
    else:
        answer = f"{strategy['auto']} on {strategy['device']}, since {strategy['why']}"
        yield "strategy", '"auto"', answer


def _machine_rows(machine: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "system", machine["system"]
    usable, quota = machine["usable_cores"], machine["quota_cores"]
    cores = f"{usable} of {machine['cores']} may be used by this process"
    if quota is not None and quota < usable:
        # Threads beyond the quota are stopped all at once, for the rest of each tenth of a second.
        cores = (
            f"! {cores}, with the time of {quota:g}: give strategies {math.ceil(quota)} threads, "
            f"and set OMP_NUM_THREADS={math.ceil(quota)}"
        )
    yield "cores", cores
    threads = str(machine["torch_threads"])
    if machine["omp_num_threads"]:
        threads += f" (OMP_NUM_THREADS={machine['omp_num_threads']})"
    yield "torch's threads", threads
    memory, limit = machine["memory"], machine["memory_limit"]
    text = "unknown" if memory is None else _gib(memory)
    if limit is not None and (memory is None or limit < memory):
        text += f", of which this process may use {_gib(limit)}"
    yield "memory", text
    shared = machine["shared_memory"]
    if shared is not None:
        text = _gib(shared)
        if shared <= _SMALL_SHARED_MEMORY:
            text = (
                f"! {text}: too little for a loader's workers; start the container with "
                "--shm-size=8g or --ipc=host"
            )
        yield "shared memory", text


def _gpu_rows(gpus: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "torch is built for", gpus["built_for"]
    driver, devices = gpus["driver"], gpus["devices"]
    if driver is not None:
        yield "driver", driver
    for index, device in enumerate(devices):
        memory = "" if device["memory"] is None else f", {_gib(device['memory'])}"
        capability = device["capability"]
        able = "" if capability is None else f", compute capability {capability}"
        yield str(index), f"{device['name']}{memory}{able}"
    if not devices:
        problem = driver is not None
        cause = (
            "this torch is built for the CPU"
            if gpus["built_for"] == "CPU"
            else "the driver is older than torch's CUDA, or CUDA_VISIBLE_DEVICES hides them"
        )
        yield "found", f"! none, though there is a driver: {cause}" if problem else "none"


def _launched(launcher: dict[str, Any]) -> str:
    if launcher["problem"]:
        return f"! {launcher['problem']}"
    if launcher["size"] is not None:
        return f"{launcher['name']}: rank {launcher['rank']} of {launcher['size']}"
    return "none: this process is no rank of a job"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def _table(facts: Facts) -> Table:
    table = Table(title="composefit doctor", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    before = ""
    for section, what, answer in rows(facts):
        if before and section != before:
            table.add_section()
        style = "yellow" if answer.startswith("!") else ""
        table.add_row("" if section == before else section, what, answer, style=style)
        before = section
    return table


def _plain(facts: Facts) -> str:
    """A line each, to be searched and compared: no frames, colours or widths."""
    return "".join(f"{section}: {what}: {answer}\n" for section, what, answer in rows(facts))
