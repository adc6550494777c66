"""Where a run took place: versions, device, machine, command."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from composefit.report.redaction import command_line

_PACKAGES = ("composefit", "torch", "torchmetrics", "numpy")


def environment() -> dict[str, str]:
    """What a reader needs to run it again: no environment variables, users or host names.

    Returns:
        Versions of packages and of Python, the platform, accelerators, cores, torch's threads, and
        the command line, in which the values of options such as `--token` are hidden.

    Example:
        >>> sorted(environment())[:4]
        ['command', 'composefit', 'cores', 'device']
    """
    found = {name: _version(name) for name in _PACKAGES}
    found["python"] = platform.python_version()
    found["platform"] = platform.platform()
    found["device"] = _device()
    found["cores"] = _cores()
    found["torch threads"] = str(torch.get_num_threads())
    found["command"] = command_line([os.path.basename(sys.executable), *sys.argv])
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its sources
        return "not installed"


def _device() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{', '.join(names)} (CUDA {torch.version.cuda})"
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "CPU" if found is None else found.type


def _cores() -> str:
    there = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    return str(there) if usable == there else f"{usable} of {there}"
