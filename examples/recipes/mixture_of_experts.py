"""Mixture of experts: a router sends each character to one of several networks.

Fedus, Zoph and Shazeer, Switch Transformers (2021, arXiv:2101.03961), section 2. Reference:
github.com/tensorflow/mesh, mesh_tensorflow/transformer/moe.py. Two losses with two denominators:
hidden characters are guessed, a mean over those; experts are kept equally busy, a mean over all.
"""

import torch
import torch.nn.functional as F
from _common import CHARACTERS, Loader, Result, Where, lines_of_code, loader, measure, run, trainer
from torch import Tensor, nn

from composefit import Gather, LoopModule, Mean, Step

LENGTH, END, HIDDEN = 48, 0, len(CHARACTERS)


class MixtureOfExperts(LoopModule):
    def __init__(self, width: int = 64, experts: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(CHARACTERS) + 1, width)
        self.places = nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(Layer(width, experts) for _ in range(layers))
        self.head = nn.Linear(width, len(CHARACTERS))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def training_step(self, batch: list[Tensor]) -> Step:
        (ids,) = batch
        hidden, routed = self.hide(ids), ids != END
        scores, chances = self(ids.masked_fill(hidden, HIDDEN))
        guessed = F.cross_entropy(scores[hidden], ids[hidden], reduction="sum")

        chances = chances[routed]  # (characters, layers, experts)
        sent = F.one_hot(chances.argmax(2), chances.shape[2]).sum(0)
        sent = (yield from Gather(sent[None]))[0].sum(0)  # by everybody, (layers, experts)
        share = sent / sent.sum(1, keepdim=True)
        busy = chances.shape[2] * (share * chances.sum(0)).sum()
        return Mean(guessed, hidden.sum()) + 0.01 * Mean(busy, routed.sum())

    def hide(self, ids: Tensor) -> Tensor:
        """Which characters are to be guessed: 15 of 100."""
        return self.random.bernoulli(*ids.shape, p=0.15, dtype=torch.bool) & (ids != END)

    def test_step(self, batch: list[Tensor]) -> None:
        (ids,) = batch
        hidden = self.hide(ids)
        scores, _ = self(ids.masked_fill(hidden, HIDDEN))
        right = scores[hidden].argmax(1) == ids[hidden]
        self.log("metric", Mean(right.double().sum(), hidden.sum()))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (n, length, characters), and routers' chances (n, length, layers, experts)."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x, routes = self.characters(ids) + self.places(places), []
        for layer in self.layers:
            x, chances = layer(x, ids == END)
            routes.append(chances)
        return self.head(x), torch.stack(routes, 2)


class Layer(nn.Module):
    """Attention, and the expert that each character is sent to."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(experts)
        )

    def forward(self, x: Tensor, ended: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, key_padding_mask=ended, need_weights=False)[0]
        h = self.norms[1](x)
        chances = self.router(h).softmax(2)
        chance, chosen = chances.max(2)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out[chosen == i] = expert(h[chosen == i])
        return x + chance[:, :, None] * out, chances


def build(quick: bool = False) -> tuple[MixtureOfExperts, Loader]:
    torch.manual_seed(0)
    lines, _ = lines_of_code(LENGTH)
    return MixtureOfExperts(), loader(lines, batch_size=64)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    _, lines = lines_of_code(LENGTH)
    test = loader(lines[: 100 if quick else 1000], batch_size=200, shuffle=False)
    fitter = trainer(strategy, devices, max_steps=4 if quick else 200)
    return measure(fitter, module, batches, test, "hidden characters found", at_least=0.35)


if __name__ == "__main__":
    run(main)
