"""Every Python block of the documentation runs, and every link leads somewhere.

The blocks of a page share their names, as in a notebook. A block that must not run is fenced as
`text` or `console`.
"""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language: the line on which each begins, and its code."""
    return [
        (text.count("\n", 0, found.start(2)), found[2])
        for found in FENCE.finditer(text)
        if found[1] == language
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


WITH_CODE = [page for page in PAGES if blocks(page.read_text(encoding="utf-8"), "python")]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = ModuleType("page")  # for what looks its names up by `__module__`
    monkeypatch.setitem(sys.modules, "page", module)
    for line, code in blocks(page.read_text(encoding="utf-8"), "python"):
        # The empty lines make a traceback show the line of the page.
        exec(compile("\n" * line + code, page, "exec"), vars(module))


def test_the_pages_with_code_are_these() -> None:
    assert [name_of(page) for page in WITH_CODE] == [
        "README.md",
        "docs/step.md",
        "docs/strategies.md",
        "docs/why.md",
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
    """What links to a page's headings look like on GitHub."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_picture_of_the_lockstep_is_what_its_script_draws() -> None:
    script = ROOT / "docs" / "pictures" / "lockstep.py"
    spec = importlib.util.spec_from_file_location("lockstep_picture", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert script.with_suffix(".svg").read_text(encoding="utf-8") == module.picture()


def test_blocks_are_read_with_their_lines_and_languages() -> None:
    page = "a\n```python\nx = 1\n```\n```text\nno\n```\n```python\ny = 2\n```\n"
    assert blocks(page, "python") == [(2, "x = 1\n"), (8, "y = 2\n")]


def test_an_error_in_a_block_is_on_the_line_of_the_page() -> None:
    ((line, code),) = blocks("a\n\n```python\n\nraise KeyError\n```\n", "python")
    with pytest.raises(KeyError) as raised:
        exec(compile("\n" * line + code, "page", "exec"), {})
    assert raised.traceback[-1].lineno + 1 == 5
