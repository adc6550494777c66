"""Profilers: where the time of a run goes.

The trainer puts a span around what it does (`"fetch"`, `"step"`, `"validation"`, `"checkpoint"`,
and `"hook:on_fit_start"` and the like around each hook). Spans lie within one another, and all
belong to the thread that runs the trainer.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch._C._profiler import _ExperimentalConfig

__all__ = ["AdvancedProfiler", "Profiler", "PyTorchProfiler", "SimpleProfiler", "as_profiler"]


class Profiler:
    """What `Trainer(profiler=...)` takes: subclass it and override `span` and `summary`.

    A run calls `start`, then `span` around each of its parts and `step` after each training step,
    then `stop`, also when it fails. `start` begins afresh.

    Example:
        >>> class Printing(Profiler):
        ...     @contextmanager
        ...     def span(self, name):
        ...         print("begin", name)
        ...         yield
        ...         print("end", name)
        >>> with Printing().span("step"):
        ...     print("work")
        begin step
        work
        end step
    """

    def start(self) -> None:
        """A run begins: forget the one before."""

    def stop(self) -> None:
        """A run ends."""

    def step(self) -> None:
        """A training step has ended."""

    def span(self, name: str) -> AbstractContextManager[object]:
        """A context manager around a part of the run; it lets every exception through."""
        raise NotImplementedError(f"{type(self).__name__} defines no span(name)")

    def summary(self) -> str:
        """What was found, as text for a terminal."""
        raise NotImplementedError(f"{type(self).__name__} defines no summary()")


def as_profiler(given: object, folder: Path) -> Profiler | None:
    """What a user passed as `Trainer(profiler=...)`, as a profiler.

    Args:
        given: None, `"simple"`, `"advanced"`, `"pytorch"`, a `torch.profiler.profile`, or a
            `Profiler`.
        folder: where `"pytorch"` writes its traces.

    Raises:
        ValueError: another name.
        TypeError: something else.
    """
    if given is None or isinstance(given, Profiler):
        return given
    if isinstance(given, torch.profiler.profile):
        return PyTorchProfiler(folder, given)
    if given == "simple":
        return SimpleProfiler()
    if given == "advanced":
        return AdvancedProfiler()
    if given == "pytorch":
        return PyTorchProfiler(folder)
    expected = "'simple', 'advanced', 'pytorch', a torch.profiler.profile or a Profiler"
    if isinstance(given, str):
        raise ValueError(f"profiler must be {expected}, got {given!r}")
    hint = ""
    if isinstance(given, type) and issubclass(given, Profiler):
        hint = f": write {given.__name__}() with parentheses"
    raise TypeError(f"profiler must be {expected}, got {given!r}{hint}")


# -- how long ----------------------------------------------------------------------------------


class SimpleProfiler(Profiler):
    """How often each span ran and how long, in wall-clock time.

    A span's time includes that of the spans within it, so shares add up to more than the run. The
    last row is what was in no span. A GPU works on after the call has returned: its time shows in
    whichever span waits for it.

    Attributes:
        counts: name -> how often.
        totals: name -> nanoseconds in all.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)
        self.totals: dict[str, int] = defaultdict(int)
        self._depth = 0
        self._outermost = 0
        self._began = self._ended = 0

    def start(self) -> None:
        """Begin with empty tables."""
        self.counts.clear()
        self.totals.clear()
        self._depth = self._outermost = self._ended = 0
        self._began = time.perf_counter_ns()

    def stop(self) -> None:
        """The end of what the shares are shares of."""
        self._ended = time.perf_counter_ns()

    def span(self, name: str) -> AbstractContextManager[object]:
        """Time a part of the run."""
        return _Timed(self, name)

    def summary(self) -> str:
        """A table of counts, totals, means and shares of the run, the longest first."""
        run = (self._ended or time.perf_counter_ns()) - self._began
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        for name in ("span", "count", "total s", "mean ms", "share"):
            table.add_column(name, justify="left" if name == "span" else "right", no_wrap=True)
        rows = sorted(self.totals.items(), key=lambda row: -row[1])
        for name, total in rows:
            mean = total / self.counts[name] / 1e6
            table.add_row(
                # Text: a name in brackets would be read as a style.
                Text(name),
                str(self.counts[name]),
                f"{total / 1e9:.3f}",
                f"{mean:.3f}",
                _share(total, run),
            )
        table.add_section()
        rest = max(0, run - self._outermost)
        table.add_row("(in no span)", "", f"{rest / 1e9:.3f}", "", _share(rest, run))
        table.add_row("run", "", f"{run / 1e9:.3f}", "", _share(run, run))
        return _as_text(table)


class _Timed:
    __slots__ = ("_began", "_name", "_profiler")

    def __init__(self, profiler: SimpleProfiler, name: str) -> None:
        self._profiler = profiler
        self._name = name

    def __enter__(self) -> None:
        self._profiler._depth += 1
        self._began = time.perf_counter_ns()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        elapsed = time.perf_counter_ns() - self._began
        profiler = self._profiler
        profiler.counts[self._name] += 1
        profiler.totals[self._name] += elapsed
        profiler._depth -= 1
        if not profiler._depth:
            profiler._outermost += elapsed


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _as_text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=10_000, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


