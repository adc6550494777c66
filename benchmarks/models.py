"""What is trained in the benchmarks, and the loop that one would write for it by hand.

Everything is seeded and made in memory. A workload's `train` is the plain PyTorch loop; wrapping
each network in `DistributedDataParallel` makes the same code the loop of one rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Wrap = Callable[[nn.Module], nn.Module]
Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def dcgan_adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=2e-4, betas=(0.5, 0.999))


def unwrapped(network: nn.Module) -> nn.Module:
    return network


@dataclass(frozen=True)
class Supervised:
    """A classifier under cross-entropy.

    Attributes:
        model: makes the network, maps an input batch to logits of shape (batch, classes).
        sample: draws an input batch of that many samples.
        size: samples in a batch.
        classes: number of labels.
        optimizer: makes the optimizer.
    """

    model: Callable[[], nn.Module]
    sample: Callable[[int, torch.Generator], Tensor]
    size: int
    classes: int
    optimizer: Optimizer

    comparable = True

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model()

    def batches(self, count: int, size: int | None = None) -> list[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(1)
        size = size or self.size
        return [
            (self.sample(size, draw), torch.randint(self.classes, (size,), generator=draw))
            for _ in range(count)
        ]

    def train(self, batches: Iterable[Any], wrap: Wrap = unwrapped) -> Iterable[Tensor]:
        model = wrap(self.build())
        optimizer = self.optimizer(model.parameters())
        for inputs, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
        return model.parameters()


@dataclass(frozen=True)
class GAN:
    """Generator against critic, as in PyTorch's DCGAN tutorial, its loop included.

    https://docs.pytorch.org/tutorials/beginner/dcgan_faces_tutorial.html, without its printing and
    its five `.item()` a step, which would only make that loop slower.

    Attributes:
        generator: makes the network from noise, of shape (batch, *noise), to samples.
        critic: makes the network from samples to probabilities that they are real.
        noise: shape of one sample's noise.
        sample: shape of one real sample.
        size: samples in a batch.
        optimizer: makes an optimizer, called once per network.
    """

    generator: Callable[[], nn.Module]
    critic: Callable[[], nn.Module]
    noise: tuple[int, ...]
    sample: tuple[int, ...]
    size: int
    optimizer: Optimizer

    comparable = False  # each contestant draws its own noise

    def build(self) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        return self.generator(), self.critic()

    def batches(self, count: int, size: int | None = None) -> list[tuple[Tensor]]:
        draw = torch.Generator().manual_seed(1)
        size = size or self.size
        return [(torch.randn(size, *self.sample, generator=draw).tanh(),) for _ in range(count)]

    def train(self, batches: Iterable[Any], wrap: Wrap = unwrapped) -> Iterable[Tensor]:
        generator, critic = map(wrap, self.build())
        generator_optimizer = self.optimizer(generator.parameters())
        critic_optimizer = self.optimizer(critic.parameters())
        for (real,) in batches:
            ones, zeros = torch.ones(len(real)), torch.zeros(len(real))

            critic.zero_grad()
            F.binary_cross_entropy(critic(real).flatten(), ones).backward()
            fake = generator(torch.randn(len(real), *self.noise))
            F.binary_cross_entropy(critic(fake.detach()).flatten(), zeros).backward()
            critic_optimizer.step()

            generator.zero_grad()
            F.binary_cross_entropy(critic(fake).flatten(), ones).backward()
            generator_optimizer.step()
        return [*generator.parameters(), *critic.parameters()]


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *block(3, 32), *block(32, 64), *block(64, 128), nn.Flatten(), nn.Linear(128 * 16, 10)
    )


class Transformer(nn.Module):
    """An encoder of 4 layers, width 128, that classifies a sequence by its mean token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 128)
        # No dropout: all contestants then take the very same step, which `race` verifies.
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embedding(tokens)).mean(1))
        return logits


def _dcgan_init(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
    return network


def dcgan_generator() -> nn.Module:
    def up(before: int, after: int, stride: int, padding: int) -> list[nn.Module]:
        return [
            nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(True),
        ]

    return _dcgan_init(
        nn.Sequential(
            *up(100, 256, 1, 0),
            *up(256, 128, 2, 1),
            *up(128, 64, 2, 1),
            nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )
    )


def dcgan_critic() -> nn.Module:
    def down(before: int, after: int) -> list[nn.Module]:
        return [
            nn.Conv2d(before, after, 4, 2, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.LeakyReLU(0.2, True),
        ]

    return _dcgan_init(
        nn.Sequential(
            nn.Conv2d(3, 64, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, True),
            *down(64, 128),
            *down(128, 256),
            nn.Conv2d(256, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )
    )


def _normal(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda size, draw: torch.randn(size, *shape, generator=draw)


def _tokens(size: int, draw: torch.Generator) -> Tensor:
    return torch.randint(256, (size, 64), generator=draw)


WORKLOADS: dict[str, Supervised | GAN] = {
    "smallest MLP": Supervised(lambda: mlp(16, 32, 4), _normal(16), 32, 4, sgd),
    "tiny MLP": Supervised(lambda: mlp(64, 256, 256, 10), _normal(64), 128, 10, adam),
    "large MLP": Supervised(lambda: mlp(784, 2048, 2048, 10), _normal(784), 512, 10, adam),
    "CNN": Supervised(cnn, _normal(3, 32, 32), 128, 10, adam),
    "transformer": Supervised(Transformer, _tokens, 32, 10, adam),
    "tiny GAN": GAN(
        lambda: mlp(8, 32, 16),
        lambda: nn.Sequential(mlp(16, 32, 1), nn.Sigmoid()),
        noise=(8,),
        sample=(16,),
        size=32,
        optimizer=sgd,
    ),
    "DCGAN": GAN(
        dcgan_generator,
        dcgan_critic,
        noise=(100, 1, 1),
        sample=(3, 32, 32),
        size=64,
        optimizer=dcgan_adam,
    ),
}
"""By name, so that a process can be told what to train."""
