"""Runs of a trainer in processes of its own."""

from __future__ import annotations

from typing import Any


def call(trainer: Any, method: str, module: Any, given: dict[str, Any]) -> Any:
    """Not built yet."""
    raise NotImplementedError
