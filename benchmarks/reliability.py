"""Is what was saved there when it is needed? Kills, resumptions, damage, signals, hostile files.

Each experiment has a control that is hit in the same way and has to suffer: without it, nothing
going wrong would show nothing. Where a target is missed, the exit status is 1.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from timing import console, machine
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from composefit import (
    Callback,
    LoopModule,
    OptimizerConfig,
    SingleDevice,
    Step,
    ThreadDataParallel,
    Trainer,
    checkpoint,
)
from composefit.callbacks import EMA

# Each run is a process of its own, forked from one that has imported all this and done nothing.
processes = multiprocessing.get_context("forkserver")


def alone(call: Callable[[], Any]) -> Any:
    """What the call returns in a process of its own."""
    ours, theirs = processes.Pipe()
    process = processes.Process(target=_answer, args=(call, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:  # it has said why
        raise RuntimeError(f"{call} has failed") from None
    finally:
        process.join()


def _answer(call: Callable[[], Any], pipe: Connection) -> None:
    pipe.send(call())


def two_at_a_time(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the calls return, each in a process of its own."""
    # No ProcessPoolExecutor: with max_tasks_per_child it waits forever now and then.
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(alone, calls))


class Targets:
    """Counts, each shown with what it has to be."""

    def __init__(self) -> None:
        self.missed = 0

    def equal(self, value: float, wanted: float = 0) -> str:
        return self._verdict(f"{value:g}", f"{wanted:g}", value == wanted)

    def some(self, value: float) -> str:
        return self._verdict(f"{value:g}", "> 0", value > 0)

    def _verdict(self, value: str, wanted: str, reached: bool) -> str:
        self.missed += not reached
        return f"{value} [green]({wanted})[/]" if reached else f"[red]{value} (not {wanted})[/]"


def table(title: str, *columns: str) -> Table:
    made = Table(title=title)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    return made


# -- killed while a checkpoint is overwritten ------------------------------------------------------


NUMBERS = 50_000_000  # of float32 in a checkpoint: 200 MB


def save_when_told(path: Path, atomic: bool, temporary: Path, orders: Connection) -> None:
    """In a process: save the versions that `orders` name, and answer with the seconds it took."""
    os.environ["TMPDIR"], tempfile.tempdir = str(temporary), None
    with suppress(EOFError):
        while True:
            version = orders.recv()
            state = {"version": version, "weights": torch.full((NUMBERS,), float(version))}
            began = time.perf_counter()
            if atomic:
                checkpoint.save(path, state)
            else:
                torch.save(state, path)
            orders.send(time.perf_counter() - began)


class Kills:
    """Kills, at random moments, processes that overwrite a checkpoint.

    Args:
        folder: gets the checkpoint, and nothing else.
        atomic: `checkpoint.save`; else `torch.save` onto the file itself.
        temporary: the folder for temporary files.

    Attributes:
        counted: kills in time: a temporary file was left or, in place, the save was not over.
        lost: files that could not be read then, or held neither the old nor the new version.
        leaked: files beside the checkpoint once the next process had saved.
    """

    def __init__(self, folder: Path, atomic: bool, temporary: Path) -> None:
        self.counted = self.lost = self.leaked = 0
        self._path = folder / "run.ckpt"
        self._arguments = (self._path, atomic, temporary)
        self._atomic, self._temporary = atomic, temporary
        self._version = 0

    def repeat(self, kills: int) -> Kills:
        draw = random.Random(0).random
        for _ in range(5 * kills):
            if self.counted < kills:
                self._once(draw())
        self._start()[0].kill()  # the last one's leftovers are looked for, too
        return self

    def _start(self) -> tuple[Any, Connection, float, int]:
        """A process that has saved once, the seconds that took, and the size of the file."""
        ours, theirs = processes.Pipe()
        process = processes.Process(target=save_when_told, args=(*self._arguments, theirs))
        process.start()
        theirs.close()
        self._version += 1
        ours.send(self._version)
        seconds = ours.recv()
        self.leaked += len(self._others())
        return process, ours, seconds, self._path.stat().st_size

    def _once(self, part: float) -> None:
        process, pipe, seconds, size = self._start()
        before = self._version
        self._version += 1
        pipe.send(self._version)
        while not (self._others() if self._atomic else self._path.stat().st_size < size):
            if pipe.poll():  # over before this process had its turn
                break
            time.sleep(0.0002)
        time.sleep(part * seconds)
        process.kill()
        process.join()
        if self._others() if self._atomic else not answered(pipe):
            self.counted += 1
            self.lost += self._found() not in (before, self._version)
        pipe.close()

    def _others(self) -> list[Path]:
        found = [*self._path.parent.iterdir(), *self._temporary.iterdir()]
        return [one for one in found if one != self._path]

    def _found(self) -> int | None:
        """The version in the file; None if it is not whole."""
        try:
            load = checkpoint.load if self._atomic else partial(torch.load, weights_only=True)
            state = load(self._path)
        except Exception:
            return None
        version, weights = state["version"], state["weights"]
        whole = len(weights) == NUMBERS and bool((weights == version).all())
        return version if whole else None


