"""Numbers and places in a few characters, for table and picture alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from composefit.explain.plan import Barrier, Plan

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: int) -> str:
    """Bytes in the unit that leaves few digits (KiB: 1024 bytes).

    Example:
        >>> size(0), size(1000), size(134788), size(5 * 2**30)
        ('0 B', '1000 B', '131.6 KiB', '5.0 GiB')
    """
    value, unit = float(count), 0
    while abs(value) >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{count} B"


def duration(milliseconds: float) -> str:
    """A time in the unit that leaves few digits.

    Example:
        >>> duration(0.0421), duration(7.25), duration(180.2), duration(2500)
        ('42 µs', '7.2 ms', '180 ms', '2.50 s')
    """
    if milliseconds < 0.9995:
        return f"{milliseconds * 1e3:.0f} µs"
    if milliseconds < 99.95:
        return f"{milliseconds:.1f} ms"
    if milliseconds < 999.5:
        return f"{milliseconds:.0f} ms"
    return f"{milliseconds / 1e3:.2f} s"


def number(count: int, one: str, many: str | None = None) -> str:
    """A number of something.

    Example:
        >>> number(1, "shard"), number(4, "shard"), number(2, "batch", "batches")
        ('1 shard', '4 shards', '2 batches')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def shards(plan: Plan) -> str:
    """The shards in space x time, and the samples of each: `4 = 2 in space x 2 in time: 8 each`."""
    lanes = [[part.samples for part in plan.of_lane(lane)] for lane in range(plan.lanes)]
    sizes = [part.samples for part in plan.parts]
    if len(sizes) == 1:
        return "1" if sizes[0] is None else f"1 of {number(sizes[0], 'sample')}"
    slots = max(map(len, lanes))
    if len(sizes) == plan.lanes * slots:
        text = f"{len(sizes)} = {plan.lanes} in space x {slots} in time"
    else:
        text = f"{len(sizes)}, {plan.lanes} in space, up to {slots} in time"
    if plan.lanes > 1 and not plan.concurrent:
        text += ", one after another"
    if None in sizes:
        return text
    if len(set(sizes)) == 1:
        return f"{text}, {sizes[0]} samples each"
    of_lanes = " | ".join(" then ".join(map(str, lane)) for lane in lanes)
    return f"{text}, samples: {of_lanes}"


def what(barrier: Barrier) -> str:
    """An effect for a reader: `update of critic`, `Gather (32, 16)`."""
    if barrier.effect != "Update":
        return barrier.label
    return f"update of {barrier.label}"
