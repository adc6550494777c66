"""Early stopping, the best checkpoint by a monitored value, and a test with it."""

import os

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Bouncing(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", abs(self.current_epoch - 2) + 0.5)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_loss", nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main():
    L.seed_everything(12)
    x = torch.linspace(-1, 1, 12).unsqueeze(1)
    loader = DataLoader(TensorDataset(x, 2 * x), batch_size=4)
    stopping = EarlyStopping(monitor="val_loss", mode="min", patience=2, min_delta=0.0)
    checkpoints = ModelCheckpoint(
        dirpath="kept",
        filename="{epoch}-{val_loss:.2f}",
        monitor="val_loss",
        mode="min",
        save_top_k=2,
        save_last=True,
    )
    trainer = L.Trainer(max_epochs=20, callbacks=[stopping, checkpoints], logger=False)
    model = Bouncing()
    trainer.fit(model, loader, loader)
    stopped_epoch = stopping.stopped_epoch
    (best,) = trainer.test(model, loader, ckpt_path="best")
    model = Bouncing.load_from_checkpoint(checkpoints.best_model_path)
    (loaded,) = trainer.test(model, loader)
    return {
        "stopped_epoch": stopped_epoch,
        "best_score": checkpoints.best_model_score.item(),
        "best_is_epoch_2": os.path.basename(checkpoints.best_model_path).startswith("epoch=2"),
        "best_name": os.path.basename(checkpoints.best_model_path) == "epoch=2-val_loss=0.50.ckpt",
        "files": len(os.listdir("kept")),
        "kept": len(checkpoints.best_k_models),
        "last_exists": os.path.isfile(checkpoints.last_model_path),
        "same_callback": trainer.checkpoint_callback is checkpoints,
        "epochs": trainer.current_epoch,
        "best_test_loss": best["test_loss"],
        "values_of_the_test": len(best),
        "loaded_test_loss": loaded["test_loss"],
    }