# -- which functions ---------------------------------------------------------------------------


class AdvancedProfiler(Profiler):
    """Which Python functions take the time of each span, by `cProfile`.

    A call counts in the innermost span that it is in. Profiling slows Python code down several
    times, and torch's kernels not at all. Of shards in threads, those outside the calling thread
    are left out in Python 3.11, and mixed into the same table from Python 3.12 on, which profiles
    all threads together.

    Args:
        lines: rows of each span's table; those with the largest cumulative time are shown.

    Raises:
        RuntimeError: in `start`, another profiler (`python -m cProfile`) is at work: Python has
            room for one.
    """

    def __init__(self, lines: int = 20) -> None:
        if not isinstance(lines, int) or isinstance(lines, bool) or lines < 1:
            raise ValueError(f"AdvancedProfiler(lines=...) expects 1 or more, got {lines!r}")
        self.lines = lines
        self.profiles: dict[str, cProfile.Profile] = {}
        self._open: list[cProfile.Profile] = []

    def start(self) -> None:
        """Begin with empty tables."""
        self.profiles.clear()
        self._open.clear()
        probe = cProfile.Profile()
        try:
            probe.enable()
        except ValueError as error:
            raise RuntimeError(
                f"profiler='advanced' cannot begin: {error}; run without the other profiler, or "
                "with profiler='simple'"
            ) from error
        probe.disable()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Profile a part of the run; the span around it pauses."""
        profile = self.profiles.setdefault(name, cProfile.Profile())
        if self._open:
            self._open[-1].disable()
        self._open.append(profile)
        profile.enable()
        try:
            yield
        finally:
            profile.disable()
            self._open.pop()
            if self._open:
                self._open[-1].enable()

    def summary(self) -> str:
        """For each span the functions with the largest cumulative time."""
        text = io.StringIO()
        for name, profile in self.profiles.items():
            profile.create_stats()
            print(f"-- {name}", file=text)
            if not profile.stats:  # pstats raises for nothing at all
                print("   (no call)\n", file=text)
                continue
            stats = pstats.Stats(profile, stream=text)
            stats.sort_stats("cumulative").print_stats(self.lines)
        return text.getvalue()


# -- which kernels -----------------------------------------------------------------------------


class PyTorchProfiler(Profiler):
    """Which operators and kernels take the time, by `torch.profiler`, in all threads.

    By default it skips the first step, warms up in the second and records three. Each recording is
    written as `trace-<step>.json`, for chrome://tracing or ui.perfetto.dev, and summarised in a
    table. Spans show as ranges in both.

    Args:
        folder: where traces go; it is made when the first is written.
        profile: a profile of one's own, with its own schedule and `on_trace_ready`; no file is
            written then but by that.
        rows: of the table, those that take the most time themselves.

    Attributes:
        traces: the files written by this run.

    Source: `torch.profiler.profile` and `torch.profiler.schedule`.
    """

    def __init__(
        self,
        folder: str | Path = "profile",
        profile: torch.profiler.profile | None = None,
        rows: int = 20,
    ) -> None:
        self.folder = Path(folder)
        self.rows = rows
        self.traces: list[Path] = []
        self._given = profile
        self._profile: torch.profiler.profile | None = None
        self._table = ""
        self._steps = 0

    def start(self) -> None:
        """Begin the schedule."""
        self.traces.clear()
        self._table = ""
        self._steps = 0
        self._profile = self._given or self._new_profile()
        self._profile.start()

    def stop(self) -> None:
        """End a recording that is under way; a schedule that is still waiting has none."""
        if self._profile is None:
            return
        self._profile.stop()
        if self._given is not None and self._given.profiler is not None:
            self._table = self._table_of(self._given)

    def step(self) -> None:
        """The schedule's next step."""
        self._steps += 1
        if self._profile is not None:
            self._profile.step()

    def span(self, name: str) -> AbstractContextManager[object]:
        """A range of this name in the trace."""
        return torch.profiler.record_function(name)

    def summary(self) -> str:
        """The last recording's table and the names of the files."""
        if not self._table:
            wait = "" if self._given else ", and the first two of a run are not recorded"
            return f"torch.profiler recorded nothing: the run had {self._steps} steps{wait}"
        files = "".join(f"\ntrace: {trace}" for trace in self.traces)
        return self._table + files

    def _new_profile(self) -> torch.profiler.profile:
        return torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1),
            on_trace_ready=self._recorded,
            # Without it the shards of other threads are missing.
            experimental_config=_ExperimentalConfig(profile_all_threads=True),
        )

    def _recorded(self, profile: torch.profiler.profile) -> None:
        if self._steps <= 2:  # stopped while it was warming up
            return
        self._table = self._table_of(profile)
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"trace-{self._steps}.json"
        profile.export_chrome_trace(str(trace))
        self.traces.append(trace)

    def _table_of(self, profile: torch.profiler.profile) -> str:
        averages = profile.key_averages()
        if not averages:
            return ""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return str(averages.table(sort_by=f"self_{device}_time_total", row_limit=self.rows))
