"""The rest of an epoch left out, by returning -1 from `on_train_batch_start`."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.trained = 0

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            return -1

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.trained += 1
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def main():
    L.seed_everything(29)
    x = torch.randn(20, 2)
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=4)
    model = Net()
    trainer = L.Trainer(max_epochs=3, logger=False, enable_checkpointing=False)
    trainer.fit(model, loader)
    return {
        "trained": model.trained,
        "epochs": trainer.current_epoch,
        "weight": model.net.weight.sum().item(),
    }
