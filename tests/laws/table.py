"""Measure law 1 over the gallery, and write the tables of `docs/laws.md`: `make laws`.

    python -m tests.laws.table

The same numbers on the same machine: threads and ranks compute with one core each. It fails, and
writes nothing, where a recipe differs from what it is compared with by more than law 1 allows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tests.laws.gallery_law import PLACES, REDUCED, WHOLE, measured, reduced, whole
from tests.ranks.pool import closing_pools

PAGE = Path(__file__).parents[2] / "docs" / "laws.md"

Rows = Mapping[str, Mapping[str, float]]


def rows(text: str, table: str) -> list[str]:
    """The names in the first column of a table of the page."""
    found = re.search(_pattern(table), text, re.DOTALL)
    lines = found[2].strip().splitlines()[2:] if found else []
    return [line.split("|")[1].strip() for line in lines]


def replaced(text: str, table: str, found: Rows, columns: Sequence[str]) -> str:
    """The page with a table written anew, between its two marks.

    Args:
        text: of the page.
        table: its name in the marks.
        found: name of a row -> column -> a difference.
        columns: in their order.

    Raises:
        ValueError: the page lacks the marks.
    """
    lines = [f"| recipe | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, row in found.items():
        lines.append(f"| {name} | {' | '.join(f'{row[column]:.0e}' for column in columns)} |")
    body = "\n".join(lines)
    text, count = re.subn(
        _pattern(table), lambda m: f"{m[1]}\n{body}\n{m[3]}", text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"expected the marks of table {table!r} once in the page, found {count}")
    return text


def _pattern(table: str) -> str:
    return rf"(<!-- {table}: made by make laws -->\n)(.*?)(\n<!-- end of {table} -->)"


def main() -> None:
    """Measure everything, and write the page."""
    torch.set_num_threads(1)
    text = PAGE.read_text("utf-8")
    others = [place for place in PLACES if place != "one device"]  # what those are compared with
    with closing_pools():
        for table, measure, names, places in (
            ("reduced", reduced, list(REDUCED), list(PLACES)),
            ("whole", whole, list(WHOLE), others),
        ):
            by_place = {place: measured(measure, names, place) for place in places}
            found = {name: {place: by_place[place][name] for place in places} for name in names}
            text = replaced(text, table, found, places)
    PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
