"""For recipes that learn from two views of an image: the views, networks, and a measure."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from _common import Loader, digits
from torch import Tensor, nn
from torch.utils.data import DataLoader


def view(x: Tensor, strength: float = 1.0, part: float = 1.0, size: int = 8) -> Tensor:
    """Images turned, scaled, shifted, fainter or bolder, and noisy; or such a part of each."""
    n, turn, shift, noise = len(x), 0.5 * strength, 0.25 * strength, 0.2 * strength
    angle, scale = turn * (2 * torch.rand(n) - 1), part * (0.5 * torch.rand(n) - 0.25).exp()
    c, s, by = scale * angle.cos(), scale * angle.sin(), shift * (2 * torch.rand(n, 2) - 1)
    rows = torch.stack([c, -s, by[:, 0]], 1), torch.stack([s, c, by[:, 1]], 1)
    grid = F.affine_grid(torch.stack(rows, 1), [n, 1, size, size], align_corners=False)
    ink = F.grid_sample(x + 1, grid, align_corners=False) * (0.6 + 0.8 * torch.rand(n, 1, 1, 1))
    return ink - 1 + noise * torch.randn_like(ink)


def pairs(images: Tensor, size: int) -> Loader:
    """Batches of two views of each image."""

    def two_views(rows: list[Tensor]) -> list[Tensor]:
        x = torch.stack(rows)
        return [view(x), view(x)]

    return DataLoader(images, size, shuffle=True, collate_fn=two_views)  # type: ignore[arg-type]


def encoder(norm: str, width: int) -> nn.Sequential:
    """Images (n, 1, height, width) of any size -> features (n, 2 * width).

    `norm` is `"batch"`, which couples the samples that it sees together, or `"group"`.
    """
    layers: list[nn.Module] = []
    for before, after, stride in (1, width, 1), (width, width, 2), (width, 2 * width, 2):
        conv = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        normalised = nn.BatchNorm2d(after) if norm == "batch" else nn.GroupNorm(2, after)
        layers += [conv, normalised, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def perceptron(norm: str, *sizes: int) -> nn.Sequential:
    """Rows (n, first size) -> (n, last size), `norm` as above, or `"none"`, on those within."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes[:-1]):
        normalised = {"batch": nn.BatchNorm1d(after), "group": nn.GroupNorm(2, after)}
        layers += [nn.Linear(before, after), normalised.get(norm, nn.Identity()), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Each parameter of the slow network moves a little towards the fast one's."""
    for theirs, own in zip(fast.parameters(), slow.parameters(), strict=True):
        own.lerp_(theirs, 1 - momentum)


@torch.no_grad()
def few_labels(network: nn.Module, shots: int = 4, draws: int = 20) -> float:
    """Accuracy on the test images by the nearest mean of `shots` labelled images of each digit.

    Of the pixels themselves it is 0.83, of an untrained network less.
    """
    (images, labels), (test, expected) = digits()
    generator, accuracy = torch.Generator().manual_seed(0), 0.0
    network.eval()
    features, found = (F.normalize(network(x), dim=1) for x in (images, test))
    network.train()
    for _ in range(draws):
        order = torch.randperm(len(labels), generator=generator)
        drawn = [order[labels[order] == digit][:shots] for digit in range(10)]
        means = torch.stack([F.normalize(features[rows].mean(0), dim=0) for rows in drawn])
        accuracy += (found @ means.T).argmax(1).eq(expected).float().mean().item() / draws
    return accuracy
