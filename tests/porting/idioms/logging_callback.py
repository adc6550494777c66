"""A callback that logs with `self.log`, as a module does."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Norms(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.log("loss_of_callback", outputs["loss"], on_step=True, on_epoch=True)

    def on_validation_epoch_end(self, trainer, pl_module):
        self.log_dict({"norm": pl_module.net.weight.norm(), "two": 2.0})


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main():
    L.seed_everything(35)
    x = torch.randn(20, 2)
    loader = DataLoader(TensorDataset(x, 2 * x[:, :1]), batch_size=5)
    trainer = L.Trainer(max_epochs=2, callbacks=[Norms()], logger=False, enable_checkpointing=False)
    trainer.fit(Net(), loader, loader)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}
