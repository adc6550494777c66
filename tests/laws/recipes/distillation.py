"""A frozen teacher, and an average of the student that a hook keeps."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from composefit import LoopModule
from tests.laws.recipe import Draws, Recipe


def inputs(sizes: list[int]) -> list[Tensor]:
    draws = Draws(5)
    return [draws.normal(n, 4) for n in sizes]


class Distillation(LoopModule):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.student = nn.Linear(4, 3)
        self.average = nn.Linear(4, 3)
        self.average.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.average.requires_grad_(False)

    def training_step(self, x: Tensor) -> Tensor:
        target = (self.teacher(x) * 3).softmax(1)
        return F.kl_div(self.student(x).log_softmax(1), target, reduction="batchmean")

    def on_after_optimizer_step(self, optimizer: Any, name: str) -> None:
        with torch.no_grad():
            for slow, fast in zip(
                self.average.parameters(), self.student.parameters(), strict=True
            ):
                slow.lerp_(fast, 0.2)

    def configure_optimizers(self) -> dict[str, SGD]:
        return {"student": SGD(self.student.parameters(), lr=0.2)}


def distillation(module: Distillation, batches: list[Tensor]) -> Iterator[None]:
    optimizer = SGD(module.student.parameters(), lr=0.2)
    for x in batches:
        with torch.no_grad():
            target = (module.teacher(x) * 3).softmax(1)
        optimizer.zero_grad()
        F.kl_div(module.student(x).log_softmax(1), target, reduction="batchmean").backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(
                module.average.parameters(), module.student.parameters(), strict=True
            ):
                slow.copy_(0.8 * slow + 0.2 * fast)
        yield


RECIPES = {"distillation": Recipe(Distillation, inputs, distillation)}
