"""Tables where there is no terminal."""

from io import StringIO

from rich.console import Console, RenderableType


def print_table(console: Console, content: RenderableType) -> None:
    """Print in colour to a terminal; elsewhere as plain text, as wide as it needs to be.

    Args:
        console: where to.
        content: anything that rich renders.
    """
    if console.is_terminal and console.file.isatty():
        console.print(content)
        return
    # A file has no width to fit into, and a console asked for colour gives it to files too.
    wide = Console(
        file=StringIO(), width=10_000, color_system=None, force_terminal=False, force_jupyter=False
    )
    with wide.capture() as capture:
        wide.print(content)
    lines = (line.rstrip() for line in capture.get().splitlines())
    print("\n".join(lines), file=console.file, flush=True)
