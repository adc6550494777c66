"""Packages that only some loggers need."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import a module that an extra brings, when somebody asks for what needs it.

    Raises:
        ModuleNotFoundError: it is not installed; says what to install.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'there is no module {error.name}: write pip install "composefit[{extra}]"',
            name=error.name,
        ) from error
