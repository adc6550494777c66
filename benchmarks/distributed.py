"""What do many processes cost? Against `DistributedDataParallel` and `fully_shard`, by hand.

Two gloo processes with one torch thread each are kept alive; every contestant trains in the very
same ones, in segments that take turns. Three models: a CNN of some 35 ms a step, a DCGAN at batch
16, and a transformer whose layers are sharded. Then the peak of resident memory, in fresh processes
for each contestant, and the bytes that each hands to collectives in a step.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import socket
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import torch
from models import GAN, WORKLOADS, Supervised
from peaks import EVERY_TENSOR_A_MAPPING, PeakResident, private_resident
from rich.table import Table
from timing import (
    Clock,
    Lap,
    Race,
    Segment,
    StampedBatches,
    Train,
    arguments,
    console,
    machine,
    race,
    verdict,
)
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode

OURS = "composefit"
LIGHTNING = "Lightning, ddp"
CONTROL = "by hand, once more (control)"
DDP_VIEWS = "DDP, gradient_as_bucket_view"
TWO, ONE = "two DDP modules", "one DDP module, unused found"
CAREFUL = "two DDP modules, critic unsynchronized by hand"

#: Samples in the world's batch: steps of 20 to 60 ms on two cores.
SIZES = {
    "CNN": 64,
    "DCGAN": 16,
    "transformer": 24,
    "large MLP": 512,
    "smallest MLP": 32,
    "tiny GAN": 32,
}


# -- by hand ---------------------------------------------------------------------------------------


def ddp(work: Supervised | GAN, **options: Any) -> Train:
    return functools.partial(work.train, wrap=functools.partial(DDP, **options))


def gan_of_two(work: GAN, careful: bool = False) -> Train:
    """Each network in a DDP of its own; both terms of the critic's loss in one backward.

    Args:
        work: the workload.
        careful: the generator's update leaves out the critic's gradients and their all-reduce.
    """

    def train(batches: Iterable[Any]) -> Iterable[Tensor]:
        # Two forwards of a critic with BatchNorm before one backward: DDP's broadcast of buffers
        # before the second would write in place what the first one's backward needs.
        wrap = functools.partial(DDP, forward_sync_buffers=False)
        generator, critic = map(wrap, work.build())
        generator_optimizer = work.optimizer(generator.parameters())
        critic_optimizer = work.optimizer(critic.parameters())
        for (real,) in batches:
            fake = generator(torch.randn(len(real), *work.noise))
            critic.zero_grad()
            (score(critic, real, 1.0) + score(critic, fake.detach(), 0.0)).backward()
            critic_optimizer.step()
            generator.zero_grad()
            if careful:
                critic.requires_grad_(False)
                score(critic.module, fake, 1.0).backward()
                critic.requires_grad_(True)
            else:
                score(critic, fake, 1.0).backward()
            generator_optimizer.step()
        return [*generator.parameters(), *critic.parameters()]

    return train


class Both(nn.Module):
    """Both networks of a GAN, for one DDP around them."""

    def __init__(self, work: GAN) -> None:
        super().__init__()
        self.work = work
        self.generator, self.critic = work.build()

    def forward(self, real: Tensor, noise: Tensor, of_critic: bool) -> Tensor:
        fake = self.generator(noise)
        if of_critic:
            return score(self.critic, real, 1.0) + score(self.critic, fake.detach(), 0.0)
        return score(self.critic, fake, 1.0)


def gan_of_one(work: GAN) -> Train:
    """One DDP, which each step searches for the parameters that a loss does not reach."""

    def train(batches: Iterable[Any]) -> Iterable[Tensor]:
        both = DDP(Both(work), find_unused_parameters=True, forward_sync_buffers=False)
        networks: Both = both.module
        generator_optimizer = work.optimizer(networks.generator.parameters())
        critic_optimizer = work.optimizer(networks.critic.parameters())
        for (real,) in batches:
            noise = torch.randn(len(real), *work.noise)
            both.zero_grad()
            both(real, noise, True).backward()
            critic_optimizer.step()
            both.zero_grad()
            both(real, noise, False).backward()
            generator_optimizer.step()
        return networks.parameters()

    return train


def score(critic: nn.Module, samples: Tensor, target: float) -> Tensor:
    labels = torch.full((len(samples),), target)
    return F.binary_cross_entropy(critic(samples).flatten(), labels)


def sharded(work: Supervised) -> Train:
    """`fully_shard` on each layer and on the whole."""

    def train(batches: Iterable[Any]) -> Iterable[Tensor]:
        model = work.build()
        for layer in model.modules():
            if isinstance(layer, nn.TransformerEncoderLayer):
                fully_shard(layer)
        fully_shard(model)
        optimizer = work.optimizer(model.parameters())
        for inputs, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        return model.parameters()

    return train


# -- by trainers -----------------------------------------------------------------------------------


def composefit(work: Supervised | GAN, unit: type[nn.Module] | None = None) -> Train:
    """Sharded by modules of type `unit`, or, with None, not at all."""
    import ours

    from composefit import Distributed, FullySharded

    def train(batches: Iterable[Any]) -> Iterable[Tensor]:
        if unit is None:
            return ours.train(work, batches, strategy=Distributed(accelerator="cpu"))
        strategy = FullySharded(policy=[unit], accelerator="cpu")
        return ours.train(work, batches, strategy=strategy)

    return train


def lightning(work: Supervised | GAN) -> Train:
    import overhead
    from lightning.pytorch import Trainer

    kind = "ddp" if isinstance(work, Supervised) else "ddp_find_unused_parameters_true"
    trainer = functools.partial(
        Trainer,
        accelerator="cpu",
        strategy=kind,
        devices=dist.get_world_size(),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    # The modules are those of the other benchmark, and only its trainer has one process.
    overhead._lightning_trainer = trainer
    run = (
        overhead.lightning_gan(work)
        if isinstance(work, GAN)
        else overhead.lightning(work, log=True)
    )

    def train(batches: Iterable[Any]) -> Iterable[Tensor]:
        with _variables({}):  # it takes some away at its end
            return run(batches)

    return train


#: By model and contestant; the first of a model is what the ratios are to.
CONTESTANTS: dict[str, dict[str, Callable[[Any], Train]]] = {
    "CNN": {
        "DDP": ddp,
        CONTROL: ddp,
        DDP_VIEWS: functools.partial(ddp, gradient_as_bucket_view=True),
        OURS: composefit,
        LIGHTNING: lightning,
    },
    "DCGAN": {
        TWO: gan_of_two,
        CONTROL: gan_of_two,
        ONE: gan_of_one,
        CAREFUL: functools.partial(gan_of_two, careful=True),
        OURS: composefit,
        LIGHTNING: lightning,
    },
    "transformer": {
        "fully_shard": sharded,
        CONTROL: sharded,
        OURS: functools.partial(composefit, unit=nn.TransformerEncoderLayer),
    },
    # Counted only, without a log: what an update must send, and no more.
    "smallest MLP": {"DDP": ddp, OURS: composefit},
    "tiny GAN": {
        TWO: gan_of_two,
        ONE: gan_of_one,
        CAREFUL: functools.partial(gan_of_two, careful=True),
        OURS: composefit,
    },
}
TARGETS = {"CNN": 1.03, "DCGAN": 0.95, "transformer": 1.05}
RIVALS = {"CNN": ("DDP",), "DCGAN": (TWO, ONE), "transformer": ("fully_shard",)}
"""Of several, the faster one counts."""


# -- two processes ---------------------------------------------------------------------------------


class Job:
    """Processes that are ranks of one job, do what they are told together, and wait in between.

    Args:
        world_size: how many.
        environment: variables for them, besides those that a launcher sets.
    """

    def __init__(self, world_size: int = 2, environment: dict[str, str] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # `spawn`: a forked child would inherit torch's thread pool in an undefined state.
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            variables = {
                "RANK": rank,
                "WORLD_SIZE": world_size,
                "LOCAL_RANK": rank,
                "LOCAL_WORLD_SIZE": world_size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": 1,
            }
            process = context.Process(target=_rank, args=(theirs,), daemon=True)
            with _variables({**(environment or {}), **{k: str(v) for k, v in variables.items()}}):
                process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def do(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function of this module in every rank; what each returned, in rank order.

        Raises:
            ModuleNotFoundError, RuntimeError: what a rank has raised.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                answers.append(pipe.recv())
            except EOFError:
                raise RuntimeError(f"rank {rank} has died in {function}{args}") from None
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()


@contextlib.contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    before = os.environ.copy()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _rank(orders: Connection) -> None:
    """A rank's process: does what it is told until the pipe is closed."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while True:
        try:
            function, args = orders.recv()
        except EOFError:
            break
        try:
            orders.send(function(*args))
        except ModuleNotFoundError as error:
            orders.send(error)
        except Exception as error:
            traceback.print_exc()
            orders.send(RuntimeError(str(error)))
    if dist.is_initialized():
        dist.destroy_process_group()


