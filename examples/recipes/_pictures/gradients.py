"""Gradients that pull apart, lead uphill, or solve an equation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _common import digits
from matplotlib.figure import Figure
from torch import Tensor

from .drawing import (
    BLUE,
    DIVERGING,
    GREY,
    ORANGE,
    SEQUENTIAL,
    TEAL,
    curves,
    dress,
    field,
    first,
    images,
    level,
    logarithmic,
)
from .picture import Recorded


def tasks(recipe: Any, module: Any) -> tuple[list[float], float]:
    """Accuracy of each task, and the cosine of their gradients in the trunk."""
    canvas, *wanted = recipe.overlaid(*digits()[1], copies=1)
    with torch.enable_grad():
        scores = module(canvas)
        trunk = list(module.trunk.parameters())
        losses = [F.cross_entropy(own, labels) for own, labels in zip(scores, wanted, strict=True)]
        slopes = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in losses]
    one, other = (torch.cat([part.flatten() for part in slope]) for slope in slopes)
    right = [
        float((own.argmax(1) == y).double().mean()) for own, y in zip(scores, wanted, strict=True)
    ]
    return right, float(F.cosine_similarity(one, other, dim=0))


def two_tasks(drawn: Figure, found: Recorded) -> None:
    """What is to be read, how well it is, and whether the tasks pull apart."""
    example, left, right = drawn.subplots(1, 3, width_ratios=(0.85, 1, 1))
    (run,) = found.runs
    canvas, *_ = found.recipe.overlaid(*digits()[1], copies=1)
    images(example, first(canvas, 3, 3), "two digits each")
    names = "upper left", "lower right"
    lines = {name: (run.steps, [own[i] for own, _ in run.seen]) for i, name in enumerate(names)}
    curves(left, lines, (BLUE, ORANGE))
    level(left, found.result.target, "target", at="bottom right")
    level(left, found.result.control, "control: untrained")
    dress(left, "digits read right", "steps", "accuracy")
    curves(right, {"cosine": (run.steps, [cosine for _, cosine in run.seen])}, (TEAL,))
    level(right, 0.0, "")
    dress(right, "gradients of the two tasks", "steps", "cosine; below 0 they disagree")


def accuracy(recipe: Any, module: Any) -> float:
    pictures, labels = digits()[1]
    return float((module.net(pictures).argmax(1) == labels).double().mean())


def sharpness(drawn: Figure, found: Recorded) -> None:
    """Accuracy with and without the climb; and the loss uphill from where each has ended."""
    left, right = drawn.subplots(1, 2)
    names = "SAM", "control: SGD"
    runs = dict(zip(names, found.runs, strict=True))
    curves(left, {name: (run.steps, run.seen) for name, run in runs.items()}, (BLUE, ORANGE))
    level(left, found.result.target, "target", at="top left")
    left.set_ylim(0.5, 1.0)
    dress(left, "test images read right", "steps", "accuracy")
    _, batches = found.recipe.build()
    pictures, labels = batches.dataset.tensors
    ways = [i / 20 for i in range(31)]
    uphill = {
        name: (ways, losses_uphill(run.module, pictures, labels, ways))
        for name, run in runs.items()
    }
    curves(right, uphill, (BLUE, ORANGE))
    dress(
        right,
        "uphill from the trained weights",
        "distance in weights",
        "loss on what was trained on",
    )


def losses_uphill(
    module: Any, pictures: Tensor, labels: Tensor, ways: Sequence[float]
) -> list[float]:
    parameters = list(module.parameters())
    with torch.enable_grad():
        slopes = torch.autograd.grad(F.cross_entropy(module.net(pictures), labels), parameters)
    length = torch.cat([slope.flatten() for slope in slopes]).norm()
    losses, at = [], 0.0
    for way in ways:
        torch._foreach_add_(parameters, slopes, alpha=float((way - at) / length))
        losses.append(float(F.cross_entropy(module.net(pictures), labels)))
        at = way
    return losses


def equation_error(recipe: Any, module: Any) -> float:
    found: float = recipe.error(module)
    return found


def burgers(drawn: Figure, found: Recorded) -> None:
    """The solution that was found, how far it is off, and how that went down."""
    left, middle, right = drawn.subplots(1, 3, width_ratios=(1.15, 1.15, 1))
    (run,) = found.runs
    points = torch.cartesian_prod(torch.linspace(-1, 1, 121), torch.linspace(0, 1, 81))
    u = run.module(points)
    exact = torch.where(
        points[:, 1:] == 0, -(math.pi * points[:, :1]).sin(), found.recipe.solution(points)
    )
    extent = (-1, 1, 0, 1)
    field(left, u.view(121, 81), extent, cmap=DIVERGING, vmin=-1, vmax=1)
    dress(left, "solution u", "place x", "time t")
    field(middle, (u - exact).abs().view(121, 81), extent, cmap=SEQUENTIAL)
    dress(middle, "its absolute error", "place x")
    curves(right, {"error": (run.steps, run.seen)}, (BLUE,))
    logarithmic(right)
    level(right, found.result.target, "target", at="top left")
    by_adam = run.module.by_adam
    right.axvline(by_adam, color=GREY, linewidth=0.8)
    for text, side, turned in ("Adam ", "right", 0), (" L-BFGS", "left", 90):
        right.text(
            by_adam, 0.98, text, ha=side, va="top", rotation=turned, color=GREY, fontsize=6.5,
            transform=right.get_xaxis_transform(),
        )  # fmt: skip
    dress(right, "relative error", "steps")
