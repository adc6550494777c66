"""StyleGAN2: styles steer a generator; both networks are regularised now and then.

Karras, Laine, Aittala, Hellsten, Lehtinen and Aila, Analyzing and Improving the Image Quality of
StyleGAN (2020, arXiv:1912.04958). Reference: github.com/NVlabs/stylegan2-ada-pytorch.
"""

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from _common import Loader, Result, Where, digits, draw_digits, loader, run, trainer
from torch import Tensor, nn

from composefit import LoopModule, Once, Step
from composefit.callbacks import EMA

NOISE, STYLE, GROUP, SIZES = 32, 64, 4, (4, 8, 8)  # the sizes are those of the layers
R1_EVERY, PATHS_EVERY = 16, 4


class StyleGAN2(LoopModule):
    samples_per_group = GROUP  # the critic looks at the spread within groups of samples

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layers = nn.Linear(NOISE, STYLE), nn.LeakyReLU(0.2), nn.Linear(STYLE, STYLE)
        self.mapping, self.synthesis = nn.Sequential(*layers), Synthesis(width)
        body = conv(1, width, 3), conv(width, width, 4), Spread(), conv(width + 1, width, 4)
        self.critic = nn.Sequential(*body, nn.Flatten(), nn.Linear(4 * width, 1))
        self.path_mean: Tensor = nn.Buffer(torch.zeros(()))

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        generator = chain(self.mapping.parameters(), self.synthesis.parameters())
        c, g = R1_EVERY / (R1_EVERY + 1), PATHS_EVERY / (PATHS_EVERY + 1)  # the extra steps count
        return {
            "critic": torch.optim.Adam(self.critic.parameters(), 5e-3 * c, (0.0, 0.99**c)),
            "generator": torch.optim.Adam(generator, 5e-3 * g, (0.0, 0.99**g)),
        }

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Step:
        real, _ = batch
        fake, _ = self.draw(len(real))
        yield {"generator": F.softplus(-self.critic(fake)).mean()}
        if self.global_step % PATHS_EVERY == 0:
            fake, styles = self.draw(len(real))
            direction = self.random.normal(*fake.shape) / fake[0].numel() ** 0.5
            (slope,) = torch.autograd.grad((fake * direction).sum(), styles, create_graph=True)
            lengths = slope.square().sum(2).mean(1).sqrt()
            mean = yield from Once(self.follow, lengths)
            yield {"generator": PATHS_EVERY * 0.1 * (lengths - mean).square().mean()}
        fake, _ = self.draw(len(real))
        yield {"critic": (F.softplus(self.critic(fake)) + F.softplus(-self.critic(real))).mean()}
        if self.global_step % R1_EVERY == 0:
            real = real.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.critic(real).sum(), real, create_graph=True)
            yield {"critic": R1_EVERY * 0.5 * slope.square().sum((1, 2, 3)).mean()}

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Images (n, 1, 8, 8), and the styles that made them (n, layers, STYLE): often of two."""
        early, late = (self.mapping(self.random.normal(n, 1, NOISE)) for _ in range(2))
        coins = self.random.shared
        at = int(coins.integers(low=1, high=3)) if coins.uniform() < 0.9 else 3
        styles = torch.cat([early.expand(-1, at, -1), late.expand(-1, 3 - at, -1)], 1)
        return self.synthesis(styles, [self.random.normal(n, 1, s, s) for s in SIZES]), styles

    def follow(self, lengths: Tensor) -> Tensor:
        self.path_mean = self.path_mean.lerp(lengths.mean(), 0.1)
        return self.path_mean

    def forward(self, noise: Tensor) -> Any:
        return self.synthesis(self.mapping(noise.unsqueeze(1)).expand(-1, 3, -1))


class Synthesis(nn.Module):
    """Convolutions whose weights each sample's styles scale, and then norm (section 2.2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.start, self.ink = nn.Parameter(torch.randn(width, 4, 4)), nn.Conv2d(width, 1, 1)
        self.weights = nn.Parameter(torch.randn(3, width, width, 3, 3) / (9 * width) ** 0.5)
        self.biases = nn.Parameter(torch.zeros(3, width, 1, 1))
        self.loudness = nn.Parameter(torch.zeros(3))
        self.scales = nn.ModuleList(nn.Linear(STYLE, width) for _ in SIZES)

    def forward(self, styles: Tensor, noise: Any = (0.0, 0.0, 0.0)) -> Any:
        x = self.start.expand(len(styles), -1, -1, -1)
        for i, (weight, scale) in enumerate(zip(self.weights, self.scales, strict=True)):
            s = 1 + scale(styles[:, i])
            x = F.interpolate(x, size=(SIZES[i], SIZES[i]), mode="bilinear")
            x = F.conv2d(x * s[:, :, None, None], weight, padding=1)
            x = x * (s.square() @ weight.square().sum((2, 3)).T).rsqrt()[:, :, None, None]
            x = F.leaky_relu(x + self.biases[i] + self.loudness[i] * noise[i], 0.2)
        return self.ink(x)


class Spread(nn.Module):  # one more channel: the mean standard deviation within groups
    def forward(self, x: Tensor) -> Tensor:
        s = [(g.var(0, correction=0) + 1e-8).sqrt().mean().expand_as(g) for g in x.split(GROUP)]
        return torch.cat([x, torch.cat(s)[:, :1]], 1)


def conv(before: int, after: int, size: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, size, size - 2, padding=1), nn.LeakyReLU(0.2))


def build(quick: bool = False) -> tuple[StyleGAN2, Loader]:
    torch.manual_seed(0)
    (images, labels), _ = digits()
    return StyleGAN2(), loader(images, labels, batch_size=64)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    fitter = trainer(strategy, devices, max_steps=4 if quick else 400, callbacks=EMA(0.98))
    return draw_digits(fitter, module, batches, NOISE, target=15.0)


if __name__ == "__main__":
    run(main)
