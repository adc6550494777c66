"""How the benchmarks measure: short training runs that take turns, compared round by round.

One run of a contestant scatters by a factor of two on a machine that does anything else, and the
scatter is slow: it lasts for seconds. So every contestant trains in *segments* of a few dozen
steps, the segments of all contestants take turns in an order that is shuffled anew each round, and
what is reported is the median over rounds of the ratio *within* a round.

Inside a segment the clock is read by the batches themselves (`StampedBatches`): whatever a trainer
does to start and to end a run is not counted, all that it does between two batches is.

Every segment also returns a fingerprint of the parameters it ends at, and `race` compares them: a
contestant that trains something else than the others is an error, not a good time.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Train = Callable[[Any], Iterable[torch.Tensor]]
"""Trains a fresh, seeded model once through the batches and returns its parameters."""

Clock = Callable[[], float]

CONTROL = "bare loop, once more (control)"
"""The first contestant entered twice: how far its ratio is from 1 is how far to trust the rest."""

console = Console(width=110)


@dataclass(frozen=True)
class Lap:
    """What one segment gives.

    Attributes:
        seconds: time of one step, the mean over the segment without its first fifth.
        fingerprint: the Euclidean norm of each parameter at the end, sorted, so that a library
            with other shapes, names or order can be compared; empty if runs are not comparable.
    """

    seconds: float
    fingerprint: tuple[float, ...] = ()


Segment = Callable[[int], Lap]
"""Trains for that many steps, from the start, and says how long a step took."""


class StampedBatches:
    """Batches ready in memory that note the time whenever one is fetched.

    Args:
        batches: what to hand out, cyclically.
        steps: how many to hand out in one iteration.
        clock: tells the time in seconds.
    """

    def __init__(
        self, batches: Sequence[Any], steps: int, clock: Clock = time.perf_counter
    ) -> None:
        self.batches = batches
        self.steps = steps
        self.clock = clock
        self.stamps: list[float] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        self.stamps = stamps = []
        for step in range(self.steps):
            stamps.append(self.clock())
            yield self.batches[step % len(self.batches)]

    def seconds_per_step(self) -> float:
        """The mean time between two fetches, leaving out the first fifth (at least one).

        The mean and not the median, so that what happens only every so many steps counts. A trainer
        that fetches a batch ahead shifts all stamps alike.
        """
        if len(self.stamps) != self.steps:
            raise RuntimeError(
                f"the trainer fetched {len(self.stamps)} batches of {self.steps}: it must go "
                "through the batches exactly once, one step each"
            )
        first = max(1, self.steps // 5)
        return (self.stamps[-1] - self.stamps[first]) / (self.steps - 1 - first)


def fingerprint(parameters: Iterable[torch.Tensor]) -> tuple[float, ...]:
    """The sorted norms of the parameters, in float64; see `Lap`."""
    return tuple(sorted(float(p.detach().double().norm()) for p in parameters))


def in_process(
    train: Train,
    batches: Sequence[Any],
    *,
    torch_threads: int = 1,
    comparable: bool = True,
    clock: Clock = time.perf_counter,
) -> Segment:
    """A contestant that runs in this process.

    Args:
        train: trains once through the batches it is given.
        batches: the batches, ready in memory.
        torch_threads: how many threads torch may use within one operation.
        comparable: whether it must end where the others end.
        clock: tells the time in seconds.
    """

    def segment(steps: int) -> Lap:
        stamped = StampedBatches(batches, steps, clock)
        torch.set_num_threads(torch_threads)
        trained = train(stamped)
        return Lap(stamped.seconds_per_step(), fingerprint(trained) if comparable else ())

    return segment


@dataclass(frozen=True)
class Race:
    """The times of all contestants in all rounds, in seconds per step."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """A contestant's time of a step in seconds, the median over rounds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> tuple[float, float, float]:
        """Time of `name` over time of `to` in the same round: quartile, median, quartile."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        ratios = [own / other for own, other in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, middle, high


def race(contestants: Mapping[str, Segment], *, rounds: int, steps: int) -> Race:
    """Let the contestants take turns.

    Args:
        contestants: by name; the first one's fingerprint is the others' measure.
        rounds: how often each one's turn comes, after one round that is not counted.
        steps: steps in a segment.

    Raises:
        RuntimeError: if a contestant trains something else than the first one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    expected: tuple[float, ...] = ()
    order = list(contestants)
    shuffle = random.Random(0).shuffle
    for turn in range(rounds + 1):
        for name in order:
            gc.collect()  # nobody pays for what another one left behind
            lap = contestants[name](steps)
            expected = expected or lap.fingerprint
            _assert_same_training(name, lap.fingerprint, expected)
            if turn:
                seconds[name].append(lap.seconds)
        shuffle(order)
    return Race(seconds)


