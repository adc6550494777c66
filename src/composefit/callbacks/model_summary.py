"""What is about to be trained, and by which optimizer: two tables before training starts."""

import math
from collections.abc import Iterable
from typing import Any

from rich import box, get_console
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.nn.parameter import is_lazy

from composefit.callbacks.callback import Callback
from composefit.callbacks.printing import print_table


class ModelSummary(Callback):
    """Prints the module's children and the optimizers before training.

    One table lists the module's direct children: class, number of parameters, how many of them are
    trainable, and their size in MiB (2**20 bytes). The other lists the optimizers: class, number of
    parameters, learning rates; trainable parameters that no optimizer was given have a row of their
    own. A parameter that several children share counts in each, and once in the total. When the
    first batch is there, a line says how the strategy cuts it (``32 = 2 threads x 16``), which
    ``trainer.describe_batch(batch)`` tells (None where the size of a batch is not known).

    The trainer brings one along for ``enable_model_summary=True``; it is printed by rank zero, in
    the first ``on_fit_start`` of a run, after ``configure_optimizers``. Without a terminal the
    tables are plain text as wide as they need to be.

    Args:
        console: Where to print; ``rich.get_console()`` if None.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._printed = False
        self._describe_next_batch = False

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Once in a run, however often its loop trains."""
        self._printed = False
        self._describe_next_batch = False

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Print both tables."""
        if self._printed or not trainer.is_global_zero:
            return
        self._printed = True
        console = self._console or get_console()
        print_table(console, Padding(_children_table(module), (1, 1)))
        if trainer.optimizers:
            content = Padding(_optimizers_table(module, trainer.optimizers), (0, 1, 1, 1))
            print_table(console, content)
        self._describe_next_batch = True

    batch_interval = math.inf  # the first batch of an epoch is enough

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Print how the strategy cuts the fit's first batch."""
        if self._describe_next_batch:
            self._describe_next_batch = False
            cut = trainer.describe_batch(batch)
            if cut is not None:
                line = Text.assemble(("  one batch  ", "bright_black"), cut, "\n")
                # Through the console, since a progress bar may be on it already.
                print_table(self._console or get_console(), line)


def _children_table(module: nn.Module) -> Table:
    table = _table("module", "type", right=("parameters", "trainable", "MiB"))
    for name, child in module.named_children():
        table.add_row(Text(name), Text(type(child).__name__), *_sizes(child.parameters()))
    own = list(module.parameters(recurse=False))
    if own:
        table.add_row(Text("(itself)"), Text(type(module).__name__), *_sizes(own))
    table.add_section()
    total = (Text("total"), Text(type(module).__name__), *_sizes(module.parameters()))
    table.add_row(*total, style="bold")
    return table


def _optimizers_table(module: nn.Module, optimizers: dict[str, Any]) -> Table:
    table = _table("optimizer", "type", right=("parameters", "lr"))
    owned: set[int] = set()
    for name, named in optimizers.items():
        parameters = list(named.parameters())
        owned.update(map(id, parameters))
        # dict.fromkeys: each rate once, in the order of the groups
        rates = dict.fromkeys(
            f"{float(g['lr']):.4g}" for g in named.optimizer.param_groups if "lr" in g
        )
        table.add_row(
            Text(name),
            Text(type(named.optimizer).__name__),
            _count(parameters),
            ", ".join(rates) or "-",
        )
    left = [p for p in module.parameters() if p.requires_grad and id(p) not in owned]
    if left:
        table.add_row("none", "", _count(left), "-", style="yellow")
    return table


def _table(*left: str, right: tuple[str, ...]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, header_style="cyan", border_style="bright_black"
    )
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _sizes(parameters: Iterable[nn.Parameter]) -> tuple[str, str, str]:
    """Total, trainable, MiB."""
    all_of_them = list(parameters)
    size = sum(p.numel() * p.element_size() for p in all_of_them if not is_lazy(p))
    trainable = [p for p in all_of_them if p.requires_grad]
    return _count(all_of_them), _count(trainable), f"{size / 2**20:,.2f}"


def _count(parameters: list[nn.Parameter]) -> str:
    count = f"{sum(p.numel() for p in parameters if not is_lazy(p)):,}"
    # A lazy module's parameters have no shape before its first forward.
    return f"{count} + lazy" if any(map(is_lazy, parameters)) else count
