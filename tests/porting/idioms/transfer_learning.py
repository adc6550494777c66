"""A frozen backbone that is trained with the rest from the second epoch on."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Backbone(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())

    def forward(self, x):
        return self.net(x)


class FineTuned(LightningModule):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.backbone.freeze()
        self.head = nn.Linear(6, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.backbone(x)), y)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.backbone.unfreeze()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Freezing(Callback):
    def __init__(self):
        self.trainable = []
        self.weights = []

    def on_train_epoch_end(self, trainer, pl_module):
        backbone = pl_module.backbone
        self.trainable.append(sum(p.requires_grad for p in backbone.parameters()))
        self.weights.append(backbone.net[0].weight.sum().item())


def main():
    seed_everything(20)
    x = torch.randn(24, 4)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)
    backbone = Backbone()
    before = backbone.net[0].weight.sum().item()
    freezing = Freezing()
    model = FineTuned(backbone)
    trainer = Trainer(max_epochs=2, callbacks=[freezing], logger=False, enable_checkpointing=False)
    trainer.fit(model, loader)
    model.freeze()
    return {
        "trainable_in_epoch_0": freezing.trainable[0],
        "trainable_in_epoch_1": freezing.trainable[1],
        "unchanged_in_epoch_0": freezing.weights[0] == before,
        "weight": freezing.weights[1],
        "head": model.head.weight.sum().item(),
        "all_frozen": not any(p.requires_grad for p in model.parameters()),
    }
