import cProfile
import json
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from composefit.profilers import (
    AdvancedProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
    as_profiler,
)

# -- what a user may pass --------------------------------------------------------------------------


def test_names_objects_and_nothing(tmp_path: Path) -> None:
    assert as_profiler(None, tmp_path) is None
    assert isinstance(as_profiler("simple", tmp_path), SimpleProfiler)
    assert isinstance(as_profiler("advanced", tmp_path), AdvancedProfiler)
    found = as_profiler("pytorch", tmp_path / "traces")
    assert isinstance(found, PyTorchProfiler) and found.folder == tmp_path / "traces"
    assert isinstance(as_profiler(torch.profiler.profile(), tmp_path), PyTorchProfiler)
    mine = SimpleProfiler()
    assert as_profiler(mine, tmp_path) is mine


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ("simpel", ValueError, "'simple', 'advanced', 'pytorch', .* got 'simpel'"),
        (True, TypeError, "got True"),
        (SimpleProfiler, TypeError, r"write SimpleProfiler\(\) with parentheses"),
    ],
)
def test_what_is_no_profiler(given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        as_profiler(given, Path())


def test_a_profiler_of_ones_own_needs_two_methods() -> None:
    class Mine(Profiler): ...

    mine = Mine()
    mine.start(), mine.step(), mine.stop()
    with pytest.raises(NotImplementedError, match=r"Mine defines no span\(name\)"):
        mine.span("step")
    with pytest.raises(NotImplementedError, match=r"Mine defines no summary\(\)"):
        mine.summary()


@pytest.mark.parametrize("name", ["simple", "advanced", "pytorch"])
def test_an_exception_goes_through_a_span_and_the_profiler_works_on(
    name: str, tmp_path: Path
) -> None:
    profiler = as_profiler(name, tmp_path)
    assert profiler is not None
    profiler.start()
    with pytest.raises(KeyError, match="mine"), profiler.span("outer"), profiler.span("inner"):
        raise KeyError("mine")
    with profiler.span("outer"):
        pass
    profiler.stop()
    assert profiler.summary()


# -- simple ----------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A clock in nanoseconds that stands still unless it is moved."""
    now = [10**9]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    return now


def test_counts_totals_means_and_shares(clock: list[int]) -> None:
    profiler = SimpleProfiler()
    profiler.start()
    for _ in range(3):
        with profiler.span("step"):
            clock[0] += 20_000_000
            with profiler.span("hook:[bold]"):
                clock[0] += 5_000_000
    clock[0] += 25_000_000
    profiler.stop()
    clock[0] += 999
    rows = [line.split() for line in profiler.summary().splitlines() if line.strip()]
    assert rows[0] == ["span", "count", "total", "s", "mean", "ms", "share"]
    assert [row for row in rows if "─" not in row[0]][1:] == [
        ["step", "3", "0.075", "25.000", "75.0", "%"],
        ["hook:[bold]", "3", "0.015", "5.000", "15.0", "%"],
        ["(in", "no", "span)", "0.025", "25.0", "%"],
        ["run", "0.100", "100.0", "%"],
    ]


def test_a_second_run_begins_with_an_empty_table(clock: list[int]) -> None:
    profiler = SimpleProfiler()
    for name in ("first", "second"):
        profiler.start()
        with profiler.span(name):
            clock[0] += 10
        profiler.stop()
    assert dict(profiler.totals) == {"second": 10}
    assert "first" not in profiler.summary()


def test_a_run_of_no_length_has_no_shares(clock: list[int]) -> None:
    profiler = SimpleProfiler()
    profiler.start()
    profiler.stop()
    assert profiler.summary().split()[-3:] == ["run", "0.000", "-"]


# -- advanced --------------------------------------------------------------------------------------


def fetches() -> None: ...


def trains() -> None: ...


def hooks() -> None: ...


def test_a_call_counts_in_the_innermost_span() -> None:
    profiler = AdvancedProfiler()
    profiler.start()
    for _ in range(2):
        with profiler.span("fetch"):
            fetches()
        with profiler.span("step"):
            trains()
            with profiler.span("hook:on_after_backward"):
                hooks()
            trains()
    profiler.stop()
    found: dict[str, dict[str, int]] = {}
    for name, profile in profiler.profiles.items():
        profile.create_stats()
        functions = {key[2]: row[1] for key, row in profile.stats.items()}
        found[name] = {f: n for f, n in functions.items() if f in ("fetches", "trains", "hooks")}
    assert found == {
        "fetch": {"fetches": 2},
        "step": {"trains": 4},
        "hook:on_after_backward": {"hooks": 2},
    }
    text = profiler.summary()
    sections = text.split("-- ")[1:]
    assert [section.split()[0] for section in sections] == list(found)
    assert "trains" in sections[1] and "hooks" not in sections[1]


def test_only_so_many_lines() -> None:
    profiler = AdvancedProfiler(lines=1)
    profiler.start()
    with profiler.span("step"):
        trains()
        hooks()
    assert "to 1 due to restriction" in profiler.summary()


@pytest.mark.parametrize("lines", [0, True, 1.5])
def test_a_number_of_lines_that_cannot_be(lines: Any) -> None:
    with pytest.raises(ValueError, match="expects 1 or more"):
        AdvancedProfiler(lines)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.11 lets the second one win")
def test_another_profiler_at_work() -> None:
    profiler = AdvancedProfiler()
    with cProfile.Profile(), pytest.raises(RuntimeError, match="without the other profiler"):
        profiler.start()


# -- pytorch ---------------------------------------------------------------------------------------


def train(profiler: Profiler, steps: int) -> None:
    def work() -> None:
        torch.mm(torch.ones(4, 4), torch.ones(4, 4))

    profiler.start()
    for _ in range(steps):
        with profiler.span("step"):
            work()
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        profiler.step()
    profiler.stop()


def events(trace: Path, name: str) -> int:
    return sum(e.get("name") == name for e in json.loads(trace.read_text())["traceEvents"])


@pytest.mark.parametrize(("steps", "recorded"), [(3, 1), (5, 3), (8, 3)])
def test_steps_of_all_threads_are_recorded_after_a_warm_up(
    tmp_path: Path, steps: int, recorded: int
) -> None:
    profiler = PyTorchProfiler(tmp_path / "made" / "here")
    train(profiler, steps)
    (trace,) = profiler.traces
    assert trace == tmp_path / "made" / "here" / f"trace-{min(steps, 5)}.json"
    assert events(trace, "aten::mm") == 2 * recorded
    assert "aten::mm" in profiler.summary() and f"trace: {trace}" in profiler.summary()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_is_too_short_says_so(tmp_path: Path, steps: int) -> None:
    profiler = PyTorchProfiler(tmp_path)
    train(profiler, steps)
    assert profiler.summary() == (
        f"torch.profiler recorded nothing: the run had {steps} steps, and the first two of a run "
        "are not recorded"
    )
    assert not list(tmp_path.iterdir())


def test_a_second_run_is_recorded_anew(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(tmp_path)
    train(profiler, 5)
    train(profiler, 4)
    (trace,) = profiler.traces
    assert trace.name == "trace-4.json" and events(trace, "aten::mm") == 4


def test_a_profile_of_ones_own_keeps_its_schedule_and_its_handler(tmp_path: Path) -> None:
    ready: list[int] = []
    mine = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1),
        on_trace_ready=lambda profile: ready.append(profile.step_num),
    )
    profiler = as_profiler(mine, tmp_path)
    assert profiler is not None
    train(profiler, 4)
    assert ready == [2]
    assert "aten::mm" in profiler.summary() and "trace:" not in profiler.summary()
    assert not list(tmp_path.iterdir())


def test_a_profile_of_ones_own_that_recorded_nothing(tmp_path: Path) -> None:
    mine = torch.profiler.profile(schedule=torch.profiler.schedule(wait=9, warmup=1, active=1))
    profiler = PyTorchProfiler(tmp_path, mine)
    train(profiler, 2)
    assert profiler.summary() == "torch.profiler recorded nothing: the run had 2 steps"


def test_a_user_defined_profiler_gets_what_the_trainer_says() -> None:
    class Mine(Profiler):
        def __init__(self) -> None:
            self.log: list[str] = []

        def step(self) -> None:
            self.log.append("step")

        @contextmanager
        def span(self, name: str) -> Any:
            self.log.append(name)
            yield

    mine = Mine()
    train(mine, 1)
    assert mine.log == ["step", "step"]
