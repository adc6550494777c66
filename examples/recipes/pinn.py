"""A physics-informed network: Burgers' equation, by Adam and then by L-BFGS.

Raissi, Perdikaris, Karniadakis: Physics-Informed Neural Networks: A Deep Learning Framework for
Solving Forward and Inverse Problems Involving Nonlinear Partial Differential Equations, 2019;
reference implementation: maziarraissi/PINNs, Burgers.

The equation is u_t + u u_x = v u_xx for -1 < x < 1, with u = -sin(pi x) at the start and 0 at both
ends. Nothing but points is given; the solution is known, and is what is measured against.
"""

import math

import numpy as np
import torch
from _common import Result, Where, run, trainer
from torch import Tensor, nn

from composefit import LoopModule, Step

VISCOSITY = 0.1 / math.pi


class PINN(LoopModule):
    def __init__(self, width: int = 20, by_adam: int = 300) -> None:
        super().__init__()
        self.by_adam = by_adam
        layers: list[nn.Module] = [nn.Linear(2, width), nn.Tanh()]
        for _ in range(3):
            layers += [nn.Linear(width, width), nn.Tanh()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        parameters = list(self.parameters())
        return {
            "adam": torch.optim.Adam(parameters, lr=3e-3),
            "lbfgs": torch.optim.LBFGS(parameters, max_iter=20, line_search_fn="strong_wolfe"),
        }

    def forward(self, points: Tensor) -> Tensor:
        """The solution u (n, 1) at points (n, 2): x and t."""
        found: Tensor = self.net(points)
        return found

    def training_step(self, batch: list[Tensor]) -> Step:
        if self.global_step < self.by_adam:
            yield {"adam": self.loss(*batch)}
        else:
            yield {"lbfgs": lambda: self.loss(*batch)}  # it asks as often as it likes

    def loss(self, inside: Tensor, edge: Tensor, expected: Tensor) -> Tensor:
        points = inside.clone().requires_grad_()
        u = self(points)
        (slopes,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        u_x, u_t = slopes.split(1, dim=1)
        (curvatures,) = torch.autograd.grad(u_x.sum(), points, create_graph=True)
        residual = u_t + u * u_x - VISCOSITY * curvatures[:, :1]
        loss: Tensor = residual.square().mean() + (self(edge) - expected).square().mean()
        return loss


def solution(points: Tensor) -> Tensor:
    """By the transform of Cole and Hopf: a quotient of two integrals, by Gauss-Hermite."""
    x, t = points.double().split(1, dim=1)
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite.hermgauss(64))
    y = x - 2 * (VISCOSITY * t).sqrt() * nodes
    heat = weights * (-(math.pi * y).cos() / (2 * math.pi * VISCOSITY)).exp()
    u: Tensor = -((math.pi * y).sin() * heat).sum(1, keepdim=True) / heat.sum(1, keepdim=True)
    return u


def build(quick: bool = False, count: int = 600) -> tuple[PINN, list[list[Tensor]]]:
    torch.manual_seed(0)
    inside = torch.rand(count, 2) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])
    edge = inside[torch.randperm(count)]
    at_start = torch.arange(count) % 2 == 0
    edge[at_start, 1], edge[~at_start, 0] = 0.0, edge[~at_start, 0].sign()
    expected = torch.where(at_start[:, None], -(math.pi * edge[:, :1]).sin(), 0)
    by_adam, by_lbfgs = (2, 2) if quick else (300, 30)
    return PINN(by_adam=by_adam), [[inside, edge, expected]] * (by_adam + by_lbfgs)


@torch.no_grad()
def error(module: PINN) -> float:
    """Relative to the size of the solution, over a grid of points after the start."""
    points = torch.cartesian_prod(torch.linspace(-1, 1, 101), torch.linspace(0.01, 1, 50))
    exact = solution(points)
    return float((module(points) - exact).norm() / exact.norm())


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    untrained = error(module)
    trainer(strategy, devices, max_epochs=1).fit(module, batches)
    return Result(error(module), 0.03, "lower", untrained, "relative error")


if __name__ == "__main__":
    run(main)
