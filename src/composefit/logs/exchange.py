"""What ranks tell each other of what they have logged, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from composefit.images import Image
from composefit.logged import LogOptions, Reduce
from composefit.logs.sums import Plain, once, reduced, together
from composefit.logs.values import MetricValue, Remembered, Running, StepValue, Value
from composefit.ranks import World

#: prog_bar, logger, on_step, on_epoch, and the reduction: None for a function, which does not
#: travel. Also what a checkpoint holds.
PlainOptions = tuple[bool, bool, bool, bool, str | None]


@dataclass(slots=True)
class Entry:
    """What a rank has logged under one name since the last exchange.

    Attributes:
        options: how.
        step: the latest step's value: when, whether a hook has logged it, and what it is made of.
        epoch: what it adds to the epoch's, by steps and by hooks.
        metric: the name in the module of the metric that it is, or None.
        metric_at: the metric was logged for a step.
    """

    options: PlainOptions
    step: tuple[int, bool, Plain] | None = None
    epoch: tuple[Plain | None, Plain | None] | None = None
    metric: str | None = None
    metric_at: bool = False


def plain_options(options: LogOptions) -> PlainOptions:
    """As plain data."""
    one = options
    return one.prog_bar, one.logger, one.on_step, one.on_epoch, reduce_name(one.reduce)


def options_of(plain: Sequence[Any]) -> LogOptions:
    """And back; in place of a function there is what remembers what it came to."""
    bar, logger, on_step, on_epoch, reduce = plain
    return LogOptions(bar, logger, on_step, on_epoch, reduce or Remembered())


def reduce_name(reduce: Reduce) -> str | None:
    """None for a function."""
    return reduce if isinstance(reduce, str) else None


def entry_of(options: LogOptions, value: StepValue | None, running: Running | None) -> Entry | None:
    """What is new of a name; None where nothing is."""
    entry = Entry(plain_options(options))
    if isinstance(value, Value):
        value.weigh()
        entry.step = value.moment, value.by_hook, value.plain()
    if running is not None and running.metric is None and running.ended is None:
        given = running.give()
        entry.epoch = None if given == (None, None) else given
    entry.metric_at = isinstance(value, MetricValue)
    if entry.step is None and entry.epoch is None and not entry.metric_at:
        return None
    return entry


def latest(entries: Sequence[Entry], reduce: Reduce) -> float | None:
    """The value of the last step at which some rank has logged it, of all that did so then."""
    steps = [entry.step for entry in entries if entry.step is not None]
    if not steps:
        return None
    moment = max(when for when, _, _ in steps)
    found = [plain for when, by_hook, plain in steps if when == moment and not by_hook]
    hooks = [plain for when, by_hook, plain in steps if when == moment and by_hook]
    if hooks:
        found.append(once(hooks, reduce))
    return reduced(together(found), reduce)


def known(reduce: Reduce) -> bool:
    """Whether this process can compute it."""
    return not isinstance(reduce, Remembered)


def images_of_all(
    world: World, mine: Mapping[str, Image], names: Sequence[Sequence[str]]
) -> dict[str, Image]:
    """For each name the picture of the first rank that has one, on rank 0, which writes them.

    Args:
        world: the ranks.
        mine: this rank's.
        names: each rank's.
    """
    first: dict[str, int] = {}
    for rank, own in enumerate(names):
        for name in own:
            first.setdefault(name, rank)
    found = dict(mine)
    if any(first.values()):  # as a rule rank 0 has them all, and none has to travel
        sent = {
            name: Image(mine[name].pixels.cpu().clone(), mine[name].caption)
            for name, rank in first.items()
            if rank == world.rank != 0
        }
        for one in world.gather("pictures that rank 0 has not logged", sent):
            found |= one
    return found
