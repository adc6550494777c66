"""`make mutants`: take each safeguard out of a copy of the tree; a test has to fail each time."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from catalogue import MUTANTS, Mutant
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parents[2]
SIDE_BY_SIDE = 2
FAILED = re.compile(r"^FAILED (\S+?)(?: - |$)", re.MULTILINE)


def copy_of_the_tree(folder: Path) -> None:
    """What tests need of the project, without what they would leave there."""
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "demo", "downstream", "mutants")
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", folder)


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """pytest's exit status and output for these tests of a copy, up to the first failure.

    A name may be the beginning of a test's: node ids are then found by `-k`.
    """
    files = {test.partition("::")[0] for test in tests}
    names = [name for test in tests if (name := test.partition("::")[2])]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no"]
    command += ["--timeout=60", *(f"tests/{file}" for file in sorted(files))]
    if names:
        command += ["-k", " or ".join(names)]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def judge(mutant: Mutant) -> tuple[bool, str]:
    """Whether a test fails under the patch, and which, or else what is wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_the_tree(folder)
        file = folder / "src" / "composefit" / mutant.file
        text = file.read_text()
        if text.count(mutant.old) != 1:
            return False, f"its old text occurs {text.count(mutant.old)} times in {mutant.file}"
        file.write_text(text.replace(mutant.old, mutant.new))
        status, output = run_tests(folder, mutant.tests)
    failed = FAILED.search(output)
    if status == 1 and failed:
        return True, failed[1].removeprefix("tests/")
    if status == 0:
        return False, "no test fails"
    last = output.strip().splitlines()[-1:]
    return False, f"pytest ended with status {status}: {' '.join(last)}"


def main() -> int:
    """Print the table; 1 where a patch was not caught."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    with tempfile.TemporaryDirectory() as name:
        copy_of_the_tree(Path(name))
        every = tuple(dict.fromkeys(test for mutant in MUTANTS for test in mutant.tests))
        status, output = run_tests(Path(name), every)
    if status:
        console.print(output, markup=False)
        console.print("[red]the tests fail before anything is taken out[/]")
        return 1
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        judged = track(
            pool.map(judge, MUTANTS), "taking out", len(MUTANTS), console=console, transient=True
        )
        found = list(judged)
    table = Table("rule", "taken out", "the test that then fails", title="mutants")
    for mutant, (caught, text) in zip(MUTANTS, found, strict=True):
        table.add_row(str(mutant.rule), mutant.what, text if caught else f"[red]{text}[/]")
    console.print(table)
    missed = sum(not caught for caught, _ in found)
    console.print(f"{len(MUTANTS) - missed} of {len(MUTANTS)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
