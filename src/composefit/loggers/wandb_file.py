"""The local file of a W&B run, which W&B's own package writes but does not read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from composefit.loggers.extras import require

_HEADER = 7  # bytes: ":W&B", a magic number, a version
_BLOCK = 32768
_FULL, _FIRST, _LAST = 1, 2, 4


class Entry(NamedTuple):
    """A row of the run's history, or of its summary, which W&B keeps up to date beside it."""

    begin: int  # offset of its first byte in the file
    end: int
    is_row: bool
    values: dict[str, Any]


def entries(path: Path, begin: int = 0) -> Iterator[Entry]:
    """The entries of a file as far as it is written, in order.

    Args:
        path: a `run-<id>.wandb`; a process may still be writing it.
        begin: the `end` of an entry, to go on behind it.

    Source: the log format of LevelDB: records in blocks of 32 KiB, cut where a block ends.
    """
    read = require("wandb.proto.wandb_internal_pb2", "wandb").Record.FromString
    with open(path, "rb") as file:
        at = max(begin, _HEADER)
        first, record = at, b""
        while True:
            if _BLOCK - at % _BLOCK < _HEADER:  # too short for a record: left empty
                at += _BLOCK - at % _BLOCK
            file.seek(at)
            head = file.read(7)
            if len(head) < 7:
                return
            _, length, kind = struct.unpack("<IHB", head)
            data = file.read(length)
            if len(data) < length or not kind:
                return
            if kind in (_FULL, _FIRST):
                first, record = at, b""
            record += data
            at += 7 + length
            if kind in (_FULL, _LAST):
                found = read(record)
                if found.HasField("history"):
                    yield Entry(first, at, True, _values(found.history.item))
                elif found.HasField("summary"):
                    yield Entry(first, at, False, _values(found.summary.update))


def cut(path: Path, name: str, last: float) -> None:
    """Cut a file off before the first entry whose value `name` is above `last`."""
    for entry in entries(path):
        if entry.values.get(name, last) > last:
            os.truncate(path, entry.begin)
            return


def _values(items: Any) -> dict[str, Any]:
    """Only those at the top: W&B writes a picture as several items below one name."""
    found = {}
    for item in items:
        keys = list(item.nested_key) or [item.key]
        if len(keys) == 1:
            found[keys[0]] = json.loads(item.value_json)
    return found
