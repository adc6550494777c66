"""Names of files after what was logged."""

from __future__ import annotations

import re
import string
from typing import Any

from torch import Tensor

from composefit.checkpoint import plain_name


class FileName:
    """A template such as `"{epoch:02d}-{val_loss:.3f}"`, checked before anything is trained.

    Args:
        text: with fields named `epoch`, `step`, or like a logged value, formatted as by
            `str.format`; without folders and without `.ckpt`.
        insert_names: whether `{epoch}` becomes `epoch=3`, not `3`.

    Attributes:
        fields: the logged values that it needs.

    Raises:
        TypeError: `text` is no str.
        ValueError: it is no template, or could lead out of its folder.

    Example:
        >>> FileName("{epoch:02d}-{val/loss:.3f}", True).fill({"epoch": 3, "val/loss": 0.125})
        'epoch=03-val_loss=0.125'
    """

    def __init__(self, text: str, insert_names: bool) -> None:
        if not isinstance(text, str):
            raise TypeError(f"filename must be a str such as '{{epoch}}-{{step}}', got {text!r}")
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"filename={text!r} is no template: {error}") from None
        self.text = text
        self.insert_names = insert_names
        self.parts = parts
        self.fields = {field for _, field, _, _ in parts if field is not None}
        if "" in self.fields or any(field.isdigit() for field in self.fields):
            raise ValueError(
                f"filename={text!r} has a field without a name: write {{epoch}}, {{step}} or the "
                "name of a logged value"
            )
        literal = "".join(part[0] for part in parts)
        if text.endswith(".ckpt") or text == "last":
            raise ValueError(
                f"filename={text!r}: leave .ckpt out, it is added, and last.ckpt is the file of "
                "the latest state"
            )
        plain_name("-" + literal)
        self.fields -= {"epoch", "step"}

    def fill(self, values: dict[str, Any]) -> str:
        """The name, without an ending; of logged names nothing stays that could leave the folder.

        Args:
            values: of `epoch`, `step` and all `fields`: numbers, or 0-dim tensors.

        Raises:
            ValueError: a value does not fit its format.
        """
        found = []
        for literal, field, spec, conversion in self.parts:
            found.append(literal)
            if field is None:
                continue
            value = values[field]
            number = value.item() if isinstance(value, Tensor) else value
            try:
                text = format(str(number) if conversion else number, spec or "")
            except ValueError as error:
                raise ValueError(
                    f"filename={self.text!r}: {field} = {number!r} cannot be written so: {error}"
                ) from None
            label = re.sub(r"[^\w.+-]", "_", field) + "=" if self.insert_names else ""
            found.append(label + text)
        return plain_name("".join(found))