def answered(pipe: Connection) -> bool:
    try:
        pipe.recv()
    except EOFError:
        return False
    return True


def another_file_system(folder: Path) -> Path | None:
    """A folder for temporary files on another file system than `folder`'s, if there is one."""
    for place in map(Path, ("/dev/shm", tempfile.gettempdir(), "/tmp", "/var/tmp")):
        if place.is_dir() and place.stat().st_dev != folder.stat().st_dev:
            return place
    return None


def kills_table(folder: Path, kills: int, targets: Targets) -> Table:
    other = another_file_system(folder)
    where = f"temporary folder on {'another file system' if other else 'the same file system'}"
    made = table(
        f"Killed while {NUMBERS * 4 / 1e6:,.0f} MB were overwritten, {where}",
        *("written by", "kills", "unreadable or lost", "leaked files"),
    )
    for name, atomic in (("composefit.checkpoint.save", True), ("torch.save, in place", False)):
        with (
            tempfile.TemporaryDirectory(dir=folder) as here,
            tempfile.TemporaryDirectory(dir=other or folder) as there,
        ):
            done = Kills(Path(here), atomic, Path(there)).repeat(kills)
        made.add_row(
            name,
            targets.equal(done.counted, kills),
            targets.equal(done.lost) if atomic else targets.some(done.lost),
            targets.equal(done.leaked) if atomic else f"{done.leaked}",
        )
    return made


# -- stopped and resumed ---------------------------------------------------------------------------

SAMPLES, BATCH, EPOCHS = 22, 4, 3  # the last batch of an epoch is a short one


@dataclass(frozen=True)
class Setup:
    """What is trained, and how."""

    shuffle: bool = False
    workers: int = 0
    dropout: bool = False
    augmentation: bool = False
    window: int = 1
    gan: bool = False
    ema: bool = False
    threads: int = 1

    def __str__(self) -> str:
        names = ("shuffle", "dropout", "augmentation", "gan", "ema")
        parts = [name for name in names if getattr(self, name)]
        parts = ["all"] if len(parts) == len(names) else parts
        parts += [f"{self.workers} workers"] * bool(self.workers)
        parts += [f"{self.window} batches a step"] * (self.window > 1)
        parts += [f"{self.threads} threads"] * (self.threads > 1)
        return ", ".join(parts) or "in order, nothing random"


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Samples with their index, augmented by all three global generators."""

    def __init__(self, samples: int, augmentation: bool) -> None:
        self.rows = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0))
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.rows[index]
        if self.augmentation:
            row = row + 0.1 * torch.randn(4) + 0.1 * np.random.randn() + 0.1 * random.random()
        return row, torch.tensor(index)


def loader(setup: Setup) -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(
        Points(SAMPLES, setup.augmentation),
        BATCH,
        shuffle=setup.shuffle,
        num_workers=setup.workers,
        # Else a child of a fork server starts, slowly, one of its own.
        multiprocessing_context="fork" if setup.workers else None,
    )


class Regression(LoopModule):
    """One optimizer; `in_step(batch_idx)` is called in each shard's step."""

    samples_per_group = 2  # what BatchNorm needs

    def __init__(self, setup: Setup, in_step: Callable[[int], None] = lambda batch_idx: None):
        super().__init__()
        torch.manual_seed(3)
        p = 0.3 if setup.dropout else 0.0
        self.in_step = in_step
        self.generator = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(p), nn.Linear(8, 4)
        )

    def configure_optimizers(self) -> Any:
        adam = torch.optim.Adam(self.generator.parameters(), lr=1e-2)
        return OptimizerConfig(adam, torch.optim.lr_scheduler.StepLR(adam, 1, gamma=0.7))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        self.in_step(batch_idx)
        rows, _ = batch
        loss = (self.generator(rows) - rows).square().mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("validation", self.generator(batch[0]).mean())

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.validation_step(batch)

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        found: Tensor = self.generator(batch[0])
        return found


