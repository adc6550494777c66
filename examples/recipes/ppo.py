"""PPO: several epochs over what was played, until the policy has moved too far from it.

Schulman, Wolski, Dhariwal, Radford, Klimov: Proximal Policy Optimization Algorithms, 2017;
reference implementation: vwxyzjn/cleanrl, ppo.py.

One step is all that is learned from one rollout. Which sample is in which minibatch, the scale of
the advantages, and when to stop are matters of the whole rollout, however it is cut.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from _common import Result, Where, run, trainer
from torch import Tensor, nn
from torch.distributions import Categorical

from composefit import Gather, LoopModule, Mean, Step


class CartPoles:
    """Carts with a pole (Barto, Sutton, Anderson, 1983): an episode earns 1 a step, 200 at most."""

    def __init__(self, carts: int) -> None:
        self.state, self.age = torch.zeros(carts, 4), torch.zeros(carts)

    def step(self, right: Tensor) -> Tensor:
        """Push each cart for 0.02 s, and tell whose episode is over."""
        _, speed, angle, spin = self.state.unbind(1)
        force = (20 * right - 10 + 0.05 * spin**2 * angle.sin()) / 1.1
        turn = (9.8 * angle.sin() - force * angle.cos()) / (2 / 3 - angle.cos() ** 2 / 22)
        push = force - turn * angle.cos() / 22
        state, age = self.state + 0.02 * torch.stack([speed, push, spin, turn], 1), self.age + 1
        over = (state[:, 0].abs() > 2.4) | (state[:, 2].abs() > 0.2) | (age >= 200)
        fresh = 0.1 * torch.rand(state.shape) - 0.05
        self.state, self.age = torch.where(over[:, None], fresh, state), torch.where(over, 0, age)
        return over


class Played(NamedTuple):
    state: Tensor  # (n, 4), of each moment; the others (n,)
    action: Tensor
    likelihood: Tensor  # of the action, its logarithm
    advantage: Tensor
    earned: Tensor


class PPO(LoopModule):
    epochs, parts, clip, furthest = 4, 4, 0.2, 0.02

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
        self.critic = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": torch.optim.Adam(self.parameters(), lr=3e-3)}

    def training_step(self, played: Played) -> Step:
        n = len(played.state)
        for _ in range(self.epochs):
            draws, offset = yield from Gather(self.random.uniform(n))
            part = draws.argsort().argsort()[offset : offset + n] % self.parts  # of equal size
            for i in range(self.parts):
                minibatch = Played(*(column[part == i] for column in played))
                moved = yield from self.improve(minibatch)
            if moved > self.furthest:
                return

    def improve(self, played: Played) -> Step:
        """Update the policy; returns how far it was from the one that played (its KL)."""
        n, advantage = len(played.state), played.advantage
        advantage = advantage - (yield from Mean(advantage.sum(), n))
        variance = yield from Mean(advantage.square().sum(), n)
        advantage = advantage / (variance.sqrt() + 1e-8)

        policy = Categorical(logits=self.actor(played.state))
        ratio = (policy.log_prob(played.action) - played.likelihood).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        gain = torch.min(ratio * advantage, clipped * advantage) + 0.01 * policy.entropy()
        error = (self.critic(played.state).squeeze(1) - played.earned).square()
        yield {"policy": Mean((0.5 * error - gain).sum(), n)}
        moved = ratio.detach()
        return (yield from Mean((moved - 1 - moved.log()).sum(), n))


@torch.no_grad()
def rollouts(policy: PPO, count: int, carts: int = 64, horizon: int = 32) -> Iterator[Played]:
    """What the policy, as it is by then, plays in so many moments; whenever one is asked for."""
    poles = CartPoles(carts)
    for _ in range(count):
        moments, ends, advantages = [], [], [torch.zeros(carts)]
        for _ in range(horizon):
            choice = Categorical(logits=policy.actor(poles.state))
            action, value = choice.sample(), policy.critic(poles.state).squeeze(1)
            moments.append((poles.state, action, choice.log_prob(action), value))
            ends.append(poles.step(action))
        following = policy.critic(poles.state).squeeze(1)
        for (*_, value), over in zip(moments[::-1], ends[::-1], strict=True):
            goes_on = 0.99 * ~over
            surprise = 1 + goes_on * following - value
            advantages.append(surprise + goes_on * 0.95 * advantages[-1])
            following = value
        state, action, likelihood, value = (torch.cat(c) for c in zip(*moments, strict=True))
        advantage = torch.cat(advantages[:0:-1])
        yield Played(state, action, likelihood, advantage, advantage + value)


@torch.no_grad()
def mean_return(policy: PPO, carts: int = 256) -> float:
    """What an episode earns, on average over one of each cart."""
    poles, running, total = CartPoles(carts), torch.ones(carts, dtype=torch.bool), 0
    while running.any():
        total += int(running.sum())
        running &= ~poles.step(Categorical(logits=policy.actor(poles.state)).sample())
    return total / carts


def build(quick: bool = False) -> tuple[PPO, Iterator[Played]]:
    torch.manual_seed(0)
    module = PPO()
    return module, rollouts(module, 3 if quick else 100)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    untrained = mean_return(module)
    trainer(strategy, devices, max_epochs=1).fit(module, batches)
    return Result(mean_return(module), 150, "higher", untrained, "mean return")


if __name__ == "__main__":
    run(main)
