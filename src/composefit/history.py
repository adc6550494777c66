"""What a run has logged, in memory: bounded, in the checkpoint, and what a report is made of."""

from __future__ import annotations

import math
import time
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from composefit.images import Image
from composefit.loggers.logger import Logger

#: Points that a metric keeps before they are thinned.
LIMIT = 4000

#: Pictures that a name keeps before they are thinned.
PICTURES = 8


class Point(NamedTuple):
    """One value of a metric, and what was thinned out beside it.

    Attributes:
        step: steps done when it was logged.
        epoch: the epoch then, from 0.
        seconds: since the run began, without the time between a stop and its resumption.
        value: as it was logged.
        low: the smallest finite value of those it stands for, its own among them; NaN without any.
        high: the largest.
        size: how many values it stands for.
    """

    step: int
    epoch: int
    seconds: float
    value: float
    low: float
    high: float
    size: int


class Track:
    """The points of one metric, in the order in which they came.

    At `limit` points they are thinned evenly: neighbours are grouped, of each group one stays as
    it was, and the range of the others stays with it. The first, the last, the lowest and the
    highest point always stay, and what is not finite outlives what is.

    Args:
        limit: points kept at most.

    Example:
        >>> track = Track(limit=8)
        >>> for step in range(10):
        ...     track.add(step, 0, 0.0, value=step % 5)
        >>> [(point.step, point.value) for point in track]
        [(0, 0.0), (2, 2.0), (4, 4.0), (6, 1.0), (8, 3.0), (9, 4.0)]
    """

    #: Column -> its type, as `array` and torch name it.
    COLUMNS: ClassVar = {
        "step": ("q", torch.int64),
        "epoch": ("i", torch.int32),
        "seconds": ("d", torch.float64),
        "value": ("d", torch.float64),
        "low": ("d", torch.float64),
        "high": ("d", torch.float64),
        "size": ("q", torch.int64),
    }

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.columns: dict[str, array[Any]] = {}
        self._fill([])

    def __len__(self) -> int:
        return len(self.columns["step"])

    def __iter__(self) -> Iterator[Point]:
        return map(Point._make, zip(*self.columns.values(), strict=True))

    def add(self, step: int, epoch: int, seconds: float, value: float) -> None:
        """Append a point, thinning the others first where there are too many."""
        if len(self) >= self.limit:
            self._thin()
        bound = value if math.isfinite(value) else math.nan
        self._append(Point(step, epoch, seconds, value, bound, bound, 1))

    def drop_after(self, step: int) -> None:
        """Forget the points of later steps."""
        self._fill([point for point in self if point.step <= step])

    def column(self, name: str) -> Tensor:
        """A column as a tensor of its own, (points,): a name and dtype of `COLUMNS`."""
        kind = self.COLUMNS[name][1]
        data = self.columns[name]
        return torch.frombuffer(bytearray(data.tobytes()), dtype=kind) if data else torch.empty(0)

    @property
    def thinned(self) -> bool:
        """Whether some point stands for several."""
        return any(size > 1 for size in self.columns["size"])

    def state_dict(self) -> dict[str, Tensor]:
        """The columns; the ranges only where there are any."""
        names = list(self.COLUMNS) if self.thinned else ["step", "epoch", "seconds", "value"]
        return {name: self.column(name) for name in names}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        columns = [state[name].tolist() for name in ("step", "epoch", "seconds", "value")]
        self._fill([])
        if "size" in state:
            columns += [state[name].tolist() for name in ("low", "high", "size")]
            self._fill([Point(*row) for row in zip(*columns, strict=True)])
        else:
            for row in zip(*columns, strict=True):
                self.add(*row)

    def _append(self, point: Point) -> None:
        for column, item in zip(self.columns.values(), point, strict=True):
            column.append(item)

    def _fill(self, points: list[Point]) -> None:
        self.columns = {name: array(code) for name, (code, _) in self.COLUMNS.items()}
        for point in points:
            self._append(point)

    def _thin(self) -> None:
        """Group neighbours to the size of the groups there are, and else to twice that size."""
        points = list(self)
        size = max(self.columns["size"])
        groups = _grouped(points, size)
        # A quarter is to be free afterwards, or this would come again at every few points.
        while len(groups) > self.limit * 3 // 4:
            size *= 2
            groups = _grouped(points, size)
        self._fill(groups)


def _grouped(points: list[Point], size: int) -> list[Point]:
    """Join neighbours that together stand for no more than `size` values."""
    finite = [i for i, point in enumerate(points) if math.isfinite(point.value)]
    stay = {0}
    if finite:
        stay |= {min(finite, key=lambda i: points[i].value)}
        stay |= {max(finite, key=lambda i: points[i].value)}
    groups: list[Point] = []
    before = 2  # how much the last group's point wants to stay: 2 it must, 1 it is not finite
    for i, point in enumerate(points):
        wish = 2 if i in stay else int(not math.isfinite(point.value))
        full = not groups or groups[-1].size + point.size > size
        if full or (wish and before and max(wish, before) == 2):
            groups.append(point)
            before = wish
            continue
        last = groups[-1]
        lows = [low for low in (last.low, point.low) if low == low]
        highs = [high for high in (last.high, point.high) if high == high]
        groups[-1] = (point if wish > before else last)._replace(
            low=min(lows, default=math.nan),
            high=max(highs, default=math.nan),
            size=last.size + point.size,
        )
        before = max(wish, before)
    return groups


