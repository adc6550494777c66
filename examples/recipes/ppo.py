"""PPO: several epochs over what was played, until the policy has moved too far from it.

Schulman, Wolski, Dhariwal, Radford, Klimov: Proximal Policy Optimization Algorithms, 2017;
reference implementation: vwxyzjn/cleanrl, ppo.py.

Which moment is in which minibatch, the scale of the advantages, and when to stop are matters of the
whole rollout, however it is cut.
"""

from collections.abc import Iterator

import torch
from _common import Result, Where, run, trainer
from torch import Tensor, nn
from torch.distributions import Categorical

from composefit import Gather, LoopModule, Mean, Step

Played = list[Tensor]  # state (n, 4), action, its log-likelihood, advantage, what was earned (n,)


def push(state: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Push carts with a pole (Barto, Sutton, Anderson, 1983); those that fail begin anew."""
    _, speed, angle, spin = state.unbind(1)
    force = (20 * right - 10 + 0.05 * spin**2 * angle.sin()) / 1.1
    turn = (9.8 * angle.sin() - force * angle.cos()) / (2 / 3 - angle.cos() ** 2 / 22)
    pushed = force - turn * angle.cos() / 22
    state = state + 0.02 * torch.stack([speed, pushed, spin, turn], 1)
    failed = (state[:, 0].abs() > 2.4) | (state[:, 2].abs() > 0.2)
    return torch.where(failed[:, None], 0.1 * torch.rand(state.shape) - 0.05, state), failed


class PPO(LoopModule):
    epochs, parts, clip, furthest = 4, 4, 0.2, 0.02

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
        self.critic = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": torch.optim.Adam(self.parameters(), lr=3e-3)}

    def forward(self, state: Tensor) -> tuple[Categorical, Tensor]:
        """The policy, and what is expected to be earned, (n,)."""
        policy = Categorical(logits=self.actor(state), validate_args=False)  # of no rows, too
        return policy, self.critic(state).squeeze(1)

    def training_step(self, played: Played) -> Step:
        n = len(played[0])
        for _ in range(self.epochs):
            draws, offset = yield from Gather(self.random.uniform(n))
            part = draws.argsort().argsort()[offset : offset + n] % self.parts  # of equal size
            for i in range(self.parts):
                moved = yield from self.improve(*(column[part == i] for column in played))
            if moved > self.furthest:
                return

    def improve(self, state: Tensor, *played: Tensor) -> Step:
        """Update the policy; returns how far it was from the one that played (its KL)."""
        n, (action, before, advantage, earned) = len(state), played
        advantage = advantage - (yield from Mean(advantage.sum(), n))
        variance = yield from Mean(advantage.square().sum(), n)
        advantage = advantage / (variance.sqrt() + 1e-8)

        policy, value = self(state)
        ratio = (policy.log_prob(action) - before).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        gain = torch.min(ratio * advantage, clipped * advantage) + 0.01 * policy.entropy()
        error = 0.5 * (value - earned).square()
        yield {"policy": Mean((error - gain).sum(), n)}
        return (yield from Mean((ratio - 1 - ratio.log()).detach().sum(), n))


@torch.no_grad()
def rollouts(module: PPO, count: int, carts: int = 64, horizon: int = 32) -> Iterator[Played]:
    """What the policy, as it is when a batch is asked for, plays in so many moments."""
    state = torch.zeros(carts, 4)
    for _ in range(count):
        moments, advantages = [], [torch.zeros(carts)]
        for _ in range(horizon):
            policy, value = module(state)
            action = policy.sample()
            before, (state, failed) = state, push(state, action)
            moments.append((before, action, policy.log_prob(action), value, 0.99 * ~failed))
        _, following = module(state)
        for *_, value, goes_on in moments[::-1]:
            surprise = 1 + goes_on * following - value
            advantages.append(surprise + goes_on * 0.95 * advantages[-1])
            following = value
        *played, value, _ = (torch.cat(column) for column in zip(*moments, strict=True))
        advantage = torch.cat(advantages[:0:-1])
        yield [*played, advantage, advantage + value]


@torch.no_grad()
def time_up(module: PPO, carts: int = 256) -> float:
    """How many of 200 moments a pole stays up, on average."""
    state, up, total = torch.zeros(carts, 4), torch.ones(carts, dtype=torch.bool), 0.0
    for _ in range(200):
        state, failed = push(state, module(state)[0].sample())
        up &= ~failed
        total += up.float().mean().item()
    return total


def build(quick: bool = False) -> tuple[PPO, Iterator[Played]]:
    torch.manual_seed(0)
    return (module := PPO()), rollouts(module, 3 if quick else 100)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    untrained = time_up(module)
    trainer(strategy, devices, max_epochs=1).fit(module, batches)
    return Result(time_up(module), 150, "higher", untrained, "moments that the pole stays up")


if __name__ == "__main__":
    run(main)
