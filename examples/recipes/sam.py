"""Sharpness-aware minimisation: the gradient is taken where the loss is worst nearby.

Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization for Efficiently Improving
Generalization, 2021; reference implementation: google-research/sam.

Climbing is an update like any other, by an optimizer of its own; before the second update steps,
the weights go back. The hill is that of the whole batch, however it is cut.

A third of the labels are wrong. The control is the same training without the climb: SGD.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import Loader, Result, Where, digits, loader, run, trainer
from torch import Tensor, nn

from composefit import LoopModule, Step


class Climb(torch.optim.Optimizer):
    """Goes up the gradient, so far in all; `back` returns to where it was."""

    def __init__(self, parameters: Any, radius: float) -> None:
        super().__init__(parameters, {"radius": radius})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            climbers = [p for p in group["params"] if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in climbers]).norm()
            for p in climbers:
                self.state[p]["before"] = p.clone()
                p.add_(p.grad * (group["radius"] / (norm + 1e-12)))

    @torch.no_grad()
    def back(self) -> None:
        for p, state in self.state.items():
            p.copy_(state["before"])


class SAM(LoopModule):
    def __init__(self, radius: float = 0.5, width: int = 256) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)
        )
        self.radius = radius

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        self.climb = Climb(self.parameters(), self.radius)
        return {"climb": self.climb, "descend": torch.optim.SGD(self.parameters(), 0.1, 0.9)}

    def training_step(self, batch: list[Tensor]) -> Step:
        images, labels = batch
        yield {"climb": F.cross_entropy(self.net(images), labels)}
        yield {"descend": F.cross_entropy(self.net(images), labels)}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer, name: str) -> None:
        if name == "descend":
            self.climb.back()

    def test_step(self, batch: list[Tensor]) -> None:
        images, labels = batch
        self.log("accuracy", self.net(images).argmax(1).eq(labels).float().mean())


def build(quick: bool = False, radius: float = 0.5) -> tuple[SAM, Loader]:
    torch.manual_seed(0)
    (images, labels), _ = digits()
    wrong = torch.rand(len(labels)) < 0.4
    labels = torch.where(wrong, torch.randint(10, (len(labels),)), labels)
    return SAM(radius), loader(images, labels, batch_size=128)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    _, (images, labels) = digits()
    test = loader(images, labels, batch_size=400, shuffle=False)
    accuracies = []
    for radius in (0.5, 0.0):  # without a radius it is SGD
        module, batches = build(quick, radius)
        fitter = trainer(strategy, devices, max_epochs=2 if quick else 30)
        fitter.fit(module, batches)
        found, *_ = fitter.test(module, test, verbose=False)
        accuracies.append(found["accuracy"])
    return Result(accuracies[0], 0.9, "higher", accuracies[1], "accuracy")


if __name__ == "__main__":
    run(main)
