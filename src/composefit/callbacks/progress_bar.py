"""The progress bar: where a run stands, drawn by the thread that trains, at most every 0.1 s."""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich import get_console
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

from composefit.callbacks.callback import Callback

# Drawing may take at most this part of the time, however slow the terminal or the metrics are.
_DRAWING_SHARE = 0.01
_BACKGROUND = "bright_black dim"
# Wide enough for -1.234e-05, so that a metric's neighbours stay where they are.
_VALUE_WIDTH = 10


class ProgressBar(Callback):
    """Shows epoch, batches, metrics, speed and time left of a run.

    In a terminal it is a live display (with `rich <https://rich.readthedocs.io>`_): one bar for the
    epoch, under it the metrics logged with ``prog_bar=True``, and while validation runs a bar of
    its own. What is printed meanwhile, with ``print`` or ``rich.print``, appears above it. Where
    standard output is no terminal, plain lines come instead: one per epoch, and one every
    ``line_interval`` seconds within a long one, without control characters.

    The trainer brings one along for ``enable_progress_bar=True``, and only rank zero shows it. All
    drawing happens in the hooks, on the thread that trains: there is no thread in the background,
    and a step after which nothing is drawn costs one look at the clock. Metrics are asked for
    (``trainer.progress_bar_metrics``, which may have to wait for a device) only when they are
    drawn. A slow display is drawn less often, so that drawing takes at most 1 % of the time.

    The speed is that of the last few seconds of training, validation left out. The time left is
    that of the whole fit, validation included, up to ``max_epochs`` or ``max_steps``, whichever
    comes first; without a known end there is none.

    Args:
        interval: Seconds between two drawings in a terminal, at least.
        line_interval: Seconds between two plain lines within an epoch, at least.
        console: Where to draw; ``rich.get_console()`` if None.

    Raises:
        ValueError: If an interval is not positive.
    """

    counts_samples = True

    def __init__(
        self,
        interval: float = 0.1,
        line_interval: float = 10.0,
        console: Console | None = None,
    ) -> None:
        for name, seconds in (("interval", interval), ("line_interval", line_interval)):
            if not seconds > 0:
                raise ValueError(
                    f"ProgressBar({name}={seconds!r}): expected a positive number of seconds. "
                    "To have no progress bar, write Trainer(enable_progress_bar=False)."
                )
        self.interval = interval
        self.line_interval = line_interval
        self._console = console
        self._reset()

    def _reset(self) -> None:
        self._display: _Display | None = None
        self._due = math.inf  # when to draw next, on the monotonic clock
        self._pace = _Pace()
        self._epoch = 0  # the one shown: at the end of a fit the trainer's is one further
        self._epoch_batches = 0  # finished in this epoch
        self._fit_batches = 0  # finished in this fit
        self._validation_batches: int | None = None  # None outside validation
        self._in_fit = False

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Open a fresh display."""
        self._open(trainer)
        self._in_fit = True
        self._epoch = trainer.current_epoch
        self._pace.mark(time.monotonic(), 0, trainer.samples_seen)
        if self._display is not None:
            if self._display.live:
                self._draw(trainer)
            self._due = -math.inf  # the first batch starts the clock for the time left

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Start the epoch's bar at zero."""
        self._epoch = trainer.current_epoch
        self._epoch_batches = 0

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw, if it is time to."""
        self._epoch_batches = batch_idx + 1
        self._fit_batches += 1
        if (now := time.monotonic()) >= self._due:
            if self._pace.origin is None:
                self._pace.origin = (now, _fractions_done(trainer, *self._done))
                if self._display is not None and not self._display.live:
                    self._due = now + self._display.interval
                    return
            self._draw(trainer)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        """Open the bar of validation, by itself if there is no fit around it."""
        if not self._in_fit:
            self._open(trainer)
        self._validation_batches = 0
        self._pace.pause(time.monotonic(), self._fit_batches, trainer.samples_seen)

    def on_validation_batch_end(
        self,
        trainer: Any,
        module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw, if it is time to."""
        # Counted here, since batch_idx starts again with each loader.
        self._validation_batches = (self._validation_batches or 0) + 1
        if time.monotonic() >= self._due:
            self._draw(trainer)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """Close the bar of validation."""
        if self._in_fit:
            self._validation_batches = None
            self._pace.resume(time.monotonic())
        else:
            self._draw(trainer)
            self._close()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Write the epoch's line, where lines are written."""
        if self._display is not None and (not self._display.live or time.monotonic() >= self._due):
            self._draw(trainer)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Leave the final state on the screen."""
        if self._display is not None and self._display.live:
            self._draw(trainer, finished=True)
        self._close()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Leave the last drawing as it is, and the terminal as it was."""
        self._close()

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        """Close the display, should an error in another callback have kept it open."""
        self._close()

    def _open(self, trainer: Any) -> None:
        self._close()
        if not trainer.is_global_zero:
            return
        console = self._console or get_console()
        # Asked of the file too: FORCE_COLOR makes a console call any file a terminal.
        if console.is_interactive and console.file.isatty():
            self._display = _LiveDisplay(console, self.interval)
            self._due = -math.inf
        else:
            self._display = _LineDisplay(console, self.line_interval)
            self._due = time.monotonic() + self.line_interval

    def _close(self) -> None:
        display = self._display
        self._reset()
        if display is not None:
            display.close()

    def _draw(self, trainer: Any, finished: bool = False) -> None:
        if self._display is None:
            return
        start = time.monotonic()
        self._display.show(self._view(trainer, start, finished))
        end = time.monotonic()
        self._due = end + max(self._display.interval, (end - start) / _DRAWING_SHARE)

    @property
    def _done(self) -> tuple[int, int]:
        return self._epoch, self._epoch_batches

    def _view(self, trainer: Any, now: float, finished: bool) -> "_View":
        view = _View(metrics=dict(trainer.progress_bar_metrics))
        if self._in_fit:
            if self._validation_batches is None:
                self._pace.mark(now, self._fit_batches, trainer.samples_seen)
            fractions = _fractions_done(trainer, *self._done)
            view.training = _training_row(trainer, *self._done)
            view.speed = self._pace.speed()
            left = self._pace.left(now, fractions)
            if finished or (left == 0 and self._validation_batches is None):
                view.time = f"in {_clock(self._pace.elapsed(now))}"
            elif left is not None:
                view.time = f"{_clock(left)} left"
        if self._validation_batches is not None:
            total = _known(trainer.num_val_batches)
            view.validation = _Row("validate", self._validation_batches, total)
        return view


