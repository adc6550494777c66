"""F29 to F39: checkpoints that are cut short, damaged, foreign, missing, or cannot be written."""

import errno
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from composefit import LoopModule, ThreadDataParallel, checkpoint
from composefit.callbacks import Callback
from tests.faults import runs
from tests.faults.conftest import Tells
from tests.faults.fault import surfaces
from tests.faults.table import message
from tests.lockstep.steps import data, linear, same

if sys.platform != "win32":
    import resource


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The last checkpoint of a training of one epoch."""
    root = tmp_path_factory.mktemp("written")
    runs.fit(root, max_epochs=1)
    return (root / "last.ckpt").read_bytes()


@pytest.fixture
def path(tmp_path: Path, written: bytes) -> Path:
    """A folder with this checkpoint."""
    found = tmp_path / "last.ckpt"
    found.write_bytes(written)
    return found


def refused(path: Path, kind: type[Exception], *words: str) -> Any:
    """Going on from it, evaluating with it and making a module of it all raise the same."""
    run, net = runs.trainer(path.parent), runs.GAN()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    samples = [[torch.randn(4, 2), torch.arange(4)]]
    with surfaces(kind, *words) as found:
        run.fit(net, samples, ckpt_path=path)
    with surfaces(kind, *words):
        run.validate(net, samples, ckpt_path=path)
    with surfaces(kind, *words):
        runs.GAN.load_from_checkpoint(path)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert run.global_step == 0
    return found


# -- F29 to F31: files that are not whole --------------------------------------------------------


def kill_while_overwriting(path: Path, in_place: bool) -> tuple[bool, bool]:
    """Kill a process that does nothing else: was it in the middle of a file, is the file lost?"""
    with runs.process(runs.overwrite, path, in_place) as child:
        child.connection.recv()  # the first one is there
        time.sleep(random.random() / 50)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    middle = len(files(path.parent)) > 1  # the new one is not in its place yet
    try:
        state = checkpoint.load(path)
    except RuntimeError as error:
        assert "damaged" in str(error)
        return middle, True
    assert torch.equal(state["weights"], torch.full((1_000_000,), float(state["number"])))
    return middle, False


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_f29_kill_9_while_overwriting(tmp_path: Path, tells: Tells) -> None:
    path = tmp_path / "last.ckpt"
    in_the_middle = losses = 0
    while in_the_middle < 5:
        middle, lost = kill_while_overwriting(path, in_place=False)
        in_the_middle += middle
        losses += lost
    assert losses == 0
    checkpoint.save(path, {"next": 1})
    assert files(tmp_path) == ["last.ckpt"]
    while not kill_while_overwriting(path, in_place=True)[1]:  # the control: it can be lost
        pass
    tells("the file is the old one or the new one, and the next save removes what was half written")


@pytest.mark.parametrize("part", [0, 0.5, 0.999])
def test_f30_truncated_or_empty(path: Path, written: bytes, part: float, tells: Tells) -> None:
    (path.parent / "epoch=0-step=3.ckpt").write_bytes(written)
    path.write_bytes(written[: int(part * len(written))])
    words = (str(path), "is damaged or no checkpoint", "use another; the latest other one beside")
    found = refused(path, RuntimeError, *words, "is epoch=0-step=3.ckpt")
    if part == 0.5:
        tells(found)


def test_f31_bit_flip_in_the_data(path: Path, written: bytes, tells: Tells) -> None:
    weight = checkpoint.load(path)["state_dict"]["critic.0.weight"]
    place = written.index(weight.numpy().tobytes())
    flipped = bytearray(written)
    flipped[place] ^= 1
    path.write_bytes(flipped)
    silent = torch.load(path, weights_only=True)["state_dict"]["critic.0.weight"]
    assert not torch.equal(silent, weight)  # the control
    words = (str(path), "does not match its checksum", "has changed since: use another")
    tells(refused(path, RuntimeError, *words))


def test_f31_bit_flip_in_the_directory(path: Path, written: bytes) -> None:
    place = written.rindex(b"PK\x01\x02")  # the last record's entry
    for offset in (0, 16, 46):  # its mark, its checksum, its name
        flipped = bytearray(written)
        flipped[place + offset] ^= 1
        path.write_bytes(flipped)
        refused(path, RuntimeError, str(path), "is damaged or no checkpoint")


# -- F32 to F34: files of something else ---------------------------------------------------------


def test_f32_another_module(path: Path, tells: Tells) -> None:
    class Wider(runs.GAN):
        def __init__(self) -> None:
            super().__init__(width=5)
            self.head = nn.Linear(2, 1, bias=False)

        def configure_optimizers(self) -> dict[str, Any]:
            self.head.requires_grad_(False)
            return super().configure_optimizers()

    net, run = Wider(), runs.trainer(path.parent)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    words = ("does not fit Wider", "6 of another shape (generator.0.weight (4, 2) for (5, 2), ")
    with surfaces(RuntimeError, *words, "1 missing in the file (head.weight)") as found:
        run.fit(net, [[torch.randn(4, 2), torch.arange(4)]], ckpt_path=path)
    tells(found)
    with surfaces(RuntimeError, *words):
        run.validate(net, [[torch.randn(4, 2), torch.arange(4)]], ckpt_path=path)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(not one.optimizer.state for one in run.optimizers.values())


def test_f33_bare_state_dict(path: Path, tells: Tells) -> None:
    torch.save(runs.GAN().state_dict(), path)
    words = ("is a state_dict", "module.load_state_dict(torch.load(path, weights_only=True))")
    tells(refused(path, ValueError, *words))


def test_f34_other_optimizers(path: Path, tells: Tells) -> None:
    class Changed(runs.GAN):
        kinds = {"critic": Adam, "generator": Adam}  # noqa: RUF012

        def configure_optimizers(self) -> dict[str, Any]:
            self.generator.requires_grad_("generator" in self.kinds)
            return {n: kind(getattr(self, n).parameters()) for n, kind in self.kinds.items()}

        def training_step(self, batch: Any) -> Any:
            yield {"critic": self.critic(batch[0]).mean()}

    class Fewer(Changed):
        kinds = {"critic": runs.Pausing}  # noqa: RUF012

    class Plain(Changed):
        kinds = {"critic": runs.Pausing, "generator": Adam}  # noqa: RUF012

    was = "was written with the optimizers critic (Pausing), generator (Adam)"
    cures = ("make them as they were", "load_from_checkpoint")
    for kind, words in (
        (Changed, (was, "has made critic (Adam), generator (Adam)", *cures)),
        (Fewer, (was, "has made critic (Pausing)", *cures)),
        (Plain, ("'generator' had the schedulers ['StepLR'], now []", *cures)),
    ):
        net = kind()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        with surfaces(ValueError, *words) as found:
            runs.trainer(path.parent).fit(
                net, [[torch.randn(4, 2), torch.arange(4)]], ckpt_path=path
            )
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        if kind is Changed:
            tells(found)


# -- F36: files that cannot be written -----------------------------------------------------------


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder with a checkpoint, in which this user may not write."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        runs.fit(root, max_epochs=1)
        root.chmod(0o555)
        for_root = os.geteuid() == 0  # who may write anywhere
        if for_root:
            os.seteuid(65534)
        yield root
        if for_root:
            os.seteuid(0)
        root.chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_f36_read_only_folder(read_only: Path, tells: Tells) -> None:
    before = (read_only / "last.ckpt").read_bytes()
    words = ("last.ckpt was written; what was there before is unchanged", "may write")
    with surfaces(PermissionError, *words) as found:
        runs.fit(read_only, max_epochs=1)
    assert (read_only / "last.ckpt").read_bytes() == before
    assert files(read_only) == ["last.ckpt"]
    tells("the system's own error, with the note", message(found.note("was written")))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits")
def test_f36_full_disk(path: Path, written: bytes) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond this: like a full disk, it fails in the middle of a write.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(written) // 2, hard))
    try:
        with surfaces(OSError, os.strerror(errno.EFBIG), "last.ckpt was written", "make room"):
            runs.fit(path.parent, max_epochs=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == written
    assert files(path.parent) == ["last.ckpt"]
    runs.fit(path.parent, ckpt_path="last")  # and it can be gone on from
    assert runs.steps_saved(path.parent) == runs.STEPS


# -- F37, F38: going on --------------------------------------------------------------------------


def test_f37_last_and_auto(tmp_path: Path, tells: Tells) -> None:
    words = (f"no {tmp_path / 'last.ckpt'} yet", "write ckpt_path='auto' to begin from the start")
    with surfaces(FileNotFoundError, *words) as found:
        runs.fit(tmp_path, ckpt_path="last")
    assert not files(tmp_path)
    tells(found)
    fresh = runs.fit(tmp_path, ckpt_path="auto", max_epochs=1)
    assert len(fresh.seen) == 40
    again = runs.fit(tmp_path, ckpt_path="auto")
    assert len(again.seen) == 40
    assert runs.steps_saved(tmp_path) == runs.STEPS


class Stop(Callback):
    """Raises at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any) -> None:
        if trainer.global_step == self.step and trainer.exception is None:
            raise OSError("the power is cut")


