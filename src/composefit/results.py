"""The results of a validation or test, as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_results(stage: str, results: Sequence[dict[str, float]]) -> None:
    """Print name and value of what was logged, a column for each loader."""
    names = list(dict.fromkeys(name for one in results for name in one))
    if not names:
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="cyan")
    table.add_column(stage)
    for i in range(len(results)):
        table.add_column(f"loader {i}" if len(results) > 1 else "", justify="right")
    for name in names:
        values = [f"{one[name]:.6g}" if name in one else "" for one in results]
        table.add_row(Text(name), *values)
    Console().print(table)