# ---------------------------------------------------------------------------------------------
# What is shown


@dataclass(frozen=True)
class _Row:
    """One bar: so many done, of so many (None if that is not known)."""

    label: str
    done: int
    total: int | None
    unit: str = ""

    @property
    def count(self) -> str:
        if self.total is None:
            return f"{self.done}{self.unit}"
        # As wide at the start as at the end, so that the bar beside it keeps its length.
        return f"{self.done:>{len(str(self.total))}}/{self.total}{self.unit}"


@dataclass
class _View:
    """Everything that one drawing shows."""

    metrics: dict[str, float]
    training: _Row | None = None
    validation: _Row | None = None
    speed: str = ""
    time: str = ""

    def facts(self) -> list[str]:
        """What stands beside the training bar."""
        count = [] if self.training is None else [self.training.count]
        return [*count, *filter(None, (self.speed, self.time))]


def _training_row(trainer: Any, epoch: int, epoch_batches: int) -> _Row:
    epochs, steps = _known(trainer.max_epochs), _known(trainer.max_steps)
    batches = _known(trainer.num_training_batches)
    label = f"epoch {epoch + 1}" + ("" if epochs is None else f"/{epochs}")
    if steps is not None and (epochs is None or batches is None):
        # Steps are then what ends the fit, and the epoch's bar might never fill.
        return _Row(label, trainer.global_step, steps, " steps")
    return _Row(label, epoch_batches, batches)


def _fractions_done(trainer: Any, epoch: int, epoch_batches: int) -> list[float]:
    """How much of the fit is done, by each of the limits that can end it."""
    fractions = []
    epochs, steps = _known(trainer.max_epochs), _known(trainer.max_steps)
    batches = _known(trainer.num_training_batches)
    if epochs and batches:
        fractions.append((epoch + epoch_batches / batches) / epochs)
    if steps:
        fractions.append(trainer.global_step / steps)
    return fractions


def _known(limit: float | Sequence[float] | None) -> int | None:
    """A limit as a number; None for "no limit", which is None, -1 or infinity.

    Several loaders may have one each, which add up.
    """
    if isinstance(limit, Sequence):
        limit = sum(limit)
    return None if limit is None or limit < 0 or limit == math.inf else int(limit)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _number(value: float) -> str:
    # "#" keeps the trailing zeros of 0.6900, which else would move everything behind it.
    return f"{float(value):#.4g}".rstrip(".")


# ---------------------------------------------------------------------------------------------
# How fast it goes


