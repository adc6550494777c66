"""A training that goes on from its last checkpoint, with its scheduler and its counters."""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)]


def run(folder, max_epochs, ckpt_path=None):
    L.seed_everything(27)
    x = torch.randn(24, 3)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    model = Net()
    keep = ModelCheckpoint(dirpath=folder, save_last=True, every_n_epochs=1)
    trainer = L.Trainer(max_epochs=max_epochs, callbacks=keep, logger=False)
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    return model, trainer


def main():
    whole, _ = run("whole", 5)
    run("parts", 2)
    resumed, trainer = run("parts", 5, ckpt_path="parts/last.ckpt")
    return {
        "difference": (whole.net.weight - resumed.net.weight).abs().max().item(),
        "weight": resumed.net.weight.sum().item(),
        "global_step": trainer.global_step,
        "epochs": trainer.current_epoch,
        "rate": resumed.lr_schedulers().get_last_lr()[0],
        "loss": trainer.callback_metrics["loss"].item(),
    }
