"""torchmetrics objects and collections, logged as they are."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


class Measured(L.LightningModule):
    def __init__(self, classes=4):
        super().__init__()
        self.net = nn.Linear(5, classes)
        metrics = MetricCollection(
            [MulticlassAccuracy(classes, average="micro"), MulticlassF1Score(classes)]
        )
        self.train_metrics = metrics.clone(prefix="train_")
        self.val_metrics = metrics.clone(prefix="val_")
        self.valid_acc = MulticlassAccuracy(classes)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        self.train_metrics.update(logits, y)
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True)
        return nn.functional.cross_entropy(logits, y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        self.valid_acc(logits, y)
        self.log("valid_acc", self.valid_acc, on_step=True, on_epoch=True)
        self.val_metrics.update(logits, y)

    def on_validation_epoch_end(self):
        self.log_dict(self.val_metrics.compute())
        self.val_metrics.reset()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def main():
    L.seed_everything(11)
    x = torch.randn(50, 5)
    data = TensorDataset(x, x[:, :4].argmax(1))
    loader = DataLoader(data, batch_size=16)
    model = Measured()
    trainer = L.Trainer(max_epochs=3, logger=False, enable_checkpointing=False)
    trainer.fit(model, loader, loader)
    found = trainer.callback_metrics
    return {name: found[name].item() for name in found if not name.endswith("_step")}
