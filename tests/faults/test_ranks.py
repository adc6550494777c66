"""F35, F47 to F49, in trainings that launch two ranks.

A rank raises, dies, leaves or hangs; ranks have different numbers of samples; a training goes on in
another number of processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from composefit import LoopModule, SingleDevice, Strategy, Trainer, checkpoint
from composefit.data import PerRank
from composefit.ranks import PeerFailed
from composefit.strategies.distributed import Distributed
from tests.faults.conftest import Tells
from tests.faults.table import message

# Each launches processes, which takes seconds: all of them with `make laws`.
pytestmark = pytest.mark.full

#: So many steps are done, and an epoch has as many, when the fault comes.
STEPS = 3

#: Seconds to the job's end; five at most on a machine that does nothing else.
LIMIT = 60.0


class Cause(ValueError):
    """The error of the rank at fault; no other rank raises it."""


def fail(how: str, folder: Path) -> None:
    """What the rank at fault does."""
    (folder / "fault").write_text(str(time.monotonic()))
    if how == "raises":
        raise Cause("the user's own")
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "calls sys.exit":
        sys.exit(0)
    if how == "calls os._exit":
        os._exit(0)
    if how == "hangs":
        time.sleep(1000)


class Net(LoopModule):
    """Two optimizers; one rank is at fault, once, at one place."""

    def __init__(self, how: str, rank: int, place: str, folder: Path) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)
        self.how, self.rank, self.place, self.folder = how, rank, place, folder

    def configure_optimizers(self) -> Any:
        return {
            "a": torch.optim.SGD(self.a.parameters()),
            "b": torch.optim.SGD(self.b.parameters()),
        }

    def reach(self, place: str) -> None:
        if (place, self.global_rank) == (self.place, self.rank) and self.global_step >= STEPS:
            fail(self.how, self.folder)

    def training_step(self, batch: Any) -> Any:
        (x,) = batch
        yield {"a": self.a(x).mean()}
        self.reach("training")
        if self.how == "skips an update" and self.rank == self.global_rank:
            return
        yield {"b": self.b(x).mean()}

    def validation_step(self, batch: Any) -> None:
        if not self.trainer.sanity_checking:
            self.reach("validation")
        self.log("val", self.a(batch[0]).mean())

    def on_save_checkpoint(self, state: dict[str, Any]) -> None:
        self.reach("checkpoint")


def loader() -> DataLoader[Any]:
    """With a worker: a process that must not stay either."""
    return DataLoader(TensorDataset(torch.randn(4 * STEPS, 3)), batch_size=4, num_workers=1)


@pytest.fixture(autouse=True)
def no_orphans() -> Iterator[None]:
    """No process that a test has started, or that those have, is left."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = [one for one in psutil.Process().children(recursive=True) if one not in before]
    for one in psutil.process_iter(["pid", "cmdline"]):
        if any("/composefit-" in part for part in one.info["cmdline"] or ()):
            left += [one] if one.ppid() == 1 else []
    assert left == []


def run(how: str, rank: int, place: str, folder: Path, timeout: float = 100.0) -> Trainer:
    trainer = Trainer(
        strategy=Distributed(processes=2, accelerator="cpu", timeout=timeout),
        max_epochs=2,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(how, rank, place, folder), loader(), loader())
    return trainer


def seconds(folder: Path) -> float:
    """Since the fault."""
    return time.monotonic() - float((folder / "fault").read_text())


FAULTS = ("raises", "is killed", "calls sys.exit", "calls os._exit")
PLACES = ("training", "validation", "checkpoint")

# Each fault, rank and place at least once; all combinations take minutes.
SOME = [
    ("raises", 1, "training"),
    ("is killed", 0, "training"),
    ("calls sys.exit", 1, "validation"),
    ("calls os._exit", 0, "checkpoint"),
    ("raises", 0, "checkpoint"),
    ("is killed", 1, "validation"),
]
ALL = [
    pytest.param(how, rank, place, marks=[] if (how, rank, place) in SOME else pytest.mark.full)
    for how in FAULTS
    for rank in (0, 1)
    for place in PLACES
    if not (rank == 1 and place == "checkpoint")  # rank 0 alone writes
]


