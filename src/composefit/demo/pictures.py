"""The two pictures that the demo leaves behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from torch import Tensor
from torch.nn.functional import interpolate, pad

from composefit.demo.digits import CLASSES

_INK, _GREY, _PAPER = "#1d2733", "#7b8794", "#ffffff"
_BLUE, _ORANGE, _TEAL = "#2f6db3", "#d9772b", "#1b8a7a"
_DIGITS = LinearSegmentedColormap.from_list("ink", ["#f3f1ec", _INK])


def by_class(images: Tensor, classes: Tensor, columns: int) -> Tensor:
    """The first images of each class, in rows: none is picked by its looks.

    Args:
        images: (n, 1, h, w).
        classes: (n,), int64, each image's row.
        columns: images in a row.

    Returns:
        (10, columns, h, w); NaN where a class has fewer images.
    """
    rows = torch.full((CLASSES, columns, *images.shape[2:]), torch.nan)
    for digit in range(CLASSES):
        found = images[classes == digit][:columns, 0]
        rows[digit, : len(found)] = found
    return rows


def grid(rows: Tensor, scale: int = 6, gap: int = 4) -> Tensor:
    """Rows of images as one, enlarged smoothly, a gap of NaN between them.

    Args:
        rows: (r, c, h, w).
        scale: pixels for a pixel.
        gap: pixels between images.

    Returns:
        (r * (h * scale + gap) - gap, c * (w * scale + gap) - gap).
    """
    r, c, h, w = rows.shape
    large = interpolate(rows, scale_factor=scale, mode="bicubic").clamp(-1, 1)
    cells = pad(large, (0, gap, 0, gap), value=torch.nan)
    whole = cells.permute(0, 2, 1, 3).reshape(r * (h * scale + gap), c * (w * scale + gap))
    return whole[:-gap, :-gap] if gap else whole


def save_samples(
    path: Path,
    pictures: Mapping[int, Tensor],
    classes: Tensor,
    real: tuple[Tensor, Tensor],
    columns: int = 5,
) -> None:
    """Draw the grids of several epochs side by side, and real digits at the right.

    All epochs show the same noise at the same place; the row is the digit that the classifier sees
    in it at the end.

    Args:
        path: of the file.
        pictures: epoch -> images (n, 1, h, w).
        classes: (n,), int64, for each image of the last epoch.
        real: images and their labels.
        columns: images in a row of a grid.
    """
    grids = {
        "untrained" if not epoch else f"epoch {epoch}": by_class(images, classes, columns)
        for epoch, images in pictures.items()
    }
    grids["real digits"] = by_class(*real, columns)
    tall, wide = grid(next(iter(grids.values()))).shape
    figure = Figure(figsize=(len(grids) * (wide + 28) / 100, (tall + 64) / 100), facecolor=_PAPER)
    axes = figure.subplots(1, len(grids), squeeze=False)[0]
    figure.subplots_adjust(0.012, 0.01, 0.988, 1 - 52 / (tall + 64), wspace=28 / wide)
    for axis, (title, rows) in zip(axes, grids.items(), strict=True):
        axis.imshow(grid(rows).numpy(), cmap=_DIGITS, vmin=-1, vmax=1, interpolation="none")
        axis.set_title(title, color=_GREY if title == "real digits" else _INK, fontsize=15, pad=10)
        axis.axis("off")
    figure.savefig(path, dpi=100)


def save_curves(
    path: Path, losses: Mapping[str, Sequence[float]], distances: Sequence[float], floor: float
) -> None:
    """Draw both losses and the Fréchet distance over the epochs.

    Args:
        path: of the file.
        losses: name -> the mean losses of epoch 1, 2, ...
        distances: of epoch 0 (untrained), 1, ...
        floor: the distance between real digits and real digits.
    """
    figure = Figure(figsize=(11, 4.2), facecolor=_PAPER, layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, values), colour in zip(losses.items(), (_BLUE, _ORANGE), strict=False):
        left.plot(range(1, len(values) + 1), values, color=colour, label=name, linewidth=1.8)
    _dress(left, "loss")
    left.legend(frameon=False, labelcolor=_INK)

    right.plot(range(len(distances)), distances, color=_TEAL, linewidth=1.8)
    right.set_yscale("log")
    right.yaxis.set_major_formatter(ScalarFormatter())
    for value, text in (
        (distances[0] / 5, "a fifth of the start"),
        (floor, "floor: real digits against real digits"),
    ):
        right.axhline(value, color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
        # At the right, above the line, whatever the number of epochs.
        right.annotate(
            text,
            (1, value),
            (-2, 4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            color=_GREY,
            fontsize=9,
        )
    _dress(right, "Fréchet distance to real digits")
    figure.savefig(path, dpi=120)


def _dress(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", color=_INK, fontsize=12)
    axis.set_xlabel("epoch", color=_GREY)
    axis.tick_params(colors=_GREY, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#c5ccd3")
    axis.grid(color="#e6eaee", linewidth=0.8)
    axis.set_axisbelow(True)
