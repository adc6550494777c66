"""What scripts do for one process of many: printing, and work on rank zero only."""

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

written = []


@rank_zero_only
def write(line):
    written.append(line)


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss, prog_bar=True, sync_dist=True, rank_zero_only=True)
        return loss

    def on_train_epoch_end(self):
        self.print("epoch", self.current_epoch, "done")
        if self.trainer.is_global_zero:
            write(f"rank {self.global_rank} of {self.trainer.world_size}")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def main():
    L.seed_everything(25)
    x = torch.randn(8, 2)
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=4)
    model = Net()
    written.clear()
    trainer = L.Trainer(max_epochs=2, logger=False, enable_checkpointing=False)
    trainer.fit(model, loader)
    trainer.print("fit is over")
    return {
        "lines": len(written),
        "said": written[0] == "rank 0 of 1",
        "rank": trainer.global_rank + trainer.local_rank + model.local_rank,
        "loss": trainer.callback_metrics["loss"].item(),
    }
