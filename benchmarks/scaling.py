"""How long does a step take on many GPUs? A model on paper, and what two cores measure beside it.

Prints the tables of docs/scaling.md; with `--write` it puts what it has measured there, and draws
docs/pictures/scaling.png. All times are in seconds, sizes in bytes, rates in bytes a second.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from distributed import Job, composefit
from models import Supervised, adam, mlp
from rich.table import Table
from timing import StampedBatches, console, machine
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
PICTURE = PAGE.parent / "pictures" / "scaling.png"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
MIB = 2**20


# -- links and collectives -------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """What connects the processes.

    Attributes:
        node: processes in a node.
        inside: rate at which one process sends to another of its node.
        between: rate at which a *node* sends to another one, over all its cards together.
        latency_inside: from one process to another, for the smallest message.
        latency_between: the same between nodes.
        control_latency: of a message between two hosts over TCP, for control messages.
    """

    node: int
    inside: float
    between: float
    latency_inside: float
    latency_between: float
    control_latency: float

    def rate(self, processes: int) -> float:
        """Of a ring through all of them: its slowest link. A node's rings share its cards."""
        return self.inside if processes <= self.node else min(self.inside, self.between)

    def hops(self, processes: int) -> float:
        """The latency of once around the ring, less one hop."""
        nodes = math.ceil(processes / self.node)
        between = nodes if nodes > 1 else 0
        return (processes - 1 - between) * self.latency_inside + between * self.latency_between

    def depth(self, processes: int) -> float:
        """The latency from a tree's root to its leaves: a chain in each node, a tree of nodes."""
        nodes = math.ceil(processes / self.node)
        chain = (min(processes, self.node) - 1) * self.latency_inside
        return chain + math.log2(nodes) * self.latency_between


def ring(cluster: Cluster, processes: int, size: float) -> float:
    """All-reduce: a reduce-scatter and an all-gather (Patarasuk and Yuan, 2009)."""
    share = (processes - 1) / processes
    return 2 * share * size / cluster.rate(processes) + 2 * cluster.hops(processes)


def tree(cluster: Cluster, processes: int, size: float) -> float:
    """All-reduce over two binary trees, up and down again (Sanders, Speck and Träff, 2009)."""
    return 2 * size / cluster.rate(processes) + 2 * cluster.depth(processes)


def all_reduce(cluster: Cluster, processes: int, size: float) -> float:
    """The better of the two, as NCCL chooses."""
    return min(ring(cluster, processes, size), tree(cluster, processes, size))


def all_gather(cluster: Cluster, processes: int, size: float) -> float:
    """Of `size` bytes in total over a ring; a reduce-scatter takes as long."""
    share = (processes - 1) / processes
    return share * size / cluster.rate(processes) + cluster.hops(processes)