# -- what a rank does ------------------------------------------------------------------------------


@functools.cache
def contestant(model: str, name: str) -> tuple[Train, list[Any]]:
    """Its loop and its batches: the world's for composefit, one's own rows of each for the rest."""
    work = WORKLOADS[model]
    train = CONTESTANTS[model][name](work)
    batches: list[Any] = work.batches(4, SIZES[model])
    if name != OURS:
        rank, size = dist.get_rank(), dist.get_world_size()
        batches = [tuple(t.tensor_split(size)[rank].clone() for t in batch) for batch in batches]
    return train, batches


def fingerprint(parameters: Iterable[Tensor]) -> tuple[float, ...]:
    """As `timing.fingerprint`, of sharded parameters too."""
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters)
    return tuple(sorted(float(p.detach().double().norm()) for p in whole))


def lap(model: str, name: str, steps: int, clock: Clock = time.perf_counter) -> Lap:
    train, batches = contestant(model, name)
    gc.collect()
    stamped = StampedBatches(batches, steps, clock)
    dist.barrier()
    trained = train(stamped)
    prints = fingerprint(trained) if WORKLOADS[model].comparable else ()
    return Lap(stamped.seconds_per_step(), prints)


def peak(model: str, name: str, steps: int) -> tuple[int, int]:
    """Growth of resident memory while training, and private memory before it, in bytes."""
    train, batches = contestant(model, name)
    train(StampedBatches(batches, 2))
    gc.collect()
    before = private_resident()
    with PeakResident() as grown:
        train(StampedBatches(batches, steps))
    return grown.bytes, before


