"""What a recipe makes of text."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from _common import CHARACTERS, lines_of_code
from matplotlib.figure import Figure
from torch import Tensor, nn

from .drawing import BLUE, FAINT, GREY, INK, ORANGE, PLUM, TEAL, curves, dress, level
from .picture import Recorded


def bits(loss: Any) -> float:
    (term,) = loss.terms
    return float(term.total / term.weight) / math.log(2)


def bits_of_lines(recipe: Any, module: Any) -> float:
    return bits(module.loss(lines_of_code(recipe.LENGTH)[1][:300]))


def written(drawn: Figure, found: Recorded) -> None:
    """Bits a character, and lines drawn from the model."""
    left, right = drawn.subplots(1, 2)
    (run,) = found.runs
    curves(left, {"test": (run.steps, run.seen)}, (BLUE,))
    level(left, found.result.control, "control: untrained", at="bottom right")
    level(left, found.result.target, "target")
    dress(left, "lines never seen", "steps", "bits a character")
    module: Any = run.module
    ids = torch.zeros(12, 1, dtype=torch.int64)
    ids[:, 0] = torch.tensor([CHARACTERS.find(c) for c in " " * 9 + "def"])
    for _ in range(38):
        chances = (module(ids)[:, -1] / 0.7).softmax(1)
        ids = torch.cat([ids, chances.multinomial(1) * (ids[:, -1:] != 0)], 1)
    lines = ["".join(CHARACTERS[i] for i in row if i) for row in ids.tolist()]
    dress(right, "lines that it writes")
    right.axis("off")
    right.text(
        0, 0.98, "\n".join(lines), family="monospace", fontsize=7, color=INK, va="top",
        transform=right.transAxes, linespacing=1.45,
    )  # fmt: skip


def code_and_prose(recipe: Any, module: Any) -> dict[str, float]:
    texts = {"prose": recipe.prose()[:300], "code": recipe.code()[:300]}
    means = {}
    for name, text in texts.items():
        (batch,) = recipe.batches(text, size=300)
        means[name] = bits(module.loss(dict(batch)))
    return means


def adapted(drawn: Figure, found: Recorded) -> None:
    """Both texts while the whole model learns code, and while thin matrices learn prose."""
    axes = drawn.subplots()
    first, second = found.runs
    steps = [*first.steps, *(first.steps[-1] + step for step in second.steps)]
    seen = [*first.seen, *second.seen]
    lines = {name: (steps, [means[name] for means in seen]) for name in ("prose", "code")}
    curves(axes, lines, (ORANGE, BLUE))
    axes.axvline(first.steps[-1], color=GREY, linewidth=0.8)
    learning = [p.numel() for p in second.module.parameters() if p.requires_grad]
    share = sum(learning) / sum(p.numel() for p in second.module.parameters())
    for x, text in (
        (first.steps[-1] / 2, "all weights learn code"),
        (first.steps[-1] * 1.5, f"{sum(learning):,} weights ({share:.0%}) learn prose"),
    ):
        axes.text(
            x,
            0.93,
            text,
            color=INK,
            fontsize=7.5,
            ha="center",
            transform=axes.get_xaxis_transform(),
        )
    level(axes, found.result.target, "target for prose", at="bottom left")
    dress(axes, "", "steps", "bits a character")


def experts(recipe: Any, module: Any) -> tuple[float, Tensor]:
    """Hidden characters found, and each expert's share of all characters (layers, experts)."""
    ids = lines_of_code(recipe.LENGTH)[1][:300]
    hidden = (torch.rand(ids.shape) < 0.15) & (ids != recipe.END)
    scores, chances = module(ids.masked_fill(hidden, recipe.HIDDEN))
    right = (scores[hidden].argmax(1) == ids[hidden]).double().mean()
    sent = F.one_hot(chances[ids != recipe.END].argmax(2), chances.shape[3]).double().mean(0)
    return float(right), sent


def loads(drawn: Figure, found: Recorded) -> None:
    """What is found, and how busy each expert is."""
    left, *panels = drawn.subplots(1, 3)
    (run,) = found.runs
    curves(left, {"found": (run.steps, [right for right, _ in run.seen])}, (BLUE,))
    level(left, found.result.target, "target")
    level(left, found.result.control, "control: untrained")
    dress(left, "hidden characters found", "steps", "share")
    for i, panel in enumerate(panels):
        shares = torch.stack([sent[i] for _, sent in run.seen])
        panel.stackplot(run.steps, shares.T.numpy(), colors=(BLUE, TEAL, ORANGE, PLUM), alpha=0.85)
        for edge in 0.25, 0.5, 0.75:
            panel.axhline(edge, color="white", linewidth=0.8, linestyle=(0, (4, 3)))
        panel.margins(0)
        dress(
            panel,
            f"experts of layer {i + 1}",
            "steps",
            "" if i else "share of all characters",
        )


def bits_by_place(recipe: Any, module: Any) -> Tensor:
    losses: Tensor = module(recipe.source_code()[:100])[0]
    return losses.mean(0) / math.log(2)


def carried(drawn: Figure, found: Recorded) -> None:
    """Bits a character over updates; and along a text, the state carried on or dropped."""
    left, right = drawn.subplots(1, 2)
    (run,) = found.runs
    module: Any = run.module
    text = found.recipe.source_code()[:100]
    window = module.window
    updates = [step * found.recipe.LENGTH // window for step in run.steps]
    curves(left, {"test": (updates, [float(seen.mean()) for seen in run.seen])}, (BLUE,))
    level(left, found.result.target, "target", at="bottom right")
    level(left, found.result.control, "control: untrained", at="bottom right")
    dress(left, "source code never seen", "updates, eight a step", "bits a character")
    pieces = [module(text[:, i : i + window + 1])[0] for i in range(0, found.recipe.LENGTH, window)]
    dropped = torch.cat(pieces, 1).mean(0) / math.log(2)
    smooth = nn.AvgPool1d(8, 8)
    x = [8 * i + 4 for i in range(found.recipe.LENGTH // 8)]
    lines = {
        "dropped at each window": (x, smooth(dropped[None])[0].tolist()),
        "carried on": (x, smooth(run.seen[-1][None])[0].tolist()),
    }
    curves(right, lines, (ORANGE, BLUE))
    for edge in range(window, found.recipe.LENGTH, window):
        right.axvline(edge, color=FAINT, linewidth=0.8)
    right.grid(visible=False)
    dress(
        right, "what the hidden state is worth", "place in the text, characters", "bits a character"
    )
