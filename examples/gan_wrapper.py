"""A GAN in a hand-written loop: `DataParallel` around the networks, and nothing else changes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from composefit import DataParallel


def network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, outputs)
    )


def circle(points: int) -> Tensor:
    """Points on a circle of radius 1, with a little noise."""
    angle = 2 * torch.pi * torch.rand(points, 1)
    return torch.cat([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(points, 2)


def main(threads: int | None = 2, steps: int = 600) -> float:
    """Train, and return how far generated points are from the circle, on average."""
    torch.manual_seed(0)
    generator = DataParallel(network(4, 2), threads)
    critic = DataParallel(network(2, 1), threads)
    critic_adam = torch.optim.Adam(critic.parameters(), lr=5e-3, betas=(0.5, 0.99))
    generator_adam = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.99))
    for _ in range(steps):
        real, noise = circle(128), torch.randn(128, 4)
        fake = generator(noise)

        doubt = F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()
        critic_adam.zero_grad()
        doubt.backward()
        critic_adam.step()

        failure = F.softplus(-critic(fake)).mean()
        generator_adam.zero_grad()
        failure.backward(inputs=list(generator.parameters()))  # the critic's are not needed
        generator_adam.step()
    with torch.no_grad():
        return float((generator(torch.randn(2000, 4)).norm(dim=1) - 1).abs().mean())


if __name__ == "__main__":
    print(f"mean distance from the circle {main():.3f}")
