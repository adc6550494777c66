"""How often to validate: within an epoch, or every so many epochs."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.validated_at = []
        self.batches = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.batches += 1
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y))

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            self.validated_at.append(self.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(**arguments):
    L.seed_everything(17)
    x = torch.linspace(-1, 1, 64).reshape(32, 2)
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=4)
    model = Net()
    trainer = L.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, **arguments
    )
    trainer.fit(model, loader, loader)
    return model, trainer


def main():
    quarter, trainer = run(max_epochs=1, val_check_interval=0.25)
    third, _ = run(max_epochs=2, val_check_interval=3)
    across, _ = run(max_epochs=3, val_check_interval=12, check_val_every_n_epoch=None)
    seldom, _ = run(max_epochs=5, check_val_every_n_epoch=2)
    short, _ = run(max_epochs=1, limit_val_batches=2, num_sanity_val_steps=2)
    part, _ = run(max_epochs=1, limit_val_batches=0.5, num_sanity_val_steps=0)
    off, _ = run(max_epochs=1, limit_val_batches=0)
    return {
        **{f"quarter_{i}": step for i, step in enumerate(quarter.validated_at)},
        **{f"third_{i}": step for i, step in enumerate(third.validated_at)},
        **{f"across_{i}": step for i, step in enumerate(across.validated_at)},
        **{f"seldom_{i}": step for i, step in enumerate(seldom.validated_at)},
        "short": short.batches,
        "part": part.batches,
        "off": off.batches,
        "val_loss": trainer.callback_metrics["val_loss"].item(),
    }