@pytest.mark.parametrize(
    ("strategy", "workers"),
    [(lambda: None, 0), (lambda: ThreadDataParallel(2), 2)],
    ids=["one shard", "two threads, two workers"],
)
def test_f38_resumed_in_mid_epoch(
    tmp_path: Path, strategy: Callable[[], Any], workers: int, tells: Tells
) -> None:
    def fit(root: Path, **options: Any) -> None:
        runs.fit(root, strategy=strategy(), workers=workers, **options)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit(whole)
    for stop in (2, 7):  # in each of the epochs
        seen: list[int] = []
        with surfaces(OSError, "the power is cut"):
            fit(broken, callbacks=Stop(stop), seen=seen)
        assert runs.steps_saved(broken) == stop
        fit(broken, ckpt_path="last", seed=9, seen=seen)
        assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40))
        assert all(map(torch.equal, runs.everything(whole), runs.everything(broken)))
    tells(
        "bitwise as if never stopped, weights and optimizers; every sample comes once an epoch "
        "(two optimizers, dropout, augmentation, accumulation, threads, workers)"
    )


# -- F39: what cannot be kept --------------------------------------------------------------------


def test_f39_hyperparameters_that_a_safe_load_cannot_read(tmp_path: Path, tells: Tells) -> None:
    class Keeps(LoopModule):
        def __init__(self, rate: float, kernel: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = linear(3, 1)

        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=self.hparams["rate"])

        def training_step(self, x: Tensor) -> Tensor:
            return self.net(x).mean()

    net, other = Keeps(0.1, torch.relu), Keeps(0.1, torch.relu)
    words = ('hparams["kernel"] is a builtins.builtin_function_or_method', "ignore=[...]")
    with surfaces(TypeError, *words, "a safe load does not read back") as found:
        runs.trainer(tmp_path).fit(net, [data(6, 3)])
    assert same(net, other) and not files(tmp_path)  # before anything was trained
    tells("before anything is trained,", found, "with the note", message(found.notes))


def test_f39_states_that_a_safe_load_cannot_read(path: Path, written: bytes) -> None:
    class Counting(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"seen": {"where": Path("here")}}

    words = ('Counting"]["seen"]["where"] is a pathlib', "store plain data in its place")
    with surfaces(TypeError, *words, "str(path)"):
        runs.fit(path.parent, callbacks=Counting())
    assert path.read_bytes() == written