class Adversaries(Regression):
    """Two optimizers, each with a scheduler of its own kind, and noise."""

    def __init__(self, setup: Setup, in_step: Callable[[int], None] = lambda batch_idx: None):
        super().__init__(setup, in_step)
        p = 0.3 if setup.dropout else 0.0
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(p), nn.Linear(8, 1))

    def configure_optimizers(self) -> Any:
        adam = torch.optim.Adam(self.generator.parameters(), lr=1e-2)
        sgd = torch.optim.SGD(self.critic.parameters(), lr=1e-2, momentum=0.9)
        by_update = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.98)
        return {
            "generator": OptimizerConfig(adam, torch.optim.lr_scheduler.StepLR(adam, 1, gamma=0.7)),
            "critic": OptimizerConfig(sgd, by_update, interval="step"),
        }

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Step:
        self.in_step(batch_idx)
        rows, _ = batch
        fake = self.generator(rows + 0.1 * self.random.normal(len(rows), 4))
        loss = self.critic(fake).mean() - self.critic(rows).mean()
        self.log("loss", loss, on_epoch=True)
        yield {"critic": loss + self.critic(rows).square().mean()}
        yield {"generator": -self.critic(fake).mean()}


class Stopped(RuntimeError):
    """What a run is stopped with."""


class Recorder(Callback):
    """The samples that were trained on: how often each, in each epoch."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[int, int]] = Counter()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: tuple[Tensor, Tensor]
    ) -> None:
        if trainer.exception is None:
            self.seen.update((trainer.current_epoch, int(index)) for index in batch[1])


class Stop(Callback):
    """Stops a run once `step` steps are done.

    Args:
        how: one of `STOPS`.
        step: how many; at least 1.
        window: loader batches in a step.
    """

    def __init__(self, how: str, step: int, window: int) -> None:
        self.how, self.step, self.window = how, step, window
        self.done = 0

    def on_train_batch_start(self, trainer: Any) -> None:
        self.done = trainer.global_step
        if self.how == "error in a hook" and self.done == self.step:
            raise Stopped

    def in_step(self, batch_idx: int) -> None:
        if self.done != self.step:
            return
        if self.how == "error in a step":
            raise Stopped
        # In a window of two: when the first batch has run, and the second has not.
        if self.how == "SIGTERM in a step" and batch_idx % self.window == self.window - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_batch_end(self, trainer: Any) -> None:
        if self.how == "error in validation" and trainer.global_step >= self.step:
            raise Stopped


STOPS = (
    "error in a hook",
    "error in a step",
    "error in validation",
    "SIGTERM in a step",
    "max_steps",
)


class ByHand(Callback):
    """The control: weights and optimizers saved and loaded as one does by hand."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path, self.resume = path, resume

    def on_exception(self, trainer: Any, module: Any) -> None:
        states = {name: one.optimizer.state_dict() for name, one in trainer.optimizers.items()}
        torch.save({"module": module.state_dict(), "optimizers": states}, self.path)

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        if self.resume:
            state = torch.load(self.path, weights_only=True)
            module.load_state_dict(state["module"])
            for name, one in trainer.optimizers.items():
                one.optimizer.load_state_dict(state["optimizers"][name])


