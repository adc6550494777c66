"""The wheel, in a clean environment: a project that uses it runs, and type-checks strictly."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOWNSTREAM = ROOT / "tests" / "downstream"

# In one process when the tests are spread: the wheel is built once.
pytestmark = pytest.mark.xdist_group("packaging")


def run(*command: object, cwd: Path) -> str:
    # Nothing from outside may lead Python to the sources instead of to the wheel.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", "--quiet", *options, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment in which only the wheel is installed.

    The dependencies are this environment's: they come last on the path, through a .pth file, so
    that neither a network nor a second torch is needed. An editable install does not come along,
    since the .pth file behind it is not read from there.
    """
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    interpreter = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", interpreter]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(interpreter, "-c", ask, cwd=folder).strip())
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site / "dependencies.pth").write_text("\n".join(paths) + "\n")
    origin = run(interpreter, "-c", "import composefit; print(composefit.__file__)", cwd=folder)
    assert Path(origin.strip()) == site / "composefit" / "__init__.py"
    return interpreter


def test_wheel_holds_every_module_its_type_marker_and_its_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    modules = {str(path.relative_to(source)) for path in source.glob("composefit/**/*.py")}
    assert modules | {"composefit/py.typed"} <= names
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"composefit"}


def test_downstream_project_runs_with_the_wheel(python: Path, tmp_path: Path) -> None:
    printed = run(python, "-W", "error", DOWNSTREAM / "rings.py", cwd=tmp_path)
    assert printed.splitlines()[-1] == "trained"


@pytest.mark.slow
@pytest.mark.full
def test_downstream_project_type_checks_with_the_wheel(python: Path, tmp_path: Path) -> None:
    options = ["--config-file", DOWNSTREAM / "pyproject.toml", "--cache-dir", tmp_path / "cache"]
    printed = run(python, "-m", "mypy", *options, DOWNSTREAM / "rings.py", cwd=tmp_path)
    assert "no issues found in 1 source file" in printed


def test_command_line_is_installed_with_the_wheel(python: Path, tmp_path: Path) -> None:
    assert "demo" in run(python.parent / "composefit", "--help", cwd=tmp_path)


def test_importing_the_package_imports_nothing_that_is_slow() -> None:
    """torchmetrics brings SciPy and more along, and takes longer than torch itself."""
    slow = {"torchmetrics", "scipy", "matplotlib", "transformers", "pandas", "sklearn", "wandb"}
    code = f"import sys, composefit; print(*({slow!r} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
