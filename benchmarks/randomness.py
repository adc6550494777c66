"""What do `self.random` and random streams cost beside torch's own draws?

`python benchmarks/randomness.py`: two tables. The first compares `self.random` with the draw of
torch that gives the same distribution, on one thread, for 64 to a million numbers; it is to take
at most 3 times as long from 4,096 numbers on. The second gives what streams add to a draw and to
a step. Medians of repeats that take turns.

(Not named after its subject alone: a `random.py` beside the other scripts would be found by them
in place of Python's.)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from rich.table import Table
from timing import arguments, console, machine, verdict

from composefit.random import (
    GlobalGenerators,
    SampleRandom,
    Stream,
    hash_key,
    thread_local_generators,
)

SIZES = (64, 512, 4_096, 32_768, 262_144, 1_048_576)
SEGMENT = 0.01  # seconds that a repeat takes, about


def race(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of each call in each round, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(SEGMENT / (time.perf_counter() - start)))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
    return times


def microseconds(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median time of each call."""
    return {name: statistics.median(times) for name, times in race(calls, rounds).items()}


def ratio(times: list[float], to: list[float]) -> float:
    """Median over rounds of the ratio within a round: slow spells hit both sides of it."""
    return statistics.median(a / b for a, b in zip(times, to, strict=True))


def draws(size: int, dtype: torch.dtype) -> dict[str, tuple[Callable[[], object], ...]]:
    """For each kind: ours, and torch's."""
    random = SampleRandom(0)
    random.begin(0, 0, size, size, dtype, torch.device("cpu"))
    generator = torch.Generator()
    empty = torch.empty
    return {
        "normal": (
            lambda: random.normal(size),
            lambda: torch.randn(size, dtype=dtype, generator=generator),
        ),
        "uniform": (
            lambda: random.uniform(size),
            lambda: torch.rand(size, dtype=dtype, generator=generator),
        ),
        "integers": (
            lambda: random.integers(size, high=1000),
            lambda: torch.randint(1000, (size,), generator=generator),
        ),
        "bernoulli": (
            lambda: random.bernoulli(size),
            lambda: empty(size, dtype=dtype).bernoulli_(0.5, generator=generator),
        ),
    }


def sample_table(rounds: int) -> Table:
    """`self.random` beside torch."""
    table = Table(title="self.random against torch, one thread")
    for column in ("draw", "dtype", "numbers", "µs", "torch, µs", "÷ torch", "÷ randn", "to reach"):
        table.add_column(column, justify="left" if column in ("draw", "dtype") else "right")
    for dtype in (torch.float32, torch.float64):
        for size in SIZES:
            calls = draws(size, dtype)
            flat = {f"{kind} {who}": call for kind in calls for who, call in enumerate(calls[kind])}
            times = race(flat, rounds)
            randn = times["normal 1"]
            for kind in calls:
                ours, theirs = times[f"{kind} 0"], times[f"{kind} 1"]
                table.add_row(
                    kind,
                    str(dtype).removeprefix("torch."),
                    f"{size:,}",
                    f"{statistics.median(ours):,.1f}",
                    f"{statistics.median(theirs):,.1f}",
                    f"{ratio(ours, theirs):.2f}",
                    f"{ratio(ours, randn):.2f}",
                    verdict(ratio(ours, randn), at_most=3.0) if size >= 4_096 else "",
                )
    return table


def stream_table(rounds: int) -> Table:
    """What streams, and finding draws that have none, add."""
    one, stream = torch.ones(1), Stream()
    generators = GlobalGenerators()
    default = torch.default_generator
    random = SampleRandom(0)
    cpu = torch.device("cpu")

    def entered() -> None:
        with stream:
            pass

    def restarted() -> None:
        state = default.get_state()
        default.manual_seed(7)
        default.set_state(state)

    def installed() -> None:
        with thread_local_generators():
            pass

    def drawing() -> dict[str, Callable[[], object]]:
        return {
            "bernoulli_, 1 number": lambda: one.bernoulli_(0.5),
            "randn, 1 number": lambda: torch.randn(1),
            "dropout, 1 number": lambda: F.dropout(one),
        }

    def named(suffix: str) -> dict[str, float]:
        return {
            f"{name}, {suffix}": value for name, value in microseconds(drawing(), rounds).items()
        }

    rows = named("torch alone")
    rows |= microseconds({"telling the kernels, and back, once a run": installed}, rounds)
    with thread_local_generators():
        rows |= named("kernels told, no stream")
        with stream:
            rows |= named("in a stream")
        rows |= microseconds(
            {
                "entering and leaving a stream": entered,
                "seeding a stream": lambda: stream.seed(2**63),
                "hash_key(seed, step, shard)": lambda: hash_key(0, 1000, 1),
                "self.random.begin": lambda: random.begin(1, 0, 8, 8, torch.float32, cpu),
                "the default generator stored, seeded, restored": restarted,
                "GlobalGenerators.fingerprint": generators.fingerprint,
            },
            rounds,
        )
    table = Table(title="streams")
    table.add_column("what")
    table.add_column("µs", justify="right")
    for name, value in rows.items():
        table.add_row(name, f"{value:,.2f}")
    return table


def main() -> None:
    options = arguments(__doc__ or "", rounds=15, one_thread=True)
    torch.set_num_threads(1)
    console.print(sample_table(options.rounds))
    console.print(stream_table(options.rounds))
    console.print(machine("numpy"))


if __name__ == "__main__":
    main()
