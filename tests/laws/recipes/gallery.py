"""The files of `examples/recipes`, as modules."""

import importlib
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[3] / "examples" / "recipes"


def example(name: str) -> Any:
    """The file of a recipe, as a module."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
