"""A data module with its setup by stage and all four loaders."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split


class NoisyLine(L.LightningDataModule):
    def __init__(self, data_dir: str = "data", batch_size: int = 8):
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.stages = []
        self.prepared = 0
        self.torn_down = []

    def prepare_data(self):
        self.prepared += 1

    def setup(self, stage: str):
        self.stages.append(stage)
        x = torch.linspace(-1, 1, 48).unsqueeze(1)
        full = TensorDataset(x, 3 * x + 1)
        if stage == "fit":
            self.train_set, self.val_set = random_split(
                full, [32, 16], generator=torch.Generator().manual_seed(42)
            )
        if stage == "test":
            self.test_set = full
        if stage == "predict":
            self.predict_set = TensorDataset(x)

    def train_dataloader(self):
        return DataLoader(self.train_set, batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(self.val_set, batch_size=self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.test_set, batch_size=self.batch_size)

    def predict_dataloader(self):
        return DataLoader(self.predict_set, batch_size=self.batch_size)

    def teardown(self, stage: str):
        self.torn_down.append(stage)


class Line(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def _loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.layer(x), y)

    def training_step(self, batch, batch_idx):
        return self._loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self._loss(batch))

    def predict_step(self, batch, batch_idx):
        (x,) = batch
        return self.layer(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main():
    L.seed_everything(3)
    dm = NoisyLine(batch_size=16)
    model = Line()
    trainer = L.Trainer(max_epochs=2, logger=False, enable_progress_bar=False)
    trainer.fit(model, datamodule=dm)
    val_loss = trainer.callback_metrics["val_loss"].item()
    (tested,) = trainer.test(model, datamodule=dm)
    predictions = trainer.predict(model, datamodule=dm)
    return {
        "val_loss": val_loss,
        "test_loss": tested["test_loss"],
        "predictions": torch.cat(predictions).sum().item(),
        "predicted_batches": len(predictions),
        "prepared": dm.prepared,
        "stages_in_order": dm.stages == ["fit", "test", "predict"],
        "torn_down_in_order": dm.torn_down == ["fit", "test", "predict"],
        "batch_size": dm.hparams.batch_size,
        "datamodule_is_known": trainer.datamodule is dm,
    }
