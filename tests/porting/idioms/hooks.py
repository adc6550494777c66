"""Hooks of the module and of a callback, by name."""

from collections import Counter

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Watcher(L.Callback):
    def __init__(self):
        self.seen = []

    def setup(self, trainer, pl_module, stage):
        self.seen.append("setup")

    def on_fit_start(self, trainer, pl_module):
        self.seen.append("on_fit_start")

    def on_sanity_check_start(self, trainer, pl_module):
        self.seen.append("on_sanity_check_start")

    def on_sanity_check_end(self, trainer, pl_module):
        self.seen.append("on_sanity_check_end")

    def on_train_start(self, trainer, pl_module):
        self.seen.append("on_train_start")

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append("on_train_epoch_start")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append("on_train_batch_start")

    def on_after_backward(self, trainer, pl_module):
        self.seen.append("on_after_backward")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append("on_before_optimizer_step")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append("on_train_batch_end")

    def on_validation_start(self, trainer, pl_module):
        self.seen.append("on_validation_start")

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ):
        self.seen.append("on_validation_batch_end")

    def on_validation_end(self, trainer, pl_module):
        self.seen.append("on_validation_end")

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append("on_train_epoch_end")

    def on_train_end(self, trainer, pl_module):
        self.seen.append("on_train_end")

    def on_fit_end(self, trainer, pl_module):
        self.seen.append("on_fit_end")

    def teardown(self, trainer, pl_module, stage):
        self.seen.append("teardown")


class Hooked(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.calls = Counter()
        self.grad_norms = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return {"loss": loss, "size": len(x)}

    def validation_step(self, batch, batch_idx):
        return torch.tensor(float(batch_idx))

    def setup(self, stage):
        self.calls["setup"] += stage == "fit"

    def on_train_start(self):
        self.calls["on_train_start"] += 1

    def on_train_batch_start(self, batch, batch_idx):
        self.calls["on_train_batch_start"] += 1

    def on_after_backward(self):
        self.calls["on_after_backward"] += 1

    def on_before_optimizer_step(self, optimizer):
        grads = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        self.grad_norms.append(torch.cat(grads).norm().item())

    def on_before_zero_grad(self, optimizer):
        self.calls["on_before_zero_grad"] += 1

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.calls["on_train_batch_end"] += 1
        self.last_loss = outputs["loss"].item()

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.calls["val_output"] += int(outputs.item())

    def on_validation_epoch_end(self):
        self.calls["on_validation_epoch_end"] += 1

    def on_train_epoch_end(self):
        self.calls["on_train_epoch_end"] += 1

    def teardown(self, stage):
        self.calls["teardown"] += stage == "fit"

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main():
    L.seed_everything(9)
    x = torch.randn(12, 2)
    loader = DataLoader(TensorDataset(x, x.prod(1, keepdim=True)), batch_size=4)
    model, watcher = Hooked(), Watcher()
    trainer = L.Trainer(
        max_epochs=2,
        callbacks=[watcher],
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=1,
    )
    trainer.fit(model, loader, loader)
    seen = {f"{place:02d}_{name}": 1 for place, name in enumerate(watcher.seen)}
    norms = {f"norm_{step}": norm for step, norm in enumerate(model.grad_norms)}
    return {**seen, **model.calls, **norms, "last_loss": model.last_loss}
