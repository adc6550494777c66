"""One plot of a report: axes, curves and legend, whole without a script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from composefit.history import Track
from composefit.report import drawing
from composefit.report.drawing import Scale
from composefit.report.numbers import count, labels, log_ticks, number, short, ticks
from composefit.report.plots import Plot, Series

#: Up to so many points each is marked by a dot.
_DOTS = 60

#: Classes of colours: what is measured now and then looks the same in every section.
_PHASE_COLOURS = {"validation": "gold", "test": "rust"}
_COLOURS = ("teal", "plum", "blue", "rust", "gold", "moss")


def chart(
    plot: Plot,
    tracks: Mapping[str, Track],
    curves: Mapping[str, int],
    across: Scale,
    colour: int = 0,
) -> str:
    """The HTML of a plot.

    Args:
        plot: what to draw.
        tracks: name of a metric -> its points.
        curves: name of a metric -> its place in the page's data, for the script.
        across: the axis of steps, common to all plots.
        colour: the place of the section's colour.
    """
    lines = [
        _Line(one, tracks[one.metric], curves[one.metric], shade)
        for one, shade in zip(plot.series, _colours(plot.series, colour), strict=True)
    ]
    values = np.concatenate([line.value for line in lines])
    linear, log = Scale.around(values), Scale.around_log(values)
    toggle = '<label><input type="checkbox"> log</label>' if log else ""
    return (
        f'<figure class="chart"><figcaption><h3>{_text(plot.title)}</h3>'
        f'<span class="when"></span>{toggle}</figcaption>'
        f'<ul class="legend">{"".join(line.legend() for line in lines)}</ul>'
        f"{_plot(plot, lines, across, linear)}{_plot(plot, lines, across, log) if log else ''}"
        "</figure>"
    )


class _Line:
    """A curve with all that is drawn of it."""

    def __init__(self, series: Series, track: Track, curve: int, colour: str) -> None:
        self.series, self.curve, self.colour = series, curve, colour
        self.step = track.column("step").double().numpy()
        self.value = track.column("value").numpy()
        self.low = track.column("low").numpy()
        self.high = track.column("high").numpy()
        self.thinned = track.thinned
        # What has few points, or is told rather than measured, is not to be smoothed.
        self.rough = len(track) > _DOTS and not series.metric.startswith("lr/")

    def legend(self) -> str:
        bad = self.step[~np.isfinite(self.value)]
        note = f" <em>not finite first at step {count(int(bad[0]))}</em>" if len(bad) else ""
        name = f'<span title="{_text(self.series.metric)}">{_text(self.series.label)}</span>'
        return (
            f'<li class="{self._classes()}" data-curve="{self.curve}"><i></i>{name} '
            f"<b>{number(float(self.value[-1]))}</b>{note}</li>"
        )

    def draw(self, across: Scale, up: Scale) -> str:
        x, y = across.place(self.step), up.place(self.value)
        shapes = [("line", drawing.line(x, y))]
        if self.thinned:
            shapes.insert(0, ("band", drawing.band(x, up.place(self.low), up.place(self.high))))
        if len(x) <= _DOTS:
            shapes.append(("dots", drawing.dots(x, y)))
        drawn = "".join(
            f'<path class="{kind} {self._classes()}" d="{path}"/>' for kind, path in shapes if path
        )
        for kind in ["smooth", "at"] if self.rough else ["at"]:  # the script's
            drawn += f'<path class="{kind} {self._classes()}" data-curve="{self.curve}"/>'
        bad = drawing.marks(x, self.value)
        return drawn + (f'<path class="bad" d="{bad}"/>' if bad else "")

    def _classes(self) -> str:
        fine, rough = " fine" * self.series.every_step, " rough" * self.rough
        return f"{self.colour}{fine}{rough}"


def _plot(plot: Plot, lines: Sequence[_Line], across: Scale, up: Scale) -> str:
    low, high = up.ends
    marks = log_ticks(up.low, up.high) if up.log else ticks(up.low, up.high, 6)
    names = [number(mark) for mark in marks] if up.log else labels(marks)
    heights = up.place(np.array(marks)).tolist()
    grid = "".join(f"M0 {(1 - height) * drawing.HEIGHT:.0f}H{drawing.WIDTH}" for height in heights)
    beside = "".join(
        f'<span class="y" style="bottom:{height:.2%}">{name}</span>'
        for height, name in zip(heights, names, strict=True)
    )
    steps = ticks(across.low, across.high, 5, whole=True)
    below = "".join(
        f'<span class="x" style="left:{part:.2%}">{short(step)}</span>'
        for part, step in zip(across.place(np.array(steps)).tolist(), steps, strict=True)
    )
    kind = "log" if up.log else "linear"
    what = f"{plot.title} over steps" + (", logarithmic" if up.log else "")
    return (
        f'<div class="plot {kind}" data-low="{low!r}" data-high="{high!r}">'
        f'<svg viewBox="0 0 {drawing.WIDTH} {drawing.HEIGHT}" preserveAspectRatio="none" '
        f'role="img" aria-label="{_text(what)}"><path class="grid" d="{grid}"/>'
        f"{''.join(line.draw(across, up) for line in lines)}</svg>"
        f'<div class="cursor"></div>{beside}{below}</div>'
    )


def _colours(series: Sequence[Series], first: int) -> list[str]:
    """Another one for each, but the same for the two rates of one metric."""
    found: dict[tuple[str, str], str] = {}
    free = [*_COLOURS[first % len(_COLOURS) :], *_COLOURS[: first % len(_COLOURS)]]
    chosen = []
    for one in series:
        key = one.phase, one.label.replace("per step", "").replace("per epoch", "")
        if key not in found:
            wanted = _PHASE_COLOURS.get(one.phase)
            left = [colour for colour in free if colour not in found.values()] or free
            found[key] = wanted if wanted in left else left[0]
        chosen.append(found[key])
    return chosen


def _text(text: str) -> str:
    return escape(text).replace("\0", "�")
