"""A scheduler that wants the epoch, by overriding `lr_scheduler_step`."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Halving:
    """A scheduler that is no class of torch's, with a step of its own kind."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.base = optimizer.param_groups[0]["lr"]

    def step(self, epoch):
        for group in self.optimizer.param_groups:
            group["lr"] = self.base * 0.5**epoch

    def state_dict(self):
        return {"base": self.base}

    def load_state_dict(self, state_dict):
        self.base = state_dict["base"]


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": Halving(optimizer), "interval": "epoch"},
        }

    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step(epoch=self.current_epoch + 1)


def main():
    L.seed_everything(23)
    x = torch.randn(16, 2)
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=4)
    model = Net()
    trainer = L.Trainer(max_epochs=3, logger=False, enable_checkpointing=False)
    trainer.fit(model, loader)
    scheduler = model.lr_schedulers()
    return {
        "rate": scheduler.optimizer.param_groups[0]["lr"],
        "weight": model.net.weight.sum().item(),
    }
