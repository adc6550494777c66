"""Checkpoints every few steps, all kept, and small callbacks made of functions."""

import os

import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ended = []


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main():
    L.seed_everything(32)
    ended.clear()
    x = torch.randn(20, 2)
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=4)
    kept = ModelCheckpoint(
        dirpath="all", filename="{step}", every_n_train_steps=4, save_top_k=-1, save_last=False
    )
    best = ModelCheckpoint("best", "best", monitor="train_loss", mode="min", save_weights_only=True)
    tell = LambdaCallback(on_train_epoch_end=lambda trainer, pl_module: ended.append(trainer))
    trainer = L.Trainer(max_epochs=2, callbacks=[kept, tell, best], logger=False)
    trainer.fit(Net(), loader)
    loaded = Net.load_from_checkpoint(best.best_model_path)
    return {
        "kept": len(os.listdir("all")),
        "step_4": os.path.isfile("all/step=4.ckpt"),
        "step_8": os.path.isfile("all/step=8.ckpt"),
        "best": os.path.basename(best.best_model_path) == "best.ckpt",
        "score": best.best_model_score.item(),
        "weight": loaded.net.weight.sum().item(),
        "ended": len(ended),
        "checkpoint_callbacks": len(trainer.checkpoint_callbacks),
    }