class Handed(TorchDispatchMode):
    """Counts the bytes that are handed to collectives, whoever calls them, C++ too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            names = [argument.name for argument in func._schema.arguments]
            given = [
                value
                for name, value in zip(names, args, strict=False)
                if not name.startswith("output")
            ]
            self.bytes += sum(tensor.nbytes for tensor in _tensors(given))
            self.calls[func._schema.name.removeprefix("c10d::")] += 1
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def handed(model: str, name: str, steps: int) -> tuple[int, dict[str, int]]:
    """Bytes and calls of so many steps, with what there is before the first and after the last."""
    train, batches = contestant(model, name)
    with Handed() as counted:
        train(StampedBatches(batches, steps))
    return counted.bytes, dict(counted.calls)


# -- what comes of it ------------------------------------------------------------------------------


def present(job: Job, model: str) -> list[str]:
    """The contestants whose library is installed."""
    names = []
    for name in CONTESTANTS[model]:
        try:
            job.do(lap, model, name, 4)
            names.append(name)
        except ModuleNotFoundError as missing:
            console.print(f"[yellow]left out:[/] {name} ({missing})")
    return names


def slowest(job: Job, model: str, name: str, clock: Clock) -> Segment:
    def segment(steps: int) -> Lap:
        laps: list[Lap] = job.do(lap, model, name, steps, clock)
        return max(laps, key=lambda one: one.seconds)

    return segment


def times(job: Job, model: str, rounds: int, steps: int, clock: Clock) -> Race:
    contestants = {name: slowest(job, model, name, clock) for name in present(job, model)}
    return race(contestants, rounds=rounds, steps=steps)


def times_table(results: dict[str, Race], clock: Clock) -> Table:
    what = ", processor time" if clock is time.process_time else ""
    table = Table(title=f"A step in two processes{what}")
    for column in ("model", "contestant", "a step", "÷ by hand", "middle half", "to reach"):
        table.add_column(column, justify="left" if column in ("model", "contestant") else "right")
    for model, result in results.items():
        rival = min(RIVALS[model], key=result.median)
        for name in result.seconds:
            low, middle, high = result.ratio(name, rival)
            table.add_row(
                model,
                name,
                f"{result.median(name) * 1e3:,.1f} ms",
                f"{middle:.3f}",
                f"{low:.3f} to {high:.3f}",
                verdict(middle, at_most=TARGETS[model]) if name == OURS else "",
            )
    return table


def memory_table(present: dict[str, list[str]], steps: int) -> Table:
    table = Table(title="Peak of resident memory while training, the larger of both ranks")
    for column in ("model", "contestant", "MiB", "before it", "÷ by hand"):
        table.add_column(column, justify="left" if column in ("model", "contestant") else "right")
    for model, names in present.items():
        peaks = {}
        for name in names:
            if name != CONTROL:
                with Job(environment=EVERY_TENSOR_A_MAPPING) as job:
                    peaks[name] = max(job.do(peak, model, name, steps))
        by_hand = min(peaks[rival][0] for rival in RIVALS[model])
        for name, (grown, before) in peaks.items():
            ratio = f"{grown / by_hand:.2f}"
            table.add_row(model, name, f"{grown / 2**20:,.1f}", f"{before / 2**20:,.1f}", ratio)
    return table


def bytes_table(job: Job, models: Iterable[str]) -> Table:
    table = Table(title="Handed to collectives by a rank, in a step")
    for column in ("model", "contestant", "bytes", "gradients", "besides", "calls", "to reach"):
        table.add_column(column, justify="left" if column in ("model", "contestant") else "right")
    for model in models:
        needed = gradient_bytes(WORKLOADS[model])
        updates = 1 if isinstance(WORKLOADS[model], Supervised) else 2
        for name in CONTESTANTS[model]:
            (few, few_calls), *_ = job.do(handed, model, name, 4)
            (many, many_calls), *_ = job.do(handed, model, name, 12)
            a_step = (many - few) / 8
            calls = (sum(many_calls.values()) - sum(few_calls.values())) / 8
            at_most = needed + 1000 * updates
            table.add_row(
                model,
                name,
                f"{a_step:,.0f}",
                f"{needed:,}",
                f"{a_step - needed:,.0f}",
                f"{calls:g}",
                _reached(a_step, at_most) if name == OURS else "",
            )
    return table


def _reached(value: float, at_most: float) -> str:
    word = "[green]reached[/]" if value <= at_most else "[red]missed[/]"
    return f"≤ {at_most:,.0f} {word}"


def gradient_bytes(work: Supervised | GAN) -> int:
    """Of each optimizer's parameters, once: what an update has to send."""
    built = work.build()
    networks = built if isinstance(built, tuple) else (built,)
    return sum(p.nbytes for network in networks for p in network.parameters())


def main() -> None:
    options = arguments(str(__doc__), rounds=15, one_thread=True)
    steps = 4 if options.quick else 10
    results = {}
    with Job() as job:
        for model in TARGETS:
            results[model] = times(job, model, options.rounds, steps, options.clock)
        counted = bytes_table(job, ("smallest MLP", "tiny GAN"))
    console.print(times_table(results, options.clock), counted)
    if sys.platform == "linux":
        console.print(memory_table({m: list(r.seconds) for m, r in results.items()}, steps=6))
    console.print(machine("lightning"))


if __name__ == "__main__":
    main()
