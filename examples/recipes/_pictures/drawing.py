"""How the recipes' pictures look: colours, axes, images, and files that stay small."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from composefit.demo.pictures import grid

INK, GREY, FAINT, PAPER = "#1d2733", "#6b7682", "#e6eaee", "#ffffff"
BLUE, ORANGE, TEAL, PLUM = "#2f6db3", "#d9772b", "#1b8a7a", "#85587a"
#: For ten classes, told apart by their labels too.
TEN = (
    BLUE, ORANGE, TEAL, PLUM, "#c23b3b",
    "#8a9a2e", "#4aa8c9", "#d9a514", "#5b4fa3", "#8b6b4a",
)  # fmt: skip
INKED = LinearSegmentedColormap.from_list("inked", ["#f3f1ec", INK])
SEQUENTIAL = LinearSegmentedColormap.from_list("sequential", [PAPER, "#9cc3cf", BLUE, INK])
DIVERGING = LinearSegmentedColormap.from_list("diverging", [BLUE, "#f7f6f3", ORANGE])

WIDTH, DOTS = 6.0, 160  # inches, and dots an inch: sharp where it is shown 600 pixels wide
LARGEST = 60_000  # bytes of a file


def figure(height: float = 2.4) -> Figure:
    """An empty picture, `height` inches high."""
    return Figure(figsize=(WIDTH, height), facecolor=PAPER, layout="constrained")


def dress(axes: Axes, title: str = "", x: str = "", y: str = "") -> Axes:
    """Title and labels, and nothing that is not read."""
    axes.set_title(title, loc="left", color=INK, fontsize=8.5, pad=6)
    axes.set_xlabel(x, color=GREY, fontsize=7.5)
    axes.set_ylabel(y, color=GREY, fontsize=7.5)
    axes.tick_params(colors=GREY, which="both", labelsize=7, length=2.5, width=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color="#c5ccd3", linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


def curves(
    axes: Axes, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], colours: Iterable[str]
) -> None:
    """Lines, and what each is called, in its colour, where there are several."""
    axes.grid(color=FAINT, linewidth=0.6)
    for (name, (x, y)), colour in zip(lines.items(), colours, strict=False):
        axes.plot(x, y, color=colour, linewidth=1.5, label=name, solid_capstyle="round")
    if len(lines) == 1:
        return
    legend = axes.legend(frameon=False, fontsize=7, handlelength=1.1, borderaxespad=0.2)
    for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True):
        text.set_color(line.get_color())


def logarithmic(axes: Axes) -> None:
    """A logarithmic axis upwards, its numbers written out."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")


SIDES = {"left": (0, "left", 3), "right": (1, "right", -2)}


def level(axes: Axes, value: float, text: str, at: str = "top right") -> None:
    """A dashed line at a value, with what it is `"top"` or `"bottom"`, `"left"` or `"right"`."""
    axes.axhline(value, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    (x, across, shift), up = SIDES[at.split()[1]], at.startswith("top")
    axes.annotate(
        text, (x, value), (shift, 2.5 if up else -2.5), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha=across, va="bottom" if up else "top", color=GREY, fontsize=7,
    )  # fmt: skip


def images(axes: Axes, rows: Tensor, title: str = "", labels: Sequence[str] = ()) -> None:
    """Rows of images (r, c, h, w) from -1 to 1; a label for each row, at its left."""
    scale = 5
    whole = grid(rows.detach().float().cpu(), scale=scale, gap=3)
    axes.imshow(whole.numpy(), cmap=INKED, vmin=-1, vmax=1, interpolation="none")
    dress(axes, title)
    axes.spines[:].set_visible(False)
    high = rows.shape[2] * scale
    axes.set_xticks([])
    axes.set_yticks([i * (high + 3) + high / 2 for i in range(len(labels))], labels)
    axes.tick_params(length=0)


def first(batch: Tensor, rows: int, columns: int) -> Tensor:
    """The first images of (n, 1, h, w) in rows (r, c, h, w): none is picked by its looks."""
    return batch[: rows * columns].view(rows, columns, *batch.shape[2:])


def field(
    axes: Axes, values: Tensor, extent: tuple[float, float, float, float], **options: Any
) -> Any:
    """A field (x, y) as colours, with its scale beside it."""
    drawn = axes.imshow(values.T.numpy(), origin="lower", extent=extent, aspect="auto", **options)
    assert axes.figure is not None
    bar = axes.figure.colorbar(drawn, ax=axes, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=GREY, labelsize=6.5, length=2, width=0.6)
    return drawn


def save(drawn: Figure, path: Path, about: str) -> None:
    """Write a PNG of so many colours as make it small; `about` is kept in it as its description."""
    raw = io.BytesIO()
    drawn.savefig(raw, format="png", dpi=DOTS)
    note = PngInfo()
    note.add_text("Description", about)
    with Image.open(raw) as image:
        for colours in (256, 128, 64, 32, 16):
            few = image.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
            few.save(path, "PNG", optimize=True, pnginfo=note)
            if path.stat().st_size <= LARGEST:
                return


def principal(features: Tensor) -> tuple[Tensor, list[float]]:
    """The two principal components of rows (n, d), (n, 2), and their shares of the variance."""
    centred = features.double() - features.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    return u[:, :2] * s[:2], (s.square() / s.square().sum())[:2].tolist()
