"""CLIP: images and captions of one batch find each other; classification is by caption.

Radford, Kim, Hallacy and others: Learning Transferable Visual Models From Natural Language
Supervision, 2021; reference implementation: mlfoundations/open_clip.

An image is two digits side by side, its caption their names. One in five combinations is never
trained on, and the measure is on those alone. `Gather` brings in the features of all shards.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from _common import Loader, Result, Where, digits, loader, run, trainer
from _views import encoder
from torch import Tensor, nn

from composefit import Gather, LoopModule, Step

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LENGTH = 11  # "three seven"
# (100, LENGTH), characters as numbers: what is said of the digits a and b is in row 10 * a + b.
CAPTIONS = torch.tensor([list(f"{a} {b}".ljust(LENGTH).encode()) for a in WORDS for b in WORDS])
HELD_OUT = (torch.arange(10)[:, None] + 2 * torch.arange(10)).flatten() % 5 == 0


class Text(nn.Module):
    """Captions (n, LENGTH) -> (n, features), by a transformer over their characters."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(128, width)
        self.places = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(width, features)

    def forward(self, captions: Tensor) -> Tensor:
        found: Tensor = self.head(self.layer(self.characters(captions) + self.places).mean(1))
        return found


class CLIP(LoopModule):
    def __init__(self, norm: str = "batch", width: int = 32, features: int = 32) -> None:
        super().__init__()
        convolutions = encoder(norm, width)[:-2]  # where things are matters
        flat = nn.Linear(2 * width * 2 * 4, features)
        self.image = nn.Sequential(convolutions, nn.Flatten(), flat)
        self.text = Text(width, features)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.01)

    def training_step(self, batch: list[Tensor]) -> Step:
        images, captions = batch
        image = F.normalize(self.image(images), dim=1)
        text = F.normalize(self.text(captions), dim=1)
        (all_images, all_texts), offset = yield from Gather((image, text))
        loss = self.contrast(image, all_texts, offset) + self.contrast(text, all_images, offset)
        yield loss.mean() / 2

    def contrast(self, own: Tensor, others: Tensor, offset: int) -> Tensor:
        """Cross-entropy: the right one is in one's own row."""
        scores = self.scale.exp() * own @ others.T
        return scores.logsumexp(1) - scores.diagonal(offset)

    def on_after_optimizer_step(self, *_: Any) -> None:
        with torch.no_grad():
            self.scale.clamp_(0, math.log(100))


def combinations(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Two digits side by side, (count, 1, 8, 16), and which two, as a row of CAPTIONS."""
    left, right = torch.randint(len(images), (2, count))
    return torch.cat([images[left], images[right]], 3), 10 * labels[left] + labels[right]


@torch.no_grad()
def zero_shot(module: CLIP, images: Tensor, rows: Tensor) -> float:
    """How often the caption that goes with an image best, of all hundred, is the right one."""
    module.eval()
    scores = F.normalize(module.image(images), dim=1) @ F.normalize(module.text(CAPTIONS), dim=1).T
    module.train()
    return scores.argmax(1).eq(rows).float().mean().item()


def build(quick: bool = False) -> tuple[CLIP, Loader]:
    torch.manual_seed(0)
    train, _ = digits()
    images, rows = combinations(*train, count=8000)
    seen = ~HELD_OUT[rows]
    return CLIP(), loader(images[seen], CAPTIONS[rows[seen]], batch_size=128)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    images, rows = combinations(*digits()[1], count=2000)
    new = images[HELD_OUT[rows]], rows[HELD_OUT[rows]]
    untrained = zero_shot(module, *new)
    trainer(strategy, devices, max_steps=4 if quick else 300).fit(module, batches)
    accuracy = zero_shot(module, *new)
    return Result(accuracy, 0.85, "higher", untrained, "accuracy on combinations never seen")


if __name__ == "__main__":
    run(main)
