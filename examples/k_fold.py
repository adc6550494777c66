"""Cross-validation as a loop: k fits, one after another, that stop and resume as one run."""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from composefit import Loop, LoopModule, Strategy, ThreadDataParallel, Trainer
from composefit.loops import EvaluateLoop, FitLoop, TrainEpochLoop


class Classifier(LoopModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        points, labels = batch
        loss = F.cross_entropy(self.net(points), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        points, labels = batch
        right = self.net(points).argmax(1) == labels
        self.log("accuracy", right.float().mean(), prog_bar=True)


class KFoldLoop(Loop):
    """For each fold: begin with the same weights, train on the others, measure on this one.

    The fold's own loops are attributes, so that their state is part of this one's.
    """

    def __init__(self, data: TensorDataset, folds: int, epochs: int) -> None:
        self.data, self.folds, self.epochs = data, folds, epochs
        self.scores: list[float] = []
        self.weights: dict[str, Tensor] = {}
        self.begin(fold=0)

    def begin(self, fold: int) -> None:
        """The loops of a fold: every k-th sample, from the fold's own number on, is left out."""
        self.fold = fold
        samples = set(range(len(self.data)))
        left_out = set(range(fold, len(self.data), self.folds))
        train = Subset(self.data, sorted(samples - left_out))
        self.fit = FitLoop(
            TrainEpochLoop(DataLoader(train, batch_size=64, shuffle=True)), max_epochs=self.epochs
        )
        self.measure = EvaluateLoop(DataLoader(Subset(self.data, sorted(left_out)), batch_size=64))

    def run(self, trainer: Trainer, module: LoopModule) -> list[float]:
        self.weights = self.weights or copy.deepcopy(module.state_dict())
        while len(self.scores) < self.folds:
            if len(self.scores) > self.fold:
                self.close()
                self.begin(self.fold + 1)
                module.load_state_dict(self.weights)
                trainer.restart(module)
            if self.fit.epoch < self.epochs:  # else it was stopped while it measured
                self.fit.run(trainer, module)
            (measured,) = self.measure.run(trainer, module)
            self.scores.append(measured["accuracy"])
            print(f"fold {self.fold + 1}: {self.scores[-1]:.3f}")
        return self.scores

    def state_dict(self) -> dict[str, Any]:
        own = {"fold": self.fold, "scores": list(self.scores), "weights": self.weights}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin(state["fold"])
        self.scores, self.weights = list(state["scores"]), state["weights"]
        super().load_state_dict(state)


def rings(points: int) -> TensorDataset:
    """Points inside and outside of a circle."""
    x = torch.randn(points, 2, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (x.norm(dim=1) > 1.2).long())


def main(strategy: Strategy | None = None, epochs: int = 5, ckpt: Path | None = None) -> float:
    """Cross-validate in five folds; the mean accuracy on points that were not seen."""
    torch.manual_seed(0)
    trainer = Trainer(strategy=strategy or ThreadDataParallel(threads=2), seed=0)
    loop = KFoldLoop(rings(1000), folds=5, epochs=epochs)
    scores: list[float] = trainer.run(loop, Classifier(), ckpt_path=ckpt)
    return sum(scores) / len(scores)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT")
    given = parser.parse_args()
    print(f"accuracy {main(ThreadDataParallel(given.threads), ckpt=given.resume):.3f}")