# -- steps -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """One process's step without any communication.

    Attributes:
        forward: time.
        backward: time.
        update: time of the optimizer.
        gradients: bytes that are reduced.
        weights: bytes that are gathered, where they are sharded.
        layers: parts of equal size, which are sharded and gathered each by itself.
    """

    forward: float
    backward: float
    update: float
    gradients: float
    weights: float
    layers: int

    @property
    def alone(self) -> float:
        return self.forward + self.backward + self.update


def data_parallel(
    work: Work,
    processes: int,
    cluster: Cluster,
    bucket: float = 25 * MIB,
    overlap: bool = True,
    reduce: Callable[[Cluster, int, float], float] = all_reduce,
) -> float:
    """A step in which gradients are reduced bucket by bucket while the backward goes on."""
    count = max(1, math.ceil(work.gradients / bucket))
    size = work.gradients / count
    done = 0.0
    for number in range(count):
        ready = work.forward + work.backward * ((number + 1) / count if overlap else 1)
        done = max(done, ready) + reduce(cluster, processes, size)
    return done + work.update


def fully_sharded(work: Work, processes: int, cluster: Cluster, overlap: bool = True) -> float:
    """A step that gathers each layer before it is used, twice, and scatters its gradients.

    The next layer is gathered while this one computes (`fully_shard` prefetches one); all messages
    share one link. Each process updates its own part.
    """
    gather = all_gather(cluster, processes, work.weights / work.layers)
    scatter = all_gather(cluster, processes, work.gradients / work.layers)
    link = busy = 0.0  # when the link, and the processor, are free again
    for phase, seconds in (("forward", work.forward), ("backward", work.backward)):
        begun = busy  # when the layer before began to compute: no earlier is the next one asked for
        for _ in range(work.layers):
            link = max(link, begun if overlap else busy) + gather
            begun = max(busy, link)
            busy = begun + seconds / work.layers
            if phase == "backward":
                link = max(link, busy) + scatter
    return max(busy, link) + work.update / processes


def control(cluster: Cluster, processes: int) -> float:
    """A control message: an all-gather of some hundred bytes, around a ring of hosts."""
    return (processes - 1) * cluster.control_latency


# -- on paper --------------------------------------------------------------------------------------

#: Eight H100 a node: NVLink of 450 GB/s a direction and a card of 400 Gbit/s (50 GB/s) each, of
#: which four fifths get through.
H100 = Cluster(8, 0.8 * 450e9, 0.8 * 8 * 50e9, 2e-6, 10e-6, 25e-6)
#: The same machines with one card of 100 Gbit/s a node.
SLOW = replace(H100, between=0.8 * 12.5e9)

PEAK, USED = 989e12, 0.4  # bf16 without sparsity; what good training code gets out of it


def transformer(parameters: float, tokens: int, layers: int) -> Work:
    """Two floating-point operations a parameter and token in forward, four in backward, in bf16.

    The update reads and writes some 16 bytes a parameter at 3.35 TB/s.
    """
    forward = 2 * parameters * tokens / (PEAK * USED)
    update = 16 * parameters / 3.35e12
    return Work(forward, 2 * forward, update, 2 * parameters, 2 * parameters, layers)


MODELS = {
    "0.1 B": transformer(0.1e9, 16_384, 12),
    "1 B": transformer(1e9, 16_384, 24),
    "7 B": transformer(7e9, 8_192, 32),
}


STRATEGIES: dict[str, Callable[[Work, int, Cluster], float]] = {
    "data-parallel": data_parallel,
    "fully sharded": fully_sharded,
}
EXPOSED_AT = (8, 64, 1024)
BUCKETS = (1 * MIB, 5 * MIB, 25 * MIB, 100 * MIB, math.inf)


def paper_rows(cluster: Cluster) -> list[list[str]]:
    """Milliseconds a step, and in brackets how much of it is compute; first of one GPU alone."""
    rows = []
    for name, work in MODELS.items():
        for strategy, step in STRATEGIES.items():
            times = [step(work, gpus, cluster) for gpus in GPUS]
            cells = [f"{t * 1e3:,.0f} ({work.alone / t:.0%})" for t in times]
            rows.append([f"{name}, {strategy}", f"{work.alone * 1e3:,.0f}", *cells])
    return rows


def bucket_rows() -> list[list[str]]:
    """Milliseconds that a step of the model of 1 B takes beyond its compute."""
    work = MODELS["1 B"]
    return [
        ["all in one" if bucket == math.inf else f"{bucket / MIB:g} MiB"]
        + [
            f"{(data_parallel(work, gpus, cluster, bucket) - work.alone) * 1e3:,.1f}"
            for cluster in (H100, SLOW)
            for gpus in EXPOSED_AT
        ]
        for bucket in BUCKETS
    ]


def table_of(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table


def paper_table(cluster: Cluster, title: str) -> Table:
    columns = ["model, strategy", "1", *(f"{gpus:,}" for gpus in GPUS)]
    return table_of(title, columns, paper_rows(cluster))


def bucket_table() -> Table:
    columns = [f"{gpus:,}, {name}" for name in ("fast", "slow") for gpus in EXPOSED_AT]
    title = "ms beyond compute, 1 B, data-parallel"
    return table_of(title, ["bucket", *columns], bucket_rows())


# -- measured --------------------------------------------------------------------------------------


def _images(size: int, draw: torch.Generator) -> Tensor:
    return torch.randn(size, 784, generator=draw)


#: So many parameters that they make several buckets: 12 layers of 4 MiB.
DEEP = Supervised(lambda: mlp(784, *[1024] * 13, 10), _images, 64, 10, adam)
SAMPLES = 64  # of each process


@dataclass(frozen=True)
class Point:
    """A measured step beside what the model says of it, with full and without any overlap."""

    strategy: str
    processes: int
    measured: float
    overlapped: float
    in_turn: float


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The median of a few, each after all ranks have met."""
    times = []
    for _ in range(repeats + 2):
        dist.barrier()
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def measure_all_reduce(size: int, repeats: int) -> float:
    tensor = torch.zeros(size // 4)
    return seconds(lambda: dist.all_reduce(tensor), repeats)


def measure_control(repeats: int) -> float:
    sent = torch.zeros(45, dtype=torch.float64)
    got = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    return seconds(lambda: dist.all_gather(got, sent), repeats)


def measure_alone(repeats: int) -> Work:
    """The parts of a step without communication, while all ranks do the same."""
    model = DEEP.build()
    optimizer = DEEP.optimizer(model.parameters())
    inputs, labels = DEEP.batches(1, SAMPLES)[0]
    parts: tuple[list[float], ...] = ([], [], [])
    for _ in range(repeats + 2):
        dist.barrier()
        marks = [time.perf_counter()]
        loss = F.cross_entropy(model(inputs), labels)
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.perf_counter())
        for times, (begun, ended) in zip(parts, itertools.pairwise(marks), strict=True):
            times.append(ended - begun)
    size = sum(p.nbytes for p in model.parameters())
    medians = [statistics.median(times[2:]) for times in parts]
    return Work(*medians, gradients=size, weights=size, layers=13)


