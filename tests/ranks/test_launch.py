"""Processes that are launched: what comes back, who is blamed, and that none stays."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import composefit
from composefit.ranks.launch import launch
from composefit.ranks.rank import outcome_file
from composefit.ranks.world import PeerFailed

# Each launches processes, which takes seconds: all of them with `make laws`.
pytestmark = pytest.mark.full

# Seconds from a rank's end to the job's: five at most where the machine is not busy with other
# tests, and thirty where it is left to torch's launcher.
ENDS_WITHIN = 25.0


def came_at(folder: Path) -> float:
    """When the rank at fault wrote that it is at fault; clocks of one machine agree."""
    return float((folder / "fault").read_text())


def fault(folder: Path) -> None:
    (folder / "fault").write_text(str(time.monotonic()))


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"{path} has not come"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, no file, no handler, no variable, no log level: as before the launch."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
    loggers = [
        logging.getLogger(name)
        for name in logging.root.manager.loggerDict
        if name.startswith("torch.distributed.elastic")
    ]

    def state() -> Any:
        handlers = [signal.getsignal(number) for number in numbers]
        variables = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
        quiet = [logger.disabled for logger in loggers]
        return handlers, variables, quiet, threading.active_count()

    before = state()
    yield
    assert state() == before
    assert list(temporary.iterdir()) == []
    assert [one for one in psutil.Process().children() if "composefit" in _command(one)] == []


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


# -- what comes back ---------------------------------------------------------------------------


class Found:
    """What a rank has seen; a class that no other process can import."""

    def __init__(self, **seen: Any) -> None:
        self.seen = seen


def look_around() -> tuple[list[Found], list[warnings.WarningMessage]]:
    class Local(Found):
        def rank(self) -> Any:
            return self.seen["rank"]

    method = Local.rank
    threshold = threading.active_count()  # of the caller, in a closure
    shared = torch.arange(4.0)

    def work(tensor: torch.Tensor, view: torch.Tensor) -> Found:
        warnings.warn("from a rank", UserWarning, stacklevel=1)
        dist.init_process_group("gloo")
        total = torch.ones(1) * (dist.get_rank() + 1)
        dist.all_reduce(total)
        dist.destroy_process_group()
        tensor.zero_()
        return Local(
            rank=int(os.environ["RANK"]),
            size=int(os.environ["WORLD_SIZE"]),
            total=total.item(),
            view=view.clone(),
            dtype=torch.get_default_dtype(),
            threads=os.environ["OMP_NUM_THREADS"],
            arguments=sys.argv,
            folder=os.getcwd(),
            closure=threshold,
            method=Local.__qualname__,
        )

    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            found = launch(work, 2, shared, shared[1:3])
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(type(one) is Local for one in found), "another class of the same name"
    assert Local.rank is method, "a class that came back in place of the caller's"
    return found, [one for one in heard if str(one.message) == "from a rank"]


# One launch for several tests, since it takes seconds.
_looked: list[Any] = []


@pytest.fixture
def looked() -> Any:
    if not _looked:
        _looked.extend(look_around())
    return _looked


def test_results_come_in_the_order_of_the_ranks(looked: Any) -> None:
    assert [one.seen["rank"] for one in looked[0]] == [0, 1]
    assert [one.seen["size"] for one in looked[0]] == [2, 2]


def test_ranks_reach_each_other(looked: Any) -> None:
    assert [one.seen["total"] for one in looked[0]] == [3.0, 3.0]


def test_tensors_that_share_memory_share_it_there(looked: Any) -> None:
    assert all(torch.equal(one.seen["view"], torch.zeros(2)) for one in looked[0])


def test_ranks_have_the_settings_of_the_caller(looked: Any) -> None:
    for one in looked[0]:
        assert one.seen["dtype"] is torch.float64
        assert one.seen["arguments"] == sys.argv
        assert one.seen["threads"] == os.environ["OMP_NUM_THREADS"], "what the user has set stays"


def test_the_launcher_of_torch_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit):
        launch(sys.exit, 1, 1)
    assert caplog.records == []


def test_a_warning_of_rank_0_is_shown_once(looked: Any) -> None:
    (warning,) = looked[1]
    assert warning.category is UserWarning
    assert warning.filename == __file__


def test_what_cannot_be_sent_is_named_before_anything_starts() -> None:
    lock = threading.Lock()
    with pytest.raises(TypeError, match=r"argument 1\['a'\]\[0\] is a _thread.lock, which cannot"):
        launch(print, 2, "x", {"a": [lock]})
    with pytest.raises(TypeError, match=r"lock \(in .*<lambda>\) is a _thread.lock"):
        launch(lambda: lock, 2)


def test_a_rank_launches_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        with pytest.raises(RuntimeError, match="this process is rank 1 of 2 already"):
            launch(print, 2)


# -- who is blamed -----------------------------------------------------------------------------


class Particular(ValueError):
    """Pickles badly: its `__init__` does not take what it has as arguments."""

    def __init__(self, step: int, *, reason: str) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step = step


def test_the_rank_that_failed_on_its_own_account_is_raised(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        if os.environ["RANK"] == "0":
            # Earlier than the cause, as a rank whose peer has closed its connections may be.
            raise PeerFailed("rank 1 has gone")
        time.sleep(0.5)
        fault(folder)
        raise Particular(3, reason="no reason")

    with pytest.raises(Particular, match="step 3: no reason") as caught:
        launch(work, 2, tmp_path)
    assert time.monotonic() - came_at(tmp_path) < ENDS_WITHIN
    error = caught.value
    assert error.step == 3
    assert "in rank 1" in str(error.__cause__)
    assert 'raise Particular(3, reason="no reason")' in str(error.__cause__)
    assert [note.split(":")[0] for note in error.__notes__] == [
        "then rank 0 ended with composefit.ranks.world.PeerFailed"
    ]


def test_a_killed_rank_is_named_and_a_stubborn_one_does_not_stay(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        if os.environ["RANK"] == "0":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (folder / "ready").touch()
            time.sleep(1000)
        wait_for(folder / "ready")
        fault(folder)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="rank 1 of 2 was killed by SIGKILL") as caught:
        launch(work, 2, tmp_path)
    assert time.monotonic() - came_at(tmp_path) < ENDS_WITHIN
    (note,) = caught.value.__notes__
    assert note.startswith("rank 0 was still running, and was killed, here:")
    assert "in work" in note


@pytest.mark.parametrize("how", ["sys.exit(0)", "os._exit(0)"])
def test_a_rank_that_ends_too_early_is_named(tmp_path: Path, how: str) -> None:
    def work(folder: Path) -> None:
        dist.init_process_group("gloo")
        if os.environ["RANK"] == "1":
            fault(folder)
            if how == "sys.exit(0)":
                sys.exit(0)
            os._exit(0)
        dist.barrier()  # raises, as soon as the other has gone

    with pytest.raises(RuntimeError, match="rank 1 of 2 has ended") as caught:
        launch(work, 2, tmp_path)
    assert time.monotonic() - came_at(tmp_path) < ENDS_WITHIN
    assert ("SystemExit: 0" if "sys" in how else "exit code 0") in str(caught.value)


def test_a_rank_that_hangs_is_named_with_the_line_where_it_is(tmp_path: Path) -> None:
    def work() -> None:
        if os.environ["RANK"] == "1":
            threading.Event().wait()

    with pytest.raises(TimeoutError, match=r"rank 1 of 2 did not return within 1 s") as caught:
        launch(work, 2, timeout=1)
    (note,) = caught.value.__notes__
    assert f'File "{__file__}", line {work.__code__.co_firstlineno + 2} in work' in note


def test_if_all_ranks_exit_so_does_the_caller() -> None:
    with pytest.raises(SystemExit) as caught:
        launch(sys.exit, 2, 7)
    assert caught.value.code == 7


def test_a_failure_of_the_launcher_itself_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter that is started ends at once, before it is a rank.
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="has ended its process with exit code 1"):
        launch(print, 1)


# -- signals, and the end of the launcher ------------------------------------------------------

# Without `if __name__ == "__main__"`: were it run again in the ranks, it would say so.
SCRIPT = """
import os, sys, time
import torch
from composefit.ranks.launch import launch
from composefit.signals import Signals

