"""What is read right, with few labels or with a teacher."""

from __future__ import annotations

from typing import Any

import torch
from _common import digits
from _views import view
from matplotlib.figure import Figure
from torch import Tensor

from .drawing import BLUE, FAINT, GREY, ORANGE, PLUM, TEAL, curves, dress, level
from .picture import Recorded


def recall(recipe: Any, module: Any) -> Tensor:
    """How many test images of each digit are read as what they are, (10,); and of all, the last."""
    pictures, labels = digits()[1]
    right = (module.network(pictures).argmax(1) == labels).double()
    return torch.stack([*(right[labels == digit].mean() for digit in range(10)), right.mean()])


def student_and_control(drawn: Figure, found: Recorded) -> None:
    """Accuracy over steps, and of each digit at the end: one of them was never shown."""
    left, right = drawn.subplots(1, 2)
    names = "teacher", "student", "without a teacher"
    runs = dict(zip(names, found.runs, strict=True))
    colours = GREY, BLUE, ORANGE
    lines = {
        name: (run.steps, [float(seen[-1]) for seen in run.seen]) for name, run in runs.items()
    }
    curves(left, lines, colours)
    level(left, found.result.target, "target", at="bottom right")
    left.set_ylim(0.5, 1.0)
    dress(left, "test images read right", "steps", "accuracy")
    right.axvspan(2.5, 3.5, color=FAINT, linewidth=0)
    for (name, run), colour, shift in zip(runs.items(), colours, (-0.25, 0, 0.25), strict=True):
        x = [digit + shift for digit in range(10)]
        right.bar(x, run.seen[-1][:10].tolist(), width=0.24, color=colour, label=name)
    right.set_xticks(range(10), ["3*" if digit == 3 else str(digit) for digit in range(10)])
    right.set_ylim(0, 1.0)
    dress(right, "the same, digit by digit", "digit; *no student was shown one")


def confidence(recipe: Any, module: Any) -> tuple[float, float, float]:
    """Accuracy on test images; of unlabelled ones, the share that counts, and its accuracy."""
    (train, truth), (pictures, labels) = digits()
    accuracy = (module.net(pictures).argmax(1) == labels).double().mean()
    sure, guess = module.net(view(train, strength=0.3)).softmax(1).max(1)
    counts = sure >= module.confidence
    right = (guess == truth)[counts].double().mean()
    return float(accuracy), float(counts.double().mean()), float(right)


def labels_and_guesses(drawn: Figure, found: Recorded) -> None:
    """Accuracy with and without the images that have no labels; and what is said of these."""
    left, right = drawn.subplots(1, 2)
    ours, control = found.runs
    lines = {
        "40 labels, and 1,397 images without": (ours.steps, [seen[0] for seen in ours.seen]),
        "control: 40 labels": (control.steps, [seen[0] for seen in control.seen]),
    }
    curves(left, lines, (BLUE, ORANGE))
    level(left, found.result.target, "target", at="top left")
    left.set_ylim(0, 1.0)
    dress(left, "test images read right", "steps", "accuracy")
    guesses = {
        "confident, so they count": (ours.steps, [seen[1] for seen in ours.seen]),
        "right, of those": (ours.steps, [seen[2] for seen in ours.seen]),
    }
    curves(right, guesses, (TEAL, PLUM))
    dress(right, "guesses for images without labels", "steps", "share")
