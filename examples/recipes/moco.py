"""MoCo: the other view is to be told from the keys of past batches, which a queue keeps.

He, Fan, Wu, Xie, Girshick: Momentum Contrast for Unsupervised Visual Representation Learning, 2020,
with the projector of its second version; reference implementation: facebookresearch/moco.

The queue is written by `Once`: with the keys of all shards, in the order of the samples.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from _common import Loader, Result, Where, digits, run, trainer
from _views import encoder, few_labels, follow, pairs, perceptron
from torch import Tensor, nn

from composefit import LoopModule, Once, Step


class MoCo(LoopModule):
    queue: Tensor

    def __init__(self, norm: str = "batch", width: int = 32, keys: int = 512) -> None:
        super().__init__()
        self.queries = nn.Sequential(
            encoder(norm, width), perceptron("none", 2 * width, 2 * width, width)
        )
        self.keys = copy.deepcopy(self.queries).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(keys, width), dim=1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.queries.parameters(), lr=3e-3, weight_decay=1e-5)

    def training_step(self, views: list[Tensor]) -> Step:
        query = F.normalize(self.queries(views[0]), dim=1)
        key = F.normalize(self.keys(views[1]), dim=1)
        positive = (query * key).sum(1, keepdim=True)
        scores = torch.cat([positive, query @ self.queue.T], 1) / 0.2
        yield (scores.logsumexp(1) - scores[:, 0]).mean()
        yield from Once(self.enqueue, key)

    def enqueue(self, keys: Tensor) -> None:
        self.queue = torch.cat([keys, self.queue])[: len(self.queue)]

    def on_after_optimizer_step(self, *_: Any) -> None:
        follow(self.keys, self.queries, momentum=0.99)


def build(quick: bool = False) -> tuple[MoCo, Loader]:
    torch.manual_seed(0)
    (images, _), _ = digits()
    return MoCo(), pairs(images, 128)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    untrained = few_labels(module.queries[0])
    trainer(strategy, devices, max_epochs=1 if quick else 30).fit(module, batches)
    accuracy = few_labels(module.queries[0])
    return Result(accuracy, 0.84, "higher", untrained, "accuracy with four labels a digit")


if __name__ == "__main__":
    run(main)
