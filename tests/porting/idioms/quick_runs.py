"""Quick runs to find mistakes: a fast development run, a few batches, overfitting them."""

import os

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.trained, self.validated, self.first = 0, 0, set()

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.trained += 1
        self.first.add(x[0, 0].item())
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.validated += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(shuffle=False, **arguments):
    L.seed_everything(18)
    x = torch.linspace(-1, 1, 80).reshape(40, 2)
    data = TensorDataset(x, x[:, :1])
    model = Net()
    trainer = L.Trainer(**arguments)
    trainer.fit(model, DataLoader(data, batch_size=4, shuffle=shuffle), DataLoader(data, 4))
    return model, trainer


def main():
    once, trainer = run(fast_dev_run=True, max_epochs=5)
    thrice, _ = run(fast_dev_run=3)
    files = len(os.listdir("."))
    few, _ = run(limit_train_batches=0.5, limit_val_batches=1, max_epochs=2, num_sanity_val_steps=0)
    over, _ = run(shuffle=True, overfit_batches=2, max_epochs=3, num_sanity_val_steps=0)
    return {
        "once": once.trained,
        "once_validated": once.validated,
        "is_fast_dev_run": bool(trainer.fast_dev_run),
        "thrice": thrice.trained,
        "thrice_validated": thrice.validated,
        "files_of_fast_runs": files,
        "few": few.trained,
        "few_validated": few.validated,
        "overfitted": over.trained,
        "overfitted_validated": over.validated,
        "different_batches": len(over.first),
        "weight": few.net.weight.sum().item(),
    }
