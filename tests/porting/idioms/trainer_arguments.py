"""A trainer with the arguments that scripts set, and what they bound."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.loaders_made = 0
        self.stop_at = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.global_step == self.stop_at:
            self.trainer.should_stop = True
        return nn.functional.mse_loss(self.net(x), y)

    def train_dataloader(self):
        self.loaders_made += 1
        x = torch.linspace(-1, 1, 40).reshape(20, 2)
        return DataLoader(TensorDataset(x, x[:, :1]), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(stop_at=None, **arguments):
    L.seed_everything(16)
    model = Net()
    model.stop_at = stop_at
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy="auto",
        precision="32-true",
        benchmark=False,
        deterministic=True,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir="here",
        **arguments,
    )
    trainer.fit(model)
    return model, trainer


def main():
    model, trainer = run(max_epochs=3, reload_dataloaders_every_n_epochs=1)
    _, by_steps = run(max_steps=7)
    _, stopped = run(stop_at=1, max_epochs=9, min_steps=8)
    _, by_epochs = run(stop_at=1, max_epochs=9, min_epochs=2)
    _, by_time = run(max_epochs=2, max_time="00:01:00:00")
    _, none_at_all = run(max_epochs=0)
    return {
        "weight": model.net.weight.sum().item(),
        "loaders_made": model.loaders_made,
        "batches": trainer.num_training_batches,
        "epochs": trainer.current_epoch,
        "max_epochs": trainer.max_epochs,
        "by_steps": by_steps.global_step,
        "stopped": stopped.global_step,
        "by_epochs": by_epochs.global_step,
        "by_time": by_time.global_step,
        "none_at_all": none_at_all.global_step,
    }
