"""Gradients accumulated over four batches, and clipped by their norm."""

import torch
from lightning import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.norms = []
        self.batches = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.batches += 1

    def on_before_optimizer_step(self, optimizer):
        gradients = [p.grad.flatten() for p in self.parameters()]
        self.norms.append(torch.cat(gradients).norm().item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def main():
    seed_everything(21)
    x = torch.randn(32, 3)
    loader = DataLoader(TensorDataset(x, 5 * x[:, :1]), batch_size=4)
    model = Net()
    trainer = Trainer(
        max_epochs=2,
        accumulate_grad_batches=4,
        gradient_clip_val=0.5,
        gradient_clip_algorithm="norm",
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, loader)
    return {
        **{f"norm_{step}": norm for step, norm in enumerate(model.norms)},
        "global_step": trainer.global_step,
        "batches": model.batches,
        "loss": trainer.callback_metrics["loss"].item(),
        "weight": model.net.weight.sum().item(),
    }
