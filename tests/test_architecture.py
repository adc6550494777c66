"""The order of the modules: imports point downward, without circles, at the top of the file."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "composefit"

# A module, or a package as a whole, imports only from the rows below its own; those of one row
# stand side by side and do not know each other. `__init__` stands for composefit/__init__.py.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("demo", "doctor"),
    ("testing",),
    ("__init__",),
    ("lightning",),  # other names for what is below
    ("trainer",),
    ("explain",),
    ("training", "evaluation", "running", "snapshot", "remote"),  # what a trainer consists of
    ("check",),
    ("arguments", "hooks", "logs", "report", "results", "sources"),
    ("loops", "history"),
    ("callbacks", "loggers", "profilers", "datamodule"),
    ("data_parallel",),
    ("strategies",),
    ("lockstep",),
    ("module",),
    ("module_hooks", "logged"),
    ("steps",),
    ("updates",),
    ("effects",),  # an effect reads losses; a loss knows of no effect
    ("losses",),
    ("replicas",),
    ("optimizers",),
    ("saved",),
    ("sharded_checkpoint",),
    ("precision", "random", "ranks", "data", "images", "checkpoint"),
    ("tree",),
    ("hyperparameters", "metric_types", "seeding", "settings", "signals"),
)

# What takes a second to import, since it builds on torch's sharded tensors, and few runs need.
LATE = {"composefit.strategies.fully_sharded", "composefit.sharded_checkpoint"}

# Imported inside the function that needs them, or by the demo: packages of the extras, and
# torchmetrics, which takes longer to import than torch.
OPTIONAL = {"IPython", "matplotlib", "sklearn", "tensorboard", "torchmetrics", "wandb"}


class Import(NamedTuple):
    """One imported module, such as `composefit.losses` or `torch.nn`."""

    name: str
    line: int
    in_function: bool


def modules(sources: Path) -> dict[str, Path]:
    """The package's modules by dotted name; a package's own name is that of its `__init__`."""
    files = {}
    for file in sorted(sources.rglob("*.py")):
        parts = file.relative_to(sources.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def imports(name: str, file: Path, known: dict[str, Path]) -> Iterator[Import]:
    """What a module imports at run time; `if TYPE_CHECKING:` is none of it."""

    def visit(nodes: Iterable[ast.AST], in_function: bool) -> Iterator[Import]:
        for node in nodes:
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                yield from visit(node.orelse, in_function)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, node.lineno, in_function)
            elif isinstance(node, ast.ImportFrom):
                base = absolute(node)
                full = [f"{base}.{alias.name}" for alias in node.names]
                names = [each if each in known else base for each in full]
                for imported in dict.fromkeys(names):
                    yield Import(imported, node.lineno, in_function)
            else:
                function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(ast.iter_child_nodes(node), in_function or function)

    def absolute(node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, node.module] if node.module else package)

    yield from visit([ast.parse(file.read_text(encoding="utf-8"))], False)


def part(name: str) -> str:
    """The module or package of the layers that one of the package's dotted names belongs to."""
    return name.split(".")[1] if "." in name else "__init__"


def own_imports(sources: Path) -> Iterator[tuple[str, Import]]:
    known = modules(sources)
    for name, file in known.items():
        for found in imports(name, file, known):
            if found.name.split(".")[0] == sources.name:
                yield name, found


def unlisted(sources: Path) -> list[str]:
    listed = {name for row in LAYERS for name in row}
    return [name for name in modules(sources) if part(name) not in listed]


def upward(sources: Path) -> list[str]:
    """Imports of a row that is not below the importing module's own, the same part excepted."""
    depth = {name: row for row, names in enumerate(LAYERS) for name in names}
    return [
        f"{importer}:{found.line} imports {found.name}"
        for importer, found in own_imports(sources)
        if part(importer) != part(found.name)
        and depth.get(part(importer), 0) >= depth.get(part(found.name), 0)
    ]


