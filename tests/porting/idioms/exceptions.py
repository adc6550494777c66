"""An exception of which a callback is told, and a batch that is left out by returning None."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Ends(L.Callback):
    def __init__(self):
        self.exceptions, self.torn_down = [], []

    def on_exception(self, trainer, pl_module, exception):
        self.exceptions.append(type(exception).__name__)

    def teardown(self, trainer, pl_module, stage):
        self.torn_down.append(stage)


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.fail_at = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        if batch_idx == self.fail_at:
            raise ArithmeticError("no")
        if y.isnan().any():
            return None
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def main():
    L.seed_everything(28)
    x = torch.randn(16, 2)
    y = x[:, :1].clone()
    y[5] = float("nan")
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    ends, model = Ends(), Net()
    model.fail_at = 2
    trainer = L.Trainer(max_epochs=1, callbacks=[ends], logger=False, enable_checkpointing=False)
    raised = ""
    try:
        trainer.fit(model, loader)
    except ArithmeticError as error:
        raised = str(error)
    model.fail_at = 9
    again = L.Trainer(max_epochs=1, callbacks=[ends], logger=False, enable_checkpointing=False)
    again.fit(model, loader)
    return {
        "raised": raised == "no",
        "told": ends.exceptions == ["ArithmeticError"],
        "torn_down": ends.torn_down[-1] == "fit",
        "weight": model.net.weight.sum().item(),
    }
