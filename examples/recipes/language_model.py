"""A language model of characters: a small transformer learns to write Python.

Radford, Narasimhan, Salimans and Sutskever, Improving Language Understanding by Generative
Pre-Training (2018). Reference: github.com/karpathy/nanoGPT. Lines are of different lengths: the
loss is a mean over characters, not over lines, whatever lines a shard or a batch holds.
"""

import math

import torch
import torch.nn.functional as F
from _common import CHARACTERS, Loader, Result, Where, lines_of_code, loader, measure, run, trainer
from torch import Tensor, nn

from composefit import LoopModule, Mean

LENGTH, PAD = 64, -100


class LanguageModel(LoopModule):
    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(CHARACTERS), width)
        self.places = nn.Embedding(LENGTH, width)
        block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(CHARACTERS))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.01)

    def training_step(self, batch: list[Tensor]) -> Mean:
        return self.loss(*batch)

    def test_step(self, batch: list[Tensor]) -> None:
        self.log("metric", self.loss(*batch) / math.log(2))

    def loss(self, ids: Tensor) -> Mean:
        """The mean over all characters but the first of each line, and up to its end."""
        inputs, targets = ids[:, :-1], ids[:, 1:]
        targets = targets.masked_fill(inputs == 0, PAD)  # after its end
        mean = F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten(), ignore_index=PAD)
        return Mean.of(mean, (targets != PAD).sum())

    def forward(self, ids: Tensor) -> Tensor:
        """Scores (n, length, characters) of the next characters of ids (n, length)."""
        x = self.characters(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        later = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], x.device, x.dtype)
        scores: Tensor = self.head(self.blocks(x, mask=later, is_causal=True))
        return scores


def build(quick: bool = False) -> tuple[LanguageModel, Loader]:
    torch.manual_seed(0)
    lines, _ = lines_of_code(LENGTH)
    return LanguageModel(), loader(lines, batch_size=32)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    steps = 4 if quick else 160
    fitter = trainer(strategy, devices, max_steps=steps, accumulate_grad_batches=2)
    _, lines = lines_of_code(LENGTH)
    test = loader(lines[: 100 if quick else 1000], batch_size=200, shuffle=False)
    return measure(fitter, module, batches, test, "bits a character", at_most=3.0)


if __name__ == "__main__":
    run(main)