@dataclass(frozen=True)
class Outcome:
    """What a run has left.

    Attributes:
        numbers: every parameter, buffer, optimizer and scheduler state, average and logged value.
        seen: (epoch, sample) -> how often it was trained on.
        epoch: the epoch in which it ended.
        stopped: how it was stopped: an exception's name, or an exit code; empty if it was not.
    """

    numbers: dict[str, np.ndarray]
    seen: Counter[tuple[int, int]]
    epoch: int
    stopped: str


def run(
    setup: Setup,
    folder: Path,
    stop: tuple[str, int] | None = None,
    resume: bool = False,
    by_hand: bool = False,
    epochs: int = EPOCHS,
) -> Outcome:
    """Train, in a process of its own: from the start or resumed, to the end or until stopped."""
    torch.set_num_threads(1)
    how, step = stop or ("", -1)
    stopping, recorder, ema = Stop(how, step, setup.window), Recorder(), EMA(decay=0.9)
    module = (Adversaries if setup.gan else Regression)(setup, stopping.in_step)
    # Whoever resumes has drawn something else before.
    seed = 99 if resume else 11
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    trainer = Trainer(
        strategy=ThreadDataParallel(setup.threads) if setup.threads > 1 else SingleDevice("cpu"),
        max_epochs=epochs,
        max_steps=step if how == "max_steps" else -1,
        accumulate_grad_batches=setup.window,
        val_check_interval=2,
        callbacks=[
            *([ema] if setup.ema else []),
            recorder,
            *([ByHand(folder / "by-hand.pt", resume)] if by_hand else []),
            stopping,
        ],
        default_root_dir=folder,
        **SILENT,
    )
    held_out = DataLoader(Points(8, False), BATCH)
    ckpt_path = "last" if resume and not by_hand else None
    stopped = ""
    try:
        trainer.fit(module, loader(setup), held_out, ckpt_path=ckpt_path)
    except Stopped:
        stopped = "Stopped"
    except SystemExit as exit_:
        stopped = str(exit_.code)
    named = trainer.optimizers
    state = {
        "module": module.state_dict(),
        "optimizers": {name: one.optimizer.state_dict() for name, one in named.items()},
        "schedulers": {
            name: [one.scheduler.state_dict() for one in of.schedulers]
            for name, of in named.items()
        },
        "ema": ema.averaged_state_dict() if setup.ema and not stopped else {},
        "logged": trainer.callback_metrics,
    }
    return Outcome(dict(numbers_in(state)), recorder.seen, trainer.current_epoch, stopped)


SILENT: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}


