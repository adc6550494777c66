"""What the demo prints when it is done."""

from __future__ import annotations

from collections.abc import Sequence

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
    distances = Table(title="Fréchet distance to real digits", title_justify="left")
    for heading in ("start", "end", "floor (real against real)", "end / start", "goal"):
        distances.add_column(heading, justify="right")
    ratio = end.distance / start.distance
    distances.add_row(
        f"{start.distance:.2f}",
        f"{end.distance:.2f}",
        f"{ruler.floor:.2f}",
        f"{ratio:.3f}",
        _verdict(ratio <= GOAL, f"at most {GOAL:.3f}"),
    )
    digits = Table(title="What the classifier sees", title_justify="left")
    digits.add_column(f"in {ruler.size} images")
    for digit in range(len(end.counts)):
        digits.add_column(str(digit), justify="right")
    digits.add_column("goal")
    digits.add_row("real", *map(str, ruler.real.counts), "")
    digits.add_row(
        "generated", *map(str, end.counts), _verdict(min(end.counts) > 0, "all ten present")
    )
    return Group(distances, digits)


def _verdict(reached: bool, goal: str) -> Text:
    return Text(f"{goal}: {'yes' if reached else 'no'}", style="green" if reached else "red")
