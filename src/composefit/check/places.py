"""Where in the user's code an operation was called, and in which part of a module."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import torch

from composefit import losses

_INSIDE = (
    *(str(Path(file).parent) for file in (torch.__file__, __file__) if file),
    str(Path(__file__).parents[1]),
    "<string>",
)
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def place(names: Mapping[int, str]) -> tuple[str | None, str | None] | None:
    """The part of a module that runs, and the user's file and line.

    Args:
        names: of the parts, by their ids.

    Returns:
        Either is None where the stack does not show it. None instead of both within the arithmetic
        of `Mean` and `Sum`, which is not the user's.
    """
    module = where = library = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (module is None or where is None):
        file = frame.f_code.co_filename
        if file == losses.__file__:
            return None
        if module is None and "self" in frame.f_locals:
            module = names.get(id(frame.f_locals["self"]))
        if where is None and not file.startswith(_INSIDE):
            here = f"{file}:{frame.f_lineno}"
            library = library or here
            if not file.startswith(_LIBRARIES):
                where = here
        frame = frame.f_back
    return module, where or library
