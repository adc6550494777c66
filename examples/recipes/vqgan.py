"""VQ-GAN: images become codes from a small book, and a critic sharpens what is made of them.

Esser, Rombach and Ommer, Taming Transformers for High-Resolution Image Synthesis (2021,
arXiv:2012.09841); the book follows its codes as in van den Oord, Vinyals and Kavukcuoglu, Neural
Discrete Representation Learning (2017, arXiv:1711.00937), appendix A. Reference:
github.com/CompVis/taming-transformers. Without the perceptual loss, which needs a trained network.
"""

import torch
import torch.nn.functional as F
from _common import Loader, Result, Where, digits, loader, measure, norm, run, trainer
from torch import Tensor, nn

from composefit import Gradient, LoopModule, Once, Step


class VQGAN(LoopModule):
    def __init__(self, width: int = 24, norm: str = "batch", critic_from: int = 20) -> None:
        super().__init__()
        self.samples_per_group = 2 if norm == "batch" else 1  # BatchNorm needs two
        self.encoder, self.decoder = encoder(width), decoder(width)
        self.book, self.critic = Codebook(64, width), critic(width, norm)
        self.critic_from = critic_from

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        coder = [*self.encoder.parameters(), *self.decoder.parameters()]
        return {
            "coder": torch.optim.Adam(coder, lr=2e-3, betas=(0.5, 0.9)),
            "critic": torch.optim.Adam(self.critic.parameters(), lr=1e-3, betas=(0.5, 0.9)),
        }

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Step:
        images, _ = batch
        z = self.encoder(images)
        codes, chosen = self.book(z)
        copies = self.decoder(z + (codes - z).detach())  # straight through to the encoder
        loss = difference = (copies - images).abs().mean()
        judged = self.global_step >= self.critic_from
        if judged:
            fooled = -self.critic(copies).mean()
            losses = {"difference": difference, "fooled": fooled}
            slopes = yield from Gradient(losses, wrt=self.decoder[-1].weight)
            balance = slopes["difference"][0].norm() / (slopes["fooled"][0].norm() + 1e-4)
            loss = difference + 0.8 * balance.clamp(0, 1e4) * fooled
        yield {"coder": loss + 0.25 * (z - codes).square().mean()}
        if judged:
            real, fake = self.critic(images), self.critic(copies)
            yield {"critic": (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2}
        yield from Once(self.book.follow, z.movedim(1, -1).flatten(0, 2), chosen.flatten())

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, _ = batch
        codes, _ = self.book(self.encoder(images))
        self.log("metric", (self.decoder(codes) - images).abs().mean())


class Codebook(nn.Module):
    """Codes that are running means of what chose them."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.codes: Tensor = nn.Buffer(torch.randn(size, width))
        self.counts: Tensor = nn.Buffer(torch.zeros(size))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The closest code at each place of (n, width, h, w), and its number (n, h, w)."""
        places = z.detach().movedim(1, -1)
        chosen = torch.cdist(places.flatten(1, 2), self.codes).argmin(2).unflatten(1, z.shape[2:])
        return self.codes[chosen].movedim(-1, 1), chosen

    def follow(self, z: Tensor, chosen: Tensor, decay: float = 0.95) -> None:
        choices = F.one_hot(chosen, len(self.codes)).to(z.dtype)
        sums = decay * self.counts[:, None] * self.codes + (1 - decay) * choices.T @ z
        self.counts = decay * self.counts + (1 - decay) * choices.sum(0)
        alive = (self.counts > 0.01)[:, None]  # at first none is; who is not begins anew
        fresh = z[torch.randint(len(z), (len(self.codes),))]
        fresh = fresh + 0.01 * torch.randn_like(fresh)  # no two codes are equally close
        self.codes = torch.where(alive, sums / self.counts[:, None].clamp(min=0.01), fresh)


def encoder(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, width, 4, 2, 1), nn.SiLU(), nn.Conv2d(width, width, 3, 1, 1))


def decoder(width: int) -> nn.Sequential:
    up = nn.ConvTranspose2d(width, width, 4, 2, 1)
    return nn.Sequential(up, nn.SiLU(), nn.Conv2d(width, 1, 3, 1, 1))


def critic(width: int, kind: str) -> nn.Module:
    first, second = nn.Conv2d(1, width, 4, 2, 1), nn.Conv2d(width, width, 3, padding=1, bias=False)
    leaky = nn.LeakyReLU(0.2)
    return nn.Sequential(first, leaky, second, norm(kind, width), leaky, nn.Conv2d(width, 1, 3))


def build(quick: bool = False) -> tuple[VQGAN, Loader]:
    torch.manual_seed(0)
    (images, labels), _ = digits()
    module = VQGAN(critic_from=2) if quick else VQGAN()
    return module, loader(images, labels, batch_size=64)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    fitter = trainer(strategy, devices, max_steps=4 if quick else 350)
    test = loader(*digits()[1], batch_size=200, shuffle=False)
    return measure(fitter, module, batches, test, "mean error of a pixel", at_most=0.2)


if __name__ == "__main__":
    run(main)
