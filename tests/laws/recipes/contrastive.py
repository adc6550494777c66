"""Samples that meet: through `Gather` (InfoNCE), `Once` (MoCo's queue) and bare means."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from composefit import Gather, LoopModule, Mean, Once, Step
from tests.laws.recipe import Draws, Recipe


def views(sizes: list[int]) -> list[Any]:
    """Two views of each sample."""
    draws = Draws(4)
    batches = []
    for n in sizes:
        x = draws.normal(n, 4)
        batches.append((x + 0.1 * draws.normal(n, 4), x + 0.1 * draws.normal(n, 4)))
    return batches


def encoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


# -- InfoNCE ---------------------------------------------------------------------------------------


class InfoNCE(LoopModule):
    """Each sample's other view is to be found among those of all shards."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()

    def training_step(self, batch: Any) -> Step:
        a, b = (F.normalize(self.encoder(view), dim=1) for view in batch)
        (all_a, all_b), offset = yield from Gather((a, b))
        own = torch.arange(offset, offset + len(a))
        a_to_b = F.cross_entropy(a @ all_b.T / 0.2, own)
        b_to_a = F.cross_entropy(b @ all_a.T / 0.2, own)
        yield (a_to_b + b_to_a) / 2

    def configure_optimizers(self) -> SGD:
        return SGD(self.encoder.parameters(), lr=0.1)


def info_nce(module: InfoNCE, batches: list[Any]) -> Iterator[None]:
    optimizer = SGD(module.encoder.parameters(), lr=0.1)
    for first, second in batches:
        optimizer.zero_grad()
        a = F.normalize(module.encoder(first), dim=1)
        b = F.normalize(module.encoder(second), dim=1)
        scores, own = a @ b.T / 0.2, torch.arange(len(a))
        ((F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2).backward()
        optimizer.step()
        yield


# -- statistics of the batch -----------------------------------------------------------------------


class UnitVariance(LoopModule):
    """Both views alike, and their variance over the whole batch kept at one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()

    def training_step(self, batch: Any) -> Step:
        a, b = (self.encoder(view) for view in batch)
        mean = yield from Mean(a.sum(), a.numel())
        variance = yield from Mean((a - mean).square().sum(), a.numel())
        yield F.mse_loss(a, b) + (variance - 1).square()

    def configure_optimizers(self) -> SGD:
        return SGD(self.encoder.parameters(), lr=0.1)


def unit_variance(module: UnitVariance, batches: list[Any]) -> Iterator[None]:
    optimizer = SGD(module.encoder.parameters(), lr=0.1)
    for first, second in batches:
        optimizer.zero_grad()
        a, b = module.encoder(first), module.encoder(second)
        (F.mse_loss(a, b) + (a.var(correction=0) - 1).square()).backward()
        optimizer.step()
        yield


# -- MoCo ------------------------------------------------------------------------------------------


class MoCo(LoopModule):
    """Keys of past batches are the negatives; the key encoder follows the query encoder."""

    queue: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = encoder(), encoder()
        self.keys.load_state_dict(self.queries.state_dict())
        self.keys.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(16, 3), dim=1))

    def training_step(self, batch: Any) -> Step:
        query = F.normalize(self.queries(batch[0]), dim=1)
        key = F.normalize(self.keys(batch[1]), dim=1)
        positive = (query * key).sum(1, keepdim=True)
        scores = torch.cat([positive, query @ self.queue.T], dim=1) / 0.2
        yield F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))
        yield from Once(self.enqueue, key)

    def enqueue(self, keys: Tensor) -> None:
        self.queue.copy_(torch.cat([keys, self.queue])[: len(self.queue)])

    def on_after_optimizer_step(self) -> None:
        with torch.no_grad():
            for key, query in zip(self.keys.parameters(), self.queries.parameters(), strict=True):
                key.lerp_(query, 0.1)

    def configure_optimizers(self) -> SGD:
        return SGD(self.queries.parameters(), lr=0.1)


def moco(module: MoCo, batches: list[Any]) -> Iterator[None]:
    optimizer = SGD(module.queries.parameters(), lr=0.1)
    queue = module.queue.clone()
    for first, second in batches:
        query = F.normalize(module.queries(first), dim=1)
        with torch.no_grad():
            key = F.normalize(module.keys(second), dim=1)
        scores = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], dim=1) / 0.2
        optimizer.zero_grad()
        F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long)).backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(
                module.keys.parameters(), module.queries.parameters(), strict=True
            ):
                slow.copy_(0.9 * slow + 0.1 * fast)
        queue = torch.cat([key, queue])[: len(queue)]
        yield


RECIPES = {
    "InfoNCE": Recipe(InfoNCE, views, info_nce),
    "variance through bare means": Recipe(UnitVariance, views, unit_variance),
    "MoCo": Recipe(MoCo, views, moco),
}
