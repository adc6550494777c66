"""The numbers of a history inside a page: exact, small, and nothing that a browser would run."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping

import numpy as np

from composefit.history import Track
from composefit.report.drawing import Numbers


def embedded(tracks: Mapping[str, Track], ends: tuple[float, float]) -> str:
    """The text of a `<script type="application/json">`.

    It holds `x`, the steps at both ends of all axes; `curves`, for each metric its name and, under
    `step`, `epoch`, `seconds` and `value`, places in `columns`; and `columns`, each the name of a
    type, `f4` or `f8`, and the little-endian numbers in base64.

    Args:
        tracks: name of a metric -> its points.
        ends: the first and the last step of all axes.

    Returns:
        JSON without `<`, `>` and `&`, so that no name can end the element.
    """
    columns: dict[str, int] = {}

    def place(values: Numbers) -> int:
        return columns.setdefault(packed(values), len(columns))

    curves = [
        {"name": name}
        | {kind: place(track.column(kind).double().numpy()) for kind in ("step", "epoch")}
        # Shown in whole seconds: half the size will do.
        | {"seconds": place(track.column("seconds").float().double().numpy())}
        | {"value": place(track.column("value").numpy())}
        for name, track in tracks.items()
    ]
    text = json.dumps({"x": ends, "curves": curves, "columns": list(columns)})
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def packed(values: Numbers) -> str:
    """Numbers as text: in single precision where that is exact."""
    with np.errstate(over="ignore"):
        single = values.astype("<f4")
    exact = np.array_equal(single.astype("<f8"), values, equal_nan=True)
    kind, data = ("f4", single) if exact else ("f8", values.astype("<f8"))
    return f"{kind} {base64.b64encode(data.tobytes()).decode()}"


def unpacked(text: str) -> Numbers:
    """Back from `packed`."""
    kind, _, data = text.partition(" ")
    return np.frombuffer(base64.b64decode(data), dtype=f"<{kind}").astype(np.float64)