def circles(sources: Path) -> list[str]:
    """The first circle of imports inside a part, where the layers say nothing."""
    graph: dict[str, set[str]] = {name: set() for name in modules(sources)}
    for importer, found in own_imports(sources):
        if part(importer) == part(found.name):
            graph[importer].add(found.name)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def inside_functions(sources: Path) -> list[str]:
    """Imports in functions, but for the extras' and for the command line's of its commands."""
    known = modules(sources)
    return [
        f"{name}:{found.line} imports {found.name}"
        for name, file in known.items()
        for found in imports(name, file, known)
        if found.in_function
        and found.name.split(".")[0] not in OPTIONAL
        and found.name not in LATE
        and not (part(name) == "cli" and part(found.name) == "demo")
    ]


def undeclared(sources: Path, declared: set[str]) -> list[str]:
    """Imports at the top of a file that a plain `pip install composefit` does not bring.

    The demo may name the extras there: the command line imports it only when it is asked for.
    """
    allowed = declared | {sources.name} | sys.stdlib_module_names
    known = modules(sources)
    return [
        f"{name}:{found.line} imports {found.name}"
        for name, file in known.items()
        for found in imports(name, file, known)
        if not found.in_function
        and (top := found.name.split(".")[0]) not in allowed
        and not (top in OPTIONAL and part(name) == "demo")
    ]


def dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = (re.match(r"[\w.-]+", line) for line in project["dependencies"])
    found = {name[0].replace("-", "_") for name in names if name}
    return {{"pillow": "PIL"}.get(name, name) for name in found}  # the name it is imported by


def test_every_module_has_its_place_in_the_order() -> None:
    assert modules(SOURCES)
    assert unlisted(SOURCES) == []


def test_imports_point_downward() -> None:
    assert upward(SOURCES) == []


def test_imports_make_no_circle() -> None:
    assert circles(SOURCES) == []


def test_imports_stand_at_the_top_of_the_file() -> None:
    assert inside_functions(SOURCES) == []


def test_the_package_imports_only_what_it_declares() -> None:
    assert undeclared(SOURCES, dependencies()) == []


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A small package in which everything is as it should be."""
    files = {
        "__init__.py": "from composefit.trainer import Trainer",
        "trainer.py": "import torch\nfrom composefit import tree\nfrom .losses import Mean",
        "losses.py": (
            "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from composefit.trainer import Trainer\n"
        ),
        "tree.py": "def draw():\n    import matplotlib.pyplot",
        "loops/__init__.py": "from composefit.loops.fit import FitLoop",
        "loops/fit.py": "from .epoch import EpochLoop",
        "loops/epoch.py": "",
    }
    package = tmp_path / "composefit"
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    return package


def test_a_package_in_order_passes(sources: Path) -> None:
    assert unlisted(sources) == []
    assert upward(sources) == []
    assert circles(sources) == []
    assert inside_functions(sources) == []
    assert undeclared(sources, {"torch"}) == []


def test_a_module_without_a_place_is_found(sources: Path) -> None:
    (sources / "utils.py").write_text("")
    assert unlisted(sources) == ["composefit.utils"]


@pytest.mark.parametrize(
    "line",
    [
        "from composefit import Trainer",
        "from composefit.trainer import Trainer",
        "from . import trainer",
        "import composefit.trainer",
        "from composefit.data import LoaderBatches",
        "try:\n    from composefit import trainer\nexcept ImportError:\n    pass",
    ],
)
def test_an_import_that_points_upward_or_sideways_is_found(sources: Path, line: str) -> None:
    (sources / "data.py").write_text("")
    (sources / "tree.py").write_text(line)
    (found,) = upward(sources)
    assert found.startswith("composefit.tree:")


@pytest.mark.parametrize("line", ["from .fit import FitLoop", "from composefit.loops import fit"])
def test_a_circle_inside_a_package_is_found(sources: Path, line: str) -> None:
    (sources / "loops" / "epoch.py").write_text(line)
    assert {"composefit.loops.epoch", "composefit.loops.fit"} <= set(circles(sources))


@pytest.mark.parametrize("line", ["import json", "from composefit import tree"])
def test_an_import_inside_a_function_is_found(sources: Path, line: str) -> None:
    (sources / "losses.py").write_text(f"class Mean:\n    def total(self):\n        {line}")
    (found,) = inside_functions(sources)
    assert found.startswith("composefit.losses:3 ")


def test_an_undeclared_import_is_found(sources: Path) -> None:
    (sources / "losses.py").write_text("import matplotlib.pyplot")
    assert undeclared(sources, {"torch"}) == ["composefit.losses:1 imports matplotlib.pyplot"]
