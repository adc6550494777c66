"""Two ways to measure peak memory, each exact where the other one is not."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.profiler import ProfilerActivity, profile

EVERY_TENSOR_A_MAPPING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Environment for processes measured with `PeakResident`.

glibc keeps freed memory for later, so that resident memory says little of what is alive. With these
variables each tensor of 64 KiB or more is a mapping of its own, given back when it is freed.
"""


def peak_allocated(function: Callable[[], object]) -> int:
    """The most bytes that tensors held at one moment while the function ran.

    From torch's own record of each allocation: exact to the byte, but of the calling thread alone.
    What was allocated before does not count.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events), default=0)


class PeakResident:
    """The most that resident memory grew by at one moment inside the `with`, in `bytes`.

    From the kernel: whatever the thread, but in pages, and with what the libraries set up on first
    use. Linux only; start the process with `EVERY_TENSOR_A_MAPPING`.
    """

    bytes: int = 0

    def __enter__(self) -> Self:
        missing = [key for key in EVERY_TENSOR_A_MAPPING if key not in os.environ]
        if missing:
            raise RuntimeError(
                f"start this process with {EVERY_TENSOR_A_MAPPING} in its environment: "
                f"{missing} is not set"
            )
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        self._before = _status("VmRSS")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bytes = _status("VmHWM") - self._before


def private_resident() -> int:
    """Resident memory that this process shares with no other, in bytes."""
    return _status("RssAnon")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
