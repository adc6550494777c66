"""What does a trainer cost? The smallest step there is, under each trainer, against the bare loop.

MLP 16-32-4, batch 32, SGD, batches ready in memory, one torch thread: some 200 µs of work, so that
whatever a trainer does in a step shows. A second table does the same for a GAN of two such MLPs. A
third one is the MLP with all that a `Trainer()` brings along: progress bar (lines, as where there
is no terminal), summary, `CSVLogger` and checkpoints. It measures from a step of one epoch to the
same step of the next, 2,000 later: the end of an epoch, with its checkpoint, counts once.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from models import GAN, WORKLOADS, Supervised
from timing import (
    CONTROL,
    Clock,
    Lap,
    Segment,
    Train,
    arguments,
    console,
    fingerprint,
    gather_contestants,
    in_process,
    machine,
    overhead_table,
    race,
)
from torch import Tensor, nn
from torch.nn import functional as F

COMPOSEFIT = "composefit, one self.log"
WHOLE = "composefit, bar, logger, checkpoints"
PEERS = ("lightning", "pytorch-ignite", "accelerate", "torchtnt", "keras")


def composefit(work: Supervised | GAN) -> Train:
    import ours

    return functools.partial(ours.train, work, strategy="single")


def ignite(work: Supervised) -> Train:
    from ignite.engine import create_supervised_trainer

    def train(batches: Iterable[Any]) -> Iterable[Tensor]:
        model = work.build()
        optimizer = work.optimizer(model.parameters())
        create_supervised_trainer(model, optimizer, F.cross_entropy).run(batches)
        return model.parameters()

    return train


def ignite_gan(work: GAN) -> Train:
    from ignite.engine import Engine

    def train(batches: Iterable[Any]) -> Iterable[Tensor]:
        # The whole step is the user's: there is nothing but a loop around it.
        generator, critic = work.build()
        generator_optimizer = work.optimizer(generator.parameters())
        critic_optimizer = work.optimizer(critic.parameters())

        def step(engine: Engine, batch: tuple[Tensor]) -> float:
            (real,) = batch
            ones, zeros = torch.ones(len(real)), torch.zeros(len(real))
            critic.zero_grad()
            loss = F.binary_cross_entropy(critic(real).flatten(), ones)
            loss.backward()
            fake = generator(torch.randn(len(real), *work.noise))
            F.binary_cross_entropy(critic(fake.detach()).flatten(), zeros).backward()
            critic_optimizer.step()
            generator.zero_grad()
            F.binary_cross_entropy(critic(fake).flatten(), ones).backward()
            generator_optimizer.step()
            return loss.item()

        Engine(step).run(batches)
        return [*generator.parameters(), *critic.parameters()]

    return train


def accelerate(work: Supervised) -> Train:
    from accelerate import Accelerator

    def train(batches: Iterable[Any]) -> Iterable[Tensor]:
        model = work.build()
        accelerator = Accelerator(cpu=True)
        # Batches are ready in memory, so that the loader is left as it is.
        model, optimizer = accelerator.prepare(model, work.optimizer(model.parameters()))
        for inputs, labels in batches:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(inputs), labels))
            optimizer.step()
        return model.parameters()

    return train


def auto_unit(work: Supervised) -> Train:
    with warnings.catch_warnings():  # its pkg_resources is deprecated
        warnings.simplefilter("ignore")
        from torchtnt.framework.auto_unit import AutoUnit
        from torchtnt.framework.train import train as tnt_train

    class Unit(AutoUnit[tuple[Tensor, Tensor]]):
        def compute_loss(self, state: Any, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            inputs, labels = data
            outputs = self.module(inputs)
            return F.cross_entropy(outputs, labels), outputs

        def configure_optimizers_and_lr_scheduler(
            self, module: nn.Module
        ) -> tuple[torch.optim.Optimizer, None]:
            return work.optimizer(module.parameters()), None

    def train(batches: Iterable[Any]) -> Iterable[Tensor]:
        unit = Unit(module=work.build(), device=torch.device("cpu"))
        tnt_train(unit, batches, max_epochs=1)
        return unit.module.parameters()

    return train


def _lightning_trainer() -> Any:
    import lightning.pytorch as lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def lightning(work: Supervised, *, log: bool) -> Train:
    from lightning.pytorch import LightningModule

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = work.build()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return work.optimizer(self.model.parameters())

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            inputs, labels = batch
            loss = F.cross_entropy(self.model(inputs), labels)
            if log:
                self.log("loss", loss)
            return loss

    def train(batches: Iterable[Any]) -> Iterable[Tensor]:
        module = Classifier()
        _lightning_trainer().fit(module, batches)
        return module.parameters()

    return train


def lightning_gan(work: GAN) -> Train:
    from lightning.pytorch import LightningModule

    class Adversaries(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.critic = work.build()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [
                work.optimizer(self.generator.parameters()),
                work.optimizer(self.critic.parameters()),
            ]

        # As in Lightning's own GAN example.
        def training_step(self, batch: tuple[Tensor]) -> None:
            (real,) = batch
            generator_optimizer, critic_optimizer = self.optimizers()
            ones, zeros = torch.ones(len(real)), torch.zeros(len(real))
            fake = self.generator(torch.randn(len(real), *work.noise))

            self.toggle_optimizer(critic_optimizer)
            loss = F.binary_cross_entropy(self.critic(real).flatten(), ones)
            loss = loss + F.binary_cross_entropy(self.critic(fake.detach()).flatten(), zeros)
            self.log("critic_loss", loss)
            self.manual_backward(loss)
            critic_optimizer.step()
            critic_optimizer.zero_grad()
            self.untoggle_optimizer(critic_optimizer)

            self.toggle_optimizer(generator_optimizer)
            self.manual_backward(F.binary_cross_entropy(self.critic(fake).flatten(), ones))
            generator_optimizer.step()
            generator_optimizer.zero_grad()
            self.untoggle_optimizer(generator_optimizer)

    def train(batches: Iterable[Any]) -> Iterable[Tensor]:
        module = Adversaries()
        _lightning_trainer().fit(module, batches)
        return module.parameters()

    return train


def keras(work: Supervised) -> Train:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras as k

    def train(batches: Iterable[Any]) -> Iterable[Tensor]:
        layers = [layer for layer in work.build().modules() if isinstance(layer, nn.Linear)]
        model = k.Sequential([k.Input((layers[0].in_features,))])
        for layer in layers:
            activation = None if layer is layers[-1] else "relu"
            dense = k.layers.Dense(layer.out_features, activation=activation)
            model.add(dense)
            dense.set_weights([layer.weight.detach().T.numpy(), layer.bias.detach().numpy()])
        model.compile(
            optimizer=k.optimizers.SGD(0.05),
            loss=k.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model.fit(iter(batches), steps_per_epoch=len(batches), shuffle=False, verbose=0)
        return [variable.value for variable in model.trainable_variables]

    return train


def contestants_for(
    work: Supervised | GAN, trainers: dict[str, Callable[[], Train]], clock: Clock
) -> dict[str, Segment]:
    """The bare loop, twice, and the trainers that are installed."""
    batches = work.batches(16)
    trainers = {"bare loop": lambda: work.train, CONTROL: lambda: work.train, **trainers}

    def entry(make: Callable[[], Train]) -> Callable[[], Segment]:
        return lambda: in_process(make(), batches, comparable=work.comparable, clock=clock)

    return gather_contestants({name: entry(make) for name, make in trainers.items()})


class Epochs:
    """Batches for several epochs that note the time when a certain one is fetched in each.

    Args:
        batches: what to hand out, cyclically.
        length: how many an epoch has.
        at: the index of that one in its epoch.
        clock: tells the time in seconds.
    """

    def __init__(self, batches: Sequence[Any], length: int, at: int, clock: Clock) -> None:
        self.batches, self.length, self.at, self.clock = batches, length, at, clock
        self.stamps: list[float] = []

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        for step in range(self.length):
            if step == self.at:
                self.stamps.append(self.clock())
            yield self.batches[step % len(self.batches)]


def whole_epoch(
    work: Supervised, train: Callable[[Epochs, int], Iterable[Tensor]], clock: Clock
) -> Segment:
    """A contestant that is timed from a step of its first epoch to the same one of the second.

    Args:
        work: what is trained.
        train: trains so many steps, over as many epochs as that takes.
        clock: tells the time in seconds.
    """
    batches = work.batches(16)

    def segment(length: int) -> Lap:
        torch.set_num_threads(1)
        warm = length // 5
        epochs = Epochs(batches, length, warm, clock)
        trained = train(epochs, length + warm + 1)
        before, after = epochs.stamps
        return Lap((after - before) / length, fingerprint(trained))

    return segment


def with_everything(work: Supervised) -> Callable[[Epochs, int], Iterable[Tensor]]:
    import ours

    from composefit import Trainer

    def train(batches: Epochs, steps: int) -> Iterable[Tensor]:
        module = ours.Classifier(work)
        with (
            tempfile.TemporaryDirectory() as folder,
            open(os.devnull, "w") as nowhere,  # no terminal
            contextlib.redirect_stdout(nowhere),
        ):
            trainer = Trainer(
                strategy="single", max_epochs=2, max_steps=steps, default_root_dir=folder
            )
            trainer.fit(module, batches)
        return module.parameters()

    return train


def by_hand(work: Supervised) -> Callable[[Epochs, int], Iterable[Tensor]]:
    def train(batches: Epochs, steps: int) -> Iterable[Tensor]:
        return work.train(itertools.islice(itertools.chain(batches, batches), steps))

    return train


def main() -> None:
    options = arguments(str(__doc__), rounds=60, one_thread=True)
    steps = 15 if options.quick else 60

    mlp, gan = WORKLOADS["smallest MLP"], WORKLOADS["tiny GAN"]
    assert isinstance(mlp, Supervised) and isinstance(gan, GAN)
    tables = {
        "A step of the smallest MLP": contestants_for(
            mlp,
            {
                COMPOSEFIT: lambda: composefit(mlp),
                "Ignite": lambda: ignite(mlp),
                "Accelerate": lambda: accelerate(mlp),
                "tnt AutoUnit": lambda: auto_unit(mlp),
                "Lightning, no logging": lambda: lightning(mlp, log=False),
                "Lightning, one self.log": lambda: lightning(mlp, log=True),
                "Keras (torch)": lambda: keras(mlp),
            },
            options.clock,
        ),
        "A step of the smallest GAN": contestants_for(
            gan,
            {
                COMPOSEFIT: lambda: composefit(gan),
                "Ignite": lambda: ignite_gan(gan),
                "Lightning, manual optimization, one self.log": lambda: lightning_gan(gan),
            },
            options.clock,
        ),
    }
    for title, contestants in tables.items():
        result = race(contestants, rounds=options.rounds, steps=steps)
        console.print(
            overhead_table(title, result, targets={COMPOSEFIT: 1.10}, clock=options.clock)
        )
    length = 50 if options.quick else 2_000
    everything = {
        "bare loop": whole_epoch(mlp, by_hand(mlp), options.clock),
        CONTROL: whole_epoch(mlp, by_hand(mlp), options.clock),
        WHOLE: whole_epoch(mlp, with_everything(mlp), options.clock),
    }
    result = race(everything, rounds=max(2, options.rounds // 2), steps=length)
    title = (
        f"A step of the smallest MLP, with all that Trainer() brings, epochs of {length:,} steps"
    )
    console.print(overhead_table(title, result, targets={WHOLE: 1.10}, clock=options.clock))
    console.print(machine(*PEERS))


if __name__ == "__main__":
    main()
