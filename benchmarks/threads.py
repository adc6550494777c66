"""What do two shards on two threads bring? Against one thread, torch's own threads, and processes.

Contestants, for each model, all with the same batch in all: the bare loop with one torch thread and
with two, `DistributedDataParallel` in two gloo processes, composefit with one shard on one torch
thread, and composefit's `ThreadDataParallel(threads=2)`, the one that the targets are about.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

from models import GAN, WORKLOADS, Supervised
from processes import Ranks
from rich.table import Table
from timing import (
    Race,
    Segment,
    arguments,
    console,
    gather_contestants,
    in_process,
    machine,
    race,
    verdict,
)
from torch import Tensor

ONE = "1 thread"
TORCH = "torch's 2 threads"
DDP = "DDP, 2 processes"
SINGLE = "composefit, 1 thread"
THREADS = "composefit, 2 threads"

STEPS = {"tiny MLP": 60}
TARGETS = {
    "CNN": {ONE: 1.9, TORCH: 1.15, DDP: 1.1},
    "large MLP": {ONE: 1.7, TORCH: 1.0, DDP: 1.3},
    "transformer": {ONE: 1.8, TORCH: 1.05},
    "tiny MLP": {},
    "DCGAN": {},
}
"""Time of the other ÷ time of `THREADS`, at least; where there is none it is reported."""


def composefit(work: Supervised | GAN, batches: list[Any], threads: int) -> Segment:
    import ours

    from composefit import SingleDevice, ThreadDataParallel

    def train(batches: Iterable[Any]) -> Iterable[Tensor]:
        single = threads == 1
        strategy = SingleDevice("cpu") if single else ThreadDataParallel(threads=threads)
        return ours.train(work, batches, strategy=strategy)

    # As many torch threads as a user's process has: with several shards it is the strategy's
    # business to keep each worker to one.
    return in_process(train, batches, torch_threads=threads, comparable=work.comparable)


@contextlib.contextmanager
def contestants_for(name: str) -> Iterator[dict[str, Segment]]:
    work = WORKLOADS[name]
    batches: list[Any] = list(work.batches(4))
    bare = functools.partial(in_process, work.train, batches, comparable=work.comparable)
    with Ranks(name, world_size=2, count=len(batches)) as ranks:
        yield gather_contestants(
            {
                ONE: bare,
                TORCH: lambda: bare(torch_threads=2),
                DDP: lambda: ranks.segment,
                SINGLE: lambda: composefit(work, batches, threads=1),
                THREADS: lambda: composefit(work, batches, threads=2),
            }
        )


def times_table(results: dict[str, Race]) -> Table:
    names = (ONE, TORCH, DDP, SINGLE, THREADS)
    table = Table(title="Milliseconds a step, median of the rounds")
    table.add_column("model")
    for name in names:
        table.add_column(name, justify="right")
    for model, result in results.items():
        times = [f"{result.median(n) * 1e3:,.2f}" if n in result.seconds else "-" for n in names]
        table.add_row(model, *times)
    return table


def ratios_table(results: dict[str, Race]) -> Table:
    table = Table(title=f"How many times as fast {THREADS} is, median of the ratios in a round")
    for column in ("model", "than", "times", "middle half of rounds", "to reach"):
        table.add_column(column, justify="right" if column == "times" else "left")
    for model, result in results.items():
        for other in result.seconds:
            if other == THREADS or THREADS not in result.seconds:
                continue
            low, middle, high = result.ratio(other, THREADS)
            target = TARGETS[model].get(other)
            table.add_row(
                model,
                other,
                f"{middle:.2f}",
                f"{low:.2f} to {high:.2f}",
                verdict(middle, at_least=target),
            )
    return table


def main() -> None:
    options = arguments(str(__doc__), rounds=15, one_thread=False)
    results = {}
    for name in TARGETS:
        steps = 4 if options.quick else STEPS.get(name, 8)
        with contestants_for(name) as contestants:
            results[name] = race(contestants, rounds=options.rounds, steps=steps)
    console.print(times_table(results), ratios_table(results), machine())


if __name__ == "__main__":
    main()
