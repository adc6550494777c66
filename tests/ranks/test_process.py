"""A rank that torchrun has started: whose error is told, how its lines begin, and when it ends."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import composefit
from composefit.ranks import process
from composefit.ranks.environment import Job
from composefit.ranks.process import as_rank, show_rank

SOURCES = str(Path(composefit.__file__).parents[1])


@contextmanager
def torchrun(folder: Path, text: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A script on two ranks."""
    script = folder / "script.py"
    script.write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*command, *options, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCES, "TMPDIR": str(folder)},
        start_new_session=True,
    )
    family: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
        process.communicate()
        for one in family:
            if one.is_running():
                one.kill()


FAILING = """
import os, time
from composefit.ranks.environment import found_job
from composefit.ranks.process import as_rank
from composefit.ranks.world import PeerFailed

with as_rank(found_job()):
    if os.environ["RANK"] == "0":
        raise PeerFailed("rank 1 has gone")  # earlier than the cause
    time.sleep(0.5)
    raise ZeroDivisionError("the cause")
"""


def test_torchrun_shows_the_rank_that_failed_on_its_own_account_first(tmp_path: Path) -> None:
    with torchrun(tmp_path, FAILING) as run:
        text, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    # The first traceback on the screen, and what torchrun calls the root cause.
    assert "ZeroDivisionError: the cause" in text
    assert "PeerFailed" not in text.partition("ZeroDivisionError: the cause")[0]
    root = text.partition("Root Cause (first observed failure):")[2]
    assert "rank      : 1" in root
    assert 'raise ZeroDivisionError("the cause")' in root


WAITING = """
import os, sys, time
from composefit.ranks.environment import found_job
from composefit.ranks.process import as_rank

with as_rank(found_job()):
    if os.fork() == 0:
        time.sleep(1000)
    print("ready", os.getppid(), flush=True)
    time.sleep(1000)
"""


def test_ranks_and_what_they_have_forked_end_with_torchrun(tmp_path: Path) -> None:
    with torchrun(tmp_path, WAITING) as run:
        assert run.stdout is not None
        lines = [run.stdout.readline() for _ in range(2)]
        assert all(line.startswith("ready") for line in lines), lines
        family = psutil.Process(run.pid).children(recursive=True)
        assert len(family) == 4
        run.kill()
        _, alive = psutil.wait_procs(family, timeout=60)
        for one in alive:
            one.kill()
        assert alive == []


def test_nothing_is_done_where_the_launcher_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(process, "die_with_parent", refuse)
    monkeypatch.setattr(process, "show_rank", refuse)
    for job in (None, Job(0, 2, 0, 2, "composefit")):
        with pytest.raises(ZeroDivisionError), as_rank(job):
            raise ZeroDivisionError


def test_a_rank_of_slurm_is_not_bound_to_its_parent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bound: list[int] = []
    monkeypatch.setattr(process, "die_with_parent", lambda: bound.append(1))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with as_rank(Job(0, 2, 0, 2, "slurm")):
        pass
    assert bound == []
    assert not (tmp_path / "error.json").exists()
    with as_rank(Job(0, 2, 0, 2, "torchrun")):
        pass
    assert bound == [1]


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({"COMPOSEFIT_DEBUG": "1"}, True),
        ({"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}, True),
        ({"TORCH_DISTRIBUTED_DEBUG": "OFF"}, False),
        ({"COMPOSEFIT_DEBUG": "0"}, False),
        ({}, False),
    ],
)
def test_lines_begin_with_the_rank_where_that_is_asked_for(
    variables: dict[str, str], shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COMPOSEFIT_DEBUG", "TORCH_DISTRIBUTED_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    show_rank(3)
    show_rank(3)
    print("one", "line")
    print("a bar", end="", flush=True)
    print(" that grows\n\nlast")
    words = "[rank 3] " if shown else ""
    lines = ["one line", "a bar that grows", "", "last"]
    assert screen.getvalue() == "".join(f"{words}{line}\n" for line in lines)


def test_a_rank_whose_peer_has_failed_lets_it_speak_first(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(process, "die_with_parent", lambda: None)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    job = Job(0, 2, 0, 2, "torchrun")
    with pytest.raises(ZeroDivisionError), as_rank(job):
        raise ZeroDivisionError
    assert slept == []
    with pytest.raises(composefit.ranks.PeerFailed), as_rank(job):
        raise composefit.ranks.PeerFailed("rank 1 has gone")
    assert len(slept) == 1
