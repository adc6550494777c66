"""Which generator torch's own draws come from in this thread."""

import contextlib
import threading
from collections.abc import Iterator

import torch


class Entered(threading.local):
    """The generators that this thread has entered, innermost last."""

    def __init__(self) -> None:
        self.generators: list[torch.Generator] = []


entered = Entered()


def current_generator() -> torch.Generator | None:
    """The generator that this thread has entered last and not left, or None."""
    generators = entered.generators
    return generators[-1] if generators else None


@contextlib.contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Enter the generator in this thread."""
    entered.generators.append(generator)
    try:
        yield
    finally:
        entered.generators.pop()
