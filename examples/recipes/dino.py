"""DINO: a student sees crops, and says what its slow copy says of the larger ones.

Caron, Touvron, Misra, Jégou, Mairal, Bojanowski, Joulin: Emerging Properties in Self-Supervised
Vision Transformers, 2021; reference implementation: facebookresearch/dino.

The teacher's centre is the mean over the whole batch: `Once` gets the rows of all shards.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from _common import Loader, Result, Where, digits, run, trainer
from _views import encoder, few_labels, follow, perceptron, view
from torch import Tensor, nn
from torch.utils.data import DataLoader

from composefit import LoopModule, Once, Step


class Prototypes(nn.Module):
    """Cosine similarities to so many directions: a linear layer whose rows have length one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


class DINO(LoopModule):
    centre: Tensor

    def __init__(self, norm: str = "batch", width: int = 32, prototypes: int = 128) -> None:
        super().__init__()
        self.student = nn.Sequential(
            encoder(norm, width),
            perceptron(norm, 2 * width, 4 * width, width),
            Prototypes(width, prototypes),
        )
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(prototypes))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=3e-3, weight_decay=0.04)

    def training_step(self, crops: list[Tensor]) -> Step:
        seen = [self.teacher(large) for large in crops[:2]]
        goals = [((scores - self.centre) / 0.04).softmax(1) for scores in seen]
        guesses = [(self.student(crop) / 0.1).log_softmax(1) for crop in crops]
        pairs = [(t, s) for i, t in enumerate(goals) for j, s in enumerate(guesses) if i != j]
        yield torch.stack([-(goal * guess).sum(1).mean() for goal, guess in pairs]).mean()
        yield from Once(self.move_centre, torch.cat(seen))

    def move_centre(self, scores: Tensor) -> None:
        self.centre.lerp_(scores.mean(0), 0.1)

    def on_after_optimizer_step(self, *_: Any) -> None:
        follow(self.teacher, self.student, momentum=0.99)


def crops(rows: list[Tensor]) -> list[Tensor]:
    """Two views of each image, and two of parts of it."""
    x = torch.stack(rows)
    return [view(x), view(x), *(view(x, part=0.8, size=7) for _ in range(2))]


def build(quick: bool = False) -> tuple[DINO, Loader]:
    torch.manual_seed(0)
    (images, _), _ = digits()
    return DINO(), DataLoader(images, 128, shuffle=True, collate_fn=crops)  # type: ignore[arg-type]


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    untrained = few_labels(module.teacher[0])
    trainer(strategy, devices, max_epochs=1 if quick else 20).fit(module, batches)
    accuracy = few_labels(module.teacher[0])
    return Result(accuracy, 0.81, "higher", untrained, "accuracy with four labels a digit")


if __name__ == "__main__":
    run(main)
