"""A GAN in a hand-written loop: `strategy.gradient` is data-parallel forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from composefit import Strategy, ThreadDataParallel


def network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, outputs)
    )


def circle(points: int) -> Tensor:
    """Points on a circle of radius 1, with a little noise."""
    angle = 2 * torch.pi * torch.rand(points, 1)
    return torch.cat([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(points, 2)


def critic_loss(gan: nn.ModuleDict, batch: tuple[Tensor, Tensor]) -> Tensor:
    real, noise = batch
    fake = gan["generator"](noise)
    return F.softplus(-gan["critic"](real)).mean() + F.softplus(gan["critic"](fake)).mean()


def generator_loss(gan: nn.ModuleDict, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.softplus(-gan["critic"](gan["generator"](batch[1]))).mean()


def main(strategy: Strategy | None = None, steps: int = 600) -> float:
    """Train, and return how far generated points are from the circle, on average."""
    torch.manual_seed(0)
    gan = nn.ModuleDict({"generator": network(4, 2), "critic": network(2, 1)})
    critic_adam = torch.optim.Adam(gan["critic"].parameters(), lr=5e-3, betas=(0.5, 0.99))
    generator_adam = torch.optim.Adam(gan["generator"].parameters(), lr=2e-3, betas=(0.5, 0.99))
    with strategy or ThreadDataParallel(threads=2) as parallel:
        for _ in range(steps):
            batch = (circle(128), torch.randn(128, 4))
            for adam, loss_fn in (critic_adam, critic_loss), (generator_adam, generator_loss):
                parameters = adam.param_groups[0]["params"]
                _, gradients = parallel.gradient(loss_fn, gan, batch, parameters)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                adam.step()
    with torch.no_grad():
        return float((gan["generator"](torch.randn(2000, 4)).norm(dim=1) - 1).abs().mean())


if __name__ == "__main__":
    print(f"mean distance from the circle {main():.3f}")