def _assert_same_training(name: str, got: Sequence[float], expected: Sequence[float]) -> None:
    # Rounding of float32 and of another order of summation stays far below the bound, one step
    # more or less does not.
    same = len(got) == len(expected) and all(
        abs(a - b) <= 1e-3 * abs(b) + 1e-5 for a, b in zip(got, expected, strict=True)
    )
    if got and not same:
        raise RuntimeError(
            f"{name!r} does not end at the parameters of the bare loop: norms {tuple(got)}, "
            f"expected {tuple(expected)}"
        )


def gather_contestants(entries: Mapping[str, Callable[[], Segment]]) -> dict[str, Segment]:
    """Build the contestants, leaving out with a note those whose library is not installed."""
    contestants: dict[str, Segment] = {}
    for name, build in entries.items():
        try:
            contestants[name] = build()
        except ModuleNotFoundError as missing:
            console.print(f"[yellow]left out:[/] {name} ({missing})")
    return contestants


def arguments(description: str, *, rounds: int, one_thread: bool) -> argparse.Namespace:
    """The command line that the scripts share, with the clock that was chosen as `clock`.

    Args:
        description: of the script.
        rounds: how many, unless the command line says so.
        one_thread: whether every contestant runs on one thread, so that processor time may stand
            for time where other programs cannot be kept off the machine.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="smoke test: the figures mean nothing")
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each contestant")
    if one_thread:
        parser.add_argument(
            "--cpu-time",
            dest="clock",
            action="store_const",
            const=time.process_time,
            default=time.perf_counter,
            help="measure processor time: for a machine that others use, too",
        )
    options = parser.parse_args()
    if options.quick:
        options.rounds = 2
    return options


def verdict(value: float, *, at_most: float | None = None, at_least: float | None = None) -> str:
    """A target beside the word whether `value` reaches it."""
    if at_most is not None:
        reached, target = value <= at_most, f"≤ {at_most:.2f}"
    elif at_least is not None:
        reached, target = value >= at_least, f"≥ {at_least:.2f}"
    else:
        return "reported"
    return f"{target} [green]reached[/]" if reached else f"{target} [red]missed[/]"


def overhead_table(
    title: str, result: Race, *, targets: Mapping[str, float], clock: Clock
) -> Table:
    """One row a contestant: time of a step and its ratio to the first contestant."""
    table = Table(title=title + (", processor time" if clock is time.process_time else ""))
    for column in ("contestant", "a step", "÷ bare loop", "middle half of rounds", "to reach"):
        table.add_column(column, justify="left" if column == "contestant" else "right")
    first = next(iter(result.seconds))
    for name in result.seconds:
        low, middle, high = result.ratio(name, first)
        table.add_row(
            name,
            _duration(result.median(name)),
            f"{middle:.3f}",
            f"{low:.3f} to {high:.3f}",
            verdict(middle, at_most=targets[name]) if name in targets else "",
        )
    return table


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds > 0.01 else f"{seconds * 1e6:,.1f} µs"


def machine(*packages: str) -> str:
    """Date, processor, load and versions: what a figure is worth nothing without."""
    names = ("torch", *packages)
    versions = ", ".join(f"{name} {_version(name)}" for name in names if _version(name))
    return (
        f"{time.strftime('%Y-%m-%d %H:%M')}, {_processor()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}, Python {platform.python_version()}, {versions}"
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