def numbers_in(state: Any, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor and number in nested dicts and lists, by path, as float64."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in items:
            yield from numbers_in(value, f"{path}/{key}")
    elif isinstance(state, Tensor):
        yield path, state.detach().double().numpy()
    elif isinstance(state, int | float):
        yield path, np.asarray(state, dtype=np.float64)


def difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest; infinity where something is missing, of another shape, or no number."""
    if one.keys() != other.keys():
        return math.inf
    worst = 0.0
    for name, value in one.items():
        if value.shape != other[name].shape:
            return math.inf
        if value.size:
            found = np.abs(value - other[name]).max()
            worst = max(worst, math.inf if np.isnan(found) else float(found))
    return worst


@dataclass
class Resumed:
    """The outcomes of one setup, one for each way to stop."""

    runs: int = 0
    difference: float = 0.0
    samples: int = 0  # repeated or skipped

    def add(self, whole: Outcome, before: Outcome, after: Outcome, first_epoch: int = 0) -> None:
        """Args: the run that was not stopped, the two parts of one that was."""
        once = Counter({(e, i): 1 for e in range(EPOCHS) for i in range(SAMPLES)})
        assert whole.seen == once and not whole.stopped and not after.stopped
        seen = before.seen.copy()
        seen.update({(e + first_epoch, i): n for (e, i), n in after.seen.items()})
        self.runs += 1
        self.samples += sum(abs(seen[key] - once[key]) for key in seen | once)
        self.difference = max(self.difference, difference(whole.numbers, after.numbers))


SETUPS = (
    Setup(),
    Setup(shuffle=True),
    Setup(shuffle=True, workers=2),
    Setup(dropout=True),
    Setup(augmentation=True, workers=2),
    Setup(window=2),
    Setup(gan=True),
    Setup(ema=True),
    Setup(threads=2),
    *(
        Setup(True, workers, True, True, window, True, True, threads)
        for workers, window, threads in itertools.product((0, 2), (1, 2), (1, 2))
    ),
)


def stopped_and_resumed(setup: Setup, folder: Path) -> Resumed:
    """One setup under every stop, each at a random step; every run a process of its own."""
    result, draw = Resumed(), random.Random(str(setup))
    steps = math.ceil(math.ceil(SAMPLES / BATCH) / setup.window) * EPOCHS
    # A validation comes at the latest with the end of the last epoch.
    stops = {how: draw.randrange(1, steps) for how in STOPS}
    places = {how: folder / f"{setup}, {how}" for how in STOPS}
    whole, *before = two_at_a_time(
        [
            partial(run, setup, folder / f"{setup}, whole"),
            *(partial(run, setup, places[how], (how, stop)) for how, stop in stops.items()),
        ]
    )
    after = two_at_a_time([partial(run, setup, places[how], resume=True) for how in STOPS])
    for how, first, second in zip(STOPS, before, after, strict=True):
        expected = {"max_steps": "", "SIGTERM in a step": "143"}.get(how, "Stopped")
        if first.stopped != expected:
            raise RuntimeError(f"{setup}, {how}: ended with {first.stopped!r}")
        result.add(whole, first, second)
    return result


def resumed_by_hand(setup: Setup, folder: Path) -> Resumed:
    """The control: weights and optimizers are loaded, and the epoch is begun anew."""
    result, here = Resumed(), folder / "by hand"
    whole = alone(partial(run, setup, folder / "whole"))
    stop = ("error in a hook", 8)  # in the middle of the second epoch
    before = alone(partial(run, setup, here, stop, by_hand=True))
    left = EPOCHS - before.epoch
    after = alone(partial(run, setup, here, resume=True, by_hand=True, epochs=left))
    result.add(whole, before, after, before.epoch)
    return result


def resumption_table(folder: Path, setups: tuple[Setup, ...], targets: Targets) -> Table:
    made = table(
        "Stopped at random steps and resumed in a new process, against not stopped",
        *("what", "runs", "largest difference", "samples repeated or skipped"),
    )
    made.caption = "each stopped by " + ", ".join(STOPS)
    for setup in setups:
        found = stopped_and_resumed(setup, folder)
        made.add_row(
            str(setup),
            f"{found.runs}",
            targets.equal(found.difference),
            targets.equal(found.samples),
        )
    found = resumed_by_hand(Setup(shuffle=True), folder)
    made.add_row(
        "shuffle, weights and optimizers by hand",
        f"{found.runs}",
        targets.some(found.difference),
        targets.some(found.samples),
    )
    return made


# -- damaged files ---------------------------------------------------------------------------------


def checkpoint_of_a_run(folder: Path) -> Path:
    """A small one, of two optimizers, schedulers, averages and logs."""
    run(Setup(shuffle=True, dropout=True, gan=True, ema=True), folder, epochs=1)
    return folder / "last.ckpt"


def silent(load: Callable[[Path], Any], path: Path, original: dict[str, Any]) -> bool:
    """Whether a damaged file loads without an error, as something else than the original."""
    try:
        found = load(path)
    except Exception:
        return False
    return not same(found, original)


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other) or (one != one and other != other)


def damaged_loads(path: Path, flips: int, cuts: int) -> dict[str, dict[str, int]]:
    """For bits flipped and ends cut off, how many of them each way to load does not notice."""
    whole = path.read_bytes()
    original = torch.load(path, weights_only=True)
    draw = random.Random(0)
    damaged = path.with_name("damaged.ckpt")
    ways: dict[str, Callable[[Path], Any]] = {
        "composefit": checkpoint.load,
        "torch.load": partial(torch.load, weights_only=True),
    }
    found = {kind: dict.fromkeys(ways, 0) for kind in ("bits flipped", "ends cut off")}
    for kind, number in (("bits flipped", flips), ("ends cut off", cuts)):
        for _ in range(number):
            position = draw.randrange(len(whole))
            flipped = bytes([whole[position] ^ (1 << draw.randrange(8))])
            rest = flipped + whole[position + 1 :] if kind == "bits flipped" else b""
            damaged.write_bytes(whole[:position] + rest)
            for name, load in ways.items():
                found[kind][name] += silent(load, damaged, original)
    return found


def damage_table(folder: Path, flips: int, cuts: int, targets: Targets) -> Table:
    path = alone(partial(checkpoint_of_a_run, folder / "small"))
    found = alone(partial(damaged_loads, path, flips, cuts))
    made = table(
        f"Loaded without an error, with other contents ({path.stat().st_size:,} bytes)",
        *("damage", "files", "composefit", "torch.load, weights_only=True"),
    )
    for kind, number in (("bits flipped", flips), ("ends cut off", cuts)):
        ours, theirs = found[kind]["composefit"], found[kind]["torch.load"]
        control = targets.some(theirs) if kind == "bits flipped" else f"{theirs}"
        made.add_row(kind, f"{number}", targets.equal(ours), control)
    return made


# -- signals ---------------------------------------------------------------------------------------


class Tell(Callback):
    """Sends the number of steps done through a pipe."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def on_train_batch_end(self, trainer: Any) -> None:
        self.pipe.send(trainer.global_step)


def train_until_told(folder: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    trainer = Trainer(
        max_epochs=-1,
        strategy="single",
        callbacks=Tell(pipe),
        default_root_dir=folder,
        **SILENT,
    )
    module = Adversaries(Setup(), lambda batch_idx: time.sleep(0.002))
    trainer.fit(module, loader(Setup(shuffle=True)))


def signalled(folder: Path, signum: int, after: int, wait: float) -> tuple[int | None, int, int]:
    """The exit code, the steps in the checkpoint that is left, and those that were done."""
    ours, theirs = processes.Pipe()
    process = processes.Process(target=train_until_told, args=(folder, theirs))
    process.start()
    theirs.close()
    assert process.pid is not None
    done = 0
    while done < after:
        done = ours.recv()
    time.sleep(wait)
    os.kill(process.pid, signum)
    with suppress(EOFError):
        while True:
            done = ours.recv()
    process.join()
    saved = 0
    if (folder / "last.ckpt").is_file():
        saved = checkpoint.load(folder / "last.ckpt")["global_step"]
    return process.exitcode, saved, done


def signals_table(folder: Path, repeats: int, targets: Targets) -> Table:
    made = table("Told to end", "signal", "sent", "every step saved", "exit code")
    draw = random.Random(0)
    for name, code in (("SIGTERM", 143), ("SIGUSR1", 128 + signal.SIGUSR1)):
        signum = getattr(signal, name)
        found = [
            signalled(folder / f"{name}{i}", signum, draw.randrange(1, 20), 0.02 * draw.random())
            for i in range(repeats)
        ]
        codes = {exit_code for exit_code, _, _ in found}
        made.add_row(
            name,
            f"{repeats}",
            targets.equal(sum(saved == done for _, saved, done in found), repeats),
            ", ".join(targets.equal(math.nan if one is None else one, code) for one in codes),
        )
    return made


# -- hostile files ---------------------------------------------------------------------------------


class Payload:
    """Makes a folder when it is unpickled without care."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def hostile_files(path: Path, payload: Payload) -> list[Path]:
    """A payload in each part of a checkpoint, in torch's older format, and in a bare pickle."""
    state = torch.load(path, weights_only=True)
    made = []

    def name(part: str) -> Path:
        made.append(path.with_name(f"hostile-{part}.ckpt"))
        return made[-1]

    for part, value in state.items():
        inside = {**value, "payload": payload} if isinstance(value, dict) else payload
        torch.save({**state, part: inside}, name(part))
    hostile = {"payload": payload, **state}  # first: torch itself fails at what comes later
    torch.save(hostile, name("older-format"), _use_new_zipfile_serialization=False)
    name("pickle").write_bytes(pickle.dumps(payload))
    return made


def hostile_loads(path: Path) -> tuple[dict[str, tuple[int, int, int]], int]:
    """For each way to load: how many files ran code, and were refused; and of one good file."""
    torch.set_num_threads(1)
    marker = path.with_name("ran")
    files = hostile_files(path, Payload(marker))
    setup = Setup(shuffle=True, gan=True, ema=True)

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=2,
            strategy="single",
            callbacks=EMA(decay=0.9),
            default_root_dir=path.parent / "again",
            **SILENT,
        )

    def through(method: str) -> Callable[[Path], Any]:
        return lambda file: getattr(trainer(), method)(
            Adversaries(setup), loader(setup), ckpt_path=file
        )

    ways: dict[str, Callable[[Path], Any]] = {
        **{f"trainer.{name}": through(name) for name in ("fit", "validate", "test", "predict")},
        "load_from_checkpoint": partial(Adversaries.load_from_checkpoint, setup=setup),
        "EMA.load_into": lambda file: EMA.load_into(Adversaries(setup), file),
        "torch.load, weights_only=False": partial(torch.load, weights_only=False),
    }
    found = {}
    for name, load in ways.items():
        ran = refused = 0
        for file in files:
            refused += not loads(load, file)
            if marker.exists():
                ran += 1
                marker.rmdir()
        # A way that refuses whatever it is given would not be worth much.
        found[name] = ran, refused, int(not loads(load, path))
    return found, len(files)


def loads(load: Callable[[Path], Any], path: Path) -> bool:
    try:
        load(path)
    except Exception:
        return False
    return True


def hostile_table(folder: Path, targets: Targets) -> Table:
    path = alone(partial(checkpoint_of_a_run, folder / "hostile"))
    found, files = alone(partial(hostile_loads, path))
    made = table(
        "Files with code in them", "read by", "files", "ran the code", "refused", "1 good file"
    )
    for name, (ran, refused, good) in found.items():
        control = name.startswith("torch")
        made.add_row(
            name,
            f"{files}",
            targets.equal(ran, files if control else 0),
            f"{refused}" if control else targets.equal(refused, files),
            "refused: " + targets.equal(good),
        )
    return made


# --------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__))
    parser.add_argument("--quick", action="store_true", help="smoke test: few of everything")
    parser.add_argument("--kills", type=int, default=20, help="of each way to write")
    parser.add_argument("--folder", type=Path, help="where files go, on a disk; default: temporary")
    options = parser.parse_args()
    quick, targets, began = options.quick, Targets(), time.perf_counter()
    # torch imports the first of them, a second of work, when an optimizer is made.
    processes.set_forkserver_preload(["torch._dynamo", "composefit"])
    console.print(machine("numpy"))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        kills = 3 if quick else options.kills
        console.print(kills_table(folder, kills, targets))
        setups = (SETUPS[1], SETUPS[-1]) if quick else SETUPS
        console.print(resumption_table(folder, setups, targets))
        flips, cuts = (40, 10) if quick else (200, 50)
        console.print(damage_table(folder, flips, cuts, targets))
        console.print(signals_table(folder, 1 if quick else 5, targets))
        console.print(hostile_table(folder, targets))
    verdict = f"{targets.missed} targets missed" if targets.missed else "every target reached"
    console.print(f"{verdict}, {time.perf_counter() - began:.0f} s")
    sys.exit(targets.missed > 0)


if __name__ == "__main__":
    main()