@pytest.mark.parametrize(("how", "rank", "place"), ALL)
def test_f47_a_rank_that_ends_is_told_first_and_nothing_stays(
    how: str, rank: int, place: str, tmp_path: Path, tells: Tells
) -> None:
    if how == "raises":
        with pytest.raises(Cause, match="the user's own") as own:
            run(how, rank, place, tmp_path)
        assert f"in rank {rank}" in str(own.value.__cause__)
        assert "self.reach(" in str(own.value.__cause__), "the traceback at the user's line"
    else:
        words = {
            "is killed": "was killed by SIGKILL",
            "calls sys.exit": "has ended by itself while others were running: SystemExit: 0",
            "calls os._exit": "has ended its process with exit code 0",
        }
        with pytest.raises(RuntimeError, match=f"rank {rank} of 2 {words[how]}") as died:
            run(how, rank, place, tmp_path)
        if (how, rank, place) == ("is killed", 0, "training"):
            tells(
                "all ranks end, and no process is left; an exception is the rank's own, with its "
                "traceback; otherwise",
                died.value,
            )
    assert seconds(tmp_path) < LIMIT


@pytest.mark.parametrize("rank", [0, 1])
def test_f48_a_rank_that_hangs_is_named_with_its_line(
    rank: int, tmp_path: Path, tells: Tells
) -> None:
    with pytest.raises(PeerFailed, match=f"rank {rank} did not come to .* within 3 s") as caught:
        run("hangs", rank, "training", tmp_path, timeout=3.0)
    (note,) = [one for one in caught.value.__notes__ if one.startswith(f"rank {rank}")]
    assert "in fail" in note
    assert "in training_step" in note
    assert seconds(tmp_path) < LIMIT
    if rank == 1:
        tells(
            caught.value,
            "with the note",
            message(note.splitlines()[0]),
            "and its stack; one that skips an update: both ranks' yields, at once",
        )


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.full)])
def test_f48_a_rank_that_skips_an_update_is_named_with_both_yields(
    rank: int, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError) as caught:
        run("skips an update", rank, "training", tmp_path)
    text = "\n".join([str(caught.value), *caught.value.__notes__])
    assert "rank 0" in text and "rank 1" in text
    assert "'b'" in text


def test_f47_what_was_saved_before_is_whole_and_goes_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="was killed"):
        run("is killed", 1, "training", tmp_path)
    state = checkpoint.load(tmp_path / "last.ckpt")
    assert state["global_step"] == STEPS
    trainer = Trainer(
        strategy=Distributed(processes=2, accelerator="cpu"),
        max_epochs=2,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net("", 0, "", tmp_path), loader(), loader(), ckpt_path="auto")
    assert trainer.global_step == 2 * STEPS


# -- uneven samples ------------------------------------------------------------------------------

#: Of each rank, its batches' sizes: rank 1 has more of them, and the last step is its own alone.
UNEVEN = ((3, 1), (4, 5, 2))


