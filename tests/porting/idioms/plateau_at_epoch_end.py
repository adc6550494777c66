"""A scheduler that monitors what `on_train_epoch_end` logs."""

import lightning as L
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.losses.append(loss.detach())
        return loss

    def on_train_epoch_end(self):
        self.log("worst", torch.stack(self.losses).max())
        self.losses.clear()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02)
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "worst"}


def main():
    L.seed_everything(30)
    x = torch.randn(16, 2)
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=4)
    model = Net()
    trainer = L.Trainer(max_epochs=4, logger=False, enable_checkpointing=False)
    trainer.fit(model, loader)
    return {
        "rate": model.lr_schedulers().optimizer.param_groups[0]["lr"],
        "worst": trainer.callback_metrics["worst"].item(),
        "weight": model.net.weight.sum().item(),
    }
