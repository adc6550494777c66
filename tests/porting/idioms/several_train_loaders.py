"""Two training loaders side by side, as a dict, and a validation with each of two."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class SemiSupervised(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def configure_model(self):
        if not hasattr(self, "head"):
            self.head = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch["labelled"]
        (other,) = batch["unlabelled"]
        supervised = nn.functional.mse_loss(self.head(self.net(x)), y)
        noise = torch.full_like(other, 0.1, device=self.device)
        consistency = (self.net(other) - self.net(other + noise)).square().mean()
        self.log_dict({"supervised": supervised, "consistency": consistency}, on_epoch=True)
        return supervised + 0.5 * consistency

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def main():
    L.seed_everything(31)
    x = torch.randn(24, 2)
    loaders = {
        "labelled": DataLoader(TensorDataset(x[:8], x[:8, :1]), batch_size=2),
        "unlabelled": DataLoader(TensorDataset(x[8:]), batch_size=4),
    }
    model = SemiSupervised()
    trainer = L.Trainer(max_epochs=2, logger=False, enable_checkpointing=False)
    trainer.fit(model, loaders)
    return {
        "supervised": trainer.callback_metrics["supervised_epoch"].item(),
        "consistency": trainer.callback_metrics["consistency"].item(),
        "batches": trainer.num_training_batches,
        "head": model.head.weight.item(),
    }
