"""A classifier with its training and validation step, logged per step and per epoch."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class LitClassifier(L.LightningModule):
    def __init__(self, features: int = 6, classes: int = 3, lr: float = 0.1):
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, classes))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, logger=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        accuracy = (logits.argmax(dim=1) == y).float().mean()
        self.log_dict({"val_loss": loss, "val_acc": accuracy}, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def main():
    L.seed_everything(42, workers=True)
    x = torch.randn(40, 6)
    y = x[:, :3].argmax(dim=1)
    train = DataLoader(TensorDataset(x, y), batch_size=8)
    val = DataLoader(TensorDataset(x[:20], y[:20]), batch_size=8)
    model = LitClassifier()
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", devices=1)
    trainer.fit(model=model, train_dataloaders=train, val_dataloaders=val)
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    model.eval()
    with torch.no_grad():
        found["output"] = model(x).abs().sum().item()
    return {**found, "global_step": trainer.global_step, "epochs": trainer.current_epoch}
