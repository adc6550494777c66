"""WGAN-GP: a critic kept at slope one measures how far drawn digits are from real ones.

Gulrajani, Ahmed, Arjovsky, Dumoulin and Courville, Improved Training of Wasserstein GANs (2017,
arXiv:1704.00028), algorithm 1. Reference: github.com/igul222/improved_wgan_training.
"""

import torch
from _common import Loader, Result, Where, digits, draw_digits, loader, run, trainer
from torch import Tensor, nn

from composefit import LoopModule, Step

NOISE, CRITIC_STEPS = 64, 5


class WGANGP(LoopModule):
    """Five critic steps for each of the generator.

    With `fresh` each of the five sees a batch of its own, as in the paper: a step takes one batch,
    and the generator's turn comes at every fifth. Else all five are made on the same batch.
    """

    def __init__(self, width: int = 16, fresh: bool = True) -> None:
        super().__init__()
        self.generator, self.critic, self.fresh = generator(width), critic(width), fresh

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "critic": torch.optim.Adam(self.critic.parameters(), lr=2e-3, betas=(0.0, 0.9)),
            "generator": torch.optim.Adam(self.generator.parameters(), lr=2e-3, betas=(0.0, 0.9)),
        }

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Step:
        real, _ = batch
        for _ in range(1 if self.fresh else CRITIC_STEPS):
            fake = self.generator(self.random.normal(len(real), NOISE))
            difference = self.critic(fake).mean() - self.critic(real).mean()
            yield {"critic": difference + 10 * self.gradient_penalty(real, fake)}
        if not self.fresh or self.global_step % CRITIC_STEPS == CRITIC_STEPS - 1:
            fake = self.generator(self.random.normal(len(real), NOISE))
            yield {"generator": -self.critic(fake).mean()}

    def gradient_penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        between = torch.lerp(real, fake, self.random.uniform(len(real), 1, 1, 1))
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty: Tensor = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return penalty

    def forward(self, noise: Tensor) -> Tensor:
        images: Tensor = self.generator(noise)
        return images


def generator(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(NOISE, 8 * width),
        nn.Unflatten(1, (2 * width, 2, 2)),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 1, 3, padding=1),
        nn.Tanh(),
    )


def critic(width: int) -> nn.Module:
    """Without BatchNorm: the penalty speaks of the slope at each image by itself."""
    return nn.Sequential(
        nn.Conv2d(1, width, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(8 * width, 1),
    )


def build(quick: bool = False, fresh: bool = True) -> tuple[WGANGP, Loader]:
    torch.manual_seed(0)
    (images, labels), _ = digits()
    return WGANGP(fresh=fresh), loader(images, labels, batch_size=64)


def main(
    strategy: Where = "auto",
    devices: int | str = "auto",
    quick: bool = False,
    fresh: bool = True,
) -> Result:
    module, batches = build(quick, fresh)
    steps = 5 if quick else 1000 if fresh else 200
    fitter = trainer(strategy, devices, max_steps=steps)
    return draw_digits(fitter, module, batches, NOISE, target=6.0)


if __name__ == "__main__":
    run(main)
