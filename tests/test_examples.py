"""The examples run, are short, say what they promise, and have the types that they show."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))

# What each prints at its end, and what an untrained one prints.
FIGURES = {
    "regular_training": ("accuracy", 0.95, 0.7),
    "data_parallel_training": ("accuracy", 0.95, 0.7),
    "gan_training": ("mean distance from the circle", 0.15, 0.5),
    "data_parallel_gan_training": ("mean distance from the circle", 0.15, 0.5),
    "gan_by_hand": ("mean distance from the circle", 0.15, 0.5),
    "gan_wrapper": ("mean distance from the circle", 0.15, 0.5),
}


@pytest.fixture
def fresh_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in EXAMPLES:
        sys.modules.pop(name, None)


def test_each_example_has_its_figure() -> None:
    assert set(EXAMPLES) == set(FIGURES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_is_short(name: str) -> None:
    assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, fresh_imports: None) -> None:
    main = importlib.import_module(name).main
    (length,) = {"epochs", "steps"} & set(inspect.signature(main).parameters)
    figure = main(**{length: 1})
    assert isinstance(figure, float) and 0 < figure < 10


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_learns_as_its_user_runs_it(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", FOLDER / f"{name}.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    what, learned, untrained = FIGURES[name]
    (found,) = re.findall(rf"^{what} ([\d.]+)$", done.stdout, re.MULTILINE)
    if learned > untrained:
        assert float(found) > learned
    else:
        assert float(found) < learned


@pytest.mark.parametrize("name", ["training", "gan_training"])
def test_data_parallel_example_differs_from_the_other_by_its_strategy(name: str) -> None:
    other = {"training": "regular_training"}.get(name, name)
    code = (FOLDER / f"data_parallel_{name}.py").read_text(encoding="utf-8")
    (docstring,) = re.findall(r'^""".*?"""$', code, re.MULTILINE | re.DOTALL)
    lines = [line for line in code.replace(docstring, "").splitlines() if line]
    assert lines[0] == f"from {other} import main"
    shown = (FOLDER / f"{other}.py").read_text(encoding="utf-8").splitlines()[-1]
    assert lines[-1] == shown.replace("main()", "main(ThreadDataParallel(threads=2))")


# -- types -----------------------------------------------------------------------------------------

FORMS = """
from torch import Tensor
from composefit import Gather, LoopModule, Mean, Once, Step, Sum, Update

class Forms(LoopModule):
    def training_step(self, x: Tensor) -> Step:
        everything, offset = yield from Gather(x)
        reveal_type(everything)
        reveal_type(offset)
        pair, _ = yield from Gather((x, x))
        reveal_type(pair)
        mean = yield from Mean(x.sum(), x.numel())
        reveal_type(mean)
        total = yield from Sum(x.sum())
        reveal_type(total)
        losses = yield from Update({"a": x.mean()})
        reveal_type(losses)
        result = yield from Once(self.keep, x)
        reveal_type(result)
        yield x.mean()
        yield {"a": x.mean(), "b": Mean.of(x.mean(), 3) + 0.1 * Sum(x.sum())}
        yield 3
        return x.mean()

    def keep(self, x: Tensor) -> int:
        return len(x)

Gather(3)
"""
REVEALED = [
    "torch._tensor.Tensor",
    "int",
    "tuple[torch._tensor.Tensor, ...]",
    "torch._tensor.Tensor",
    "torch._tensor.Tensor",
    "dict[str, torch._tensor.Tensor]",
    "Any",
]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What mypy says of all examples and of `FORMS`, in one run."""
    folder = tmp_path_factory.mktemp("types")
    (folder / "forms.py").write_text(FORMS)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"),
            *("--follow-imports", "silent", "--cache-dir", folder / "cache"),
            "--allow-untyped-calls",  # torch's own backward() has no types
            *FOLDER.glob("*.py"),
            folder / "forms.py",
        ],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr  # of the two errors in FORMS
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.xdist_group("types")
def test_examples_are_typed(checked: list[str]) -> None:
    assert [line for line in checked if ": error:" in line and "forms.py" not in line] == []


@pytest.mark.slow
@pytest.mark.xdist_group("types")
def test_what_comes_back_from_an_effect_is_typed(checked: list[str]) -> None:
    revealed = [re.findall(r'Revealed type is "(.*)"$', line) for line in checked]
    found = [kind.replace("builtins.", "") for kinds in revealed for kind in kinds]
    assert found == REVEALED


@pytest.mark.slow
@pytest.mark.xdist_group("types")
def test_what_a_step_may_not_yield_is_an_error(checked: list[str]) -> None:
    errors = [line for line in checked if "forms.py" in line and ": error:" in line]
    assert ["[misc]" in errors[0], "[call-overload]" in errors[1], len(errors)] == [True, True, 2]
