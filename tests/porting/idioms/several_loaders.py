"""Several validation loaders, told apart by `dataloader_idx`."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class TwoDomains(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.ended = {0: 0, 1: 0}

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("val_loss", loss)
        self.log(f"domain_{dataloader_idx}", loss, add_dataloader_idx=False)

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.ended[dataloader_idx] += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main():
    L.seed_everything(13)
    x = torch.randn(21, 2)
    near = DataLoader(TensorDataset(x, x[:, :1]), batch_size=8)
    far = DataLoader(TensorDataset(10 * x[:9], x[:9, 1:]), batch_size=4)
    model = TwoDomains()
    trainer = L.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, num_sanity_val_steps=0
    )
    trainer.fit(model, near, [near, far])
    fitted = {name: value.item() for name, value in trainer.callback_metrics.items()}
    results = trainer.validate(model, [near, far], verbose=False)
    return {
        **fitted,
        "near_batches": model.ended[0],
        "far_batches": model.ended[1],
        "results": len(results),
        "validated_near": results[0]["val_loss/dataloader_idx_0"],
        "validated_far": results[1]["val_loss/dataloader_idx_1"],
        "validated_domain": results[1]["domain_1"],
    }
