"""Soft actor-critic: a pendulum swings up; three optimizers, two target networks, a replay.

Haarnoja, Zhou, Hartikainen, Tucker and others: Soft Actor-Critic Algorithms and Applications, 2018;
reference implementation: rail-berkeley/softlearning.

Each loss is said as it stands in the paper. Nothing is detached: the critic's update takes the
critic's gradients, the actor's the actor's, and that of the temperature its own.
"""

import copy
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from _common import Result, Where, run, trainer
from _views import follow
from torch import Tensor, nn

from composefit import LoopModule, Step

Moments = tuple[Tensor, ...]  # state, action, reward, the state that follows


class Pendulums:
    """Hanging at random; to be held upright by a torque that is too weak to lift them at once."""

    def __init__(self, count: int) -> None:
        self.angle = math.pi * (2 * torch.rand(count, 1) - 1)  # 0 is upright
        self.speed = 2 * torch.rand(count, 1) - 1

    @property
    def state(self) -> Tensor:
        return torch.cat([self.angle.cos(), self.angle.sin(), self.speed / 8], 1)

    def step(self, action: Tensor) -> Tensor:
        """Turn for 0.05 s, with a torque between -1 and 1 times 2; the reward, 0 at best."""
        off = (self.angle + math.pi) % (2 * math.pi) - math.pi
        reward = -(off**2 + 0.1 * self.speed**2 + 0.004 * action**2)
        speed = self.speed + 0.05 * (15 * self.angle.sin() + 6 * action)
        self.speed = speed.clamp(-8, 8)
        self.angle = self.angle + 0.05 * self.speed
        return reward


def network(inputs: int, outputs: int, width: int) -> nn.Sequential:
    first, second = nn.Linear(inputs, width), nn.Linear(width, width)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(width, outputs))


class SAC(LoopModule):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.actor = network(3, 2, width)
        self.critics = nn.ModuleList([network(4, 1, width), network(4, 1, width)])
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.temperature = nn.Parameter(torch.zeros(()))  # its logarithm

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "critic": torch.optim.Adam(self.critics.parameters(), lr=3e-3),
            "actor": torch.optim.Adam(self.actor.parameters(), lr=3e-3),
            "temperature": torch.optim.Adam([self.temperature], lr=3e-3),
        }

    def act(self, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """An action between -1 and 1, and the logarithm of its likelihood, each (n, 1)."""
        mean, spread = self.actor(state).chunk(2, 1)
        spread = spread.clamp(-5, 2)
        x = mean + spread.exp() * noise
        squashed = 2 * (math.log(2) - x - F.softplus(-2 * x))  # of the derivative of tanh
        normal = -0.5 * noise**2 - spread - 0.5 * math.log(2 * math.pi)
        return x.tanh(), normal - squashed

    def training_step(self, moments: Moments) -> Step:
        state, action, reward, following = moments
        price = self.temperature.exp()
        with torch.no_grad():
            then, likelihood = self.act(following, self.random.normal(len(state), 1))
            worth = torch.min(*self.judge(self.targets, following, then))
            goal = reward + 0.98 * (worth - price * likelihood)
        first, second = self.judge(self.critics, state, action)
        yield {"critic": F.mse_loss(first, goal) + F.mse_loss(second, goal)}

        action, likelihood = self.act(state, self.random.normal(len(state), 1))
        worth = torch.min(*self.judge(self.critics, state, action))
        surplus = likelihood - 1  # above the entropy that is aimed at: -1, as an action has one part
        yield {
            "actor": (price * likelihood - worth).mean(),
            "temperature": -(self.temperature * surplus).mean(),
        }

    def judge(self, critics: nn.ModuleList, state: Tensor, action: Tensor) -> list[Tensor]:
        return [critic(torch.cat([state, action], 1)) for critic in critics]

    def on_after_optimizer_step(self, optimizer: torch.optim.Optimizer, name: str) -> None:
        if name == "critic":
            follow(self.targets, self.critics, momentum=0.99)


@torch.no_grad()
def replay(policy: SAC, count: int, pendulums: int = 16, size: int = 128) -> Iterator[Moments]:
    """Play a moment with each pendulum, and draw a batch from all that was played so far."""
    played = torch.empty(count + 20, pendulums, 3 + 1 + 1 + 3)
    for i in range(len(played)):
        if i % 200 == 0:
            world = Pendulums(pendulums)
        state = world.state
        action, _ = policy.act(state, torch.randn(pendulums, 1))
        played[i] = torch.cat([state, action, world.step(action), world.state], 1)
        if i >= 20:
            drawn = played[torch.randint(i + 1, (size,)), torch.randint(pendulums, (size,))]
            yield drawn.split([3, 1, 1, 3], 1)


@torch.no_grad()
def mean_return(module: SAC, pendulums: int = 256) -> float:
    """What an episode of 200 moments earns on average; the best there is is about -150."""
    world, total = Pendulums(pendulums), 0.0
    for _ in range(200):
        action, _ = module.act(world.state, torch.zeros(pendulums, 1))
        total += world.step(action).mean().item()
    return total


def build(quick: bool = False) -> tuple[SAC, Iterator[Moments]]:
    torch.manual_seed(0)
    module = SAC()
    return module, replay(module, 30 if quick else 1400)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    untrained = mean_return(module)
    trainer(strategy, devices, max_epochs=1).fit(module, batches)
    return Result(mean_return(module), -500, "higher", untrained, "mean return")


if __name__ == "__main__":
    run(main)
