"""A notebook whose cells a test runs one by one, in a kernel of their own."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

Output = dict[str, Any]


class Notebook:
    """Runs cells, and interrupts them.

    Args:
        folder: the kernel's working directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.book = nbformat.v4.new_notebook()
        self.client = NotebookClient(
            self.book,
            kernel_name="python3",
            allow_errors=True,
            timeout=120,
            resources={"metadata": {"path": str(folder)}},
        )

    async def run(self, code: str, interrupt_at: str | None = None) -> list[Output]:
        """Run a cell to its end.

        Args:
            code: of the cell.
            interrupt_at: press the stop button as soon as there is a file of this name.

        Returns:
            The cell's outputs, as the notebook would store them.
        """
        cell = nbformat.v4.new_code_cell(code)
        self.book.cells.append(cell)
        running = asyncio.ensure_future(
            self.client.async_execute_cell(cell, len(self.book.cells) - 1)
        )
        if interrupt_at is not None:
            while not (self.folder / interrupt_at).exists():
                assert not running.done(), cell.outputs
                await asyncio.sleep(0.01)
            await self.client.km.interrupt_kernel()
        await running
        return list(cell.outputs)


def in_notebook(folder: Path, test: Callable[[Notebook], Awaitable[None]]) -> None:
    """Run a test with a kernel that ends with it."""

    async def run() -> None:
        notebook = Notebook(folder)
        path = os.pathsep.join(os.path.abspath(place) for place in sys.path)
        async with notebook.client.async_setup_kernel(env={**os.environ, "PYTHONPATH": path}):
            await test(notebook)

    asyncio.run(run())


def printed(outputs: list[Output]) -> str:
    """What a cell has printed."""
    return "".join(one["text"] for one in outputs if one["output_type"] == "stream")


def displayed(outputs: list[Output]) -> list[Output]:
    """What it shows besides, the last state of each."""
    return [one["data"] for one in outputs if one["output_type"] == "display_data"]


def raised(outputs: list[Output]) -> list[str]:
    """The names of the errors that it ended with."""
    return [one["ename"] for one in outputs if one["output_type"] == "error"]
