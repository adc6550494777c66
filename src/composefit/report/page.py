"""The page: what a run was, how it went, and where."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from composefit.checkpoint import replacing
from composefit.history import History, Picture
from composefit.report.chart import chart
from composefit.report.configuration import describe
from composefit.report.data import embedded
from composefit.report.drawing import Scale
from composefit.report.numbers import count, duration, number
from composefit.report.plots import Section, sections
from composefit.report.redaction import HIDDEN, is_secret, without_credentials

#: Final values at the top of the page; all of them are in the table.
_FIGURES = 8


def write(
    path: str | os.PathLike[str],
    history: History,
    configuration: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    title: str = "Training",
    images: Mapping[str, Sequence[Picture]] | None = None,
) -> Path:
    """Write a report of a run: one HTML file that loads nothing.

    Every text is escaped, and a policy in the page lets no script run but its own. Text settings
    with names such as `token` or `password` are left out.

    Args:
        path: the file; replaced as a whole if it is there.
        history: what was logged.
        configuration: nested settings, such as `report.configuration` collects; the names under
            `"optimizers"` group the curves.
        environment: the same, such as `report.environment` collects.
        title: the name of the run.
        images: name -> pictures; the history's by default.

    Returns:
        Where it was written.

    Raises:
        OSError: the file cannot be written; what was there before is then unchanged.
    """
    configuration = configuration or {}
    optimizers = configuration.get("optimizers")
    names = list(optimizers) if isinstance(optimizers, Mapping) else []
    groups = sections(list(history.tracks), [str(name) for name in names])
    pictures = history.pictures if images is None else images
    across = _steps(history)
    curves = {metric: i for i, metric in enumerate(history.tracks)}
    parts: list[tuple[str, str]] = [
        (
            group.title,
            _grid([chart(p, history.tracks, curves, across, _colour(group)) for p in group.plots]),
        )
        for group in groups
    ]
    if any(pictures.values()):
        parts.append(("Pictures", _pictures(pictures)))
    if history.tracks:
        parts.append(("Values", _values(history)))
    if configuration:
        parts.append(("Configuration", _cards(configuration)))
    if environment:
        parts.append(("Environment", _cards({"": environment})))
    body = _header(title, history, groups) + _bar([name for name, _ in parts])
    body += "".join(
        f'<section id="s{i}"><h2>{_text(name)}</h2>{html}</section>'
        for i, (name, html) in enumerate(parts)
    )
    data = embedded(history.tracks, (across.low, across.high))
    path = Path(path)
    with replacing(path) as file:
        # A half of a surrogate pair, which UTF-8 has no bytes for, as its number.
        file.write(_document(title, body, data).encode("utf-8", "xmlcharrefreplace"))
    return path


def _document(title: str, body: str, data: str) -> str:
    style, script = (
        files(__package__).joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f'{body}\n</main>\n<script type="application/json" id="data">{data}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _header(title: str, history: History, groups: Sequence[Section]) -> str:
    figures = [
        ("duration", duration(history.seconds)),
        ("steps", count(history.step)),
        ("epochs", count(history.epoch + 1 if history.tracks else 0)),
    ]
    plots = [plot for group in groups for plot in group.plots if not plot.added]
    shown = [one.metric for plot in plots for one in plot.series if not one.every_step]
    for name in shown[:_FIGURES]:
        figures.append((name, number(history.tracks[name].columns["value"][-1])))
    items = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in figures
    )
    now = datetime.now()
    nothing = "" if history.tracks else "<p>Nothing was logged.</p>"
    return (
        f'<header><h1>{_text(title)}</h1><p><span class="status {_status(history)}">'
        f"{_text(history.status)}</span> {now.day} {now:%B %Y, %H:%M}</p></header>"
        f'<dl class="figures">{items}</dl>{nothing}'
    )


def _status(history: History) -> str:
    return history.status if history.status in ("running", "finished", "failed") else ""


def _bar(names: Sequence[str]) -> str:
    links = "".join(f'<a href="#s{i}">{_text(name)}</a>' for i, name in enumerate(names))
    return (
        f'<div class="bar"><nav>{links}</nav><label id="smoothing" hidden>Smoothing '
        '<input type="range" min="0" max="0.99" step="0.01" value="0"><output>0</output></label>'
        "</div>"
    )


def _grid(charts: Sequence[str]) -> str:
    # Rows that are full: two charts and two rather than three and one.
    columns = 2 if len(charts) in (1, 2, 4) else 3
    return f'<div class="grid" style="--columns:{columns}">{"".join(charts)}</div>'


def _colour(group: Section) -> int:
    return 2 if group.optimizer is None else group.optimizer


def _steps(history: History) -> Scale:
    """The axis of all curves, so that one place means one step in all of them."""
    firsts = [one.columns["step"][0] for one in history.tracks.values()]
    first, last = min(firsts, default=0), history.step
    first = 0 if first < last / 2 else first
    return Scale(float(first), float(max(last, first + 1)))


def _values(history: History) -> str:
    rows = []
    for name, track in history.tracks.items():
        points = list(track)
        finite = [point for point in points if np.isfinite(point.value)]
        cells = [number(points[-1].value)]
        for pick in (min, max):
            if finite:
                best = pick(finite, key=lambda point: point.value)
                cells.append(f"{number(best.value)} <small>at {count(best.step)}</small>")
            else:
                cells.append("none")
        cells.append(count(sum(point.size for point in points)))
        rows.append(
            f'<tr><th scope="row">{_text(name)}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    heads = "".join(
        f'<th scope="col">{h}</th>' for h in ("Metric", "Last", "Lowest", "Highest", "Values")
    )
    body = "".join(rows)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _pictures(pictures: Mapping[str, Sequence[Picture]]) -> str:
    figures = []
    for name, kept in pictures.items():
        for one in kept:
            caption = f" · {_text(one.caption)}" if one.caption else ""
            data = base64.b64encode(one.png).decode()
            # The width stands at the beginning of a PNG; pixels that are enlarged stay sharp.
            kind = ' class="small"' if int.from_bytes(one.png[16:20], "big") < 200 else ""
            figures.append(
                f'<figure class="picture"><img{kind} alt="{_text(one.caption or name)}" '
                f'src="data:image/png;base64,{data}"><figcaption>{_text(name)}{caption} '
                f"<small>step {count(one.step)}</small></figcaption></figure>"
            )
    return f'<div class="grid pictures">{"".join(figures)}</div>'


def _cards(settings: Mapping[str, Any]) -> str:
    """A card for each group of settings."""
    return f'<div class="cards">{"".join(_card(*one) for one in _groups(settings))}</div>'


def _groups(settings: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    loose: dict[str, Any] = {}
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name, value in settings.items():
        if not isinstance(value, Mapping):
            loose[str(name)] = value
        elif value and all(isinstance(item, Mapping) for item in value.values()):
            found += [(f"{name} · {inner}", item) for inner, item in value.items()]
        else:
            found.append((str(name), value))
    return ([("", loose)] if loose else []) + found


def _card(title: str, settings: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
        for name, value in _flat(settings)
    )
    return f'<div class="card">{f"<h3>{_text(title)}</h3>" if title else ""}<dl>{rows}</dl></div>'


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        name = f"{above}{key}"
        value = describe(value)
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        elif isinstance(value, str) and is_secret(name):
            yield name, HIDDEN
        elif isinstance(value, list):
            yield name, without_credentials(", ".join(str(item) for item in value))
        else:
            yield name, without_credentials(str(value))


def _text(text: object) -> str:
    return escape(str(text)).replace("\0", "�")
