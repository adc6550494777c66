"""FixMatch: what is said with confidence of a weak view is to be said of a strong one.

Sohn, Berthelot, Li, Zhang and others: FixMatch: Simplifying Semi-Supervised Learning with
Consistency and Confidence, 2020; reference implementation: google-research/fixmatch.

Labelled and unlabelled images come from two loaders, and each loss is a mean over its own. There
are four labels a digit; the control is trained on these alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from _common import Loader, Result, Where, digits, loader, run, trainer
from _views import encoder, view
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from composefit import LoopModule, Mean
from composefit.callbacks import EMA
from composefit.losses import Loss


class FixMatch(LoopModule):
    def __init__(self, norm: str = "batch", width: int = 32, weight: float = 1.0) -> None:
        super().__init__()
        self.net = nn.Sequential(encoder(norm, width), nn.Linear(2 * width, 10))
        self.weight, self.confidence = weight, 0.95

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
        )

    def training_step(self, batch: dict[str, list[Tensor]]) -> Loss:
        images, labels = batch["labelled"]
        weak, strong = batch["unlabelled"]
        scores = self.net(torch.cat([images, weak, strong]))
        of_images, of_weak, of_strong = scores.split([len(images), len(weak), len(strong)])
        supervised = F.cross_entropy(of_images, labels, reduction="none")

        confidence, guess = of_weak.detach().softmax(1).max(1)
        consistency = F.cross_entropy(of_strong, guess, reduction="none")
        consistency = consistency * (confidence >= self.confidence)
        return Mean(supervised.sum(), len(images)) + self.weight * Mean(
            consistency.sum(), len(weak)
        )

    def test_step(self, batch: list[Tensor]) -> None:
        images, labels = batch
        self.log("accuracy", self.net(images).argmax(1).eq(labels).float().mean())


def labelled(rows: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    images, labels = (torch.stack(column) for column in zip(*rows, strict=True))
    return [view(images, strength=0.3), labels]


def unlabelled(rows: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    images = torch.stack([image for image, _ in rows])
    return [view(images, strength=0.3), view(images)]


def build(
    quick: bool = False, weight: float = 1.0, steps: int = 220
) -> tuple[FixMatch, dict[str, Loader]]:
    torch.manual_seed(0)
    (images, labels), _ = digits()
    few = torch.cat([(labels == digit).nonzero()[:4, 0] for digit in range(10)])

    def drawn(rows: Tensor, size: int, views: Any) -> Loader:
        data: Dataset[Any] = TensorDataset(images[rows], labels[rows])
        draws = RandomSampler(rows, replacement=True, num_samples=size * steps)
        return DataLoader(data, size, sampler=draws, collate_fn=views)

    everything = torch.arange(len(images))
    loaders = {
        "labelled": drawn(few, 32, labelled),
        "unlabelled": drawn(everything, 160, unlabelled),
    }
    return FixMatch(weight=weight), loaders


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    _, (images, labels) = digits()
    test = loader(images, labels, batch_size=400, shuffle=False)
    accuracies = []
    for weight in 1.0, 0.0:
        module, batches = build(quick, weight, steps=2 if quick else 220)
        fitter = trainer(strategy, devices, max_epochs=1, callbacks=EMA(0.95, use_buffers=True))
        fitter.fit(module, batches)
        found, *_ = fitter.test(module, test, verbose=False)
        accuracies.append(found["accuracy"])
    return Result(accuracies[0], 0.9, "higher", accuracies[1], "accuracy")


if __name__ == "__main__":
    run(main)
