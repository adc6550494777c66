"""An autoencoder built of two networks given to it, saved by default and loaded for use."""

import os

import lightning as L
import torch
from torch import nn, optim, utils

encoder = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
decoder = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 16))


class LitAutoEncoder(L.LightningModule):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def training_step(self, batch, batch_idx):
        x, _ = batch
        x = x.view(x.size(0), -1)
        z = self.encoder(x)
        x_hat = self.decoder(z)
        loss = nn.functional.mse_loss(x_hat, x)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = optim.Adam(self.parameters(), lr=1e-2)
        return optimizer


def main():
    torch.manual_seed(1)
    for layer in (*encoder, *decoder):
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    pictures = torch.rand(32, 1, 4, 4)
    dataset = utils.data.TensorDataset(pictures, torch.zeros(32))
    train_loader = utils.data.DataLoader(dataset, batch_size=4)
    autoencoder = LitAutoEncoder(encoder, decoder)
    trainer = L.Trainer(limit_train_batches=5, max_epochs=2, logger=False)
    trainer.fit(model=autoencoder, train_dataloaders=train_loader)

    checkpoint = trainer.checkpoint_callback.best_model_path
    empty = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    loaded = LitAutoEncoder.load_from_checkpoint(checkpoint, encoder=empty, decoder=decoder)
    loaded.encoder.eval()
    embeddings = loaded.encoder(pictures.view(32, -1))
    return {
        "file_exists": os.path.isfile(checkpoint),
        "train_loss": trainer.callback_metrics["train_loss"].item(),
        "global_step": trainer.global_step,
        "embeddings": embeddings.sum().item(),
        "loaded_in_training_mode": loaded.training,
    }
