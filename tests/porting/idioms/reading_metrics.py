"""A callback that reads what was logged, and logs values of its own."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Reader(L.Callback):
    def __init__(self):
        self.losses, self.norms = [], []

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        self.losses.append(trainer.callback_metrics["val_loss"].item())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        norm = torch.linalg.vector_norm(pl_module.net.weight.detach())
        pl_module.log("norm", norm, on_step=True, on_epoch=False)
        self.norms.append(norm.item())

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("epochs_read", float(len(self.losses)))
        if self.losses[-1] < 0.5:
            trainer.should_stop = True


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main():
    L.seed_everything(33)
    x = torch.randn(20, 2)
    loader = DataLoader(TensorDataset(x, 2 * x[:, :1]), batch_size=5)
    model, reader = Net(), Reader()
    trainer = L.Trainer(max_epochs=30, callbacks=[reader], logger=False)
    before = trainer.validate(model, loader, verbose=False)[0]["val_loss"]
    trainer.fit(model, loader, loader)
    return {
        "before": before,
        "first_read": reader.losses[0],
        "last_read": reader.losses[-1],
        "epochs": trainer.current_epoch,
        "norms": len(reader.norms),
        "norm": trainer.callback_metrics["norm"].item(),
        "epochs_read": trainer.callback_metrics["epochs_read"].item(),
        "shown_val_loss": float(trainer.progress_bar_metrics["val_loss"]),
        "shown_train_loss": float(trainer.progress_bar_metrics["train_loss"]),
    }
