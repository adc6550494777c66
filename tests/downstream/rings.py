"""Trains a GAN on points of a ring, and a classifier that tells the ring from its middle."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from composefit import LoopModule, Step, ThreadDataParallel, Trainer

NOISE = 4


class RingGAN(LoopModule):
    """A generator and a critic in one step, whatever carries the step out."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(NOISE, 16), nn.Tanh(), nn.Linear(16, 2))
        self.critic = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "critic": torch.optim.Adam(self.critic.parameters(), lr=1e-2),
            "generator": torch.optim.Adam(self.generator.parameters(), lr=1e-2),
        }

    def training_step(self, batch: list[Tensor]) -> Step:
        (real,) = batch
        fake = self.generator(self.random.normal(len(real), NOISE))
        yield {
            "critic": F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake)).mean()
        }
        yield {"generator": F.softplus(-self.critic(fake)).mean()}


class RingClassifier(LoopModule):
    """The ordinary case: one optimizer, and a step that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        points, on_ring = batch
        loss = F.binary_cross_entropy_with_logits(self.net(points).squeeze(1), on_ring)
        self.log("loss", loss)
        return loss


def ring(n: int) -> Tensor:
    angle = torch.linspace(0, 2 * math.pi, n)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def moved(module: nn.Module, before: dict[str, Tensor]) -> Iterator[str]:
    return (name for name, value in module.named_parameters() if not value.equal(before[name]))


def train(module: LoopModule, dataset: TensorDataset) -> None:
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    trainer = Trainer(
        strategy=ThreadDataParallel(threads=2),
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        max_epochs=2,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(dataset, batch_size=16))
    still = before.keys() - set(moved(module, before))
    if still:
        raise SystemExit(f"not trained: {sorted(still)}")


def main() -> None:
    points = ring(64)
    train(RingGAN(), TensorDataset(points))
    labels = torch.cat([torch.ones(64), torch.zeros(64)])
    train(RingClassifier(), TensorDataset(torch.cat([points, points / 4]), labels))
    print("trained")


if __name__ == "__main__":
    main()
