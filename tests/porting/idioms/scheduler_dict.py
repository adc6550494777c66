"""A scheduler that steps at every batch, as long as the training will be."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class OneCycle(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.rates = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.rates.append(self.lr_schedulers().get_last_lr()[0])
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.5, total_steps=self.trainer.estimated_stepping_batches
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1},
        }


def main():
    L.seed_everything(7)
    x = torch.randn(30, 4)
    loader = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4)
    model = OneCycle()
    trainer = L.Trainer(max_epochs=3, logger=False, enable_checkpointing=False)
    trainer.fit(model, loader)
    return {
        "steps": len(model.rates),
        "estimated": trainer.estimated_stepping_batches,
        "highest": max(model.rates),
        "last": model.rates[-1],
        "weight": model.net.weight.sum().item(),
    }
