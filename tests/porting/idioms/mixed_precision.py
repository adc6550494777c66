"""Mixed precision, anomaly detection and a profiler."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
        self.half = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        self.half += out.dtype == torch.bfloat16
        loss = nn.functional.mse_loss(out.float(), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main():
    L.seed_everything(34)
    x = torch.randn(16, 4)
    loader = DataLoader(TensorDataset(x, x[:, :1]), batch_size=4)
    model = Net()
    trainer = L.Trainer(
        max_epochs=2,
        precision="bf16-mixed",
        detect_anomaly=True,
        profiler="simple",
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, loader)
    return {
        "loss": trainer.callback_metrics["loss"].item(),
        "half": model.half,
        "weights_are_whole": model.net[0].weight.dtype == torch.float32,
        "weight": model.net[0].weight.sum().item(),
    }
