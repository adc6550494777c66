"""Images that a recipe draws, next to real ones."""

from __future__ import annotations

from typing import Any

import torch
from _common import digits
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader

from composefit.demo.frechet import frechet_distance

from .drawing import BLUE, GREY, ORANGE, TEAL, curves, dress, first, images, level, logarithmic
from .picture import Recorded, noise


def drawn_digits(recipe: Any, module: Any) -> Tensor:
    made: Tensor = module(noise(36, recipe.NOISE))
    return made


def samples(drawn: Figure, found: Recorded) -> None:
    """What the same noise becomes as the training goes on, and real digits."""
    (run,) = found.runs
    axes = drawn.subplots(1, 4)
    for i, panel in zip((0, 1, -1), axes, strict=False):
        title = f"after {run.steps[i]} steps" if run.steps[i] else "untrained"
        images(panel, first(run.seen[i], 6, 6), title)
    images(axes[3], first(digits()[0][0], 6, 6), "real digits")


def distances(recipe: Any, module: Any) -> tuple[float, Tensor]:
    made = module(noise(1000, recipe.NOISE))
    real = torch.cat([part[0] for part in digits()])
    return frechet_distance(made.flatten(1), real.flatten(1)), made[:20]


def wasserstein(drawn: Figure, found: Recorded) -> None:
    """The distance over the generator's updates, for five fresh batches and for one."""
    left, *panels = drawn.subplots(1, 3, width_ratios=(1.5, 1, 1))
    fresh, same = found.runs
    updates = [step / found.recipe.CRITIC_STEPS for step in fresh.steps]
    lines = {
        "five fresh batches": (updates, [distance for distance, _ in fresh.seen]),
        "one batch, five times": (same.steps, [distance for distance, _ in same.seen]),
    }
    curves(left, lines, (BLUE, ORANGE))
    logarithmic(left)
    level(left, found.result.target, "target")
    dress(left, "Fréchet distance to real digits", "updates of the generator", "squared pixels")
    images(panels[0], first(fresh.seen[-1][1], 5, 4), "drawn")
    images(panels[1], first(digits()[0][0], 5, 4), "real digits")


def mixed_styles(drawn: Figure, found: Recorded) -> None:
    """Coarse layers in the style of the row, the last one in that of the column."""
    (run,) = found.runs
    left, middle, right = drawn.subplots(1, 3)
    images(left, first(run.seen[-1], 6, 6), f"drawn, after {run.steps[-1]} steps")
    module: Any = run.module
    styles = module.mapping(noise(12, found.recipe.NOISE))
    pairs = [torch.stack([a, a, b]) for a in styles[:6] for b in styles[6:]]
    images(
        middle,
        first(module.synthesis(torch.stack(pairs)), 6, 6),
        "rows: style, columns: its end",
    )
    images(right, first(digits()[0][0], 6, 6), "real digits")


def translated(drawn: Figure, found: Recorded) -> None:
    """Digits of the test set to the other side and back, and the reverse."""
    module: Any = found.runs[-1].module
    a = digits()[1][0][:10]
    for panel, given, there, back, names in zip(
        drawn.subplots(1, 2),
        (a, -a),
        (module.a_to_b, module.b_to_a),
        (module.b_to_a, module.a_to_b),
        (("digit", "negative", "back"), ("negative", "digit", "back")),
        strict=True,
    ):
        over = there(given)
        rows = torch.stack([given, over, back(over)])[:, :, 0]
        images(panel, rows, f"from {names[0]} to {names[1]} and back", names)


def copies(drawn: Figure, found: Recorded) -> None:
    """Digits of the test set, their codes, and what is made of these."""
    left, right = drawn.subplots(1, 2, width_ratios=(1.7, 1))
    module: Any = found.runs[-1].module
    real, _ = digits()[1]
    codes, _ = module.book(module.encoder(real))
    made = module.decoder(codes)
    images(
        left,
        torch.stack([real[:12], made[:12]])[:, :, 0],
        "digits of the test set",
        ("real", "copy"),
    )
    _, chosen = module.book(module.encoder(digits()[0][0]))
    shares = (
        chosen.flatten().bincount(minlength=len(module.book.codes)).sort(descending=True).values
    )
    share = shares / shares.sum()
    right.bar(range(len(share)), share.tolist(), width=1.0, color=TEAL)
    dress(right, "how often each code is chosen", "code, by frequency", "share of all places")


def denoised(drawn: Figure, found: Recorded) -> None:
    """The noise on its way, as the averaged weights lead it."""
    left, middle, right = drawn.subplots(1, 3, width_ratios=(2, 1, 1))
    (run,) = found.runs
    network: Any = run.module.network
    times = found.recipe.TIMES
    seen: list[Tensor] = []
    handle = network.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    made = run.trainer.predict(run.module, DataLoader(noise(36, 1, 8, 8), 36))  # type: ignore[arg-type]
    handle.remove()
    end = torch.cat(made or [])
    at = [0, 10, 20, 30, 35, 40, 45]
    steps = torch.stack([*(seen[i][:6, 0] for i in at), end[:6, 0]], 1)
    images(left, steps, "from noise to digits")
    left.set_xticks([i * 43 + 20 for i in range(8)], [str(times - i) for i in [*at, times]])
    left.set_xlabel("steps of noise left", color=GREY, fontsize=7.5)
    images(middle, first(end[6:], 6, 4), "drawn")
    images(right, first(digits()[0][0], 6, 4), "real digits")
