"""L-BFGS, which evaluates the training step several times in each step."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Regression(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        self.evaluations = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.evaluations += 1
        loss = nn.functional.mse_loss(self.net(x), y)
        return {"loss": loss, "y": y}

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)


def main():
    L.seed_everything(4)
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=16)
    model = Regression()
    trainer = L.Trainer(max_epochs=3, logger=False, enable_checkpointing=False)
    trainer.fit(model, loader)
    return {
        "evaluations": model.evaluations,
        "steps": trainer.global_step,
        "weight": model.net[0].weight.sum().item(),
        "bias": model.net[2].bias.sum().item(),
    }
