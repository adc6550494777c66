"""A learning rate that falls when a monitored value no longer improves."""

import lightning as L
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset


class Stuck(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.rates = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float(max(5 - self.current_epoch, 3)))

    def on_train_epoch_end(self):
        self.rates.append(self.lr_schedulers().optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": ReduceLROnPlateau(optimizer, mode="min", factor=0.1, patience=1),
                "monitor": "val_loss",
                "strict": True,
                "name": "plateau",
            },
        }


def main():
    L.seed_everything(0)
    x = torch.randn(16, 2)
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=8)
    model = Stuck()
    trainer = L.Trainer(max_epochs=8, logger=False, enable_checkpointing=False)
    trainer.fit(model, loader, loader)
    return {
        **{f"rate_{epoch}": rate for epoch, rate in enumerate(model.rates)},
        "last": model.lr_schedulers().optimizer.param_groups[0]["lr"],
        "weight": model.net.weight.sum().item(),
    }
