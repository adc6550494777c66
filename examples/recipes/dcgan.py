"""DCGAN: a generator and a critic of convolutions with BatchNorm learn to draw digits.

Radford, Metz and Chintala, Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks (2016, arXiv:1511.06434). Reference: github.com/pytorch/examples, dcgan.
"""

import torch
import torch.nn.functional as F
from _common import Loader, Result, Where, digits, draw_digits, loader, norm, run, trainer
from torch import Tensor, nn

from composefit import LoopModule, Step

NOISE = 64


class DCGAN(LoopModule):
    """`norm="group"` is for those whose result must not depend on how a batch is cut."""

    def __init__(self, width: int = 32, norm: str = "batch") -> None:
        super().__init__()
        self.samples_per_group = 2 if norm == "batch" else 1  # BatchNorm needs two
        self.generator, self.critic = generator(width, norm), critic(width, norm)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "critic": torch.optim.Adam(self.critic.parameters(), lr=5e-4, betas=(0.5, 0.999)),
            "generator": torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.999)),
        }

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Step:
        real, _ = batch
        fake = self.generator(self.random.normal(len(real), NOISE))
        yield {"critic": real_loss(self.critic(real)) + fake_loss(self.critic(fake))}
        yield {"generator": real_loss(self.critic(fake))}

    def forward(self, noise: Tensor) -> Tensor:
        images: Tensor = self.generator(noise)
        return images


def real_loss(scores: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, torch.ones_like(scores))


def fake_loss(scores: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, torch.zeros_like(scores))


def generator(width: int, kind: str) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (NOISE, 1, 1)),
        nn.ConvTranspose2d(NOISE, 2 * width, 2, bias=False),
        norm(kind, 2 * width),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),
        norm(kind, width),
        nn.ReLU(),
        nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
        nn.Tanh(),
    )


def critic(width: int, kind: str) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
        norm(kind, 2 * width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 1, 2),
    )


def build(quick: bool = False) -> tuple[DCGAN, Loader]:
    torch.manual_seed(0)
    (images, labels), _ = digits()
    return DCGAN(), loader(images, labels, batch_size=64)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    fitter = trainer(strategy, devices, max_steps=4 if quick else 700)
    return draw_digits(fitter, module, batches, NOISE, target=6.0)


if __name__ == "__main__":
    run(main)
