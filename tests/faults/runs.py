"""A small adversarial training that tests stop, kill and resume, also in processes of its own."""

import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, Dataset

from composefit import LoopModule, OptimizerConfig, SingleDevice, Strategy, Trainer, checkpoint

#: Steps of an epoch, and of the whole training: 10 batches, 2 to a step, 2 epochs.
EPOCH, STEPS = 5, 10

#: With what a process ends in which `fit` has raised KeyboardInterrupt.
INTERRUPTED = 77

Pause = Callable[[str, int], None]


def nothing(where: str, step: int) -> None:
    """What happens at a place where nobody stops the training."""


class Samples(Dataset[tuple[Tensor, int]]):
    """Forty samples, augmented at random, that know their numbers."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        noise = torch.randn(2) + random.random() + float(np.random.rand())
        return torch.tensor([float(i), 1.0]) / 40 + noise / 10, i


class Pausing(SGD):
    """An optimizer in whose step somebody may be interested."""

    pause: Callable[[], None]

    def step(self, closure: Any = None) -> Any:
        self.pause()
        return super().step(closure)


class GAN(LoopModule):
    """Two optimizers, a scheduler, dropout, noise; says where it is, and what it was given."""

    def __init__(
        self, width: int = 4, pause: Pause = nothing, seen: list[int] | None = None
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["pause", "seen"])
        self.pause = pause
        self.seen: list[int] = [] if seen is None else seen
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.generator = nn.Sequential(nn.Linear(2, width), nn.Dropout(), nn.Linear(width, 2))
            self.critic = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))

    def configure_optimizers(self) -> dict[str, Any]:
        critic = Pausing(self.critic.parameters(), lr=0.1, momentum=0.9)
        critic.pause = lambda: self.pause("optimizer", self.global_step)
        generator = Adam(self.generator.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(generator, 3, gamma=0.5)
        return {"critic": critic, "generator": OptimizerConfig(generator, schedule, "step")}

    def training_step(self, batch: Any, batch_idx: int) -> Iterator[Any]:
        real, numbers = batch
        self.seen.extend(numbers.tolist())
        self.pause("window" if batch_idx % 2 else "step", self.global_step)
        fake = self.generator(self.random.normal(len(real), 2))
        yield {"critic": self.critic(fake).mean() - self.critic(real).square().mean() / 10}
        self.pause("updated", self.global_step)
        yield {"generator": -self.critic(fake).mean()}

    def validation_step(self, batch: Any) -> None:
        self.pause("validation", self.global_step)
        self.log("val_loss", self.critic(batch[0]).mean())


def fit(
    root: Path,
    ckpt_path: str | Path | None = None,
    *,
    seed: int = 0,
    pause: Pause = nothing,
    seen: list[int] | None = None,
    strategy: Strategy | None = None,
    workers: int = 0,
    **options: Any,
) -> GAN:
    """Train, or go on with it.

    Args:
        root: the folder of checkpoints.
        ckpt_path: of `Trainer.fit`.
        seed: of what the process draws before.
        pause: called where the training is.
        seen: takes in the numbers of the samples that are trained on.
        strategy: of the trainer.
        workers: of the loader.
        options: of the trainer.
    """
    for draw in (torch.manual_seed, np.random.seed, random.seed):
        draw(seed)
    net = GAN(pause=pause, seen=seen)
    trainer(root, strategy=strategy, **options).fit(
        net,
        DataLoader(Samples(), batch_size=4, shuffle=True, num_workers=workers),
        DataLoader(Samples(), batch_size=20),
        ckpt_path=ckpt_path,
    )
    return net


def trainer(root: Path, **options: Any) -> Trainer:
    """A trainer that keeps its checkpoints in a folder, and prints nothing."""
    return Trainer(
        default_root_dir=root,
        **{"max_epochs": 2, "accumulate_grad_batches": 2, "logger": False, **options}
        | {"strategy": options.get("strategy") or SingleDevice("cpu")},
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def everything(root: Path) -> list[Tensor]:
    """Weights and states of optimizers in the last checkpoint of a folder."""
    state = checkpoint.load(root / "last.ckpt")
    found = list(state["state_dict"].values())
    for optimizer in state["optimizers"].values():
        found += [v for kept in optimizer["state"].values() for v in kept.values()]
    return found


def steps_saved(root: Path) -> int:
    """The steps that the last checkpoint of a folder has."""
    saved: int = checkpoint.load(root / "last.ckpt")["global_step"]
    return saved


# -- in a process of its own ---------------------------------------------------------------------


@contextmanager
def process(function: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """A process that runs `function(connection, *arguments)`; yields it, with our `connection`.

    Forked from one that has imported everything, which has no threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for what it imports beforehand
        child = context.Process(target=function, args=(theirs, *arguments))
        child.start()
    theirs.close()
    child.connection = ours  # type: ignore[attr-defined]
    try:
        yield child
    finally:
        child.kill()
        child.join()
        child.close()
        ours.close()


def train(connection: Any, root: Path, place: str, step: int) -> None:
    """Train, and wait at a place: twice, if the place is left."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored

    def pause(where: str, at: int) -> None:
        if (where, at) == (place, step):
            for text in ("here", "still here"):
                connection.send(text)
                connection.recv()

    def fsync(descriptor: int, really: Callable[[int], None] = os.fsync) -> None:
        pause("checkpoint", step)
        really(descriptor)

    if place == "checkpoint":
        os.fsync = fsync
    try:
        fit(root, pause=pause)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def overwrite(connection: Any, path: Path, in_place: bool) -> None:
    """Write one checkpoint after another, each full of its own number."""
    write = torch.save if in_place else lambda state, path: checkpoint.save(path, state)
    number = 0
    while True:
        number += 1
        write({"number": number, "weights": torch.full((1_000_000,), float(number))}, path)
        if number == 1:
            connection.send("written")
