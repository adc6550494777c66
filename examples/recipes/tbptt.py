"""Truncated back-propagation through time: a window at a time, the hidden state carried along.

Williams, Peng: An Efficient Gradient-Based Algorithm for On-Line Training of Recurrent Network
Trajectories, 1990; reference implementation: pytorch/examples, word_language_model.

The hidden state is a local variable of the step. That it is detached is the truncation: nothing of
how the step is carried out asks for it.
"""

import math
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import CHARACTERS, Loader, Result, Where, loader, run, trainer
from torch import Tensor, nn

from composefit import LoopModule, Step

LENGTH = 256  # of a piece of text, in characters


class Recurrent(LoopModule):
    window = 32

    def __init__(self, width: int = 96, characters: int = len(CHARACTERS)) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, characters)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=5e-3)

    def forward(self, text: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss of each next character of text (n, length), and the state at its end."""
        found, state = self.memory(self.embedding(text[:, :-1]), state)
        return F.cross_entropy(self.head(found).movedim(2, 1), text[:, 1:], reduction="none"), state

    def training_step(self, batch: list[Tensor]) -> Step:
        (text,), state = batch, None
        for start in range(0, text.shape[1] - 1, self.window):
            losses, state = self(text[:, start : start + self.window + 1], state)
            yield losses.mean()
            state = state.detach()

    def test_step(self, batch: list[Tensor]) -> None:
        losses, _ = self(batch[0])
        self.log("bits", losses.mean() / math.log(2))


def source_code() -> Tensor:
    """Sources of the standard library, cut into pieces (n, LENGTH + 1) of characters."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = "".join((folder / f"{name}.py").read_text("utf-8") for name in ("argparse", "typing"))
    ids = torch.tensor([max(CHARACTERS.find(c), 0) for c in text])
    return ids.unfold(0, LENGTH + 1, LENGTH)


def build(quick: bool = False) -> tuple[Recurrent, Loader]:
    torch.manual_seed(0)
    return Recurrent(), loader(source_code()[100:], batch_size=16 if quick else 32)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    test = loader(source_code()[:100], batch_size=100, shuffle=False)
    fitter = trainer(strategy, devices, max_steps=2 if quick else 40)
    control, *_ = fitter.test(module, test, verbose=False)
    fitter.fit(module, batches)
    learned, *_ = fitter.test(module, test, verbose=False)
    return Result(learned["bits"], 2.6, "lower", control["bits"], "bits for a character")


if __name__ == "__main__":
    run(main)
