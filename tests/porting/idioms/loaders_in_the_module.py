"""Loaders that the module itself makes."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class SelfContained(pl.LightningModule):
    def __init__(self, batch_size=5):
        super().__init__()
        self.batch_size = batch_size
        self.net = nn.Linear(1, 1)

    def prepare_data(self):
        torch.save(torch.linspace(0, 1, 20).unsqueeze(1), "x.pt")

    def setup(self, stage):
        x = torch.load("x.pt")
        self.data = TensorDataset(x, x**2)

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=self.batch_size)

    def val_dataloader(self):
        return [DataLoader(self.data, batch_size=10)]

    def test_dataloader(self):
        return DataLoader(self.data, batch_size=7)

    def predict_dataloader(self):
        return DataLoader(self.data, batch_size=20)

    def _loss(self, batch):
        x, y = batch
        return nn.functional.l1_loss(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self._loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self._loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main():
    pl.seed_everything(19)
    model = SelfContained()
    trainer = pl.Trainer(max_epochs=2, logger=False, enable_checkpointing=False)
    trainer.fit(model)
    val_loss = trainer.callback_metrics["val_loss"].item()
    return {
        "val_loss": val_loss,
        "validated": trainer.validate(model)[0]["val_loss"],
        "test_loss": trainer.test(model)[0]["test_loss"],
        "predicted": trainer.predict(model)[0].sum().item(),
        "batches": trainer.num_training_batches,
        "val_batches": trainer.num_val_batches[0],
    }
