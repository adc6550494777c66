"""The public names are exactly the documented ones, and each says what it is for."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import composefit
from composefit import testing

TABLE = Path(__file__).parents[1] / "docs" / "api.md"


def rows(text: str) -> dict[str, str]:
    """The rows "| `name` | what it is for |" of a table."""
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) *\|$", text, flags=re.MULTILINE))


DOCUMENTED = rows(TABLE.read_text(encoding="utf-8"))


def own_docstring(thing: object) -> str | None:
    """The docstring somebody wrote for it: not a base class's, nor a dataclass's signature."""
    if not inspect.isclass(thing):
        return inspect.getdoc(thing)
    doc = vars(thing).get("__doc__")
    if dataclasses.is_dataclass(thing) and doc and doc.startswith(f"{thing.__name__}("):
        return None
    return doc


def test_public_names_are_exactly_the_documented_ones() -> None:
    assert set(composefit.__all__) == set(DOCUMENTED)
    assert len(composefit.__all__) == len(DOCUMENTED)


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_public_name_says_what_it_is_for(name: str) -> None:
    thing = getattr(composefit, name)
    assert len(DOCUMENTED[name]) > 10
    # A type alias has no docstring of its own, and what it stands for has a borrowed one.
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert own_docstring(thing)


def test_the_module_for_tests_is_documented_as_a_whole() -> None:
    _, _, section = TABLE.read_text(encoding="utf-8").partition(
        "## For tests: `composefit.testing`"
    )
    assert set(re.findall(r"^- `(\w+)", section, flags=re.MULTILINE)) == set(testing.__all__)
    for name in testing.__all__:
        thing = getattr(testing, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert own_docstring(thing)


def test_names_that_are_not_public_stay_out_of_a_star_import() -> None:
    space: dict[str, object] = {}
    exec("from composefit import *", space)
    assert set(space) - {"__builtins__"} == set(DOCUMENTED)


def test_rows_are_read_from_a_table() -> None:
    text = "# API\n| name | for |\n|---|---|\n| `Trainer` | trains |\n| `Mean`   | not a row |\n"
    assert rows(text) == {"Trainer": "trains"}


def test_a_docstring_that_nobody_wrote_does_not_count() -> None:
    class Base:
        """Written."""

    class Derived(Base): ...

    @dataclasses.dataclass
    class Record:
        x: int

    assert own_docstring(Base)
    assert own_docstring(Derived) is None
    assert own_docstring(Record) is None
