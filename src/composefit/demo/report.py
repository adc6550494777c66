"""What the demo prints when it is done."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from composefit.demo.measure import Measurement, Ruler

#: The demo has succeeded when the distance falls to this part of what it was.
GOAL = 1 / 5


def summary(ruler: Ruler, history: Sequence[Measurement]) -> RenderableType:
    """Tables of the Fréchet distance, start and end and floor, and of the digits that appear.

    Args:
        ruler: what was measured with.
        history: a measurement for each epoch, the first of the untrained generator.
    """
    start, end = history[0], history[-1]
    ratio = end.distance / start.distance
    distances = _table("Fréchet distance", "start", "end", "floor", "end / start")
    distances.add_row(
        f"to {ruler.size - 1} real digits",
        *(f"{value:.2f}" for value in (start.distance, end.distance, ruler.floor)),
        f"{ratio:.3f}",
    )
    digits = _table(f"{ruler.size} images show", *map(str, range(len(end.counts))))
    digits.add_row("real", *map(str, ruler.real.counts))
    digits.add_row("generated", *map(str, end.counts))
    return Group(
        Text(),
        distances,
        Text("floor: the other half of the real digits", style="bright_black"),
        Text(),
        digits,
        Text("as the classifier sees them", style="bright_black"),
        Text(),
        _verdict(ratio <= GOAL, "the distance fell to a fifth or less"),
        _verdict(min(end.counts) > 0, "all ten digits appear"),
        Text(),
    )


def _table(first: str, *others: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, header_style="cyan", border_style="bright_black"
    )
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _verdict(reached: bool, goal: str) -> Text:
    answer = ("yes", "green") if reached else ("no ", "red")
    return Text.assemble(answer, "  ", goal)