print("the script runs", flush=True)

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, index):
        return index

def work(polite):
    iterator = iter(torch.utils.data.DataLoader(Numbers(), num_workers=1))
    next(iterator)
    print("ready", flush=True)
    if not polite:
        time.sleep(1000)
    with Signals() as signals:
        while not signals.received:
            time.sleep(0.01)
        time.sleep(0.3)
        print("saved", flush=True)
        signals.obey()

try:
    launch(work, 2, sys.argv[1] == "polite")
finally:
    print("the caller ends with", sys.exc_info()[0].__name__, flush=True)
"""


class Script:
    """The script above, until both ranks are ready."""

    def __init__(self, folder: Path, manner: str, **environment: str) -> None:
        path = folder / "script.py"
        path.write_text(SCRIPT)
        sources = str(Path(composefit.__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, str(path), manner],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, **environment, "PYTHONPATH": sources, "TMPDIR": str(folder)},
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        while sum("ready" in line for line in self.lines) < 2:
            line = self.process.stdout.readline()
            assert line, "".join(self.lines)
            self.lines.append(line)
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> None:
        """Wait for the end, and for that of all its descendants."""
        text, _ = self.process.communicate(timeout=60)
        self.lines += text.splitlines(keepends=True)
        _, alive = psutil.wait_procs(self.family, timeout=ENDS_WITHIN)
        for one in alive:
            one.kill()
        assert alive == []

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        for one in self.family:
            if one.is_running():
                one.kill()


@pytest.mark.parametrize(
    ("number", "code", "error"),
    [(signal.SIGINT, -signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, 143, "SystemExit")],
)
def test_a_signal_is_handed_on_and_each_rank_ends_in_its_own_time(
    tmp_path: Path, number: int, code: int, error: str
) -> None:
    with Script(tmp_path, "polite", COMPOSEFIT_DEBUG="1") as script:
        assert len(script.family) == 4, "two ranks, and a worker of each"
        # To the whole group, as a terminal does: a rank that got it twice would not save.
        os.killpg(script.process.pid, number)
        script.end()
    assert script.process.returncode == code
    said = [line.strip() for line in script.lines]
    assert said.count("the script runs") == 1
    assert sorted(line for line in said if "saved" in line) == ["[rank 0] saved", "[rank 1] saved"]
    assert f"the caller ends with {error}" in said


def test_ranks_and_their_workers_end_with_the_launcher(tmp_path: Path) -> None:
    with Script(tmp_path, "deaf") as script:
        script.process.kill()
        script.end()
    assert script.process.returncode == -signal.SIGKILL


def test_the_names_that_elastic_is_asked_by_are_there() -> None:
    """What is used of torch beside its documented interface."""
    assert issubclass(ChildFailedError, Exception)
    assert subprocess._args_from_interpreter_flags() is not None  # type: ignore[attr-defined]
    assert outcome_file(Path("x"), 1).name == "outcome-1"
