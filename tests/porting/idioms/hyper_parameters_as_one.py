"""Hyperparameters that come as one argument: a dict, or a namespace."""

from argparse import Namespace

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self, config):
        super().__init__()
        self.save_hyperparameters(config)
        self.net = nn.Linear(2, self.hparams.width)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


class Named(Net):
    def __init__(self, config):
        super().__init__(vars(config))


class Chosen(L.LightningModule):
    def __init__(self, width, lr, comment="none"):
        super().__init__()
        self.save_hyperparameters("width", "lr")
        self.net = nn.Linear(2, width)

    training_step = Net.training_step
    configure_optimizers = Net.configure_optimizers


def main():
    L.seed_everything(36)
    loader = DataLoader(TensorDataset(torch.linspace(-1, 1, 16).reshape(8, 2)), batch_size=4)
    named = Named(Namespace(width=2, lr=0.1))
    found = {"named_width": named.hparams.width}
    for model in (Net({"width": 3, "lr": 0.2}), Chosen(4, lr=0.3)):
        name = type(model).__name__
        trainer = L.Trainer(max_epochs=1, logger=False, enable_progress_bar=False)
        trainer.fit(model, loader)
        trainer.save_checkpoint(f"{name}.ckpt")
        loaded = type(model).load_from_checkpoint(f"{name}.ckpt")
        found[f"{name}_width"] = loaded.hparams.width
        found[f"{name}_lr"] = loaded.hparams["lr"]
        found[f"{name}_count"] = len(loaded.hparams)
        found[f"{name}_weight"] = loaded.net.weight.sum().item()
    return found
