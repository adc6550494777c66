"""`make mutants`: take each safeguard out of a copy of the tree; a test has to fail each time."""

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
from catalogue import MUTANTS, Mutant
from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).parents[2]
SIDE_BY_SIDE = 2
FAILED = re.compile(r"^FAILED tests/(.+?)(?: - .*)?$", re.MULTILINE)


def copy_of_the_tree(folder: Path) -> None:
    """What tests need of the project; once, since somebody may be working on it meanwhile."""
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "demo", "downstream", "mutants")
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", folder)


def run_tests(folder: Path, tests: Iterable[str]) -> tuple[int, str]:
    """pytest's exit status and output for these tests of a copy, up to the first failure.

    In a process of its own: nothing of the package may have been imported before. A test's name
    may be the beginning of several.
    """
    files, names = zip(*(test.split("::") for test in tests), strict=True)
    os.chdir(folder)
    sys.path.insert(0, str(folder / "src"))
    sys.dont_write_bytecode = True
    arguments = [f"tests/{file}" for file in sorted(set(files))]
    arguments += ["-k", " or ".join(names), "-x", "-q", "--tb=no", "--timeout=60"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = pytest.main([*arguments, "-p", "no:cacheprovider"])
    return int(status), output.getvalue()


def judge(tree: Path, mutant: Mutant) -> tuple[bool, str]:
    """Whether a test fails under the patch, and which, or else what is wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tree"
        shutil.copytree(tree, folder)
        file = folder / "src" / "composefit" / mutant.file
        text = file.read_text()
        if text.count(mutant.old) != 1:
            return False, f"its old text occurs {text.count(mutant.old)} times in {mutant.file}"
        file.write_text(text.replace(mutant.old, mutant.new))
        status, output = run_tests(folder, mutant.tests)
        os.chdir(ROOT)
    failed = FAILED.search(output)
    if status == pytest.ExitCode.TESTS_FAILED and failed:
        return True, failed[1]
    if status == pytest.ExitCode.OK:
        return False, "no test fails"
    return False, f"pytest ended with status {status}:\n{output}"


def main() -> int:
    """Print the table; 1 where a patch was not caught."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    context = get_context("forkserver")
    # Imports take most of the time. The package itself is not among them: each has its own copy.
    context.set_forkserver_preload(["torch", "torchmetrics", "pytest", "rich.console"])
    with (
        tempfile.TemporaryDirectory() as name,
        context.Pool(SIDE_BY_SIDE, maxtasksperchild=1) as pool,
    ):
        tree = Path(name)
        copy_of_the_tree(tree)
        every = sorted({test for mutant in MUTANTS for test in mutant.tests})
        status, output = pool.apply(run_tests, (tree, every))
        if status:
            console.print(output, markup=False)
            console.print("[red]the tests fail before anything is taken out[/]")
            return 1
        found: list[tuple[bool, str]] = []
        started = time.monotonic()
        results = pool.imap(partial(judge, tree), MUTANTS)
        for mutant in MUTANTS:
            found.append(results.next(timeout=300))  # the process may be gone for good
            seconds = time.monotonic() - started
            console.print(f"{len(found)} of {len(MUTANTS)}, {seconds:.0f} s: {mutant.what}")
    table = Table("rule", "taken out", title="mutants")
    table.add_column("the test that then fails", overflow="fold")
    for mutant, (caught, text) in zip(MUTANTS, found, strict=True):
        table.add_row(str(mutant.rule), mutant.what, Text(text, style="" if caught else "red"))
    console.print(table)
    missed = sum(not caught for caught, _ in found)
    console.print(f"{len(MUTANTS) - missed} of {len(MUTANTS)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
