"""Diffusion: a network learns to take noise out of digits; averaged weights draw with it.

Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models (2020, arXiv:2006.11239), algorithms
1 and 2. Reference: github.com/hojonathanho/diffusion.
"""

import torch
import torch.nn.functional as F
from _common import Loader, Result, Where, digits, draw_digits, loader, run, trainer
from torch import Tensor, nn

from composefit import LoopModule
from composefit.callbacks import EMA

TIMES = 50


class Diffusion(LoopModule):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.network = Denoiser(width)
        self.betas = nn.Buffer(torch.linspace(1e-3, 0.2, TIMES))
        self.kept = nn.Buffer((1 - self.betas).cumprod(0))  # how much of an image is left

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=2e-3)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, _ = batch
        time = self.random.integers(len(images), high=TIMES)
        noise = self.random.normal(*images.shape)
        kept = self.kept[time][:, None, None, None]
        noisy = kept.sqrt() * images + (1 - kept).sqrt() * noise
        return F.mse_loss(self.network(noisy, time), noise)

    def predict_step(self, noise: Tensor) -> Tensor:
        """Images, from noise of their shape."""
        x = noise
        for time in reversed(range(TIMES)):
            beta, kept = self.betas[time], self.kept[time]
            found = self.network(x, torch.full((len(x),), time, device=x.device))
            x = (x - beta / (1 - kept).sqrt() * found) / (1 - beta).sqrt()
            if time:
                x = x + beta.sqrt() * self.random.normal(*x.shape)
        return x


class Denoiser(nn.Module):
    """Noisy images (n, 1, 8, 8) and times (n,) to the noise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.times, self.first = nn.Embedding(TIMES, width), nn.Linear(64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
            )
            for _ in range(3)
        )
        self.last = nn.Linear(width, 64)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = h + block(h + self.times(time))
        out: Tensor = self.last(h)
        return out.view_as(x)


def build(quick: bool = False) -> tuple[Diffusion, Loader]:
    torch.manual_seed(0)
    (images, labels), _ = digits()
    return Diffusion(), loader(images, labels, batch_size=128)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    fitter = trainer(strategy, devices, max_steps=4 if quick else 1200, callbacks=EMA(0.99))
    return draw_digits(fitter, module, batches, 1, 8, 8, target=4.0)


if __name__ == "__main__":
    run(main)
