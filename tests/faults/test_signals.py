"""F44 and F45: signals from outside, at any moment of a training in a process of its own."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from composefit import checkpoint
from tests.faults import runs
from tests.faults.conftest import Tells

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGUSR1")

#: Where the training is when the signal comes, and the steps that are done when it ends.
MOMENTS = {
    "within an optimizer's step": ("optimizer", 3, 4),
    "between two updates": ("updated", 7, 8),
    "in the middle of an accumulation window": ("window", 6, 7),
    "in a validation": ("validation", runs.EPOCH, runs.EPOCH),
    "while a checkpoint is written": ("checkpoint", runs.EPOCH, runs.EPOCH),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """What the training comes to that nobody stops."""
    root = tmp_path_factory.mktemp("whole")
    runs.fit(root)
    return runs.everything(root)


def signalled(root: Path, place: str, step: int, *signals: int) -> tuple[int | None, list[str]]:
    """Send the signals to a training that waits at this place: its exit code, what it has said."""
    said = []
    with runs.process(runs.train, root, place, step) as child:
        for signum in signals:
            said.append(child.connection.recv())
            os.kill(child.pid, signum)
            child.connection.send("sent")
        with suppress(EOFError, ConnectionError):  # until it has ended
            while True:
                said.append(child.connection.recv())
                child.connection.send("go on")
        child.join()
        return child.exitcode, said


def goes_on(root: Path, whole: list[torch.Tensor]) -> None:
    """What was saved is whole, and ends where the training does that nobody has stopped."""
    assert [path.name for path in root.iterdir()] == ["last.ckpt"]
    assert not checkpoint.load(root / "last.ckpt")["mid_step"]
    runs.fit(root, ckpt_path="auto", seed=5)
    assert runs.steps_saved(root) == runs.STEPS
    assert all(map(torch.equal, runs.everything(root), whole))


@pytest.mark.parametrize("moment", MOMENTS)
def test_f44_sigterm(moment: str, tmp_path: Path, whole: list[torch.Tensor], tells: Tells) -> None:
    place, step, done = MOMENTS[moment]
    code, said = signalled(tmp_path, place, step, signal.SIGTERM)
    assert code == 143
    assert said[:2] == ["here", "still here"]  # the handler has raised nothing
    assert runs.steps_saved(tmp_path) == done
    goes_on(tmp_path, whole)
    tells(
        "the step ends, all of its updates and its window, the state is saved, exit code 143 or "
        "138; resumed, it is bitwise as if never stopped"
    )


def test_f44_sigusr1(tmp_path: Path, whole: list[torch.Tensor]) -> None:
    code, _ = signalled(tmp_path, "step", 3, signal.SIGUSR1)
    assert code == 128 + signal.SIGUSR1 == 138
    assert runs.steps_saved(tmp_path) == 4
    goes_on(tmp_path, whole)


def test_f45_ctrl_c(tmp_path: Path, whole: list[torch.Tensor], tells: Tells) -> None:
    code, said = signalled(tmp_path, "optimizer", 3, signal.SIGINT)
    assert (code, said) == (runs.INTERRUPTED, ["here", "still here"])
    assert runs.steps_saved(tmp_path) == 4
    goes_on(tmp_path, whole)
    tells("the step ends, the state is saved, `KeyboardInterrupt`; a second one is immediate")


def test_f45_a_second_ctrl_c_is_immediate(tmp_path: Path, whole: list[torch.Tensor]) -> None:
    code, said = signalled(tmp_path, "window", 3, signal.SIGINT, signal.SIGINT)
    assert (code, said) == (runs.INTERRUPTED, ["here", "still here"])
    assert runs.steps_saved(tmp_path) == 3  # the step did not end
    goes_on(tmp_path, whole)
