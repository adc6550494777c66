"""How much memory does a step need? Micro-batches against small batches, threads against processes.

Micro-batching: a step over a batch of B samples at `microbatch_size=m` should need what a step over
a batch of m samples needs, within 5 %, plus the batch's own bytes. Measured with torch's record of
every allocation, exact to the byte; batches are made before it begins, so that there is nothing to
allow for them. Beside it the same by hand: a plain loop that accumulates.

Threads and processes: two shards on threads share one set of parameters, gradients' sum and
optimizer state, two ranks have one each. Measured as the growth of resident memory in processes of
their own, each warmed up, the sum over ranks. What Python and the libraries need by themselves is
printed apart: a rank needs that once more.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's messages; read when torch loads

import torch
from models import GAN, WORKLOADS, Supervised
from peaks import EVERY_TENSOR_A_MAPPING, PeakResident, peak_allocated, private_resident
from processes import Ranks
from rich.table import Table
from timing import Train, console, machine, verdict
from torch import Tensor
from torch.nn import functional as F

# Samples in the batch, and in a micro-batch.
MICROBATCHES = {"CNN": (512, 64), "transformer": (128, 32)}
SHARED = ("CNN", "large MLP", "transformer", "DCGAN")
STEPS = 2


def composefit(work: Supervised | GAN, **trainer: Any) -> Train:
    import ours

    return functools.partial(ours.train, work, **trainer)


def composefit_threads(work: Supervised | GAN) -> Train:
    from composefit import ThreadDataParallel

    return lambda batches: composefit(work, strategy=ThreadDataParallel(threads=2))(batches)


def by_hand(work: Supervised, size: int) -> Train:
    def train(batches: Iterable[Any]) -> Iterable[Tensor]:
        model = work.build()
        optimizer = work.optimizer(model.parameters())
        for inputs, labels in batches:
            optimizer.zero_grad()
            for x, y in zip(inputs.split(size), labels.split(size), strict=True):
                (F.cross_entropy(model(x), y, reduction="sum") / len(labels)).backward()
            optimizer.step()
        return model.parameters()

    return train


def microbatch_table(names: Sequence[str]) -> Table:
    table = Table(title="Peak of a step's allocations, micro-batched")
    for column in ("model", "step", "MiB", "÷ bare, batch of m", "to reach"):
        table.add_column(column, justify="left" if column in ("model", "step") else "right")
    for name in names:
        size, micro = MICROBATCHES[name]
        peaks = microbatch_peaks(name, size, micro)
        base = next(iter(peaks.values()))
        for step, peak in peaks.items():
            ratio = peak / base
            target = verdict(ratio, at_most=1.05) if "microbatch_size" in step else ""
            table.add_row(name, step, mib(peak), f"{ratio:.3f}", target)
    return table


def microbatch_peaks(name: str, size: int, micro: int) -> dict[str, int]:
    """The peak in bytes by what was run; the first is the bare loop over batches of m."""
    work = WORKLOADS[name]
    assert isinstance(work, Supervised)
    large, small = work.batches(STEPS, size), work.batches(STEPS, micro)
    peaks = {
        f"bare loop, batch of {micro}": allocated(work.train, small),
        f"bare loop, batch of {size}": allocated(work.train, large),
        f"{size} by hand in {micro}s": allocated(by_hand(work, micro), large),
    }
    try:
        whole = composefit(work, strategy="single")
        cut = composefit(work, strategy="single", microbatch_size=micro)
    except ModuleNotFoundError as missing:
        console.print(f"[yellow]left out:[/] composefit ({missing})")
        return peaks
    return peaks | {
        f"composefit, batch of {micro}": allocated(whole, small),
        f"composefit, batch of {size}": allocated(whole, large),
        f"composefit, {size} at microbatch_size={micro}": allocated(cut, large),
    }


def allocated(train: Train, batches: Sequence[Any]) -> int:
    warm_up(train, batches)
    return peak_allocated(lambda: train(batches))


def warm_up(train: Train, batches: Sequence[Any]) -> None:
    train(batches[:1])
    gc.collect()


def mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def resident(
    train: Callable[[Supervised | GAN], Train], name: str, torch_threads: int = 1
) -> tuple[int, int]:
    """Growth while training, and private memory before it, in bytes, of this process."""
    torch.set_num_threads(torch_threads)
    work = WORKLOADS[name]
    batches = work.batches(STEPS)
    run = train(work)
    warm_up(run, batches)
    before = private_resident()
    with PeakResident() as peak:
        run(batches)
    return peak.bytes, before


def ranks_resident(name: str) -> tuple[int, int]:
    with Ranks(name, count=STEPS) as ranks:
        return ranks.resident(STEPS)


CONTESTANTS: dict[str, Callable[[str], tuple[int, int]]] = {
    "1 thread": lambda name: resident(lambda work: work.train, name),
    "torch's 2 threads": lambda name: resident(lambda work: work.train, name, torch_threads=2),
    "DDP, 2 processes": ranks_resident,
    "composefit, 1 thread": lambda name: resident(
        lambda work: composefit(work, strategy="single"), name
    ),
    "composefit, 2 threads": lambda name: resident(composefit_threads, name, torch_threads=2),
}


def shared_table(names: Sequence[str]) -> Table:
    table = Table(title="Growth of resident memory while training (in brackets: before it)")
    for column in ("model", "contestant", "MiB", "÷ DDP"):
        table.add_column(column, justify="left" if column in ("model", "contestant") else "right")
    for name in names:
        peaks = {who: in_own_process(name, who) for who in CONTESTANTS}
        for who, measured in peaks.items():
            if measured:
                grown, before = measured
                processes, _ = peaks["DDP, 2 processes"]
                table.add_row(
                    name, who, f"{mib(grown)} ({mib(before)})", f"{grown / processes:.2f}"
                )
    return table


def in_own_process(name: str, contestant: str) -> tuple[int, ...]:
    finished = subprocess.run(
        [sys.executable, __file__, "--measure", name, contestant],
        env=os.environ | EVERY_TENSOR_A_MAPPING,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    *notes, figures = finished.stdout.splitlines() or [""]
    for note in notes:
        console.print(note)
    return tuple(map(int, figures.split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one model only")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, contestant = options.measure
        try:
            print(*CONTESTANTS[contestant](name))
        except ModuleNotFoundError as missing:
            print(f"left out: {contestant} ({missing})\n")
        return
    console.print(microbatch_table(list(MICROBATCHES)[: 1 if options.quick else None]))
    if sys.platform == "linux":
        console.print(shared_table(SHARED[: 1 if options.quick else None]))
    console.print(machine())


if __name__ == "__main__":
    main()
