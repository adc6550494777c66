"""Warm-up of the learning rate by overriding `optimizer_step`."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class WarmUp(L.LightningModule):
    def __init__(self, lr=0.2, warm_up_steps=6):
        super().__init__()
        self.lr, self.warm_up_steps = lr, warm_up_steps
        self.net = nn.Linear(4, 1)
        self.rates, self.losses, self.epochs = [], [], []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        scale = min(1.0, float(self.trainer.global_step + 1) / self.warm_up_steps)
        for group in optimizer.param_groups:
            group["lr"] = scale * self.lr
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.epochs.append(epoch)
        loss = optimizer.step(closure=optimizer_closure)
        self.losses.append(float(loss))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def main():
    L.seed_everything(4)
    x = torch.randn(32, 4)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    model = WarmUp()
    trainer = L.Trainer(max_epochs=2, logger=False, enable_checkpointing=False)
    trainer.fit(model, loader)
    return {
        **{f"rate_{step}": rate for step, rate in enumerate(model.rates)},
        **{f"loss_{step}": loss for step, loss in enumerate(model.losses)},
        "last_epoch": model.epochs[-1],
        "weight": model.net.weight.sum().item(),
    }
