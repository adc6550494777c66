"""The logger that is always there: a table that every tool reads."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from composefit.checkpoint import plain_name, replacing
from composefit.images import Image
from composefit.loggers.logger import Logger, run_folder


class CSVLogger(Logger):
    """Writes `metrics.csv`: a row per call, a column per metric.

    The columns are `step`, `epoch`, and the metrics in the order in which they first came; what a
    row does not have is empty. A file that is there already is continued; a resumed run first
    removes the rows from after its checkpoint. A metric that comes later makes the file be written
    anew, in one piece. Names and text that a spreadsheet would take for a formula get an
    apostrophe in front.

    Args:
        save_dir: the folder of all runs; made when there is something to write.
        name: a folder in it; `""` for none.
        version: a folder in that one; `""` for none.
        filename: the file in the last of these folders.
        flush_every: rows that are kept in memory before they are written together. Values are
            converted only then, so logging a tensor does not wait for its device.

    Raises:
        TypeError: `name`, `version` or `filename` is no str, or `flush_every` no int.
        ValueError: one of the names leads out of its folder, `flush_every` is not at least 1, or
            the file that is there is none of this logger's.
    """

    log_dir: Path

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str = "",
        version: str = "",
        filename: str = "metrics.csv",
        flush_every: int = 100,
    ) -> None:
        if not isinstance(flush_every, int) or isinstance(flush_every, bool):
            raise TypeError(f"flush_every must be an int, got {flush_every!r}")
        if flush_every < 1:
            raise ValueError(f"flush_every must be at least 1 (rows), got {flush_every}")
        self.log_dir = run_folder(save_dir, name, version)
        self.path = self.log_dir / plain_name(filename)
        self.flush_every = flush_every
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] | None = None  # of the file, once this logger has written it
        self._resumed_at = math.inf  # a row of the file that has a later step is to go
        self._columns_there()  # a foreign file is refused now, not after hours of training

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Add a row.

        Raises:
            ValueError: a metric is called `step`, or the file there is none of this logger's.
            OSError: the rows could not be written.
        """
        if "step" in metrics:
            raise ValueError("the column 'step' holds the step itself: log under another name")
        self._rows.append({"step": step, **metrics})
        if len(self._rows) >= self.flush_every:
            self.flush()

    def log_image(self, name: str, image: Image, step: int) -> None:
        """Write `images/<name>-<step>.png` beside the table.

        What a file's name cannot have is written as in a URL: `critic%2Ffakes-100.png`.

        Raises:
            OSError: the file could not be written.
        """
        with replacing(self.log_dir / "images" / f"{quote(name, safe='')}-{step}.png") as file:
            file.write(image.png())

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        """Write the settings as JSON beside the table; what JSON does not have as its `repr`."""
        text = json.dumps(params, indent=2, default=repr) + "\n"
        with replacing(self.path.with_suffix(".hparams.json")) as file:
            file.write(text.encode())

    def finalize(self, status: str) -> None:
        """Write the rows that are still in memory."""
        self.flush()

    def flush(self) -> None:
        """Write the rows that are still in memory.

        Raises:
            ValueError: the file there is none of this logger's.
            OSError: the rows could not be written.
        """
        if not self._rows:
            return
        rows = [{_safe(name): _cell(v) for name, v in row.items()} for row in self._rows]
        before = self._columns_there() if self._columns is None else self._columns
        names = ["step", "epoch", *before, *(name for row in rows for name in row)]
        columns = list(dict.fromkeys(names))
        if columns == self._columns and self.path.exists():
            self._append(_table(columns, rows))
        else:
            self._write_anew(columns, rows)
            self._columns = columns
            self._resumed_at = math.inf
        self._rows.clear()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the rows from after the checkpoint removed when the next ones are written."""
        self._resumed_at = state["step"]
        self._rows = [row for row in self._rows if row["step"] <= self._resumed_at]
        self._columns = None  # so that the file is written anew

    def _append(self, data: bytes) -> None:
        # Unbuffered, so that after a failure nothing is left that closing would write.
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
            except BaseException:
                file.truncate(end)
                raise

    def _write_anew(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        with replacing(self.path) as file:
            file.write(_table(columns, [dict(zip(columns, columns, strict=True))]))
            for row in self._rows_there():
                file.write(_table(columns, [row]))
            file.write(_table(columns, rows))

    def _columns_there(self) -> list[str]:
        """The columns of the file as it is; none if there is no file."""
        if not self.path.exists():
            return []
        with open(self.path, encoding="utf-8", newline="") as file:
            columns = next(csv.reader(_whole_lines(file)), [])
        if columns and columns[0] != "step":
            raise ValueError(
                f"{self.path} is no table of metrics, its first column is {columns[0]!r}: give "
                "CSVLogger another folder or filename"
            )
        return columns

    def _rows_there(self) -> Iterator[dict[str, str]]:
        """The file's whole rows, but for those from after the checkpoint of a resumed run."""
        if not self.path.exists():
            return
        with open(self.path, encoding="utf-8", newline="") as file:
            reader = csv.reader(_whole_lines(file))
            columns = next(reader, [])
            for row in reader:
                if len(row) == len(columns) and int(row[0]) <= self._resumed_at:
                    yield dict(zip(columns, row, strict=True))


def _whole_lines(file: Iterable[str]) -> Iterator[str]:
    """Without the end of a file whose writer was killed in the middle of a line."""
    return (line for line in file if line.endswith("\n"))


def _table(columns: list[str], rows: Iterable[dict[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return _safe(value)
    if isinstance(value, int):
        return str(int(value))  # a bool as 0 or 1
    return repr(float(value))  # the shortest text that reads back as the same number


def _safe(text: str) -> str:
    """Text that no spreadsheet takes for a formula.

    Source: OWASP, "CSV Injection". An apostrophe in front gets another one, so that different
    names stay different.
    """
    # The csv module before Python 3.13 writes a bare carriage return without quotes.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\n", "'")) else text
