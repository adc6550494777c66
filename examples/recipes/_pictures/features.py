"""What a recipe finds alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import digits
from matplotlib.figure import Figure
from torch import Tensor

from .drawing import DIVERGING, GREY, TEN, dress, principal
from .picture import Recorded


def features(recipe: Any, module: Any) -> Tensor:
    network = {
        "simclr": lambda: module.encoder,
        "moco": lambda: module.queries[0],
        "byol": lambda: module.online[0],
        "dino": lambda: module.teacher[0],
    }[Path(recipe.__file__).stem]()
    return F.normalize(network(digits()[1][0]), dim=1)


def embedding(drawn: Figure, found: Recorded) -> None:
    """Features of test images in two dimensions, before and after."""
    labels = digits()[1][1]
    (run,) = found.runs
    names = "untrained", f"after {run.steps[-1]} steps"
    accuracies = found.result.control, found.result.metric
    for panel, rows, name, accuracy in zip(
        drawn.subplots(1, 2), (run.seen[0], run.seen[-1]), names, accuracies, strict=True
    ):
        points, shares = principal(rows)
        for digit, colour in enumerate(TEN):
            own = points[labels == digit]
            panel.scatter(*own.T.tolist(), s=7, color=colour, linewidths=0)
        for digit, colour in enumerate(TEN):
            x, y = points[labels == digit].median(0).values.tolist()
            box = {"boxstyle": "circle,pad=0.18", "fc": "white", "ec": colour, "lw": 1.1}
            panel.text(
                x, y, str(digit), color=colour, fontsize=7, ha="center", va="center", bbox=box
            )
        panel.set_xticks([])
        panel.set_yticks([])
        dress(
            panel,
            f"{name}: accuracy {accuracy:.2f}",
            *(f"component {i + 1}: {s:.0%} of variance" for i, s in enumerate(shares)),
        )


def similarities(recipe: Any, module: Any) -> Tensor:
    """Mean cosine of the images (rows) and the caption (columns) of combinations never seen."""
    pictures, rows = recipe.combinations(*digits()[1], count=4000)
    image = F.normalize(module.image(pictures), dim=1)
    text = F.normalize(module.text(recipe.CAPTIONS), dim=1)
    new = recipe.HELD_OUT.nonzero().flatten()
    return torch.stack([(image[rows == row] @ text[new].T).mean(0) for row in new])


def image_and_text(drawn: Figure, found: Recorded) -> None:
    """Which caption goes with which image, before and after."""
    (run,) = found.runs
    new = found.recipe.HELD_OUT.nonzero().flatten().tolist()
    names = [f"{row:02}" for row in new]
    titles = (
        f"untrained: accuracy {found.result.control:.2f}",
        f"after {run.steps[-1]} steps: {found.result.metric:.2f}",
    )
    for panel, matrix, title in zip(
        drawn.subplots(1, 2), (run.seen[0], run.seen[-1]), titles, strict=True
    ):
        drawn_ = panel.imshow(matrix.numpy(), cmap=DIVERGING, vmin=-1, vmax=1)
        panel.set_xticks(range(len(names)), names, rotation=90)
        panel.set_yticks(range(len(names)), names)
        dress(panel, title, "caption, as its two digits", "image, as its two digits")
        panel.tick_params(labelsize=6, length=0)
    bar = drawn.colorbar(drawn_, ax=panel, pad=0.03, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=GREY, labelsize=6.5, length=2, width=0.6)
    bar.set_label("mean cosine", color=GREY, fontsize=7)
