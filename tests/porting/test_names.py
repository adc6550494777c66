"""Every public name that a script for Lightning may use is here, or on the page that says why not.

`lightning_names.json` lists them, as `record.py` found them in Lightning 2.6.6.
"""

import inspect
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import composefit.lightning as L

HERE = Path(__file__).parent
NAMES: dict[str, list[str]] = json.loads(
    (HERE / "lightning_names.json").read_text(encoding="utf-8")
)
PAGE = (HERE.parents[1] / "docs" / "from-lightning.md").read_text(encoding="utf-8")


def quoted(page: str) -> set[str]:
    """The names that stand in the code of a page."""
    code = re.findall(r"`([^`\n]+)`", page)
    return {name for text in code for name in re.findall(r"\w+", text)}


def arguments(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def known(owner: str) -> Iterable[str]:
    """What is here in place of one of Lightning's classes or functions."""
    if owner == "LightningModule":
        return {*dir(L.LightningModule), *vars(L.LightningModule())}
    if owner == "Trainer":
        return {*dir(L.Trainer), *vars(L.Trainer(logger=False))}
    if owner in ("callbacks", "loggers"):
        return set(getattr(L, owner).__all__)
    if owner.endswith("()"):
        thing: Any = L
        for name in owner[:-2].split("."):
            thing = getattr(thing, name, None) or getattr(L.callbacks, name)
        return arguments(thing)
    return set(dir(getattr(L, owner)))


@pytest.mark.parametrize("owner", NAMES)
def test_every_name_of_lightning_is_here_or_on_the_page(owner: str) -> None:
    assert sorted(set(NAMES[owner]) - set(known(owner)) - quoted(PAGE)) == []


@pytest.mark.parametrize("name", ["fit", "validate", "test", "predict"])
def test_arguments_that_are_here_stand_where_they_stand_in_lightning(name: str) -> None:
    ours = [n for n in arguments(getattr(L.Trainer, name)) if n in NAMES[f"Trainer.{name}()"]]
    theirs = [n for n in NAMES[f"Trainer.{name}()"] if n in ours]
    assert ours == theirs


def test_names_are_read_from_code_alone() -> None:
    assert quoted("fit `Trainer(plugins=...)` or `L.Fabric`, not this") == {
        "Trainer",
        "plugins",
        "L",
        "Fabric",
    }
