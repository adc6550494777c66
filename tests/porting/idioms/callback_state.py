"""A callback whose state is in the checkpoint, and is back when the training goes on."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Counting(L.Callback):
    def __init__(self, what="batches"):
        self.what = what
        self.state = {"epochs": 0, "batches": 0}

    @property
    def state_key(self):
        return f"Counting[what={self.what}]"

    def on_train_epoch_end(self, trainer, pl_module):
        if self.what == "epochs":
            self.state["epochs"] += 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.what == "batches":
            self.state["batches"] += 1

    def load_state_dict(self, state_dict):
        self.state.update(state_dict)

    def state_dict(self):
        return self.state.copy()


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main():
    L.seed_everything(1)
    x = torch.randn(20, 2)
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=4)
    trainer = L.Trainer(max_epochs=2, callbacks=[Counting(), Counting("epochs")], logger=False)
    trainer.fit(Net(), loader)
    trainer.save_checkpoint("two_epochs.ckpt")

    batches, epochs = Counting(), Counting("epochs")
    model = Net()
    trainer = L.Trainer(max_epochs=3, callbacks=[batches, epochs], logger=False)
    trainer.fit(model, loader, ckpt_path="two_epochs.ckpt")
    return {
        "batches": batches.state["batches"],
        "epochs": epochs.state["epochs"],
        "global_step": trainer.global_step,
        "weight": model.net.weight.sum().item(),
    }
