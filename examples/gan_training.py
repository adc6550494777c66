"""GAN training: critic and generator in one step, each with its optimizer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from composefit import LoopModule, SingleDevice, Step, Strategy, Trainer


def network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, outputs)
    )


class GAN(LoopModule):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = network(4, 2), network(2, 1)

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "critic": torch.optim.Adam(self.critic.parameters(), lr=5e-3, betas=(0.5, 0.99)),
            "generator": torch.optim.Adam(self.generator.parameters(), lr=2e-3, betas=(0.5, 0.99)),
        }

    def training_step(self, real: Tensor) -> Step:
        fake = self.generator(self.random.normal(len(real), 4))
        doubt = F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake)).mean()
        yield {"critic": doubt}
        yield {"generator": F.softplus(-self.critic(fake)).mean()}


def circle(points: int) -> DataLoader[Tensor]:
    """Points on a circle of radius 1, with a little noise."""
    generator = torch.Generator().manual_seed(1)
    angle = 2 * torch.pi * torch.rand(points, 1, generator=generator)
    noise = 0.05 * torch.randn(points, 2, generator=generator)
    data = torch.cat([angle.cos(), angle.sin()], 1) + noise
    return DataLoader(data, batch_size=64, shuffle=True)  # type: ignore[arg-type]


def main(strategy: Strategy | None = None, epochs: int = 20) -> float:
    """Train, and return how far generated points are from the circle, on average."""
    torch.manual_seed(0)
    gan = GAN()
    Trainer(
        strategy=strategy or SingleDevice(),
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
    ).fit(gan, circle(4096))
    with torch.no_grad():
        return float((gan.generator(torch.randn(2000, 4)).norm(dim=1) - 1).abs().mean())


if __name__ == "__main__":
    print(f"mean distance from the circle {main():.3f}")
