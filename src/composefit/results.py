"""The results of a validation or test, as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box, get_console
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from composefit.callbacks.printing import print_table


def print_results(
    stage: str, results: Sequence[dict[str, float]], console: Console | None = None
) -> None:
    """Print name and value of what was logged, a column for each loader; nothing without any.

    Args:
        stage: the heading, `"validate"` or `"test"`.
        results: for each loader, name -> value.
        console: where to print; `rich.get_console()` if None.
    """
    names = list(dict.fromkeys(_own(name) for one in results for name in one))
    if not names:
        return
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, header_style="cyan", border_style="bright_black"
    )
    table.add_column(stage, overflow="fold")
    several = len(results) > 1
    for i in range(len(results)):
        table.add_column(f"loader {i}" if several else "", justify="right", no_wrap=True)
    columns = [{_own(name): value for name, value in one.items()} for one in results]
    for name in names:
        values = [f"{one[name]:.6g}" if name in one else "" for one in columns]
        table.add_row(Text(name), *values)
    print_table(console or get_console(), Padding(table, 1))


def _own(name: str) -> str:
    """The name without that of the loader, which the column has."""
    own, mark, index = name.rpartition("/dataloader_idx_")
    return own if mark and index.isdecimal() else name
