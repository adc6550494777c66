"""Write `lightning.ckpt` and `objects.ckpt` as Lightning does, and what its training goes on to.

    python tests/porting/write_checkpoint.py

It needs `lightning==2.6.6`. `lightning_checkpoint.json` gets the weights after two more epochs.
"""

import argparse
import json
import tempfile
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

HERE = Path(__file__).parent


class LitRegression(L.LightningModule):
    def __init__(self, width=4, lr=0.05, options=None):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def fit(model, max_epochs, ckpt_path=None):
    x = torch.linspace(-1, 1, 32).reshape(16, 2)
    loader = DataLoader(TensorDataset(x, x.prod(1, keepdim=True)), batch_size=4)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=max_epochs, default_root_dir=folder, logger=False, enable_checkpointing=False
        )
        trainer.fit(model, loader, ckpt_path=ckpt_path)
    return trainer


if __name__ == "__main__":
    L.seed_everything(0)
    fit(LitRegression(), 2).save_checkpoint(HERE / "lightning.ckpt")
    fit(LitRegression(options=argparse.Namespace(depth=2)), 1).save_checkpoint(
        HERE / "objects.ckpt"
    )
    model = LitRegression()
    fit(model, 4, HERE / "lightning.ckpt")
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    FILE = HERE / "lightning_checkpoint.json"
    FILE.write_text(json.dumps(weights, indent=1) + "\n", encoding="utf-8")
