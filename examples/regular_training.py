"""Regular training: a step returns its loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from composefit import LoopModule, SingleDevice, Strategy, Trainer


class Classifier(LoopModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))

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


def rings(points: int, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """Points inside and outside of a circle."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(points, 2, generator=generator)
    return DataLoader(TensorDataset(x, (x.norm(dim=1) > 1.2).long()), batch_size=64, shuffle=True)


def main(strategy: Strategy | None = None, epochs: int = 10) -> float:
    """Train, and return the accuracy on points that were not seen."""
    torch.manual_seed(0)
    trainer = Trainer(strategy=strategy or SingleDevice(), max_epochs=epochs)
    trainer.fit(Classifier(), rings(2000, seed=1), rings(500, seed=2))
    return trainer.callback_metrics["accuracy"].item()


if __name__ == "__main__":
    print(f"accuracy {main():.3f}")
