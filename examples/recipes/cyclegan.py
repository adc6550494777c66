"""CycleGAN: two generators learn to translate between two sets of images that are not paired.

Zhu, Park, Isola and Efros, Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial
Networks (2017, arXiv:1703.10593). Reference: github.com/junyanz/pytorch-CycleGAN-and-pix2pix.
Here one set are digits, and the other are photographic negatives of other digits.
"""

from itertools import chain

import torch
from _common import Loader, Result, Where, digits, loader, measure, run, trainer
from torch import Tensor, nn

from composefit import LoopModule, Once, Step


class CycleGAN(LoopModule):
    def __init__(self, width: int = 16, pool: int = 50) -> None:
        super().__init__()
        self.a_to_b, self.b_to_a = generator(width), generator(width)
        self.critic_a, self.critic_b = critic(width), critic(width)
        self.pool_a, self.pool_b = ImagePool(pool), ImagePool(pool)

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        generators = chain(self.a_to_b.parameters(), self.b_to_a.parameters())
        critics = chain(self.critic_a.parameters(), self.critic_b.parameters())
        return {
            "generators": torch.optim.Adam(generators, lr=2e-3, betas=(0.5, 0.999)),
            "critics": torch.optim.Adam(critics, lr=2e-3, betas=(0.5, 0.999)),
        }

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Step:
        a, b = batch
        fake_a, fake_b = self.b_to_a(b), self.a_to_b(a)
        cycle = (self.b_to_a(fake_b) - a).abs().mean() + (self.a_to_b(fake_a) - b).abs().mean()
        fooled = off(self.critic_a(fake_a), 1) + off(self.critic_b(fake_b), 1)
        yield {"generators": fooled + 10 * cycle}

        old_a = yield from Once(self.pool_a.exchange, fake_a, rows=True)
        old_b = yield from Once(self.pool_b.exchange, fake_b, rows=True)
        loss_a = off(self.critic_a(a), 1) + off(self.critic_a(old_a), 0)
        loss_b = off(self.critic_b(b), 1) + off(self.critic_b(old_b), 0)
        yield {"critics": (loss_a + loss_b) / 2}

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        a, _ = batch
        self.log("metric", (self.a_to_b(a) + a).abs().mean())  # -a is its negative


class ImagePool(nn.Module):
    """Images made some time ago, so that a critic does not forget them (Shrivastava et al., 2017).

    Half of the images that come in take the place of an old one, which comes out instead.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.images: Tensor = nn.Buffer(torch.zeros(size, 1, 8, 8))
        self.held: Tensor = nn.Buffer(torch.zeros((), dtype=torch.int64))

    def exchange(self, images: Tensor) -> Tensor:
        out = images.clone()
        for i, image in enumerate(images):
            if self.held < len(self.images):
                self.images[self.held] = image
                self.held += 1
            elif torch.rand(()) < 0.5:
                j = torch.randint(len(self.images), ())
                out[i], self.images[j] = self.images[j].clone(), image
        return out


def off(scores: Tensor, wanted: float) -> Tensor:
    """The loss of a least-squares GAN."""
    return (scores - wanted).square().mean()


def block(*layers: nn.Module, width: int) -> list[nn.Module]:
    """Without biases before the norm, which takes them out again."""
    return [*layers, nn.InstanceNorm2d(width), nn.LeakyReLU(0.2)]


def generator(width: int) -> nn.Module:
    return nn.Sequential(
        *block(nn.Conv2d(1, width, 3, padding=1, bias=False), width=width),
        *block(nn.Conv2d(width, width, 3, padding=1, bias=False), width=width),
        nn.Conv2d(width, 1, 3, padding=1),
        nn.Tanh(),
    )


def critic(width: int) -> nn.Module:
    """Scores of overlapping patches."""
    return nn.Sequential(
        nn.Conv2d(1, width, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        *block(nn.Conv2d(width, width, 3, padding=1, bias=False), width=width),
        nn.Conv2d(width, 1, 3, padding=1),
    )


def build(quick: bool = False) -> tuple[CycleGAN, Loader]:
    torch.manual_seed(0)
    (images, _), _ = digits()
    return CycleGAN(), loader(images[:698], -images[698:1396], batch_size=16)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    fitter = trainer(strategy, devices, max_steps=4 if quick else 500)
    test = loader(*digits()[1], batch_size=200, shuffle=False)
    return measure(fitter, module, batches, test, "mean error of a pixel", at_most=0.2)


if __name__ == "__main__":
    run(main)
