"""Soft actor-critic: a pendulum swings up; three optimizers, two target networks, a replay.

Haarnoja, Zhou, Hartikainen, Tucker and others: Soft Actor-Critic Algorithms and Applications, 2018;
reference implementation: rail-berkeley/softlearning.

Nothing is detached: each update takes the gradients of its own parameters only.
"""

import copy
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from _common import Result, Where, run, trainer
from _views import follow, perceptron
from torch import Tensor, nn

from composefit import LoopModule, Step


def seen(world: Tensor) -> Tensor:
    """The state of pendulums (n, 2), given as angle, 0 at the top, and speed."""
    angle, speed = world.split(1, 1)
    return torch.cat([angle.cos(), angle.sin(), speed / 8], 1)


def swing(world: Tensor, torque: Tensor) -> tuple[Tensor, Tensor]:
    """Move for 0.05 s, by a torque too weak to lift them at once; and the reward, 0 at best."""
    angle, speed = world.split(1, 1)
    angle = (angle + math.pi) % (2 * math.pi) - math.pi
    reward = -(angle**2 + 0.1 * speed**2 + 0.004 * torque**2)
    speed = (speed + 0.05 * (15 * angle.sin() + 6 * torque)).clamp(-8, 8)
    return torch.cat([angle + 0.05 * speed, speed], 1), reward


class SAC(LoopModule):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.actor = perceptron("none", 3, width, width, 2)
        two = (perceptron("none", 4, width, width, 1) for _ in range(2))
        self.critics = nn.ModuleList(two)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.temperature = nn.Parameter(torch.zeros(()))  # its logarithm

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        critics, actor = self.critics.parameters(), self.actor.parameters()
        parameters = {"critics": critics, "actor": actor, "temperature": [self.temperature]}
        return {name: torch.optim.Adam(own, lr=3e-3) for name, own in parameters.items()}

    def act(self, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """An action from -1 to 1, and the logarithm of its likelihood, each (n, 1)."""
        mean, spread = self.actor(state).chunk(2, 1)
        spread = spread.clamp(-5, 2)
        x = mean + spread.exp() * noise
        squashed = 2 * (math.log(2) - x - F.softplus(-2 * x))  # the slope of tanh
        return x.tanh(), -0.5 * noise**2 - spread - 0.5 * math.log(2 * math.pi) - squashed

    def judge(self, critics: nn.ModuleList, state: Tensor, action: Tensor) -> Tensor:
        return torch.stack([critic(torch.cat([state, action], 1)) for critic in critics])

    def training_step(self, moments: list[Tensor]) -> Step:
        state, action, reward, following = moments
        price = self.temperature.exp()
        then, likelihood = self.act(following, self.random.normal(len(state), 1))
        worth = self.judge(self.targets, following, then.detach()).amin(0)
        goal = reward + 0.98 * (worth - price * likelihood)
        judged = self.judge(self.critics, state, action)
        yield {"critics": F.mse_loss(judged, goal.expand_as(judged))}

        action, likelihood = self.act(state, self.random.normal(len(state), 1))
        worth = self.judge(self.critics, state, action).amin(0)
        yield {
            "actor": (price * likelihood - worth).mean(),
            "temperature": (self.temperature * (1 - likelihood)).mean(),  # aims at an entropy of -1
        }

    def on_after_optimizer_step(self, optimizer: torch.optim.Optimizer, name: str) -> None:
        if name == "critics":
            follow(self.targets, self.critics, momentum=0.99)


@torch.no_grad()
def replay(module: SAC, count: int, pendulums: int = 16, size: int = 128) -> Iterator[list[Tensor]]:
    """Play a moment with each pendulum, and draw a batch from all that was played so far."""
    world, played = torch.empty(0), torch.empty(count, pendulums, 3 + 1 + 1 + 3)
    for i in range(count):
        world = math.pi * torch.rand(pendulums, 2) if i % 200 == 0 else world
        state = seen(world)
        action, _ = module.act(state, torch.randn(pendulums, 1))
        world, reward = swing(world, action)
        played[i] = torch.cat([state, action, reward, seen(world)], 1)
        drawn = played[torch.randint(i + 1, (size,)), torch.randint(pendulums, (size,))]
        yield list(drawn.split([3, 1, 1, 3], 1))  # state, action, reward, the state after it


@torch.no_grad()
def mean_return(module: SAC, pendulums: int = 256) -> float:
    """What an episode of 200 moments earns on average; about -150 is the best there is."""
    world, total = math.pi * torch.rand(pendulums, 2), 0.0
    for _ in range(200):
        world, reward = swing(world, module.act(seen(world), torch.zeros(pendulums, 1))[0])
        total += reward.mean().item()
    return total


def build(quick: bool = False) -> tuple[SAC, Iterator[list[Tensor]]]:
    torch.manual_seed(0)
    return (module := SAC()), replay(module, 30 if quick else 1400)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    untrained = mean_return(module)
    trainer(strategy, devices, max_epochs=1).fit(module, batches)
    return Result(mean_return(module), -400, "higher", untrained, "mean return")


if __name__ == "__main__":
    run(main)
