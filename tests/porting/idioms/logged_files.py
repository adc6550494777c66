"""Numbers in a CSV file, with the options of `self.log`."""

import csv
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Logging(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log("sum", float(len(x)), on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log(
            "weighed", float(batch_idx), on_step=False, on_epoch=True, batch_size=batch_idx + 1
        )
        self.log("hidden", loss, logger=False)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y))

    def on_train_epoch_end(self):
        self.log("doubled", 2.0 * self.current_epoch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def main():
    L.seed_everything(26)
    x = torch.randn(18, 2)
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=4)
    logger = CSVLogger("logs", name="experiment")
    trainer = L.Trainer(
        max_epochs=2, logger=logger, log_every_n_steps=2, enable_checkpointing=False
    )
    trainer.fit(Logging(), loader, loader)
    (file,) = Path("logs").rglob("metrics.csv")
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines))
    found = {}
    for name in ("loss", "both_step", "both_epoch", "sum", "largest", "weighed", "val_loss"):
        values = [float(row[name]) for row in rows if row.get(name)]
        found[f"{name}_count"], found[f"{name}_last"] = len(values), values[-1]
    found["hidden"] = "hidden" in rows[0]
    found["doubled"] = trainer.callback_metrics["doubled"].item()
    found["hidden_value"] = trainer.callback_metrics["hidden"].item()
    return found
