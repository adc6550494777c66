"""Outputs collected in a list, and looked at together when the epoch ends."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Collecting(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.training_step_outputs = []
        self.validation_step_outputs = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.training_step_outputs.append(loss.detach())
        return loss

    def on_train_epoch_end(self):
        self.log("epoch_mean", torch.stack(self.training_step_outputs).mean())
        self.training_step_outputs.clear()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        predictions = self.net(x)
        self.validation_step_outputs.append(predictions - y)
        return predictions

    def on_validation_epoch_end(self):
        residuals = torch.cat(self.validation_step_outputs)
        self.log("val_median", residuals.abs().median())
        self.log("val_count", float(len(residuals)))
        self.validation_step_outputs.clear()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main():
    L.seed_everything(2)
    x = torch.randn(22, 3)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    model = Collecting()
    trainer = L.Trainer(max_epochs=2, logger=False, num_sanity_val_steps=0)
    trainer.fit(model, loader, loader)
    return {
        **{name: value.item() for name, value in trainer.callback_metrics.items()},
        "left": len(model.validation_step_outputs) + len(model.training_step_outputs),
    }
