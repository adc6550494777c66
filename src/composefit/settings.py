"""Settings of torch's that hold for a run, and are put back after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


@contextmanager
def torch_settings(
    deterministic: bool | Literal["warn"], benchmark: bool | None, detect_anomaly: bool
) -> Iterator[None]:
    """Set what a trainer's arguments of these names ask for; False and None leave it as it is."""
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.benchmark
    anomaly = torch.is_anomaly_enabled()
    check_nan = torch.is_anomaly_check_nan_enabled()
    try:
        if deterministic:
            torch.use_deterministic_algorithms(True, warn_only=deterministic == "warn")
        if benchmark is not None:
            torch.backends.cudnn.benchmark = benchmark
        if detect_anomaly:
            torch.autograd.set_detect_anomaly(True)
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        torch.backends.cudnn.benchmark = cudnn
        torch.autograd.set_detect_anomaly(anomaly, check_nan)
