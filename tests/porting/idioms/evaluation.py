"""Validation and test by themselves, and gradients within an evaluation step."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Evaluated(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y), batch_size=len(x))

    def test_step(self, batch, batch_idx):
        x, _ = batch
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(x).sum(), x)
        self.log("slope", slope.norm(dim=1).mean())
        self.log("grad_is_off", float(not torch.is_grad_enabled()))


def main():
    L.seed_everything(15)
    x = torch.randn(11, 2)
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=4)
    model = Evaluated()
    trainer = L.Trainer(inference_mode=False, logger=False, enable_progress_bar=False)
    val_loss = trainer.validate(model, loader)[0]["val_loss"]
    tested = trainer.test(model, dataloaders=loader, verbose=False)[0]
    short = L.Trainer(limit_test_batches=1, inference_mode=False, logger=False)
    return {
        "val_loss": val_loss,
        "slope": tested["slope"],
        "values_of_the_test": len(tested),
        "grad_is_off": tested["grad_is_off"],
        "first_slope": short.test(model, loader)[0]["slope"],
    }
