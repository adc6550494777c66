"""A plan as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from composefit.explain.words import duration, number, shards, size, what

if TYPE_CHECKING:
    from composefit.explain.plan import Barrier, Plan, Taken

_SHOWN = 6  # layers in which samples meet; variables
_EFFECTS = 24  # of more, those of one line are one row


def render(plan: Plan) -> RenderableType:
    """What a plan prints."""
    title = Text.assemble(
        (plan.module, "bold"),
        f": one step in {duration(plan.duration)}",
        (f"  (global_step {plan.step}, on {plan.device})", "bright_black"),
    )
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="cyan", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(plan):
        facts.add_row(name, Text(value))
    notes = [Padding(Text(note, style="yellow"), (0, 1)) for note in plan.notes]
    return Group(
        Padding(title, (1, 1, 0, 1)),
        Padding(facts, (1, 1)),
        Padding(_effects(plan), (0, 1, 1, 1)),
        *notes,
    )


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "strategy", plan.strategy
    yield "shards", shards(plan)
    accumulated = number(plan.accumulate, "loader batch", "loader batches")
    if plan.microbatch is not None:
        accumulated += f", micro-batches of at most {number(plan.microbatch, 'sample')}"
    yield "accumulation", accumulated
    yield "precision", plan.precision
    clipped = {t.name: t.clipping for b in plan.barriers for t in b.taken if t.kind}
    limits = set(clipped.values())
    if len(limits) > 1:
        text = ", ".join(f"{name}: {limit or 'none'}" for name, limit in clipped.items())
    else:
        text = next(iter(limits), "") or "none"
    yield "clipping", text
    memory = f"{size(plan.resident)} between steps (parameters, buffers, optimizers' state)"
    if plan.peak is not None:
        memory += f", at most {size(plan.peak)} more within"
    yield "memory", memory
    if plan.ranks > 1:
        yield "between ranks", f"{size(plan.crosses)} sent by each of {plan.ranks} in a step"
    yield "samples meet", _meeting(plan)


def _meeting(plan: Plan) -> str:
    """The layers that couple samples, those of one kind together."""
    if not plan.coupling:
        return "only through effects, as far as layers tell"
    by_kind: dict[tuple[str, str], list[str]] = {}
    for one in plan.coupling:
        by_kind.setdefault((one.kind, one.why), []).append(one.name)
    texts = []
    for (kind, why), names in by_kind.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        where = ", ".join(filter(None, names[:_SHOWN])) + more
        texts.append(f"in {kind}{f' ({where})' if where else ''}: {why}")
    return "; ".join(texts)


def _effects(plan: Plan) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, header_style="cyan", border_style="bright_black"
    )
    table.add_column("", justify="right", style="bright_black")
    table.add_column("effect", overflow="fold")
    table.add_column("at", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("with gradient", justify="right")
    table.add_column("reduced over shards", overflow="fold")
    if plan.ranks > 1:
        table.add_column("between ranks", justify="right", no_wrap=True)
    table.add_column("done at", justify="right", no_wrap=True)
    table.add_column("kept across it", overflow="fold")
    if not plan.barriers:
        table.add_row("", "none: the step returned without an update")
    for place, barrier, times in _merged(plan.barriers):
        for row in _rows(plan, place, barrier, times):
            table.add_row(*row)
    return table


def _merged(barriers: Sequence[Barrier]) -> Iterator[tuple[int, Barrier, int]]:
    """Each with its place and 1; of very many, one for each line of the step, and how often."""
    if len(barriers) <= _EFFECTS:
        for place, barrier in enumerate(barriers, start=1):
            yield place, barrier, 1
        return
    alike: dict[tuple[str, str, int], list[int]] = {}
    for i, one in enumerate(barriers):
        alike.setdefault((one.label, one.file, one.line), []).append(i)
    for places in alike.values():
        largest = max(places, key=lambda i: sum(kept.bytes for kept in barriers[i].kept))
        yield places[0] + 1, barriers[largest], len(places)


def _rows(plan: Plan, place: int, barrier: Barrier, times: int) -> Iterator[list[str | Text]]:
    """One for each optimizer of an update; the effect's own facts stand in the first."""
    where = f"{barrier.where} returned" if barrier.returned else barrier.where
    if times > 1:
        where += f", {times} times"
    largest = sorted(barrier.kept, key=lambda one: -one.bytes)
    kept = ", ".join(f"{one.name} {size(one.bytes)}" for one in largest[:_SHOWN]) or "nothing"
    if len(largest) > _SHOWN:
        kept += f" and {len(largest) - _SHOWN} more"
    if barrier.held:
        kept += f"; {size(barrier.held)} in all"
    for i, taken in enumerate(barrier.taken or (None,)):
        first = i == 0
        row: list[str | Text] = [str(place) if first else "", _name(barrier, taken, first)]
        row.append(Text(where) if first else "")
        if taken is None:
            row += ["", "", _exchanged(barrier)]
            sent = barrier.crosses
        else:
            count = number(taken.parameters, "tensor")
            row.append(f"{taken.numbers:,} in {count}, {size(taken.bytes)}")
            row.append(f"{taken.reached} of {taken.parameters}")
            row.append(_reduced(taken))
            sent = taken.crosses
        if plan.ranks > 1:
            row.append(size(sent))
        row.append(duration(barrier.end) if first else "")
        row.append(Text(kept) if first else "")
        yield row


def _name(barrier: Barrier, taken: Taken | None, first: bool) -> Text:
    if taken is None:
        return Text(barrier.label)
    text = Text()
    if barrier.effect != "Update":
        text.append(what(barrier) if first and len(barrier.taken) == 1 else taken.name)
        return text
    text.append(taken.name, style="bold").append(f" ({taken.kind})", style="bright_black")
    return text


def _reduced(taken: Taken) -> str:
    if taken.loss == "gradients given":
        return "nothing: gradients given"
    text = f"gradients, {size(taken.gradient_bytes)}, of a {taken.loss}"
    if taken.evaluations > 1:
        text += f", evaluated {taken.evaluations} times"
    return text


def _exchanged(barrier: Barrier) -> str:
    known = {"Gather": "rows to everybody", "Once": "one call with all rows", "Reduce": "a number"}
    return known.get(barrier.effect, "")
