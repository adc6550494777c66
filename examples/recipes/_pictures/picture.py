"""What a picture of a recipe is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from _common import Result
from matplotlib.figure import Figure
from torch import Tensor

from .recording import Run

NEVER = 10**9


class Recorded(NamedTuple):
    """What there is to draw: the recipe's file, its fits in their order, and its result."""

    recipe: Any
    runs: list[Run]
    result: Result


@dataclass(frozen=True)
class Picture:
    """How a recipe is pictured.

    Attributes:
        draw: on an empty figure, what was recorded.
        look: the recipe's file, and a module of it -> what is to be kept of it as it is then.
        every: how many steps to look; before the first and after the last in any case.
        height: of the picture, in inches; it is six wide.
        also: arguments of `main` for a second training beside the first.
    """

    draw: Callable[[Figure, Recorded], None]
    look: Callable[[Any, Any], Any] = lambda recipe, module: None
    every: int = NEVER
    height: float = 2.3
    also: dict[str, Any] = field(default_factory=dict)


def noise(*shape: int) -> Tensor:
    """The same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))
