"""The workloads of `models`, written for composefit: one class each, under any strategy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from models import GAN, Supervised
from torch import Tensor, nn
from torch.nn import functional as F

from composefit import LoopModule, Step, Trainer


class Classifier(LoopModule):
    """A `Supervised` workload."""

    def __init__(self, work: Supervised) -> None:
        super().__init__()
        self.work = work
        self.model = work.build()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.work.optimizer(self.model.parameters())

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        loss = F.cross_entropy(self.model(inputs), labels)
        self.log("loss", loss)
        return loss


class Adversaries(LoopModule):
    """A `GAN` workload."""

    def __init__(self, work: GAN) -> None:
        super().__init__()
        self.work = work
        self.generator, self.critic = work.build()

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "critic": self.work.optimizer(self.critic.parameters()),
            "generator": self.work.optimizer(self.generator.parameters()),
        }

    def training_step(self, batch: tuple[Tensor]) -> Step:
        (real,) = batch
        fake = self.generator(self.random.normal(len(real), *self.work.noise))
        loss = score(self.critic, real, 1.0) + score(self.critic, fake, 0.0)
        self.log("critic_loss", loss)
        yield {"critic": loss}
        yield {"generator": score(self.critic, fake, 1.0)}


def score(critic: nn.Module, samples: Tensor, target: float) -> Tensor:
    """Cross-entropy of the critic's probabilities with one label for all samples."""
    labels = torch.full((len(samples),), target)
    return F.binary_cross_entropy(critic(samples).flatten(), labels)


def train(work: Supervised | GAN, batches: Iterable[Any], **trainer: Any) -> Iterable[Tensor]:
    """Train once through the batches; `trainer` goes to the `Trainer`, such as a strategy.

    Everything that talks or writes is off, here and in the peers; every guard is on.
    """
    module = Classifier(work) if isinstance(work, Supervised) else Adversaries(work)
    Trainer(
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **trainer,
    ).fit(module, batches)
    return module.parameters()
