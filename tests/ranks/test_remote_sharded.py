"""After a training that was sharded in processes of its own, what comes back is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composefit import LoopModule, SingleDevice, Strategy, Trainer
from composefit.callbacks import EMA
from composefit.strategies.fully_sharded import FullySharded

# Each launches processes, which takes seconds: all of them with `make laws`.
pytestmark = pytest.mark.full


class Net(LoopModule):
    """Two networks with an optimizer each; a weight without a dimension stays whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(3, 5).double(), nn.Linear(3, 5).double()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def configure_optimizers(self) -> Any:
        return {
            "a": torch.optim.Adam([*self.a.parameters(), self.scale], lr=0.01),
            "b": torch.optim.SGD(self.b.parameters(), lr=0.01, momentum=0.9),
        }

    def training_step(self, x: Tensor) -> Any:
        yield {"a": (self.scale * self.a(x)).square().mean()}
        yield {"b": (self.b(x) - self.a(x).detach()).square().mean()}


def batches() -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, generator=draws, dtype=torch.float64) for n in (6, 5, 8, 7)]


def trained(strategy: Strategy, folder: Path) -> tuple[Net, Trainer, EMA]:
    net, ema = Net(), EMA(0.5)
    trainer = Trainer(
        strategy=strategy,
        max_epochs=1,
        callbacks=[ema],
        default_root_dir=folder,
        seed=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(net, batches())
    return net, trainer, ema


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_optimizers_and_averages_come_back_whole_and_can_be_saved(tmp_path: Path) -> None:
    here, at_home, own = trained(SingleDevice("cpu"), tmp_path)
    strategy = FullySharded(processes=2, accelerator="cpu", timeout=60)
    net, trainer, ema = trained(strategy, tmp_path)
    close(net.state_dict(), here.state_dict())
    for name, one in trainer.optimizers.items():
        mine = one.optimizer.param_groups[0]["params"]
        assert any(mine[0] is parameter for parameter in net.parameters())
        close(one.optimizer.state_dict(), at_home.optimizers[name].optimizer.state_dict())
    close(ema.averaged_state_dict(), own.averaged_state_dict())
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    state = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    close(
        state["optimizers"]["a"]["state"], at_home.optimizers["a"].optimizer.state_dict()["state"]
    )
    again = Trainer(
        strategy="single",
        max_epochs=2,
        callbacks=[EMA(0.5)],
        logger=False,
        enable_checkpointing=False,
    )
    again.fit(Net(), batches(), ckpt_path=tmp_path / "whole.ckpt")
    assert again.global_step == 8
    with pytest.raises(RuntimeError, match=r"which have ended.*trainer\.run"):
        trainer.step(net, batches()[:1])
