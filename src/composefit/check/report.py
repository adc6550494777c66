"""`CheckReport`: what a check has found, as text and as a table."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import StringIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from composefit.check.causes import Cause


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one optimizer.

    Attributes:
        difference: between its gradients of the whole batch and of the batch in shards, relative:
            the norm of the difference by the norm, over all its parameters and updates. Infinity
            where there is nothing to compare, since the cut step failed. None where the step did
            not update it.
        parameter: the one with the largest relative difference of its own, or None.
        causes: why it differs, most likely first; empty where it does not.
    """

    difference: float | None
    parameter: str | None = None
    causes: list[Cause] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Whether a step means the same however its batch is cut.

    Printed by rich it is a table, and `str(report)` is the same as text.

    Attributes:
        optimizers: name -> what was found.
        state: Python state that one step hands on to the next through attributes.
        tolerance: a larger difference is none of rounding.
        shards: how the batch was cut, such as `"64 = 41 + 23, 2 threads"`.
        dtype: in which numbers it was computed.
        notes: what else is to be known.
    """

    optimizers: dict[str, Finding]
    state: list[Cause]
    tolerance: float
    shards: str
    dtype: str
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no optimizer's gradients depend on the cut, nor what the next step computes."""
        return not self.state and not any(map(self.differs, self.optimizers.values()))

    @property
    def summary(self) -> str:
        """What is wrong, in a line."""
        wrong = [
            f"{name!r} ({one.causes[0].name})"
            for name, one in self.optimizers.items()
            if self.differs(one) and one.causes
        ]
        return ", ".join([*wrong, *(f"{one.name} ({one.where})" for one in self.state)])

    def differs(self, finding: Finding) -> bool:
        """Whether a difference is more than rounding."""
        return finding.difference is not None and not finding.difference <= self.tolerance

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=100, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def __rich__(self) -> RenderableType:
        table = Table(
            box=box.SIMPLE_HEAD, show_edge=False, header_style="cyan", border_style="bright_black"
        )
        table.add_column("optimizer")
        table.add_column("difference", justify="right")
        table.add_column("largest in", overflow="fold")
        table.add_column("")
        for name, one in self.optimizers.items():
            wrong = self.differs(one)
            where = one.parameter or "" if wrong else ""
            table.add_row(Text(name), _number(one.difference), Text(where), self._verdict(one))
        return Group(
            Text(f"gradients of the batch whole and in shards ({self.shards}, {self.dtype})"),
            Padding(table, (0, 0, 0, 2)),
            *self._explanations(),
            *(Text(f"note: {note}", style="bright_black") for note in self.notes),
        )

    def _verdict(self, finding: Finding) -> Text:
        if finding.difference is None:
            return Text("not updated", style="yellow")
        if self.differs(finding):
            return Text("depends on the cut", style="bold red")
        return Text("right", style="green")

    def _explanations(self) -> Iterator[RenderableType]:
        told: set[Cause] = set()
        for name, one in self.optimizers.items():
            for i, cause in enumerate(one.causes):
                if cause not in told:
                    told.add(cause)
                    yield _explained(name, cause, "" if i == 0 else "or ")
        for cause in self.state:
            yield _explained("state", cause, "")


def _number(difference: float | None) -> str:
    if difference is None:
        return ""
    return "failed" if math.isinf(difference) else f"{difference:.1e}"


def _explained(name: str, cause: Cause, before: str) -> RenderableType:
    lines = Text(f"{name}: {before}", style="bold")
    lines.append(cause.name, style="bold yellow")
    if cause.module:
        lines.append(f", in {cause.module}", style="not bold")
    if cause.where:
        file, _, line = cause.where.rpartition(":")
        lines.append(f", at {_short(file)}:{line}", style="not bold")
    if cause.detail:
        lines.append(f"\n  {cause.detail}", style="not bold")
    lines.append("\n  write: ", style="not bold green")
    lines.append(cause.instead, style="not bold")
    return lines


def _short(file: str) -> str:
    """Relative to the working directory, where it lies in there."""
    try:
        found = os.path.relpath(file)
    except ValueError:  # on another drive
        return file
    return file if found.startswith("..") else found