class Two(LoopModule):
    """Two networks, of which the second learns from what the first has become in this step."""

    def __init__(self, seen: Path | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(3, 2).double(), nn.Linear(2, 1).double()
        self.seen = seen

    def configure_optimizers(self) -> Any:
        return {
            "a": torch.optim.SGD(self.a.parameters(), lr=0.1),
            "b": torch.optim.Adam(self.b.parameters(), lr=0.1),
        }

    def training_step(self, batch: Any) -> Any:
        (x,) = batch
        if self.seen is not None:
            with open(self.seen / str(os.getpid()), "a") as file:
                file.writelines(f"{value}\n" for value in x[:, 0].tolist())
        yield {"a": self.b(self.a(x)).square().mean()}
        yield {"b": (self.b(self.a(x)) - 1).square().mean()}

    def validation_step(self, batch: Any) -> None:
        self.log("val", self.b(self.a(batch[0])).mean())


def by_hand(batches: list[Tensor], epochs: int = 2) -> Two:
    net = Two()
    a, b = net.configure_optimizers().values()
    for x in batches * epochs:
        for optimizer, parameters, target in ((a, net.a, 0), (b, net.b, 1)):
            loss = (net.b(net.a(x)) - target).square().mean()
            gradients = torch.autograd.grad(loss, list(parameters.parameters()))
            for parameter, gradient in zip(parameters.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    return net


class Own(IterableDataset[Any]):
    """The batches of the rank in which it is read; of the only process, those of all."""

    def __init__(self, parts: list[list[Tensor]]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[Any]:
        for x in self.parts[torch.distributed.get_rank()]:
            yield (x,)


def fitted(strategy: Strategy, folder: Path, net: Two, *loaders: Any, **options: Any) -> Trainer:
    trainer = Trainer(
        strategy=strategy,
        seed=3,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, **options},
    )
    trainer.fit(net, *loaders, ckpt_path="auto")
    return trainer


def apart(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def two_processes() -> Strategy:
    return Distributed(processes=2, accelerator="cpu", timeout=60)


def test_f49_ranks_with_other_numbers_of_samples_and_batches_are_exact(
    tmp_path: Path, tells: Tells
) -> None:
    draws = torch.Generator().manual_seed(5)
    parts = [
        [torch.randn(size, 3, generator=draws, dtype=torch.float64) for size in sizes]
        for sizes in UNEVEN
    ]
    steps = [torch.cat(own) for own in zip(*parts, strict=False)] + parts[1][2:]
    net = Two()
    own = PerRank(DataLoader(Own(parts), batch_size=None))
    trainer = fitted(two_processes(), tmp_path, net, own, own)
    expected = by_hand(steps)
    assert trainer.global_step == 6
    assert apart(net, expected) < 1e-12
    mean = expected.b(expected.a(torch.cat(steps))).mean()
    assert abs(trainer.callback_metrics["val"] - mean) < 1e-12
    tells(
        "nothing hangs: trains, and evaluates, as one process on each step's samples of all ranks "
        "does, to 1e-12; a rank without any takes part with weight zero"
    )


def test_f49_a_batch_with_fewer_rows_than_ranks_is_exact(tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(5)
    x = torch.randn(9, 3, generator=draws, dtype=torch.float64)
    net = Two()
    batches = DataLoader(TensorDataset(x), batch_size=4)  # the third has one row
    trainer = fitted(two_processes(), tmp_path, net, batches, batches)
    expected = by_hand(list(x.split(4)))
    assert apart(net, expected) < 1e-12
    assert abs(trainer.callback_metrics["val"] - expected.b(expected.a(x)).mean()) < 1e-12


# -- another number of processes -----------------------------------------------------------------


def test_f35_another_number_of_processes_goes_on_with_the_samples_left(
    tmp_path: Path, tells: Tells
) -> None:
    """Stopped in mid-epoch, shuffled; two processes, then one, then two."""
    draws = torch.Generator().manual_seed(5)
    x = torch.randn(22, 3, generator=draws, dtype=torch.float64)

    def batches() -> DataLoader[Any]:
        return DataLoader(TensorDataset(x), batch_size=4, shuffle=True)  # six, the last with two

    through, net = Two(), Two()
    fitted(SingleDevice("cpu"), tmp_path / "through", through, batches())
    seen = tmp_path / "seen"
    seen.mkdir()
    for strategy, stop in ((two_processes(), 4), (SingleDevice("cpu"), 9), (two_processes(), 12)):
        net = Two(seen)
        end = fitted(strategy, tmp_path / "parts", net, batches(), max_steps=stop)
        assert end.global_step == stop
    assert apart(net, through) < 1e-10
    given = [float(line) for path in seen.iterdir() for line in path.read_text().split()]
    assert sorted(given) == sorted(2 * x[:, 0].tolist())
    tells(
        "goes on, on the samples that are left of the epoch, none twice and none lost, to the same "
        "weights, to 1e-10"
    )


# -- torchrun ----------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys
import torch
from torch.utils.data import DataLoader, TensorDataset
from composefit import LoopModule, Trainer

class Net(LoopModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(3, 1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def training_step(self, batch):
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if sys.argv[2] == "dies" and first and self.global_step == 5 and self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        noise = self.random.normal(len(batch[0]), 3)
        return (self.layer(batch[0] + noise) ** 2).mean()

torch.manual_seed(2)
rows = TensorDataset(torch.randn(12, 3))
net = Net()
trainer = Trainer(
    strategy="ddp", accelerator="cpu", seed=3, max_epochs=4, default_root_dir=sys.argv[1],
    enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(net, DataLoader(rows, batch_size=4, shuffle=True), ckpt_path="auto")
if trainer.is_global_zero:
    torch.save((trainer.global_step, net.state_dict()), sys.argv[1] + "/end.pt")
"""


@pytest.mark.full
def test_f47_torchrun_restarts_the_job_and_nothing_is_lost(tmp_path: Path) -> None:
    ends = []
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for what in ("lives", "dies"):
        folder = tmp_path / what
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", "--max-restarts=1", str(script), str(folder), what]
        sources = str(Path(checkpoint.__file__).parents[1])
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": sources, "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            text, _ = process.communicate(timeout=200)
        finally:
            process.kill()
        assert process.returncode == 0, text
        ends.append(torch.load(folder / "end.pt", weights_only=True))
    (steps, weights), (steps_again, weights_again) = ends
    assert steps == steps_again == 12
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
