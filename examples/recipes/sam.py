"""Sharpness-aware minimisation: the gradient is taken where the loss is worst nearby.

Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization for Efficiently Improving
Generalization, 2021; reference implementation: google-research/sam.

Climbing is an update like any other, by an optimizer of its own, and so is the way back. The hill
is that of the whole batch, however it is cut.

A third of the labels are wrong. The control is the same training without the climb: SGD.
"""

import torch
import torch.nn.functional as F
from _common import Loader, Result, Where, digits, loader, run, trainer
from torch import Tensor, nn

from composefit import Gradient, Grads, LoopModule, Step


class SAM(LoopModule):
    def __init__(self, radius: float = 0.5, width: int = 256) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)
        )
        self.radius = radius

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "climb": torch.optim.SGD(self.parameters(), lr=1.0),
            "descend": torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9),
        }

    def training_step(self, batch: list[Tensor]) -> Step:
        images, labels = batch
        here = F.cross_entropy(self.net(images), labels)
        slopes = yield from Gradient({"here": here}, wrt="climb")
        length = torch.cat([slope.flatten() for slope in slopes["here"]]).norm() + 1e-12
        uphill = [self.radius * slope / length for slope in slopes["here"]]
        yield {"climb": Grads([-slope for slope in uphill])}
        there = F.cross_entropy(self.net(images), labels)
        slopes = yield from Gradient({"there": there}, wrt="descend")
        yield {"climb": Grads(uphill)}  # back to where it was
        yield {"descend": Grads(slopes["there"], loss=there)}

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
