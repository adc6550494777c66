"""Every Python block of the documentation runs, every link leads somewhere, the site builds.

The blocks of a page share their names, as in a notebook. A block that must not run is fenced as
`text` or `console`.
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cloudpickle  # type: ignore[import-untyped]
import pytest
import torch

import composefit

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language: the line on which each begins, and its code."""
    return [
        (text.count("\n", 0, found.start(2)), found[2])
        for found in FENCE.finditer(text)
        if found[1] == language
    ]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# Their code launches processes: with `make laws`.
LAUNCHING = {"many-processes", "torchrun", "debugging", "fully-sharded", "slurm"}
WITH_CODE = [
    pytest.param(page, marks=pytest.mark.full if page.stem in LAUNCHING else ())
    for page in PAGES
    if blocks(page.read_text(encoding="utf-8"), "python")
]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # some write files, as a program does
    torch.manual_seed(0)
    module = ModuleType("page")  # for what looks its names up by `__module__`
    monkeypatch.setitem(sys.modules, "page", module)
    # Processes that a page launches get its classes along, as those of a script or notebook.
    cloudpickle.register_pickle_by_value(module)
    try:
        for line, code in blocks(page.read_text(encoding="utf-8"), "python"):
            # The empty lines make a traceback show the line of the page.
            exec(compile("\n" * line + code, page, "exec"), vars(module))
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def test_the_pages_with_code_are_these() -> None:
    assert [name_of(param.values[0]) for param in WITH_CODE] == [
        "README.md",
        "docs/callbacks.md",
        "docs/check.md",
        "docs/compatibility.md",
        "docs/data.md",
        "docs/debugging.md",
        "docs/effects.md",
        "docs/errors.md",
        "docs/explain.md",
        "docs/from-lightning.md",
        "docs/index.md",
        "docs/laws.md",
        "docs/lightning-checkpoints.md",
        "docs/logging.md",
        "docs/loops.md",
        "docs/many-processes.md",
        "docs/notebooks.md",
        "docs/state.md",
        "docs/step.md",
        "docs/strategies.md",
        "docs/torchrun.md",
        "docs/why.md",
        "docs/write-a-strategy.md",
    ]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_fence_says_its_language(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(fences[::2]) <= {"python", "text", "console"}
    assert set(fences[1::2]) <= {""}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in found:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def anchors(text: str) -> set[str]:
    """What links to a page's headings look like on GitHub, and to names in the reference."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    names = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
    }.union(names)


def test_picture_of_the_lockstep_is_what_its_script_draws() -> None:
    script = ROOT / "docs" / "pictures" / "lockstep.py"
    module = load(script)
    assert script.with_suffix(".svg").read_text(encoding="utf-8") == module.picture()


def test_tables_of_scaling_are_what_its_script_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # scripts that import each other
    script = load(ROOT / "benchmarks" / "scaling.py")
    for row in [
        *script.paper_rows(script.H100),
        *script.paper_rows(script.SLOW),
        *script.bucket_rows(),
    ]:
        assert f"| {' | '.join(row)} |" in page
    for gpus, text in ((8, "{:.1f} ms for 8 "), (64, "{:.1f} for 64"), (1024, "{:.0f} for 1,024")):
        assert text.format(script.control(script.H100, gpus) * 1e3) in page


def load(script: Path) -> ModuleType:
    """A script as a module; those of its folder that it imports are forgotten again."""
    spec = importlib.util.spec_from_file_location(f"{script.stem}_script", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = dict(sys.modules)
    sys.modules[spec.name] = module  # a dataclass looks itself up
    try:
        spec.loader.exec_module(module)
    finally:
        for name in [spec.name, *(path.stem for path in script.parent.glob("*.py"))]:
            if name not in before:
                sys.modules.pop(name, None)
    return module


def test_blocks_are_read_with_their_lines_and_languages() -> None:
    page = "a\n```python\nx = 1\n```\n```text\nno\n```\n```python\ny = 2\n```\n"
    assert blocks(page, "python") == [(2, "x = 1\n"), (8, "y = 2\n")]


def test_an_error_in_a_block_is_on_the_line_of_the_page() -> None:
    ((line, code),) = blocks("a\n\n```python\n\nraise KeyError\n```\n", "python")
    with pytest.raises(KeyError) as raised:
        exec(compile("\n" * line + code, "page", "exec"), {})
    assert raised.traceback[-1].lineno + 1 == 5


# -- the reference ---------------------------------------------------------------------------------


def test_the_reference_has_every_public_name() -> None:
    pages = (ROOT / "docs" / "reference").glob("*.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = re.findall(r"^(?:::: composefit\.|## )(\w+)$", text, re.MULTILINE)
    assert set(composefit.__all__) <= set(found)
    assert len(found) == len(set(found))


# -- the errors ------------------------------------------------------------------------------------

#: A value that differs from case to case, on the page and in what is read from the sources.
VALUE = "…"
QUOTED = re.compile(r"^\| (`+)(\w+): (.+?)\1 \|", re.MULTILINE)
ERRORS = [(m[2], m[3]) for m in QUOTED.finditer((ROOT / "docs" / "errors.md").read_text("utf-8"))]


def messages(code: str) -> Iterator[tuple[str, str]]:
    """What is raised or warned in a file: the exception's name and its message.

    Of a message that is not written where it is raised, the name is empty.
    """
    tree = ast.parse(code)
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name == "warn":
                yield "UserWarning", text_of(node.args[0])
            elif re.fullmatch(r"\w*(Error|Warning|Exit|Interrupt)", name):
                yield name, text_of(node.args[0])
        elif isinstance(node, (ast.Constant, ast.JoinedStr)) and id(node) not in documentation:
            yield "", text_of(node)


def text_of(node: ast.expr) -> str:
    """A string with `VALUE` for all that is computed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return VALUE


def pattern(quoted: str) -> re.Pattern[str]:
    """Finds a quoted message in a source's; `VALUE` stands for anything."""
    return re.compile(".*".join(map(re.escape, quoted.split(VALUE))), re.DOTALL)


SOURCES = [
    message
    for path in (ROOT / "src").rglob("*.py")
    for message in messages(path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("name", "quoted"), ERRORS, ids=lambda value: str(value)[:40])
def test_a_message_of_the_errors_page_is_raised_somewhere(name: str, quoted: str) -> None:
    assert len(quoted.replace(VALUE, "").strip()) > 10
    assert any(found in (name, "") and pattern(quoted).search(text) for found, text in SOURCES)


def test_the_errors_page_quotes_messages() -> None:
    assert len(ERRORS) >= 60
    assert len(ERRORS) == len(set(ERRORS))


def test_messages_are_read_from_the_sources_as_they_are_raised() -> None:
    code = '''
"""Not a message."""
def f(x):
    """Nor this."""
    if x:
        raise TypeError(f"expected a {x}, " "got " + str(x))
    message = "later"
    raise ValueError(message)
'''
    found = list(messages(code))
    assert ("TypeError", "expected a …, got …") in found
    assert ("", "later") in found
    assert not any("Not a message" in text or "Nor this" in text for _, text in found)
    assert pattern("expected a …, got").search("expected a …, got …")
    assert not pattern("expected an …, got").search("expected a …, got …")


# -- the promise about checkpoints -----------------------------------------------------------------


class Regression(composefit.LoopModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(3, 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.net(batch).square().mean()


def test_the_keys_of_a_checkpoint_are_the_promised_ones(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?`) \|", text, re.MULTILINE)
    promised = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    trainer = composefit.Trainer(
        max_epochs=1, default_root_dir=tmp_path, enable_progress_bar=False, logger=False
    )
    trainer.fit(Regression(), [torch.zeros(2, 3)])
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    whole = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    weights = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert sorted(whole) == sorted(promised)
    assert sorted(weights) == sorted(promised[: promised.index("mid_step") + 1])


# -- the site --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_nobody_else(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    # Not --quiet: with it, mkdocs does not count the warnings that --strict is about.
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert built.returncode == 0, built.stderr
    fetching = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//')
    for page in tmp_path.rglob("*.html"):
        assert not fetching.search(page.read_text(encoding="utf-8")), page
