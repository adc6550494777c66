"""Hooks of the site's build: the repository's pages outside of `docs/`, and links to them.

The pages are written to be read on a repository's site too, where a link to `../CHANGELOG.md`
works. Here such files become pages of the site, and the links follow.
"""

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)\s#]+)")

#: What is where in the repository -> where on the site.
PLACES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    **{f"examples/{path.name}": "examples.md" for path in ROOT.glob("examples/*.py")},
    "examples/recipes": "recipes-code.md",
    **{
        f"examples/recipes/{path.name}": f"recipes-code.md#{path.stem}py"
        for path in ROOT.glob("examples/recipes/*.py")
    },
}
COPIED = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add what lies outside of `docs/`."""
    for source in COPIED:
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, PLACES[source], content=text))
    files.append(File.generated(config, "examples.md", content=examples()))
    files.append(File.generated(config, "recipes-code.md", content=recipes()))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links that lead out of `docs/` lead to the page on the site."""
    here = page.file.src_uri
    sources = {place: source for source, place in PLACES.items() if source in COPIED}
    folder = posixpath.dirname(sources.get(here, f"docs/{here}"))

    def follow(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[2]))
        place = PLACES.get(target)
        if place is None and here in sources and target.startswith("docs/"):
            place = target.removeprefix("docs/")
        if place is None:
            return found[0]
        return found[1] + posixpath.relpath(place, posixpath.dirname(here) or ".")

    return LINK.sub(follow, markdown)


def examples() -> str:
    """The page of the examples: each file's docstring, and its code."""
    parts = ["# Examples\n\nEach is a program of its own, in `examples/`, and runs in the tests.\n"]
    for path in sorted(ROOT.glob("examples/*.py")):
        said, code = docstring_and_code(path)
        title = path.stem.replace("_", " ").replace("gan", "GAN")
        parts.append(f"## {title[0].upper()}{title[1:]}\n\n`{path.name}`: {said}\n")
        parts.append(f"```python\n{code}\n```\n")
    return "\n".join(parts)


def recipes() -> str:
    """The page of the recipes' code: those, and last what they share."""
    parts = ["# The recipes' code\n\nWhat each shows is in [the recipes](recipes.md).\n"]
    paths = ROOT.glob("examples/recipes/*.py")
    for path in sorted(paths, key=lambda path: (path.name[0] == "_", path.name)):
        said, code = docstring_and_code(path)
        parts.append(f"## {path.name}\n\n{said}\n\n```python\n{code}\n```\n")
    return "\n".join(parts)


def docstring_and_code(path: Path) -> tuple[str, str]:
    """What a file says of itself, and what comes after that."""
    code = path.read_text(encoding="utf-8")
    tree = ast.parse(code)
    said = ast.get_docstring(tree) or ""
    if said:
        code = "".join(code.splitlines(keepends=True)[tree.body[0].end_lineno :])
    return said, code.strip("\n")
