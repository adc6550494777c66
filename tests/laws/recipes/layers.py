"""Parameters and gradients of unusual kinds: tied, einsum, channels_last, sparse, normalised."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from composefit import LoopModule
from tests.laws.recipe import Draws, Recipe

# -- tied parameters and einsum --------------------------------------------------------------------


def tokens(sizes: list[int]) -> list[Any]:
    draws = Draws(6)
    return [draws.integers(6, n, 4) for n in sizes]


class Tied(LoopModule):
    """The embedding is the head as well, and two names are one parameter; einsum in between.

    Gradients of einsum have other strides than their parameters, those of added parameters share
    their memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.mix = nn.Parameter(torch.randn(4, 2, 4) / 2)
        self.left = nn.Parameter(torch.randn(4))
        self.right = nn.Parameter(torch.randn(4))

    def scores(self, ids: Tensor) -> Tensor:
        x = torch.einsum("btd,dhe->bte", self.embedding(ids), self.mix)
        return self.head((x + (self.left + self.right)).tanh())

    def training_step(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.scores(ids).transpose(1, 2), ids.roll(1, 1))

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.1)


def tied(module: Tied, batches: list[Tensor]) -> Iterator[None]:
    optimizer = SGD(module.parameters(), lr=0.1)
    for ids in batches:
        optimizer.zero_grad()
        F.cross_entropy(module.scores(ids).transpose(1, 2), ids.roll(1, 1)).backward()
        optimizer.step()
        yield


# -- channels_last with fused Adam -----------------------------------------------------------------


def images(sizes: list[int]) -> list[Any]:
    draws = Draws(7)
    return [
        (draws.normal(n, 3, 4, 4).to(memory_format=torch.channels_last), draws.integers(3, n))
        for n in sizes
    ]


class ChannelsLast(LoopModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Flatten()
        ).to(memory_format=torch.channels_last)

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Adam:
        return Adam(self.net.parameters(), lr=0.01, fused=True)


def channels_last(module: ChannelsLast, batches: list[Any]) -> Iterator[None]:
    optimizer = Adam(module.net.parameters(), lr=0.01, fused=True)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(module.net(x), y).backward()
        optimizer.step()
        yield


class ContiguousWeights(ChannelsLast):
    """Input in channels_last, weights not: the gradients have the strides of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.net.to(memory_format=torch.contiguous_format)


# -- sparse embedding ------------------------------------------------------------------------------


class SparseEmbedding(LoopModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3, sparse=True)
        self.head = nn.Linear(3, 1)

    def training_step(self, ids: Tensor) -> Tensor:
        return F.mse_loss(self.head(self.embedding(ids)).mean((1, 2)), ids.sum(1).double() / 10)

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.2)


def sparse_embedding(module: SparseEmbedding, batches: list[Tensor]) -> Iterator[None]:
    optimizer = SGD(module.parameters(), lr=0.2)
    for ids in batches:
        optimizer.zero_grad()
        found = module.head(module.embedding(ids)).mean((1, 2))
        F.mse_loss(found, ids.sum(1).double() / 10).backward()
        assert module.embedding.weight.grad.is_sparse
        optimizer.step()
        yield


# -- normalised ------------------------------------------------------------------------------------


class GroupNormalised(LoopModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), self.norm(), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Flatten()
        )

    def norm(self) -> nn.Module:
        return nn.GroupNorm(2, 4)

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> SGD:
        return SGD(self.net.parameters(), lr=0.1)


def normalised(module: GroupNormalised, batches: list[Any]) -> Iterator[None]:
    optimizer = SGD(module.net.parameters(), lr=0.1)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(module.net(x), y).backward()
        optimizer.step()
        yield


class BatchNormalised(GroupNormalised):
    """Outside law 1: each shard normalises by its own samples."""

    def norm(self) -> nn.Module:
        return nn.BatchNorm2d(4)


RECIPES = {
    "tied parameters and einsum": Recipe(Tied, tokens, tied),
    "channels_last, fused Adam": Recipe(ChannelsLast, images, channels_last),
    "channels_last input, fused Adam": Recipe(ContiguousWeights, images, channels_last),
    "sparse embedding": Recipe(SparseEmbedding, tokens, sparse_embedding),
    "GroupNorm": Recipe(GroupNormalised, images, normalised),
}
