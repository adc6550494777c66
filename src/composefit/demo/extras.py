"""What the demo needs beyond the package itself."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

#: Name of a module -> name of the distribution that brings it.
NEEDED: Mapping[str, str] = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def require_extras(needed: Mapping[str, str] = NEEDED) -> None:
    """Refuse to start where something is missing, before any import of it fails.

    Args:
        needed: name of a module -> name of the distribution that brings it.

    Raises:
        ModuleNotFoundError: one of the modules is not installed; the message gives the command.
    """
    missing = [name for module, name in needed.items() if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the demo needs {' and '.join(missing)}, which a plain composefit does not bring: "
            'pip install "composefit[demo]"'
        )