@dataclass(frozen=True, slots=True)
class Picture:
    """A logged picture.

    Attributes:
        step: steps done when it was logged.
        caption: what it shows; may be empty.
        png: the file's bytes.
    """

    step: int
    caption: str
    png: bytes


class History(Logger):
    """Keeps in memory what loggers get, so that `trainer.report()` can show it.

    A metric keeps at most 4,000 points, see `Track`; a picture's name keeps 8 pictures, the first
    and the latest among them. All of it is in the checkpoint: a resumed run goes on with the same
    curves, and its clock with the time that was trained.

    Args:
        limit: points that a metric keeps at most; at least 8.

    Attributes:
        tracks: name of a metric -> its points.
        pictures: name of a picture -> those kept.
        status: `"running"`, or how the run ended: `"finished"` or `"failed"`.

    Raises:
        ValueError: `limit` is less than 8.

    Example:
        >>> history = History()
        >>> history.log_metrics({"loss": 0.5, "epoch": 0}, step=10)
        >>> history.log_metrics({"loss": 0.25, "epoch": 1}, step=20)
        >>> steps, values = history.curves()["loss"]
        >>> steps.tolist(), values.tolist()
        ([10, 20], [0.5, 0.25])
    """

    def __init__(self, limit: int = LIMIT) -> None:
        if limit < 8:
            raise ValueError(f"History(limit=...) expects at least 8 points, got {limit!r}")
        self.limit = limit
        self.begin()

    def begin(self) -> None:
        """A new run: forget the one before, and start the clock."""
        self.tracks: dict[str, Track] = {}
        self.pictures: dict[str, list[Picture]] = {}
        self.status = "running"
        self._before = 0.0
        self._since: float | None = time.monotonic()

    # -- what a logger does --------------------------------------------------------------------

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Add a point to the curve of each metric.

        Args:
            metrics: name -> number; the epoch, from 0, among them as `"epoch"`. None is left out.
            step: steps done so far.

        Raises:
            TypeError: a value that is no number.
        """
        epoch = int(metrics["epoch"]) if "epoch" in metrics else self.epoch
        seconds = self.seconds
        for name, value in metrics.items():
            if name == "epoch" or value is None:
                continue
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise TypeError(f"metric {name!r} is no number: got {value!r}") from None
            if name not in self.tracks:
                self.tracks[name] = Track(self.limit)
            self.tracks[name].add(step, epoch, seconds, number)

    def log_image(self, name: str, image: Image, step: int) -> None:
        """Keep a picture, as PNG."""
        kept = self.pictures.setdefault(name, [])
        kept.append(Picture(step, image.caption, image.png()))
        if len(kept) > PICTURES:
            del kept[1::2]

    def finalize(self, status: str) -> None:
        """Stop the clock. What is logged afterwards is still kept."""
        self.status = status
        self._before, self._since = self.seconds, None

    # -- what a report reads -------------------------------------------------------------------

    def curves(self) -> dict[str, tuple[Tensor, Tensor]]:
        """All curves.

        Returns:
            name -> steps, (points,), int64; values, (points,), float64.
        """
        return {n: (one.column("step"), one.column("value")) for n, one in self.tracks.items()}

    @property
    def seconds(self) -> float:
        """Seconds trained so far."""
        return self._before + (0.0 if self._since is None else time.monotonic() - self._since)

    def last_step(self, name: str) -> int:
        """The last step at which this was logged; 0 where it never was."""
        return self.tracks[name].columns["step"][-1] if name in self.tracks else 0

    @property
    def step(self) -> int:
        """The last step at which something was logged; 0 before the first."""
        return max((one.columns["step"][-1] for one in self.tracks.values()), default=0)

    @property
    def epoch(self) -> int:
        """The epoch of the last step at which something was logged, from 0.

        What is logged between two epochs, or after the last, does not make it a later one.
        """
        last = self.step
        at_last = [one.columns for one in self.tracks.values() if one.columns["step"][-1] == last]
        return min((at["epoch"][bisect_left(at["step"], last)] for at in at_last), default=0)

    # -- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that is kept, as tensors, numbers and text."""
        tracks = {name: one.state_dict() for name, one in self.tracks.items()}
        # Metrics that are logged together have steps and times in common: one storage, saved once.
        shared: dict[tuple[torch.dtype, bytes], Tensor] = {}
        for columns in tracks.values():
            for name, column in columns.items():
                key = column.dtype, column.numpy().tobytes()
                columns[name] = shared.setdefault(key, column)
        pictures = {
            name: [
                {
                    "step": one.step,
                    "caption": one.caption,
                    "png": torch.frombuffer(bytearray(one.png), dtype=torch.uint8),
                }
                for one in kept
            ]
            for name, kept in self.pictures.items()
        }
        return {"seconds": self.seconds, "tracks": tracks, "pictures": pictures}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Args:
            state: what `state_dict` gave, and `"step"`, the steps done then: points of later ones
                are dropped.
        """
        last = state.get("step", math.inf)
        self.begin()
        self._before = state["seconds"]
        for name, columns in state["tracks"].items():
            track = Track(self.limit)
            track.load_state_dict(columns)
            track.drop_after(last)
            if len(track):
                self.tracks[name] = track
        for name, kept in state["pictures"].items():
            pictures = [
                Picture(one["step"], one["caption"], one["png"].cpu().numpy().tobytes())
                for one in kept
                if one["step"] <= last
            ]
            if pictures:
                self.pictures[name] = pictures
