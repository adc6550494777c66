"""Modules whose plans are known by hand."""

from collections.abc import Generator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from composefit import Gather, Gradient, LoopModule, Mean, Once, Step


class Plain(LoopModule):
    """Returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()


class GAN(LoopModule):
    """Two updates, of which the second does not reach all parameters of its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(2, 3)
        self.critic = nn.Linear(3, 1)
        self.unused = nn.Parameter(torch.zeros(5))

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        generator = [*self.generator.parameters(), self.unused]
        return {
            "critic": torch.optim.SGD(self.critic.parameters(), lr=0.1),
            "generator": torch.optim.Adam(generator, lr=0.1),
        }

    def training_step(self, batch: Tensor) -> Step:
        fake = self.generator(self.random.normal(len(batch), 2))
        yield {"critic": self.critic(fake).mean() - self.critic(batch).mean()}
        yield {"generator": -self.critic(fake).mean()}


class Contrastive(LoopModule):
    """Samples meet through `Gather`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Tensor) -> Step:
        z = self.encoder(batch)
        everything, offset = yield from Gather(z)
        yield F.cross_entropy(z @ everything.T, torch.arange(offset, offset + len(z)))


class Everything(LoopModule):
    """One of each effect, the first from a helper."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.register_buffer("centre", torch.zeros(1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def measured(self, x: Tensor) -> Generator[Any, Any, Tensor]:
        inner = x * 2
        mean: Tensor = yield from Mean(inner.sum(), len(x))
        return mean

    def training_step(self, batch: Tensor) -> Step:
        y = self.net(batch)
        mean = yield from self.measured(batch)
        yield from Once(self.move, y)
        found = yield from Gradient({"size": y.square().mean()}, wrt=self.net[2].weight)
        scale = found["size"][0].norm()
        return (y - mean.detach() + scale).square().mean()

    def move(self, y: Tensor) -> None:
        self.centre.lerp_(y.mean(0), 0.1)
