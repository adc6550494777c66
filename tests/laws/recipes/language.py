"""Losses over tokens: means whose denominator is not the number of samples."""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from composefit import LoopModule, Mean, Sum
from tests.laws.recipe import Draws, Recipe

TOKENS = 7
PAD = 0


def sentences(sizes: list[int]) -> list[Any]:
    """Token ids of shape (n, 6), padded at the end.

    The first half of the sentences have one token each and none to predict; whole shards hold no
    others.
    """
    draws = Draws(2)
    batches = []
    for n in sizes:
        ids = draws.integers(TOKENS - 1, n, 6) + 1
        for i, length in enumerate(draws.integers(5, n).tolist()):
            ids[i, 2 + length :] = PAD
        ids[: n // 2, 1:] = PAD
        batches.append(ids)
    return batches


class LanguageModel(LoopModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 5, padding_idx=PAD)
        self.rnn = nn.GRU(5, 5, batch_first=True)
        self.head = nn.Linear(5, TOKENS)

    def scores(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(ids[:, :-1]))[0])

    def training_step(self, ids: Tensor) -> Any:
        return Mean(self.total(ids), (ids[:, 1:] != PAD).sum())

    def total(self, ids: Tensor) -> Tensor:
        scores, targets = self.scores(ids).flatten(0, 1), ids[:, 1:].flatten()
        return F.cross_entropy(scores, targets, ignore_index=PAD, reduction="sum")

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.2)


def language_model(module: LanguageModel, batches: list[Tensor]) -> Iterator[None]:
    optimizer = SGD(module.parameters(), lr=0.2)
    for ids in batches:
        optimizer.zero_grad()
        scores = module.scores(ids).flatten(0, 1)
        F.cross_entropy(scores, ids[:, 1:].flatten(), ignore_index=PAD).backward()
        optimizer.step()
        yield


class AveragedLanguageModel(LanguageModel):
    """The control: each shard's own mean over tokens, as a plain loss."""

    def training_step(self, ids: Tensor) -> Tensor:
        return self.total(ids) / (ids[:, 1:] != PAD).sum().clamp(min=1)


class ManyDenominators(LanguageModel):
    """A mean over tokens, one over short sentences, one over samples, and a sum."""

    def training_step(self, ids: Tensor) -> Any:
        scores = self.scores(ids)
        real = ids[:, 1:] != PAD
        nll = F.cross_entropy(scores.transpose(1, 2), ids[:, 1:], reduction="none")
        short = real.sum(1) < 4
        return (
            Mean((nll * real).sum(), real.sum())
            + 0.1 * Mean((scores.logsumexp(2).square().mean(1) * short).sum(), short.sum())
            + 0.05 * scores.square().mean()
            - Sum(scores.sum()) / 1000
        )


def many_denominators(module: ManyDenominators, batches: list[Tensor]) -> Iterator[None]:
    optimizer = SGD(module.parameters(), lr=0.2)
    for ids in batches:
        optimizer.zero_grad()
        scores = module.scores(ids)
        nll = F.cross_entropy(
            scores.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD, reduction="mean"
        )
        short = (ids[:, 1:] != PAD).sum(1) < 4
        size = scores[short].logsumexp(2).square().mean()
        loss = nll + 0.1 * size + 0.05 * scores.square().mean() - 0.001 * scores.sum()
        loss.backward()
        optimizer.step()
        yield


RECIPES = {
    "token-weighted language model": Recipe(LanguageModel, sentences, language_model),
    "four denominators in one loss": Recipe(ManyDenominators, sentences, many_denominators),
}
