"""Clipping that depends on the epoch, by overriding `configure_gradient_clipping`."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ):
        self.clip_gradients(
            optimizer,
            gradient_clip_val=0.4 if self.current_epoch == 0 else 0.2,
            gradient_clip_algorithm="norm",
        )

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def main():
    pl.seed_everything(22)
    x = torch.randn(16, 3)
    loader = DataLoader(TensorDataset(x, 5 * x[:, :1]), batch_size=4)
    model = Net()
    trainer = pl.Trainer(max_epochs=2, logger=False, enable_checkpointing=False)
    trainer.fit(model, loader)
    return {"weight": model.net.weight.sum().item(), "bias": model.net.bias.item()}
