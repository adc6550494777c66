"""Hyperparameters saved with the checkpoint, and used to build the module again."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self, width, lr=0.1, activation="relu", **kwargs):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(2, self.hparams.width),
            nn.ReLU() if self.hparams.activation == "relu" else nn.Tanh(),
            nn.Linear(self.hparams["width"], 1),
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class Wrapping(L.LightningModule):
    def __init__(self, backbone, lr):
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"])
        self.backbone = backbone

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.backbone(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


def fit(model, path):
    x = torch.linspace(-1, 1, 16).reshape(8, 2)
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=4)
    trainer = L.Trainer(max_epochs=1, logger=False, enable_progress_bar=False)
    trainer.fit(model, loader)
    trainer.save_checkpoint(path)
    return x


def main():
    L.seed_everything(8)
    backbone = nn.Linear(2, 1)
    x = fit(Net(5, activation="tanh", dropout=0.25), "net.ckpt")
    same = Net.load_from_checkpoint("net.ckpt")
    other = Net.load_from_checkpoint("net.ckpt", lr=0.01)
    fit(Wrapping(backbone, lr=0.5), "wrapping.ckpt")
    wrapping = Wrapping.load_from_checkpoint("wrapping.ckpt", backbone=nn.Linear(2, 1))
    return {
        "width": same.hparams.width,
        "lr": same.hparams.lr,
        "other_lr": other.hparams.lr,
        "dropout": same.hparams["dropout"],
        "tanh": same.hparams.activation == "tanh",
        "output": same.net(x).sum().item(),
        "wrapped_names": len(wrapping.hparams),
        "wrapped_output": wrapping.backbone(x).sum().item(),
    }
