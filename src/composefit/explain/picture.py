"""A plan as a picture: lanes of shards, barriers across them, one axis of time."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from composefit.explain.words import duration, number, size, what
from composefit.report.numbers import labels, ticks

if TYPE_CHECKING:
    from composefit.explain.plan import Barrier, Part, Plan, Span

WIDTH = 900
LEFT, RIGHT = 128, 836  # the ends of the time axis
_MARGIN = 28
_CHIP = 24  # height of a row of names
_ROWS = 5  # so many rows of names, else numbers and a list
_MOST_ROWS = 8  # what would be above is left out
_NAME = 30  # letters of a name

# The colours of the reports (report/page.css): two for shards, by loader batch, others for
# effects.
STYLE = """
svg { --panel: #fdfcfa; --line: #e4e0d7; --grid: #ebe8e0; --track: #f3f1ec; --wait: #dcd7cb;
      --ink: #2c3138; --soft: #6d737d; --on: #ffffff;
      --blue: #40719c; --gold: #b07c22; --teal: #2f7f78;
      --plum: #85587a; --rust: #b3573b; --moss: #6d7f3a; --grey: #7b828c;
      --pale-blue: #a9c0d6; --pale-gold: #e0c48f; }
@media (prefers-color-scheme: dark) {
  svg { --panel: #1b1f26; --line: #2d323b; --grid: #272c35; --track: #222730; --wait: #343b46;
        --ink: #dde1e7; --soft: #959daa; --on: #14171c;
        --blue: #6fa5d4; --gold: #dca850; --teal: #58b3a9;
        --plum: #c08cb3; --rust: #e08a6c; --moss: #a5b96a; --grey: #8b93a0;
        --pale-blue: #3d5a77; --pale-gold: #75592a; }
}
text { font: 12px ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif;
       fill: var(--ink); font-variant-numeric: tabular-nums; }
.title { font-size: 18px; font-weight: 650; }
.strong { font-weight: 600; }
.soft { fill: var(--soft); }
.small { font-size: 11px; }
.on { fill: var(--on); }
.middle { text-anchor: middle; }
.end { text-anchor: end; }
.panel { fill: var(--panel); stroke: var(--line); }
.track { fill: var(--track); }
.wait { stroke: var(--wait); stroke-width: 1.2; }
.grid { stroke: var(--grid); }
.axis { stroke: var(--soft); }
.band { opacity: 0.24; }
.leader { stroke-width: 1; opacity: 0.75; }
.blue { fill: var(--blue); stroke: var(--blue); }
.gold { fill: var(--gold); stroke: var(--gold); }
.pale.blue { fill: var(--pale-blue); }
.pale.gold { fill: var(--pale-gold); }
.teal { fill: var(--teal); stroke: var(--teal); }
.plum { fill: var(--plum); stroke: var(--plum); }
.rust { fill: var(--rust); stroke: var(--rust); }
.moss { fill: var(--moss); stroke: var(--moss); }
.grey { fill: var(--grey); stroke: var(--grey); }
rect:not(.panel) { stroke: none; }
"""

_BATCHES = ("blue", "gold")
_OPTIMIZERS = ("teal", "plum", "rust", "moss")


class Chip(NamedTuple):
    """A name above a barrier."""

    barrier: Barrier
    text: str
    colour: str
    left: float
    width: float
    row: int


def draw(plan: Plan) -> str:
    """The picture as an SVG document.

    Args:
        plan: of one step.
    """
    return _Picture(plan).document()


class _Picture:
    """One drawing: what goes where."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.colours = _colours(plan)
        self.facts = textwrap.wrap("  ·  ".join(self._facts()), 125, drop_whitespace=True)
        self.chips, self.numbered = self._chips()
        rows = 1 + max((chip.row for chip in self.chips), default=0)
        self.names = 66.0 + 18 * len(self.facts)  # the top of the names
        self.top = self.names + rows * _CHIP + 8  # of the first lane
        self.tall, self.gap = (
            (46, 12) if plan.lanes <= 6 else (24, 6) if plan.lanes <= 16 else (12, 3)
        )
        self.bottom = self.top + plan.lanes * (self.tall + self.gap) - self.gap + 10

    def document(self) -> str:
        below = [*self._axis(), *self._legend()]
        y = self.bottom + 72
        for line in self._listed():
            below.append(_line(_MARGIN, y, line, "small soft"))
            y += 17
        body = "".join([*self._head(), *self._lanes(), *self._barriers(), *below])
        height = round(y + 6)
        plan = self.plan
        about = f"One step of {plan.module}: {number(len(plan.parts), 'shard')}, "
        about += f"{number(len(plan.barriers), 'effect')}, {duration(plan.duration)}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" role="img" aria-label="{_text(about)}">'
            f"<title>{_text(about)}</title><style>{STYLE}</style>"
            '<defs><pattern id="wait" width="7" height="7" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><path class="wait" d="M0 0V7"/></pattern></defs>'
            f'<rect class="panel" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" '
            f'rx="10"/>{body}</svg>\n'
        )

    # -- from time to place --------------------------------------------------------------------

    def x(self, time: float) -> float:
        """Where a time is, in ms since the step began."""
        return LEFT + (RIGHT - LEFT) * min(1.0, time / self.plan.duration)

    def y(self, lane: int) -> float:
        """The top of a lane."""
        return self.top + lane * (self.tall + self.gap)

    # -- the parts -----------------------------------------------------------------------------

    def _head(self) -> Iterator[str]:
        plan = self.plan
        yield _line(_MARGIN, 40, f"One step of {plan.module}", "title")
        yield _line(WIDTH - _MARGIN, 40, duration(plan.duration), "title end")
        for i, line in enumerate(self.facts):
            yield _line(_MARGIN, 62 + 18 * i, line, "soft")

    def _facts(self) -> Iterator[str]:
        plan = self.plan
        yield plan.strategy
        yield number(len(plan.parts), "shard")
        if plan.accumulate > 1:
            yield f"{plan.accumulate} loader batches"
        if plan.precision != "32":
            yield plan.precision
        if plan.peak is not None:
            yield f"at most {size(plan.peak)} within the step"
        if plan.ranks > 1:
            yield f"each rank sends {size(plan.crosses)}"

    def _lanes(self) -> Iterator[str]:
        plan, tall = self.plan, self.tall
        for mark in ticks(0, plan.duration, 8):
            x = self.x(mark)
            yield f'<path class="grid" d="M{x:.1f} {self.top - 4:.1f}V{self.bottom:.1f}"/>'
        for lane in range(plan.lanes):
            y, middle = self.y(lane), self.y(lane) + tall / 2
            held = [part.samples for part in plan.of_lane(lane)]
            name = _lane_name(plan, lane)
            if tall > 40:
                yield _line(_MARGIN, middle - 2, name, "strong")
                yield _line(_MARGIN, middle + 14, _samples(held), "soft small")
            elif tall > 20 or lane % 4 == 0:
                yield _line(_MARGIN, middle + 4, name, "strong small")
            wide = RIGHT - LEFT
            for fill in ('class="track"', 'fill="url(#wait)"'):
                yield f'<rect {fill} x="{LEFT}" y="{y:.1f}" width="{wide}" height="{tall}" rx="6"/>'
            if tall > 20:
                busy = 1 - plan.waiting(lane) / plan.duration
                yield _line(RIGHT + 36, middle + 4, f"{busy:.0%}", "soft small end")
        if plan.lanes and tall > 20:
            yield _line(RIGHT + 36, self.top - 8, "busy", "soft small end")

    def _barriers(self) -> Iterator[str]:
        """Bands first, then the blocks of shards, so that what is done at a barrier is seen."""
        plan, low = self.plan, self.bottom
        chips = {id(chip.barrier): chip for chip in self.chips}
        for barrier in plan.barriers:
            chip, colour = chips.get(id(barrier)), self.colours[barrier.label]
            start, end = self.x(barrier.start), self.x(barrier.end)
            middle, foot = (start + end) / 2, self.top if chip is None else self._row(chip.row) + 18
            wide = max(end - start, 1.5)
            yield (
                f'<path class="leader {colour}" d="M{middle:.1f} {foot:.1f}V{low:.1f}"/>'
                f'<rect class="band {colour}" x="{middle - wide / 2:.1f}" '
                f'y="{self.top - 4:.1f}" width="{wide:.1f}" height="{low - self.top + 4:.1f}">'
                f"<title>{_text(_tip(barrier))}</title></rect>"
            )
        for (shard, place), spans in groupby(
            sorted(plan.spans, key=lambda s: (s.shard, s.leads_to, s.start)),
            key=lambda s: (s.shard, s.leads_to),
        ):
            yield from self._blocks(plan.parts[shard], place, list(spans))
        for chip in self.chips:
            yield self._chip(chip)

    def _blocks(self, part: Part, place: int, spans: Sequence[Span]) -> Iterator[str]:
        """A shard's work before one effect, and at its barrier."""
        colour = _BATCHES[part.batch % len(_BATCHES)]
        y, tall = self.y(part.lane) + 4, self.tall - 8
        if self.tall < 20:
            y, tall = y - 3, tall + 6
        for span in spans:
            start, wide = self.x(span.start), self.x(span.end) - self.x(span.start)
            tip = f"shard {part.index}, {span.kind}: {duration(span.end - span.start)}"
            yield (
                f'<rect class="{colour} {"" if span.kind == "backward" else "pale"}" '
                f'x="{start:.2f}" y="{y:.1f}" width="{max(wide, 0.6):.2f}" height="{tall}" '
                f'rx="{2 if wide > 8 else 0}"><title>{_text(tip)}</title></rect>'
            )
        if self.tall < 20:
            return
        widest = max(spans, key=lambda span: span.end - span.start)
        start, end = self.x(widest.start), self.x(widest.end)
        kind = "on" if widest.kind == "backward" else ""
        for words in (f"shard {part.index}", str(part.index)):
            if end - start > 6.4 * len(words) + 6:
                yield _line((start + end) / 2, y + tall / 2 + 4, words, f"{kind} middle small")
                break

    def _chip(self, chip: Chip) -> str:
        y = self._row(chip.row)
        return (
            f'<rect class="{chip.colour}" x="{chip.left:.1f}" y="{y:.1f}" '
            f'width="{chip.width:.1f}" height="18" rx="9"><title>{_text(_tip(chip.barrier))}'
            "</title></rect>"
            + _line(chip.left + chip.width / 2, y + 13, chip.text, "on middle small strong")
        )

    def _row(self, row: int) -> float:
        rows = max(chip.row for chip in self.chips)
        return self.names + (rows - row) * _CHIP  # row 0 is nearest to the lanes

    def _axis(self) -> Iterator[str]:
        y = self.bottom
        yield f'<path class="axis" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
        marks = ticks(0, self.plan.duration, 8)
        for mark, words in zip(marks, labels(marks), strict=True):
            x = self.x(mark)
            yield f'<path class="axis" d="M{x:.1f} {y:.1f}v4"/>'
            yield _line(x, y + 17, words, "soft small middle")
        yield _line(RIGHT + 36, y + 17, "ms", "soft small end")

    def _legend(self) -> Iterator[str]:
        y, x = self.bottom + 32, float(LEFT)
        batches = sorted({part.batch % len(_BATCHES) for part in self.plan.parts})
        kinds = {span.kind for span in self.plan.spans}
        names = {"forward": "the step's code", "backward": "gradients"}
        if "evaluation" in kinds:
            names["evaluation"] = "the loss anew"
        for kind, words in names.items():
            for i in batches:
                shade = "" if kind == "backward" else "pale"
                yield _box(x + 15 * i, y, f'class="{_BATCHES[i]} {shade}"')
            x += 15 * len(batches) + 4
            yield _line(x, y + 10, words, "soft small")
            x += 6.2 * len(words) + 22
        for fill, words in (
            ('class="grey band"', "at a barrier"),
            ('fill="url(#wait)"', "waiting"),
        ):
            yield _box(x, y, 'class="track"') + _box(x, y, fill)
            yield _line(x + 18, y + 10, words, "soft small")
            x += 6.2 * len(words) + 40
        if len(batches) > 1:
            yield _line(x, y + 10, "colours alternate with the loader batches", "soft small")

    def _listed(self) -> Iterator[str]:
        """Below: what stands for the numbers, and the notes."""
        if self.numbered:
            times = Counter(_alike(barrier) for barrier in self.plan.barriers)
            for i, (alike, count) in enumerate(times.items(), start=1):
                yield f"{i} · {' at '.join(alike)}" + (f", {count} times" if count > 1 else "")
        for note in self.plan.notes:
            yield from textwrap.wrap(note, 140)

    # -- names ---------------------------------------------------------------------------------

    def _chips(self) -> tuple[list[Chip], bool]:
        """Names above the barriers, in as many rows as they need; numbers, where those are many."""
        barriers = self.plan.barriers
        chips = self._placed([_short(barrier.label, _NAME) for barrier in barriers])
        if max((chip.row for chip in chips), default=0) < _ROWS:
            return chips, False
        numbers = {alike: str(i) for i, alike in enumerate(dict.fromkeys(map(_alike, barriers)), 1)}
        chips = self._placed([numbers[_alike(barrier)] for barrier in barriers])
        return [chip for chip in chips if chip.row < _MOST_ROWS], True

    def _placed(self, texts: Sequence[str]) -> list[Chip]:
        ends: list[float] = []  # of each row
        chips = []
        for barrier, text in zip(self.plan.barriers, texts, strict=True):
            wide = 7.0 * len(text) + 16
            middle = (self.x(barrier.start) + self.x(barrier.end)) / 2
            left = min(max(middle - wide / 2, LEFT - 40), RIGHT - wide)
            row = next((i for i, end in enumerate(ends) if end + 6 <= left), len(ends))
            if row == len(ends):
                ends.append(0.0)
            ends[row] = left + wide
            chips.append(Chip(barrier, text, self.colours[barrier.label], left, wide, row))
        return chips


def _colours(plan: Plan) -> dict[str, str]:
    """The colour of each effect: updates by what they update, all others alike."""
    updated = dict.fromkeys(b.label for b in plan.barriers if b.effect == "Update")
    found = {label: _OPTIMIZERS[i % len(_OPTIMIZERS)] for i, label in enumerate(updated)}
    return {barrier.label: found.get(barrier.label, "grey") for barrier in plan.barriers}


def _lane_name(plan: Plan, lane: int) -> str:
    if plan.lanes == 1:
        return plan.device
    return f"{'thread' if plan.concurrent else 'lane'} {lane + 1}"


def _samples(held: Sequence[int | None]) -> str:
    known = [samples for samples in held if samples is not None]
    return number(sum(known), "sample") if len(known) == len(held) else ""


def _alike(barrier: Barrier) -> tuple[str, str]:
    """What effects have in common that are one line of the step."""
    return what(barrier), barrier.where


def _tip(barrier: Barrier) -> str:
    """An effect in a line."""
    return f"{what(barrier)} at {barrier.where}, {duration(barrier.end - barrier.start)}"


def _box(x: float, y: float, attributes: str) -> str:
    return f'<rect {attributes} x="{x:.1f}" y="{y:.1f}" width="12" height="12" rx="3"/>'


def _line(x: float, y: float, words: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{_text(words)}</text>'


def _short(words: str, letters: int) -> str:
    return words if len(words) <= letters else words[: letters - 1] + "…"


_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _text(words: str) -> str:
    """As XML: escaped, without the characters that it cannot hold."""
    return escape(_NO_XML.sub("�", words))
