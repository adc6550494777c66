"""What a module adds to its checkpoint, and takes back."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Remembering(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.best = float("inf")
        self.seen = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.best = min(self.best, outputs["loss"].item())
        self.seen += len(batch[0])

    def on_save_checkpoint(self, checkpoint):
        checkpoint["what_i_know"] = {"best": self.best, "seen": self.seen}

    def on_load_checkpoint(self, checkpoint):
        self.best = checkpoint["what_i_know"]["best"]
        self.seen = checkpoint["what_i_know"]["seen"]

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def train(max_epochs, loader, ckpt_path=None):
    L.seed_everything(6)
    model = Remembering()
    trainer = L.Trainer(max_epochs=max_epochs, logger=False, enable_progress_bar=False)
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    trainer.save_checkpoint(f"after_{max_epochs}.ckpt", weights_only=False)
    return model


def main():
    x = torch.randn(18, 2, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, x[:, :1] * 2), batch_size=6)
    whole = train(4, loader)
    train(2, loader)
    resumed = train(4, loader, ckpt_path="after_2.ckpt")
    loaded = Remembering.load_from_checkpoint("after_4.ckpt")
    return {
        "best": resumed.best,
        "seen": resumed.seen,
        "difference": (whole.net.weight - resumed.net.weight).abs().max().item(),
        "weight": resumed.net.weight.sum().item(),
        "loaded_seen": loaded.seen,
    }
