"""A character model of Python's standard library, its layers sharded over two processes.

Each process holds half of the parameters, of their gradients and of Adam's averages; a layer is
gathered when it is used. `torchrun --nproc-per-node 2 fsdp_language_model.py` does the same.
"""

import math
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from composefit import FullySharded, LoopModule, Mean, Strategy, Trainer

LENGTH, WIDTH = 64, 128  # characters in a row, and numbers that the model makes of each
PADDING = 0  # a character that no source has


class Characters(LoopModule):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.embed = nn.Embedding(128, WIDTH)
        self.place = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3, betas=(0.9, 0.98))

    def training_step(self, text: Tensor) -> Mean:
        """The mean over characters, in nats, however many of them a rank's rows have."""
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=text.device)
        x = self.embed(text[:, :-1]) + self.place(torch.arange(LENGTH, device=text.device))
        scores = self.head(self.layers(x, mask, is_causal=True)).flatten(0, 1)
        target = text[:, 1:].flatten()
        total = F.cross_entropy(scores, target, ignore_index=PADDING, reduction="sum")
        return Mean(total, (target != PADDING).sum())

    def validation_step(self, text: Tensor) -> None:
        self.log("nats", self.training_step(text))


def sources() -> tuple[Tensor, Tensor]:
    """Rows of text to learn from, and rows of other files to measure on."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    rows = [rows_of(text) for text in texts if text and text.isascii()]
    return torch.cat([r for i, r in enumerate(rows) if i % 10]), torch.cat(rows[::10])[:500]


def rows_of(text: bytes) -> Tensor:
    """A file in rows, the last of them padded."""
    characters = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return F.pad(characters, (0, -len(text) % (LENGTH + 1)), value=PADDING).view(-1, LENGTH + 1)


def order_zero(learn: Tensor, measure: Tensor) -> float:
    """Bits a character by how often each occurs, which knows nothing of those before it."""
    counts = torch.bincount(learn.flatten(), minlength=128) + 1.0
    counts[PADDING] = 0
    target = measure[:, 1:].flatten()
    return -float((counts / counts.sum()).log2()[target[target != PADDING]].mean())


def main(strategy: Strategy | None = None, steps: int = 120) -> float:
    """Train, and return the bits that a character of files takes that were not seen."""
    torch.manual_seed(0)
    learn, measure = sources()
    trainer = Trainer(
        strategy=strategy or FullySharded(processes=2, policy=[nn.TransformerEncoderLayer]),
        max_epochs=1,
        limit_train_batches=steps,
        gradient_clip_val=1.0,
        seed=0,
    )
    trainer.fit(
        Characters(),
        DataLoader(learn, batch_size=64, shuffle=True),  # type: ignore[arg-type]
        DataLoader(measure, batch_size=64),  # type: ignore[arg-type]
    )
    print(f"by frequency alone {order_zero(learn, measure):.3f}")
    return trainer.callback_metrics["nats"].item() / math.log(2)


if __name__ == "__main__":
    print(f"bits a character {main():.3f}")
