"""SimCLR: an image's two views find each other among those of all images.

Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual
Representations, 2020; reference implementation: google-research/simclr.

`Gather` brings in the views of all shards: a view is compared with those of the whole batch,
however that is cut.
"""

import torch
import torch.nn.functional as F
from _common import Loader, Result, Where, digits, run, trainer
from _views import encoder, few_labels, pairs
from torch import Tensor, nn

from composefit import Gather, LoopModule, Step


class SimCLR(LoopModule):
    def __init__(self, norm: str = "batch", width: int = 32, temperature: float = 0.2) -> None:
        super().__init__()
        self.encoder = encoder(norm, width)
        self.projector = nn.Sequential(
            nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
        self.temperature = temperature

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)

    def training_step(self, views: list[Tensor]) -> Step:
        a, b = F.normalize(self.projector(self.encoder(torch.cat(views))), dim=1).chunk(2)
        (all_a, all_b), offset = yield from Gather((a, b))
        loss = self.nt_xent(a, all_b, all_a, offset) + self.nt_xent(b, all_a, all_b, offset)
        yield loss.mean() / 2

    def nt_xent(self, view: Tensor, others: Tensor, same: Tensor, offset: int) -> Tensor:
        """Its other view is to be found among all other views, and all of its own kind but it."""
        positive_and_others, itself_and_same = (
            view @ candidates.T / self.temperature for candidates in (others, same)
        )
        itself_and_same.diagonal(offset).fill_(-torch.inf)
        scores = torch.cat([positive_and_others, itself_and_same], 1)
        return scores.logsumexp(1) - scores.diagonal(offset)


def build(quick: bool = False) -> tuple[SimCLR, Loader]:
    torch.manual_seed(0)
    (images, _), _ = digits()
    return SimCLR(), pairs(images, 128)


def main(strategy: Where = "auto", devices: int | str = "auto", quick: bool = False) -> Result:
    module, batches = build(quick)
    untrained = few_labels(module.encoder)
    trainer(strategy, devices, max_epochs=1 if quick else 20).fit(module, batches)
    accuracy = few_labels(module.encoder)
    return Result(accuracy, 0.86, "higher", untrained, "accuracy with four labels a digit")


if __name__ == "__main__":
    run(main)
