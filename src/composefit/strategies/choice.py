"""What `Trainer(strategy=, accelerator=, devices=)` may be: a strategy, or words for one."""

from __future__ import annotations

from typing import Any

import torch

from composefit.ranks.environment import found_job
from composefit.strategies.base import Strategy
from composefit.strategies.distributed import Distributed, MultiGPU
from composefit.strategies.single_device import SingleDevice
from composefit.strategies.thread_data_parallel import ThreadDataParallel

_NAMES = ("auto", "single", "threads", "ddp", "fsdp")
_ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


def choose(strategy: object, accelerator: object = "auto", devices: object = "auto") -> Strategy:
    """The strategy that a user asked for.

    Args:
        strategy: a strategy, or `"single"` (one device), `"threads"` (data-parallel threads on a
            CPU), `"ddp"` (`Distributed`: data-parallel processes), `"fsdp"` (`FullySharded`), or
            `"auto"`: a rank of the job where there is one (`torchrun`, SLURM), a process for each
            GPU where there are several, threads where `devices` asks for several CPUs, else one
            device.
        accelerator: `"cpu"`, `"gpu"`, `"cuda"`, `"mps"`, or `"auto"`: what there is.
        devices: a number, -1 for all, `"auto"`, or a list of one index. On a CPU, threads, or with
            `"ddp"` and `"fsdp"` processes.

    Raises:
        ValueError: an unknown name, a device that is not here, or several where one is meant; the
            message lists what can be.
        TypeError: neither a name nor a strategy.
    """
    if isinstance(strategy, Strategy):
        if accelerator != "auto" or devices != "auto":
            raise ValueError(
                f"{type(strategy).__name__} says itself where it runs: leave accelerator and "
                "devices out, or give strategy as a name"
            )
        return strategy
    if not isinstance(strategy, str):
        hint = ""
        if isinstance(strategy, type) and issubclass(strategy, Strategy):
            hint = f": write {strategy.__name__}() with parentheses"
        raise TypeError(f"strategy must be a Strategy or a name, got {strategy!r}{hint}")
    if strategy not in _NAMES:
        raise ValueError(
            f"unknown strategy {strategy!r}: choose one of {', '.join(map(repr, _NAMES))}, or pass "
            "a Strategy such as ThreadDataParallel(threads=4)"
        )
    kind = _device_type(accelerator)
    if strategy in ("ddp", "fsdp"):
        return _processes(strategy, kind, devices)
    if strategy == "auto" and found_job() is not None:
        return Distributed(accelerator="cpu" if kind == "cpu" else "auto")
    if strategy == "auto" and kind in ("auto", "cuda") and _gpus() > 1:
        number = _number(devices) if not isinstance(devices, list | tuple) else len(devices)
        if number is None or number > 1:
            return MultiGPU("auto" if number is None else number)
    if kind == "cpu" or (kind == "auto" and strategy == "threads"):
        return _on_cpu(strategy, _number(devices))
    if strategy == "threads":
        raise ValueError(f"strategy='threads' runs on a CPU: leave accelerator={accelerator!r} out")
    if kind == "auto":
        if devices == "auto":
            return SingleDevice()
        kind = SingleDevice().device.type
        if kind == "cpu":
            return _on_cpu(strategy, _number(devices))
    return _on(kind, devices)


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _processes(strategy: str, kind: str, devices: object) -> Strategy:
    """Data-parallel or sharded processes, one for each device."""
    if kind == "mps":
        raise ValueError(f"strategy={strategy!r} runs on CUDA or CPUs: write accelerator='cpu'")
    if strategy == "fsdp":
        # Here: it takes a second to import, and most runs do without.
        from composefit.strategies.fully_sharded import FullySharded

        return FullySharded(_number(devices), accelerator=kind)
    return Distributed(_number(devices), kind)


def _on_cpu(strategy: str, number: int | None) -> Strategy:
    if strategy == "threads":
        return ThreadDataParallel(number)
    if number is None or number == 1:
        return SingleDevice("cpu")
    if strategy == "single":
        raise ValueError(f"strategy='single' is one device, got devices={number}: write 'threads'")
    return ThreadDataParallel(number)


def _on(kind: str, devices: object) -> Strategy:
    indices = list(devices) if isinstance(devices, list | tuple) else None
    if indices is not None and len(indices) == 1:
        return SingleDevice(f"{kind}:{indices[0]}")
    number = _number(devices) if indices is None else len(indices)
    if devices in (-1, "-1") and kind == "cuda":
        number = torch.cuda.device_count()
    if number in (None, 1):
        return SingleDevice(kind)
    raise ValueError(
        f"devices={devices!r}: one {kind} device can be used: write devices=1, or a list of one"
    )


def _device_type(accelerator: object) -> str:
    if accelerator not in _ACCELERATORS:
        raise ValueError(
            f"unknown accelerator {accelerator!r}: choose one of "
            f"{', '.join(map(repr, _ACCELERATORS))}"
        )
    name = str(accelerator)
    if name == "gpu":
        name = "cuda" if torch.cuda.is_available() else "mps"
    here: dict[str, Any] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name in here and not here[name]():
        raise ValueError(
            f"accelerator={accelerator!r}, and this machine has none that torch can use: write "
            "'auto' for whatever there is"
        )
    return name


def _number(devices: object) -> int | None:
    """How many; None for as many as there are, or as the strategy likes."""
    if devices in ("auto", -1, "-1"):
        return None
    if isinstance(devices, str) and devices.isdecimal():
        devices = int(devices)
    if isinstance(devices, list | tuple):
        devices = len(devices)
    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
        raise ValueError(f"devices must be 'auto', -1, a number from 1, or a list, got {devices!r}")
    return devices
