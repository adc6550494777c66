"""A module that draws and writes wherever a module can, for law 2."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from composefit import LoopModule


class Noisy(LoopModule):
    """Dropout, attention dropout, LSTM dropout, BatchNorm, checkpointing, and noise in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, num_layers=2, dropout=0.3, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.block = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        x = x + 0.1 * torch.randn_like(x) + 0.1 * self.random.normal(len(x), *x.shape[1:])
        h, _ = self.lstm(x)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = h + checkpoint(self.block, h, use_reentrant=False)
        h = F.dropout(self.norm(h.mean(1)), 0.3)
        return F.cross_entropy(self.head(h), y)

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.1, momentum=0.9)


def batches(count: int) -> list[Any]:
    """Ragged batches: 4 threads get 2 or 3 samples each."""
    draws = torch.Generator().manual_seed(0)
    sizes = [11, 9, 10]
    return [
        (
            torch.randn(sizes[i % 3], 3, 4, generator=draws),
            torch.randint(2, (sizes[i % 3],), generator=draws),
        )
        for i in range(count)
    ]
