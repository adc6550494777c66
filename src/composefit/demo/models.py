"""The two modules of the demo: a GAN, and the classifier that measures what it has learned.

No BatchNorm in either: samples meet only in the loss, so that the result is the same however a
batch is cut.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus
from torch.optim import Adam, Optimizer

from composefit import LoopModule, Step
from composefit.demo.digits import CLASSES

#: Numbers that the generator makes an image from.
NOISE = 64


class GAN(LoopModule):
    """Two networks at odds: one writes digits, the other tells them from real ones.

    The loss is the non-saturating one (Goodfellow et al., 2014) with a gradient penalty on real
    images (R1: Mescheder et al., 2018). Calling the module writes digits with a running average
    of the generator's weights, which wavers less than the generator itself.

    Args:
        width: channels of the layers at full resolution.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.generator = generator(width)
        self.critic = critic(width)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)

    def configure_optimizers(self) -> dict[str, Optimizer]:
        """One optimizer for each network."""
        return {
            "critic": Adam(self.critic.parameters(), lr=1.2e-3, betas=(0.0, 0.99)),
            "generator": Adam(self.generator.parameters(), lr=1.2e-3, betas=(0.0, 0.99)),
        }

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Step:
        """Improve the critic, then the generator against the improved critic."""
        real = batch[0].requires_grad_()
        fake = self.generator(self.random.normal(len(real), NOISE))

        scores = self.critic(real)
        told_apart = softplus(-scores).mean() + softplus(self.critic(fake)).mean()
        critic = yield {"critic": told_apart + gradient_penalty(scores, real)}

        generator = yield {"generator": softplus(-self.critic(fake)).mean()}
        self.log_dict(critic | generator, prog_bar=True, on_step=False, on_epoch=True)

    @torch.no_grad()
    def on_after_optimizer_step(self, optimizer: Optimizer, name: str) -> None:
        """Let the averaged generator follow; closely at first, when there is little to average."""
        if name == "generator" and self.trainer is not None:
            done = self.trainer.updates["generator"]
            weight = max(0.005, 9 / (10 + done))
            for mean, new in zip(
                self.average.parameters(), self.generator.parameters(), strict=True
            ):
                mean.lerp_(new, weight)

    def forward(self, noise: Tensor) -> Tensor:
        """Digits (n, 1, 8, 8) from -1 to 1, of noise (n, 64)."""
        images: Tensor = self.average(noise)
        return images


def gradient_penalty(scores: Tensor, images: Tensor, weight: float = 1.0) -> Tensor:
    """R1: half the mean squared norm of the scores' gradient with respect to each image.

    Args:
        scores: the critic's, (n, 1).
        images: what was scored, (n, 1, 8, 8), requiring gradients.
        weight: of the penalty.

    Source: Mescheder, Geiger and Nowozin, Which Training Methods for GANs do actually Converge?
    (2018).
    """
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return weight / 2 * gradient.square().sum((1, 2, 3)).mean()


class Classifier(LoopModule):
    """Says which digit an image shows; its 32 features are the space to measure distances in."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 32),
            # Bounded: one wild image cannot make the distance whatever it likes.
            nn.Tanh(),
        )
        self.head = nn.Linear(32, CLASSES)

    def configure_optimizers(self) -> Optimizer:
        """One optimizer."""
        return Adam(self.parameters(), lr=2e-3)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One loss."""
        images, labels = batch
        return cross_entropy(self(images), labels)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (n, 10) of images (n, 1, 8, 8)."""
        scores: Tensor = self.head(self.features(images))
        return scores


def generator(width: int) -> nn.Sequential:
    """Noise (n, 64) to images (n, 1, 8, 8), each value in (-1, 1)."""
    return nn.Sequential(
        nn.Linear(NOISE, 2 * width * 2 * 2),
        nn.Unflatten(1, (2 * width, 2, 2)),
        nn.GroupNorm(8, 2 * width),
        nn.ReLU(),
        *_doubled(2 * width, 2 * width),
        *_doubled(2 * width, width),
        nn.Conv2d(width, 1, 3, padding=1),
        nn.Tanh(),
    )


def critic(width: int) -> nn.Sequential:
    """Images (n, 1, 8, 8) to scores (n, 1), high for real ones."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(4 * width * 2 * 2, 1),
    )


def _doubled(before: int, after: int) -> list[nn.Module]:
    return [
        nn.Upsample(scale_factor=2),
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.GroupNorm(4, after),
        nn.ReLU(),
    ]
