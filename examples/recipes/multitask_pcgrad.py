"""PCGrad: where two tasks pull in opposite directions, each gives way to the other.

Yu, Kumar, Gupta, Levine, Hausman and Finn, Gradient Surgery for Multi-Task Learning (2020,
arXiv:2001.06782), algorithm 1. Reference: github.com/tianheyu927/PCGrad. The tasks are those of
MultiMNIST (Sabour, Frosst and Hinton, 2017): digits lie over each other, and both are to be read.
"""

from typing import Any

import torch
import torch.nn.functional as F
from _common import Loader, Result, Where, digits, loader, measure, run, trainer
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from composefit import Gradient, Grads, LoopModule, Step


class TwoDigits(LoopModule):
    """A trunk that both tasks share, and a head for each."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        layers = nn.Linear(144, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        self.trunk = nn.Sequential(nn.Flatten(), *layers)
        self.heads = nn.ModuleList(nn.Linear(width, 10) for _ in range(2))

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "trunk": torch.optim.Adam(self.trunk.parameters(), lr=1e-3),
            "heads": torch.optim.Adam(self.heads.parameters(), lr=1e-3),
        }

    def training_step(self, batch: list[Tensor]) -> Step:
        images, *wanted = batch
        pairs = zip(self(images), wanted, strict=True)
        losses = {str(i): F.cross_entropy(scores, y) for i, (scores, y) in enumerate(pairs)}
        slopes = yield from Gradient(losses, wrt="trunk")
        yield {"trunk": Grads(self.surgery(*slopes.values())), "heads": sum(losses.values())}

    def surgery(self, *tasks: Any) -> list[Tensor]:
        """The sum of the tasks' gradients, each without what goes against another one."""
        slopes, changed = [parameters_to_vector(own) for own in tasks], []
        for i, slope in enumerate(slopes):
            for j in self.random.shared.permutation(len(slopes)).tolist():
                if j != i:
                    other = slopes[j]
                    slope = slope - (slope @ other).clamp(max=0) / (other @ other) * other
            changed.append(slope)
        parts = torch.stack(changed).sum(0).split([g.numel() for g in tasks[0]])
        return [part.view_as(g) for part, g in zip(parts, tasks[0], strict=True)]

    def test_step(self, batch: list[Tensor]) -> None:
        images, *wanted = batch
        right = [s.argmax(1) == y for s, y in zip(self(images), wanted, strict=True)]
        self.log("metric", torch.cat(right).double().mean())

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.trunk(images)
        return [head(features) for head in self.heads]


def overlaid(images: Tensor, labels: Tensor, copies: int) -> list[Tensor]:
    """Pairs of digits on a canvas (n, 1, 12, 12), and the two labels of each."""
    first = torch.arange(len(images)).repeat(copies)
    second = torch.cat([torch.randperm(len(images)) for _ in range(copies)])
    canvas = torch.full((len(first), 1, 12, 12), -1.0)
    canvas[:, :, :8, :8] = images[first]
    canvas[:, :, 4:, 4:] = canvas[:, :, 4:, 4:].maximum(images[second])
    return [canvas, labels[first], labels[second]]


def build(quick: bool = False) -> tuple[TwoDigits, Loader]:
    torch.manual_seed(0)
    train, _ = digits()
    return TwoDigits(), loader(*overlaid(*train, copies=4), batch_size=64)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    test = loader(*overlaid(*digits()[1], copies=1), batch_size=200, shuffle=False)
    fitter = trainer(strategy, devices, max_steps=4 if quick else 1000)
    return measure(fitter, module, batches, test, "accuracy", at_least=0.8)


if __name__ == "__main__":
    run(main)
