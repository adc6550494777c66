"""Actor and critic balance a pole on a cart: a loop that collects the data it trains on."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from composefit import Loop, LoopModule, Mean, Step, Strategy, ThreadDataParallel, Trainer


class CartPoles:
    """Carts with a pole (Barto, Sutton, Anderson, 1983): an episode earns 1 a step, 200 at most."""

    def __init__(self, carts: int, seed: int) -> None:
        self.state, self.age = torch.zeros(carts, 4), torch.zeros(carts)  # at rest, upright
        self.draws = Generator().manual_seed(seed)

    def step(self, right: Tensor) -> Tensor:
        """Push each cart for 0.02 s, and tell whose episode is over."""
        _, speed, angle, spin = self.state.unbind(1)
        force = (20 * right.float() - 10 + 0.05 * spin**2 * angle.sin()) / 1.1
        turn = (9.8 * angle.sin() - force * angle.cos()) / (2 / 3 - angle.cos() ** 2 / 22)
        push = force - turn * angle.cos() / 22
        state, age = self.state + 0.02 * torch.stack([speed, push, spin, turn], 1), self.age + 1
        over = (state[:, 0].abs() > 2.4) | (state[:, 2].abs() > 0.2) | (age >= 200)
        fresh = 0.1 * torch.rand(state.shape, generator=self.draws) - 0.05
        self.state, self.age = torch.where(over[:, None], fresh, state), torch.where(over, 0, age)
        return over


class ActorCritic(LoopModule):
    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(0))
        self.critic = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(0))

    def push(self, carts: CartPoles) -> Tensor:
        chance: Tensor = self.actor(carts.state).sigmoid()
        return chance.bernoulli(generator=carts.draws)

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {n: torch.optim.Adam(net.parameters(), lr=1e-2) for n, net in self.named_children()}

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Step:
        state, right, earned = batch
        value = self.critic(state)
        yield {"critic": F.smooth_l1_loss(value, earned)}
        advantage = (earned - value).detach()
        variance = yield from Mean(advantage.square().sum(), len(advantage))  # over all shards
        surprise = F.binary_cross_entropy_with_logits(self.actor(state), right, reduction="none")
        yield {"actor": (surprise * advantage).mean() / variance.sqrt()}
        self.log("earned", earned.mean(), prog_bar=True)


class PlayAndLearn(Loop):
    """Play some steps with all carts, train on what they saw, and again."""

    def __init__(self, carts: int = 64, horizon: int = 32) -> None:
        self.carts, self.horizon = CartPoles(carts, seed=0), horizon
        self.keep()

    def run(self, trainer: Trainer, module: Any) -> None:
        call = trainer.call
        with call.span("on_fit_start", "on_fit_end"), call.span("on_train_start", "on_train_end"):
            while trainer.global_step < trainer.max_steps and not trainer.should_stop:
                batch = self.play(module)
                with call.batch_span("train", [batch], trainer.global_step) as span:
                    span.outputs = trainer.step(module, [batch], trainer.global_step)
                    self.keep()
                trainer.between_steps()

    @torch.no_grad()
    def play(self, module: ActorCritic) -> tuple[Tensor, Tensor, Tensor]:
        """States, whether the cart was pushed to the right, and what was earned from then on."""
        states, pushes, ends = [], [], []
        for _ in range(self.horizon):
            states.append(self.carts.state)
            pushes.append(module.push(self.carts))
            ends.append(self.carts.step(pushes[-1]))
        earned = [module.critic(self.carts.state)]
        for over in reversed(ends):
            earned.append(1 + 0.98 * earned[-1] * ~over)
        return torch.cat(states), torch.cat(pushes), torch.cat(earned[:0:-1])

    def keep(self) -> None:
        """What was played so far is trained on: who resumes plays on from here."""
        self.kept = {**vars(self.carts), "draws": self.carts.draws.get_state()}

    def state_dict(self) -> dict[str, Tensor]:
        return self.kept

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.carts.state, self.carts.age = state["state"], state["age"]
        self.carts.draws.set_state(state["draws"])
        self.keep()


@torch.no_grad()
def mean_return(module: ActorCritic, carts: int = 256) -> float:
    """What an episode earns, on average over one of each cart."""
    poles, running, total = CartPoles(carts, seed=1), torch.ones(carts, dtype=torch.bool), 0
    while running.any():
        total += int(running.sum())
        running &= ~poles.step(module.push(poles))
    return total / carts


def main(strategy: Strategy | None = None, steps: int = 150) -> tuple[float, float]:
    """Train, and return what an episode earned on average before and after."""
    torch.manual_seed(0)
    module = ActorCritic()
    before = mean_return(module)
    trainer = Trainer(strategy=strategy or ThreadDataParallel(2), max_steps=steps, seed=0)
    trainer.run(PlayAndLearn(), module)
    return before, mean_return(module)


if __name__ == "__main__":
    print("mean return at the start {:.1f}\nmean return at the end {:.1f}".format(*main()))