@dataclass
class _Pace:
    """Speed and time left, from what the clock and the counters said at the last drawings."""

    points: deque[tuple[float, int, int | None]] = field(default_factory=lambda: deque(maxlen=32))
    started: float = 0.0
    origin: tuple[float, list[float]] | None = None
    paused: float | None = None

    def mark(self, now: float, batches: int, samples: int | None) -> None:
        if not self.points:
            self.started = now
        self.points.append((now, batches, samples))

    def pause(self, now: float, batches: int, samples: int | None) -> None:
        self.mark(now, batches, samples)
        self.paused = now

    def resume(self, now: float) -> None:
        # Moving the past forward by the length of the pause takes the pause out of every speed.
        pause = now - (now if self.paused is None else self.paused)
        self.points = deque(((t + pause, b, s) for t, b, s in self.points), self.points.maxlen)
        self.paused = None

    def speed(self) -> str:
        """Samples per second, or batches where samples are not counted; "" if not yet known."""
        if not self.points:
            return ""
        (t0, b0, s0), (t1, b1, s1) = self.points[0], self.points[-1]
        if t1 <= t0 or b1 <= b0:
            return ""
        if s0 is None or s1 is None:
            return f"{_magnitude((b1 - b0) / (t1 - t0))} batches/s"
        return f"{_magnitude((s1 - s0) / (t1 - t0))} samples/s"

    def elapsed(self, now: float) -> float:
        return now - self.started

    def left(self, now: float, fractions: list[float]) -> float | None:
        """Seconds until the first of the limits is reached; None if that is not known.

        The origin is the end of the first batch: a resumed fit starts at more than zero, within an
        epoch even, and the first batch (compiling, filling caches) says little about the others.
        """
        if self.origin is None or len(self.origin[1]) != len(fractions):
            return None
        begin, begun = self.origin
        estimates = [
            (now - begin) * max(0.0, 1 - f) / (f - f0)
            for f0, f in zip(begun, fractions, strict=True)
            if f > f0
        ]
        return min(estimates, default=None)


def _magnitude(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


# ---------------------------------------------------------------------------------------------
# Where it is shown


class _Display(Protocol):
    """A place to show views: at most one every ``interval`` seconds."""

    live: bool
    interval: float

    def show(self, view: _View) -> None: ...

    def close(self) -> None: ...


class _LineDisplay:
    """A file, a pipe, a notebook: one plain line after the other."""

    live = False

    def __init__(self, console: Console, interval: float) -> None:
        self.interval = interval
        self._console = console

    def show(self, view: _View) -> None:
        parts = [] if view.training is None else [view.training.label, *view.facts()]
        if view.validation is not None:
            parts.append(f"{view.validation.label} {view.validation.count}")
        parts += [f"{name} {_number(value)}" for name, value in view.metrics.items()]
        # Not console.print, which breaks a line at the 80 columns that a file does not have.
        print("  ".join(parts), file=self._console.file, flush=True)

    def close(self) -> None:
        pass


class _LiveDisplay:
    """A terminal: a few lines that are drawn anew in place."""

    live = True

    def __init__(self, console: Console, interval: float) -> None:
        self.interval = interval
        self._console = console
        # Without auto_refresh there is no thread, hence nothing that could outlive the run.
        self._live = Live(console=console, auto_refresh=False)

    def show(self, view: _View) -> None:
        self._live.update(_rendered(view, self._console.width), refresh=self._live.is_started)
        self._live.start(refresh=True)

    def close(self) -> None:
        self._live.stop()


def _rendered(view: _View, width: int) -> RenderableType:
    """At most two bars of equal length, metrics under the first; no line longer than ``width``."""
    facts = view.facts()
    if view.training is None and view.validation is not None:
        facts = [view.validation.count]
    label_width = max(
        (cell_len(row.label) for row in (view.training, view.validation) if row), default=0
    )
    # In a narrow terminal what matters least goes first: the speed, then the time left.
    while len(facts) > 1 and label_width + len("  ".join(facts)) + 14 > width:
        facts.pop(1)
    facts_width = len("  ".join(facts))
    # The metrics start where the bars do, if there is room.
    indent = label_width + 2 if width >= 60 and label_width else 0

    bars: list[RenderableType] = []
    for row, style, text in (
        (view.training, "cyan", Text("  ").join(_fact(fact) for fact in facts)),
        (view.validation, "blue", _fact(view.validation.count if view.validation else "")),
    ):
        if row is not None:
            grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
            grid.add_column(width=label_width, no_wrap=True)
            grid.add_column(ratio=1)
            grid.add_column(width=facts_width, no_wrap=True)
            grid.add_row(Text(row.label), _bar(row, style), text)
            bars.append(grid)
    metrics = _packed([_metric(n, v) for n, v in view.metrics.items()], width - indent)
    # Under the first bar, so that the coming and going of the second does not move them.
    return Group(*bars[:1], *(Padding(line, (0, 0, 0, indent)) for line in metrics), *bars[1:])


def _bar(row: _Row, style: str) -> RenderableType:
    return Bar(
        total=row.total,
        completed=row.done,
        style=_BACKGROUND,
        complete_style=style,
        finished_style=style,
        pulse_style=style,
    )


def _fact(fact: str) -> Text:
    """A number and its unit, the unit in grey."""
    text = Text(fact)
    text.highlight_regex(r"(?<= )[a-z/]+$|^in ", style="bright_black")
    return text


def _metric(name: str, value: float) -> Text:
    return Text.assemble((f"{name} ", "bright_black"), _number(value).ljust(_VALUE_WIDTH))


def _packed(items: list[Text], width: int) -> list[Text]:
    """Lines of whole items: none is broken, one that is wider than the line is cut."""
    lines: list[Text] = []
    for item in items:
        if lines and lines[-1].cell_len + 2 + item.cell_len <= width:
            lines[-1] = lines[-1] + Text("  ") + item
        else:
            lines.append(item)
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
        line.rstrip()
    return lines
