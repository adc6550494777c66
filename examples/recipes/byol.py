"""BYOL: predict what a slow copy of oneself makes of the other view; no negatives.

Grill, Strub, Altché, Tallec, Richemond and others: Bootstrap Your Own Latent, 2020; reference
implementation: google-deepmind/deepmind-research, byol.

No gradient has to be stopped: an update takes those of the named optimizer's parameters only.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from _common import Loader, Result, Where, digits, run, trainer
from _views import encoder, few_labels, follow, pairs, perceptron
from torch import Tensor, nn

from composefit import LoopModule


class BYOL(LoopModule):
    def __init__(self, norm: str = "batch", width: int = 32, momentum: float = 0.9) -> None:
        super().__init__()
        self.online = nn.Sequential(
            encoder(norm, width), perceptron(norm, 2 * width, 4 * width, width)
        )
        self.predictor = perceptron(norm, width, 4 * width, width)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.momentum = momentum

    def configure_optimizers(self) -> torch.optim.Optimizer:
        learning = [*self.online.parameters(), *self.predictor.parameters()]
        return torch.optim.Adam(learning, lr=6e-3, weight_decay=1e-5)

    def training_step(self, views: list[Tensor]) -> Tensor:
        guess = self.predictor(self.online(torch.cat(views)))
        goal = self.target(torch.cat(views[::-1]))
        return 2 * (2 - 2 * F.cosine_similarity(guess, goal, dim=1)).mean()  # both directions

    def on_after_optimizer_step(self, *_: Any) -> None:
        assert self.trainer is not None
        done = self.global_step / self.trainer.estimated_stepping_batches
        left = (math.cos(math.pi * done) + 1) / 2  # from 1 to 0: the target comes to rest
        follow(self.target, self.online, momentum=1 - (1 - self.momentum) * left)


def build(quick: bool = False) -> tuple[BYOL, Loader]:
    torch.manual_seed(0)
    (images, _), _ = digits()
    return BYOL(), pairs(images, 128)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    untrained = few_labels(module.online[0])
    trainer(strategy, devices, max_epochs=1 if quick else 30).fit(module, batches)
    accuracy = few_labels(module.online[0])
    return Result(accuracy, 0.82, "higher", untrained, "accuracy with four labels a digit")


if __name__ == "__main__":
    run(main)
