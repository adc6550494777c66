"""What a progress bar shows, and how it looks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

_BACKGROUND = "bright_black dim"
# Wide enough for -1.234e-05, so that a metric's neighbours stay where they are.
_VALUE_WIDTH = 10
_SPEED_WIDTH = len("99,999 samples/s")
_TIME_WIDTH = len("0:00 left")


@dataclass(frozen=True)
class Row:
    """One bar: so many done, of so many (None if that is not known)."""

    label: str
    done: int
    total: int | None
    unit: str = ""

    @property
    def count(self) -> str:
        """`12/40`, or `12` without a known end."""
        if self.total is None:
            return f"{self.done:,}{self.unit}"
        # As wide at the start as at the end, so that the bar beside it keeps its length.
        total = f"{self.total:,}"
        return f"{self.done:>{len(total)},}/{total}{self.unit}"


@dataclass
class View:
    """Everything that one drawing shows.

    Attributes:
        metrics: name -> value.
        training: the bar of an epoch.
        evaluation: the bar of a validation, test or prediction.
        speed, time: of training, or of an evaluation without one; "" where it is not known.
    """

    metrics: dict[str, float]
    training: Row | None = None
    evaluation: Row | None = None
    speed: str = ""
    time: str = ""

    def facts(self) -> list[str]:
        """What stands beside the first bar, in a plain line."""
        first = self.training or self.evaluation
        count = [] if first is None else [first.count]
        return [*count, *filter(None, (self.speed, self.time))]

    def line(self) -> str:
        """Everything in one plain line."""
        first = self.training or self.evaluation
        parts = [] if first is None else [first.label, *self.facts()]
        if self.training is not None and self.evaluation is not None:
            parts.append(f"{self.evaluation.label} {self.evaluation.count}")
        parts += [f"{name} {number(value)}" for name, value in self.metrics.items()]
        return "  ".join(parts)


def known(limit: float | Sequence[float] | None) -> int | None:
    """A limit as a number; None for "no limit", which is None, -1 or infinity.

    Several loaders may have one each, which add up.
    """
    if isinstance(limit, Sequence):
        limit = sum(limit)
    return None if limit is None or limit < 0 or limit == math.inf else int(limit)


def clock(seconds: float) -> str:
    """`0:07`, `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def number(value: float) -> str:
    """Four digits."""
    # "#" keeps the trailing zeros of 0.6900, which else would move everything behind it.
    return f"{float(value):#.4g}".rstrip(".")


def rendered(view: View, width: int) -> RenderableType:
    """At most two bars of equal length, metrics under the first; no line longer than ``width``."""
    rows = [row for row in (view.training, view.evaluation) if row is not None]
    # Of fixed widths: a bar whose ends move with every figure beside it cannot be read.
    facts = [row.count.rjust(max(len(each.count) for each in rows)) for row in rows[:1]]
    facts += [view.speed.rjust(_SPEED_WIDTH), view.time.rjust(_TIME_WIDTH)]
    label_width = max((cell_len(row.label) for row in rows), default=0)
    if view.training is not None:  # validation will come below
        label_width = max(label_width, len("validate"))
    # In a narrow terminal what matters least goes first: the speed, then the time left.
    while len(facts) > 1 and label_width + len("  ".join(facts)) + 14 > width:
        facts.pop(1)
    facts_width = len("  ".join(facts))
    # The metrics start where the bars do, if there is room.
    indent = label_width + 2 if width >= 60 and label_width else 0

    bars: list[RenderableType] = []
    for row in rows:
        style = "cyan" if row is view.training else "blue"
        beside = facts if row is rows[0] else [row.count.rjust(len(facts[0]))]
        grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
        grid.add_column(width=label_width, no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(width=facts_width, no_wrap=True)
        text = Text("  ").join(_fact(fact) for fact in beside)
        grid.add_row(Text(row.label), _bar(row, style), text)
        bars.append(grid)
    metrics = _packed([_metric(n, v) for n, v in view.metrics.items()], width - indent)
    # Under the first bar, so that the coming and going of the second does not move them.
    return Group(*bars[:1], *(Padding(line, (0, 0, 0, indent)) for line in metrics), *bars[1:])


def _bar(row: Row, style: str) -> RenderableType:
    return Bar(
        total=row.total,
        completed=row.done,
        style=_BACKGROUND,
        complete_style=style,
        finished_style=style,
        pulse_style=style,
    )


def _fact(fact: str) -> Text:
    """A number and its unit, the unit in grey."""
    text = Text(fact)
    text.highlight_regex(r"(?<= )[a-z/]+$|^in ", style="bright_black")
    return text


def _metric(name: str, value: float) -> Text:
    return Text.assemble((f"{name} ", "bright_black"), number(value).ljust(_VALUE_WIDTH))


def _packed(items: list[Text], width: int) -> list[Text]:
    """Lines of whole items: none is broken, one that is wider than the line is cut."""
    lines: list[Text] = []
    for item in items:
        if lines and lines[-1].cell_len + 2 + item.cell_len <= width:
            lines[-1] = lines[-1] + Text("  ") + item
        else:
            lines.append(item)
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
        line.rstrip()
    return lines