def measure_step(strategy: str, steps: int) -> float:
    batches = DEEP.batches(4, SAMPLES * dist.get_world_size())
    unit = nn.Linear if strategy == "fully sharded" else None
    train = composefit(DEEP, unit)
    stamped = StampedBatches(batches, steps)
    train(stamped)
    return stamped.seconds_per_step()


def fitted(times: dict[int, float], processes: int) -> Cluster:
    """Latency and rate of one machine, by the time of a small and of a large all-reduce."""
    small, large = min(times), max(times)
    share = 2 * (processes - 1) / processes
    rate = share * (large - small) / (times[large] - times[small])
    latency = max(0.0, times[small] - share * small / rate) / (2 * (processes - 1))
    return Cluster(processes, rate, rate, latency, latency, latency)


def measure(processes: int, repeats: int) -> tuple[Cluster, list[Point]]:
    with Job(processes) as job:

        def slowest(function: Callable[..., float], *args: Any) -> float:
            return max(job.do(function, *args))

        times = {size: slowest(measure_all_reduce, size, repeats) for size in (1024, 16 * MIB)}
        cluster = replace(
            fitted(times, processes),
            control_latency=slowest(measure_control, repeats * 5) / (processes - 1),
        )
        work = max(job.do(measure_alone, repeats), key=lambda one: one.alone)
        points = []
        for strategy, step in STRATEGIES.items():
            measured = slowest(measure_step, strategy, repeats)
            by_ring = functools.partial(step, reduce=ring) if step is data_parallel else step
            predicted = [by_ring(work, processes, cluster, overlap=o) for o in (True, False)]
            points.append(Point(strategy, processes, measured, *predicted))
    return cluster, points


def measured_table(points: Iterable[Point]) -> Table:
    rows = [
        [p.strategy, str(p.processes)]
        + [f"{seconds * 1e3:,.1f}" for seconds in (p.measured, p.overlapped, p.in_turn)]
        for p in points
    ]
    columns = ("strategy", "processes", "measured", "model, overlapped", "model, in turn")
    return table_of(
        f"MLP of 13 layers, {SAMPLES} samples a process, two cores, ms a step", columns, rows
    )


