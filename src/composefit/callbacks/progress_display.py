"""Where a progress bar is shown: a terminal, a notebook, or a file."""

import sys
from collections.abc import Callable
from io import StringIO
from typing import Any, Protocol

from rich.console import Console
from rich.constrain import Constrain
from rich.live import Live
from rich.terminal_theme import TerminalTheme

from composefit.callbacks.progress_view import View, rendered

# A notebook does not tell how wide it is; so much stands in a cell beside which there is a sidebar.
_NOTEBOOK_WIDTH = 90


class Display(Protocol):
    """A place to show views, at most one every `interval` seconds.

    Attributes:
        live: a view takes the place of the one before.
        at_once: it is there from the beginning, before anything is done.
        interval: seconds.
    """

    live: bool
    at_once: bool
    interval: float

    def show(self, view: View) -> None:
        """Show how things stand."""

    def close(self) -> None:
        """Leave the last view, and put back whatever was changed to show it."""


def open_display(console: Console, interval: float, line_interval: float) -> Display:
    """What fits the place that a console writes to.

    Args:
        console: where to.
        interval: seconds between two views where they are drawn in place.
        line_interval: seconds between two lines elsewhere.
    """
    # Asked of the file too: FORCE_COLOR makes a console call any file a terminal.
    if console.is_interactive and console.file.isatty():
        return LiveDisplay(console, interval)
    if console.is_jupyter and console.file is sys.stdout:
        return NotebookDisplay(interval)
    return LineDisplay(console, line_interval)


class LineDisplay:
    """A file or a pipe: one plain line after the other, without control characters."""

    live = False
    at_once = False

    def __init__(self, console: Console, interval: float) -> None:
        self.interval = interval
        self._console = console

    def show(self, view: View) -> None:
        """Write a line."""
        # Not console.print, which breaks a line at the 80 columns that a file does not have.
        print(view.line(), file=self._console.file, flush=True)

    def close(self) -> None:
        """There is nothing to put back."""


class LiveDisplay:
    """A terminal: a few lines that are drawn anew in place; what is printed appears above them."""

    live = True
    at_once = True

    def __init__(self, console: Console, interval: float) -> None:
        self.interval = interval
        self._console = console
        # Without auto_refresh there is no thread, hence nothing that could outlive the run.
        self._live = Live(console=console, auto_refresh=False)

    def show(self, view: View) -> None:
        """Draw."""
        # Else the ^C that a terminal echoes at the end of the last line begins a new one, and the
        # next drawing stands a line too low.
        width = max(1, self._console.width - len("^C"))
        content = Constrain(rendered(view, width), width)
        self._live.update(content, refresh=self._live.is_started)
        if not self._live.is_started:
            self._live.start(refresh=True)

    def close(self) -> None:
        """Show the cursor again, and give back standard output."""
        self._live.stop()


class NotebookDisplay:
    """A notebook: one output of the cell, which is replaced by the next view."""

    live = True
    at_once = False  # what is printed at the beginning stands above it

    def __init__(self, interval: float) -> None:
        from IPython.display import display

        self.interval = interval
        self._display: Callable[..., Any] = display
        self._handle: Any = None

    def show(self, view: View) -> None:
        """Replace the output."""
        console = Console(
            file=StringIO(),
            record=True,
            width=_NOTEBOOK_WIDTH,
            force_terminal=True,
            force_jupyter=False,
            color_system="truecolor",
        )
        console.print(rendered(view, _NOTEBOOK_WIDTH))
        content = {
            "text/plain": console.export_text(clear=False),
            "text/html": console.export_html(theme=_THEME, inline_styles=True, code_format=_HTML),
        }
        if self._handle is None:
            self._handle = self._display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)

    def close(self) -> None:
        """The last view stays."""


# Colours that can be read on white and on black; the text itself has the notebook's.
_GREY = (140, 140, 140)
_THEME = TerminalTheme(
    background=(170, 170, 170),  # halfway to this is what is dim
    foreground=_GREY,
    normal=[_GREY] * 4 + [(60, 120, 240), _GREY, (0, 160, 190), _GREY],
    bright=[_GREY] * 8,
)
_HTML = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:normal;'
    "font-family:Menlo,'DejaVu Sans Mono',Consolas,monospace\">{code}</pre>"
)
