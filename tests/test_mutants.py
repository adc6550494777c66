"""`make mutants` takes its time; here only that its patches still fit the sources."""

import re
from pathlib import Path

import pytest

from tests.mutants.catalogue import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]

every_mutant = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.rule}: {m.what}")


@every_mutant
def test_its_old_text_occurs_once_and_is_changed(mutant: Mutant) -> None:
    text = (ROOT / "src" / "composefit" / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    assert mutant.new != mutant.old


@every_mutant
def test_its_tests_exist(mutant: Mutant) -> None:
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = (ROOT / "tests" / file).read_text()
        assert re.search(rf"^def {re.escape(name)}\w*\(", text, re.MULTILINE)


def test_every_rule_of_the_driver_has_one() -> None:
    assert {mutant.rule for mutant in MUTANTS} == set(range(1, 14))
