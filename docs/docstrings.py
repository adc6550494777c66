"""An extension of griffe, which reads the docstrings of the reference."""

import re
from typing import Any

from griffe import Extension, Object

#: What the docstrings say, and what griffe knows it as.
WORDS = (
    (r"^(\s*)Example:$", r"\1Examples:"),
    # In a `Raises:`, which expects the name of a class.
    (r"^(\s*)Whatever ", r"\1Exception: whatever "),
)


class Wording(Extension):
    """Puts a docstring's words as griffe expects them."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """After an object was read from its source."""
        if obj.docstring is not None:
            for ours, theirs in WORDS:
                obj.docstring.value = re.sub(ours, theirs, obj.docstring.value, flags=re.MULTILINE)