# -- drawn -----------------------------------------------------------------------------------------

COLOURS = {"0.1 B": "#4c78a8", "1 B": "#f58518", "7 B": "#54a24b"}
LINES = {"data-parallel": "-", "fully sharded": "--"}


def draw(points: Sequence[Point]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (fast, slow, small) = plt.subplots(
        1, 3, figsize=(12, 3.8), width_ratios=(3, 3, 2), layout="constrained"
    )
    for axes, cluster, title in (
        (fast, H100, "a card of 400 Gbit/s for each GPU"),
        (slow, SLOW, "a card of 100 Gbit/s for each node"),
    ):
        for name, work in MODELS.items():
            for strategy, step in STRATEGIES.items():
                efficiency = [work.alone / step(work, gpus, cluster) for gpus in GPUS]
                axes.plot(
                    GPUS,
                    efficiency,
                    LINES[strategy],
                    color=COLOURS[name],
                    marker="o",
                    ms=3,
                    label=f"{name}, {strategy}",
                )
        axes.set(xscale="log", ylim=(0, 1.05), xlabel="GPUs", title=title)
        axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    fast.set_ylabel("compute ÷ step, on paper")
    slow.legend(fontsize=7, loc="upper right", handlelength=3.5)
    for place, point in enumerate(points):
        low, high = point.overlapped * 1e3, point.in_turn * 1e3
        small.bar(place, high - low, bottom=low, width=0.5, color="#bbbbbb")
        small.plot(place, point.measured * 1e3, "ko")
    small.plot([], [], "ko", label="measured")
    small.bar(0, 0, color="#bbbbbb", label="model: all overlapped\nto all in turn")
    names = [re.sub(r"[- ]", "\n", p.strategy) + f"\n{p.processes}" for p in points]
    small.set_xticks(range(len(points)), names, fontsize=8)
    small.set(ylabel="ms a step", title="2 and 4 processes, 2 cores")
    small.set_ylim(0, 1.4e3 * max(max(p.measured, p.in_turn) for p in points))
    small.legend(fontsize=7, loc="upper left")
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


def write(points: Sequence[Point]) -> None:
    """Put what was measured into the page, and draw its picture."""
    rows = "".join(
        f"| {p.strategy} | {p.processes} | {p.measured * 1e3:,.1f} | {p.overlapped * 1e3:,.1f} "
        f"| {p.in_turn * 1e3:,.1f} |\n"
        for p in points
    )
    head, _, tail = PAGE.read_text(encoding="utf-8").partition("<!-- measured -->\n")
    _, _, tail = tail.partition("<!-- until here -->\n")
    columns = "| strategy | processes | measured | all overlapped | all in turn |\n"
    table = f"\n{columns}|---|---:|---:|---:|---:|\n{rows}\n{machine()}.\n\n"
    marked = f"<!-- measured -->\n{table}<!-- until here -->\n"
    PAGE.write_text(head + marked + tail, encoding="utf-8")
    draw(points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smoke test: the figures mean nothing")
    parser.add_argument("--write", action="store_true", help="update the page and its picture")
    options = parser.parse_args()
    console.print(paper_table(H100, "ms a step (compute ÷ step), 400 Gbit/s for each GPU"))
    console.print(paper_table(SLOW, "ms a step (compute ÷ step), 100 Gbit/s for each node"))
    console.print(bucket_table())
    for gpus in EXPOSED_AT:
        console.print(f"a control message, {gpus:,} processes: {control(H100, gpus) * 1e3:.1f} ms")
    points: list[Point] = []
    for processes in (2,) if options.quick else (2, 4):
        cluster, found = measure(processes, repeats=4 if options.quick else 15)
        points += found
        console.print(
            f"{processes} processes on this machine: {cluster.inside / 1e6:,.0f} MB/s, "
            f"{cluster.latency_inside * 1e6:,.0f} µs a hop, "
            f"control messages {cluster.control_latency * 1e6:,.0f} µs a hop"
        )
    console.print(measured_table(points), machine())
    if options.write:
        write(points)


if __name__ == "__main__":
    main()
