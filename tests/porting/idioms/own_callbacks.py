"""Callbacks that the module brings along, through `configure_callbacks`."""

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Epochs(Callback):
    count = 0

    def on_train_epoch_end(self, trainer, pl_module):
        self.count += 1


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.epochs = Epochs()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 1.0)

    def configure_callbacks(self):
        return [self.epochs, EarlyStopping(monitor="val_loss", patience=1)]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def main():
    L.seed_everything(24)
    x = torch.randn(8, 2)
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=4)
    model = Net()
    # The module's own takes the place of this one.
    patient = EarlyStopping(monitor="val_loss", patience=50)
    trainer = L.Trainer(max_epochs=9, callbacks=[patient], logger=False, enable_checkpointing=False)
    trainer.fit(model, loader, loader)
    return {"counted": model.epochs.count, "epochs": trainer.current_epoch}
