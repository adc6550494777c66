"""Prediction with the default step, with a step of one's own, and over several loaders."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader


class Plain(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9), nn.Linear(4, 2))

    def forward(self, x):
        return self.net(x)


class Named(Plain):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return {"logits": self(batch), "index": batch_idx, "loader": dataloader_idx}


class Counting(L.Callback):
    batches = 0

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.batches += 1


def main():
    L.seed_everything(14)
    x = torch.randn(10, 3)
    loader = DataLoader(x, batch_size=4)
    counting = Counting()
    trainer = L.Trainer(logger=False, enable_progress_bar=False, callbacks=counting)
    plain = Plain()
    predictions = trainer.predict(plain, loader)
    named = Named()
    named.load_state_dict(plain.state_dict())
    two = trainer.predict(named, [loader, DataLoader(x[:4], batch_size=2)])
    nothing = trainer.predict(named, loader, return_predictions=False)
    return {
        "batches": len(predictions),
        "last_rows": len(predictions[-1]),
        "sum": torch.cat(predictions).sum().item(),
        "no_grad": not predictions[0].requires_grad,
        "loaders": len(two),
        "second_loader_batches": len(two[1]),
        "second_loader": two[1][1]["loader"],
        "index": two[1][1]["index"],
        "second_sum": sum(one["logits"].sum().item() for one in two[1]),
        "nothing": nothing is None,
        "counted": counting.batches,
        "still_training": plain.training,
    }
