"""Schedulers in a list beside the optimizers, stepping once in two epochs."""

import lightning as L
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset


class Decaying(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.rates = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def on_train_epoch_start(self):
        self.rates.append(self.lr_schedulers().get_last_lr()[0])

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        scheduler = {"scheduler": ExponentialLR(optimizer, gamma=0.5), "frequency": 2}
        return [optimizer], [scheduler]


def main():
    L.seed_everything(5)
    x = torch.randn(24, 3)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    model = Decaying()
    trainer = L.Trainer(max_epochs=5, logger=False, enable_checkpointing=False)
    trainer.fit(model, train_dataloaders=loader)
    rates = {f"rate_{epoch}": rate for epoch, rate in enumerate(model.rates)}
    return {**rates, "weight": model.net.weight.sum().item()}
