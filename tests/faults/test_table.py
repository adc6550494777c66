"""`docs/reliability.md` has a row for every fault, and each row a test that fills it."""

import ast
import re

import pytest

from tests.faults import table
from tests.faults.conftest import Tells

NUMBERS = [number for entries in table.ENTRIES.values() for number in entries]


def test_the_page_has_a_row_for_every_entry_in_order() -> None:
    expected = [str(i) for i in range(1, 50)]
    for number, more in (("16", ["16b"]), ("28", ["28b", "28c"])):
        expected[expected.index(number) + 1 : expected.index(number) + 1] = more
    assert expected == NUMBERS
    assert list(table.rows(table.written())) == NUMBERS


def test_the_page_is_what_its_rows_and_the_list_of_faults_make() -> None:
    written = table.written()
    happens = {number: row[1] for number, row in table.rows(written).items()}
    assert table.page(happens) == written, f"write the page with {table.COMMAND}"


def test_each_row_is_filled_by_one_test() -> None:
    filled = []
    for path in table.FOLDER.glob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and re.match(r"test_f\d", node.name):
                calls = [c for c in ast.walk(node) if isinstance(c, ast.Call)]
                if any(ast.unparse(call.func) == "tells" for call in calls):
                    filled.append(table.number_of(node.name))
    assert sorted(filled) == sorted(NUMBERS)


def test_f1_a_row_of_the_page_that_says_something_else_fails(tells: Tells) -> None:
    with pytest.raises(AssertionError, match="is not current"):
        tells.__call__("nothing of the kind")  # not as those that fill a row


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/tmp/a b", "`…/a b`"),
        ("no /tmp/pytest-1/last.ckpt (812 bytes)", "`no …/last.ckpt (… bytes)`"),
        ("in f (/home/me/x.py:12), pid 7", "`in f (…/x.py:…), pid …`"),
        ("a `b` | c\n   d", r"`` a `b` \| c d ``"),
        ("grad_norm/a and 1 / 2", "`grad_norm/a and 1 / 2`"),
        ("word " * 100, "`" + "word " * 64 + "…`"),
    ],
)
def test_what_differs_from_run_to_run_is_left_out(text: str, shown: str) -> None:
    assert table.message(text) == shown
