"""Which metrics share a plot, and which plots a section: told from their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

#: Words that say during what a value was taken -> what the legend says.
PHASES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "eval": "validation",
    "test": "test",
}

_TITLES = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "samples_per_second": "samples per second",
}
_SPEED = re.compile(r"(^|[/_])(\w*per_sec(ond)?|throughput|step_time|memory)([/_]|$)")


@dataclass(frozen=True)
class Series:
    """A metric as one line of a plot.

    Attributes:
        metric: its full name.
        label: what the legend calls it.
        phase: `"train"`, `"validation"`, `"test"`, or empty where the name does not say.
        every_step: whether it is the finer one of a metric logged per step and per epoch.
    """

    metric: str
    label: str
    phase: str
    every_step: bool


@dataclass(frozen=True)
class Plot:
    """Metrics that share a pair of axes.

    Attributes:
        title: what they measure.
        series: the metrics.
        added: whether they come from the trainer, not from a module's `log`.
    """

    title: str
    series: Sequence[Series]
    added: bool = False


@dataclass(frozen=True)
class Section:
    """Plots under one heading.

    Attributes:
        title: the heading.
        plots: what stands below it.
        optimizer: the place of the section's optimizer among all, or None.
    """

    title: str
    plots: list[Plot] = field(default_factory=list)
    optimizer: int | None = None


class Name(NamedTuple):
    """What the name of a metric says."""

    owner: str = ""  # an optimizer
    quantity: str = ""
    phase: str = ""
    rate: str = ""  # "step" or "epoch", where it is logged per both
    loader: str = ""


def sections(metrics: Sequence[str], optimizers: Collection[str] = ()) -> list[Section]:
    """Sort metrics into plots and sections.

    Args:
        metrics: their names.
        optimizers: the names of the optimizers; those that `lr/<name>` and `grad_norm/<name>` tell
            of are known anyway.

    Returns:
        What belongs to no optimizer, then a section for each of them, then speed; none is empty.

    Example:
        >>> found = sections(["loss/critic", "val_loss", "loss", "lr/critic", "samples_per_second"])
        >>> [(section.title, [plot.title for plot in section.plots]) for section in found]
        [('Metrics', ['loss']), ('critic', ['loss', 'learning rate']), ('Speed', ['samples per second'])]
    """  # noqa: E501
    owners = list(dict.fromkeys([*optimizers, *_owners(metrics)]))
    together: dict[tuple[str, str], dict[str, Name]] = {}
    for metric in metrics:
        name = read(metric, owners)
        together.setdefault((name.owner, name.quantity), {})[metric] = name
    general, speed = Section("Metrics"), Section("Speed")
    owned = {name: Section(name, optimizer=i) for i, name in enumerate(owners)}
    for (owner, quantity), names in together.items():
        plot = _plot(quantity, names)
        if owner:
            owned[owner].plots.append(plot)
        else:
            (speed if _SPEED.search(quantity) else general).plots.append(plot)
    for section in owned.values():  # what was asked for first, then what the trainer adds
        section.plots.sort(key=lambda plot: plot.added)
    return [one for one in (general, *owned.values(), speed) if one.plots]


def read(metric: str, owners: Collection[str] = ()) -> Name:
    """Take a metric's name apart.

    Args:
        metric: the name.
        owners: names of optimizers.

    Example:
        >>> read("val_critic_loss_epoch", ["critic"])
        Name(owner='critic', quantity='loss', phase='validation', rate='epoch', loader='')
        >>> read("acc/dataloader_idx_1")
        Name(owner='', quantity='acc', phase='', rate='', loader='loader 1')
    """
    loader = phase = rate = ""
    rest, _, index = metric.partition("/dataloader_idx_")
    if index:
        loader = f"loader {index}"
    for ending in ("step", "epoch"):
        if rest.endswith(f"_{ending}"):
            rest, rate = rest.removesuffix(f"_{ending}"), ending
    parts = re.split(r"([/_.-])", rest)  # words, and the marks between them
    for place in (0, -1):
        if not phase and len(parts) > 2 and parts[place].lower() in PHASES:
            phase = PHASES[parts[place].lower()]
            parts = parts[2:] if place == 0 else parts[:-2]
    rest = "".join(parts)
    for owner in sorted(owners, key=len, reverse=True):
        found = re.search(rf"(^|[/_.-]){re.escape(owner)}($|[/_.-])", rest) if owner else None
        if found:
            sides = [side for side in (rest[: found.start()], rest[found.end() :]) if side]
            return Name(owner, "/".join(sides), phase, rate, loader)
    return Name("", rest, phase, rate, loader)


def _owners(metrics: Sequence[str]) -> list[str]:
    found = []
    for metric in metrics:
        kind, _, owner = metric.partition("/")
        if kind in ("lr", "grad_norm") and owner:
            found.append(owner.partition("/")[0])
    return found


def _plot(quantity: str, names: dict[str, Name]) -> Plot:
    added = quantity in _TITLES
    phased = any(name.phase for name in names.values())
    labels = {metric: _label(name, phased) for metric, name in names.items()}
    if len(names) == 1:
        ((metric, name),) = names.items()
        # The quantity says it all where nothing but an optimizer's name is beside it.
        title = quantity if quantity and name == Name(name.owner, quantity) else metric
        labels = {metric: "" if metric == title else metric}
    else:
        title = quantity or "loss"  # a step's losses, logged as they came: under optimizers' names
        if len(set(labels.values())) < len(labels) or "" in labels.values():
            labels = {metric: metric for metric in names}
    both = {name.rate for name in names.values()} >= {"step", "epoch"}
    series = [
        Series(metric, labels[metric], name.phase, both and name.rate == "step")
        for metric, name in names.items()
    ]
    return Plot(_TITLES.get(title, title), series, added)


def _label(name: Name, phased: bool) -> str:
    phase = name.phase or ("train" if phased else "")
    words = (phase, name.loader, f"per {name.rate}" if name.rate else "")
    return ", ".join(word for word in words if word)
