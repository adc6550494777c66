"""Checkpoints of a run: the latest, the best, and where it broke off."""

from __future__ import annotations

import shutil
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import Tensor

from composefit.callbacks.callback import Callback
from composefit.callbacks.file_name import FileName
from composefit.callbacks.monitor import (
    Mode,
    agreed_values,
    as_score,
    better,
    check_count,
    check_monitor,
    judges_at_epoch_end,
    never_logged,
)


class ModelCheckpoint(Callback):
    """Keeps checkpoints: `last.ckpt`, and files of their own for the best (or all) states.

    A trainer without one brings along `ModelCheckpoint()`, which keeps `last.ckpt`: written at the
    end of each epoch, at the end of the fit, and when an exception or a signal ends it. A fit that
    stops within an epoch (`max_steps`) leaves the state before the hooks that end the epoch, from
    which it goes on as if it had never stopped.

    **When.** At the end of every `every_n_epochs`-th epoch, after every `every_n_train_steps`-th
    step, and `train_time_interval` after the last time; whichever of them are given, else at the
    end of every epoch. Several at one step write `last.ckpt` once. The values to be judged are read
    where they are known: at the end of the training epoch, or, where validations come more or
    less often than that, at the end of each validation (`save_on_train_epoch_end` says which). A
    step at which `monitor` has not been logged yet leaves the judgement to the next of these.

    **Which.** With a `monitor`, the `save_top_k` best so far. Of equal values the older stays, NaN
    is never among the best. Without one, `last.ckpt` alone, and with a `filename` or
    `save_top_k=-1` every state under its own name. A file that is no longer among the best is
    deleted once the others are written. What somebody else has left under a name is never
    overwritten: the new file gets `-v1`, `-v2`, ... at its end (`last.ckpt` is: it is the latest).

    With several ranks all of them decide alike, by values and a clock that they share; rank 0
    chooses the names, writes, and deletes. Where they do not end at the same place (one has failed,
    and the others wait for it), nothing more can be saved: the error gets a note of which
    checkpoint is the last.

    A file knows of itself: in the state that it holds, `best_model_path` is already what the save
    has made it. If writing fails, everything is as before.

    Args:
        dirpath: the folder; None for the trainer's `default_root_dir`.
        filename: a template such as `"{epoch:02d}-{val_loss:.3f}"`, filled with the epoch (from
            0), the step and whatever is logged; without folders and without `.ckpt`. None for
            `"{epoch}-{step}"`.
        monitor: the name of a logged value by which states are judged, or None.
        verbose: print what is written.
        save_last: keep `last.ckpt`.
        save_top_k: how many of the best to keep: -1 for all, 0 for none.
        save_on_exception: write `last.ckpt` when an exception or a signal ends the fit, unless
            the state of this very step is there already.
        save_weights_only: write weights without the state of the run, which cannot be resumed.
        mode: `"min"` or `"max"`: which values of `monitor` are better.
        auto_insert_metric_name: `{epoch}` becomes `epoch=3`, not `3`.
        every_n_train_steps: steps.
        train_time_interval: a `timedelta`, or minutes as a number.
        every_n_epochs: epochs.
        save_on_train_epoch_end: judge at the end of the training epoch (True) or of each
            validation (False); None decides as above.
        save_trainable_only: leave parameters out that need no gradient.

    Attributes:
        best_model_path: of the best file so far; without a `monitor`, of the latest.
        best_model_score: the value of `monitor` there, a 0-dim tensor; None without.
        best_k_models: path -> value, of all that are kept; the older first.
        last_model_path: of `last.ckpt` once written, else empty.
        current_score: the latest value that was judged, or None.

    Raises:
        TypeError, ValueError: an argument that cannot be; in a run, a `monitor` or a value in
            `filename` that was never logged.
        OSError: from the file system, when a file is written.
    """

    saves_state = True

    #: The file with the latest state.
    LAST = "last.ckpt"

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool = True,
        save_top_k: int = 1,
        save_on_exception: bool = True,
        save_weights_only: bool = False,
        mode: Mode = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | float | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        save_trainable_only: bool = False,
    ) -> None:
        check_monitor(monitor, mode)
        check_count("save_top_k", save_top_k, least=-1)
        if monitor is None and save_top_k > 1:
            raise ValueError(
                f"save_top_k={save_top_k} needs monitor='val_loss' or another logged value that "
                "says which are best; save_top_k=-1 keeps all"
            )
        for name, flag in (("save_last", save_last), ("save_on_exception", save_on_exception)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {flag!r}")
        for name, count in (
            ("every_n_train_steps", every_n_train_steps),
            ("every_n_epochs", every_n_epochs),
        ):
            if count is not None:
                check_count(name, count)
        self.monitor = monitor
        self.mode: Mode = mode
        self.verbose = verbose
        self.save_last = save_last
        self.save_top_k = save_top_k
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.save_trainable_only = save_trainable_only
        self.every_n_train_steps = every_n_train_steps
        self.train_time_interval = _seconds(train_time_interval)
        self.every_n_epochs = every_n_epochs
        if every_n_train_steps is None and train_time_interval is None and every_n_epochs is None:
            self.every_n_epochs = 1
        if every_n_train_steps is not None or train_time_interval is not None:
            # Only then, since a hook that somebody has costs time at every batch.
            self.on_train_batch_end = self._after_batch  # type: ignore[method-assign]
        self.save_on_train_epoch_end = save_on_train_epoch_end
        self.filename = filename
        self._template = FileName(filename or "{epoch}-{step}", auto_insert_metric_name)
        # Without a monitor, states have files of their own only where that is asked for, or where
        # there would be no file at all.
        self._names_files = save_top_k != 0 and (
            monitor is not None or filename is not None or save_top_k == -1 or not save_last
        )
        self._dirpath = None if dirpath is None else Path(dirpath)
        self.dirpath = self._dirpath
        self._begin()

    def _begin(self) -> None:
        self.best_model_path = ""
        self.best_model_score: Tensor | None = None
        self.best_k_models: dict[str, Tensor] = {}
        self.last_model_path = ""
        self.current_score: Tensor | None = None
        self._deferred = False  # a judgement waits for a value that is not logged yet
        self._begun = False
        self._interrupted = False
        self._first_step = self._saved_step = -1
        self._saved_time = 0.0

    @property
    def state_key(self) -> str:
        """Tells several of them apart, by what they judge and when."""
        parts = {
            "monitor": self.monitor,
            "mode": self.mode,
            "every_n_train_steps": self.every_n_train_steps,
            "every_n_epochs": self.every_n_epochs,
            "train_time_interval": self.train_time_interval,
        }
        return f"{type(self).__qualname__}{parts}"

    # -- when ----------------------------------------------------------------------------------

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Begin anew with a fit; what is resumed comes back after this."""
        folder = Path(trainer.default_root_dir) if self._dirpath is None else self._dirpath
        # Absolute, since paths in the state outlive the process and its working directory.
        folder = folder.expanduser().absolute()
        if trainer.world is not None:
            folder = Path(trainer.world.broadcast("the folder of checkpoints", str(folder)))
        self.dirpath = folder
        if stage == "fit":
            self._begin()

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Begin anew with a second one in a run, as of a loop over the folds of a data set."""
        if self._begun:
            self._begin()
        self._begun = True

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Nothing is trained yet: what there is to save is in the file that was resumed."""
        self._first_step = self._saved_step = trainer.global_step
        self._saved_time = trainer.clock()
        if trainer.world is not None:  # as rank 0 finds them
            there = trainer.world.broadcast("checkpoints that are there", self.best_k_models)
            self.best_k_models = there

    def _after_batch(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step: save by steps and by time."""
        if not self._saves(trainer) or not _ends_step(trainer, batch_idx):
            return
        due = False
        if self.every_n_train_steps is not None:
            due = trainer.global_step % self.every_n_train_steps == 0
        if self.train_time_interval is not None:
            due = due or trainer.clock() - self._saved_time >= self.train_time_interval
        if due:
            self._save(trainer, may_wait=True)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """After a validation: save where these are what states are judged by."""
        if not self._saves(trainer) or self._cut_short(trainer):
            return
        by_epoch = self._epoch_due(trainer) and not self._at_epoch_end(trainer)
        if by_epoch or self._deferred:
            self._save(trainer, may_wait=not by_epoch)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """After an epoch."""
        if not self._saves(trainer) or self._cut_short(trainer):
            return
        due = self._epoch_due(trainer)
        if self._deferred or (due and self._at_epoch_end(trainer)):
            self._save(trainer)
        elif due:
            self._write_last(trainer)

    def on_train_interrupted(self, trainer: Any, module: Any) -> None:
        """Before the end hooks of an epoch that is cut short: `last.ckpt` goes on from here."""
        if self._saves(trainer):
            self._write_last(trainer)
            self._interrupted = True

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        """After a fit whose last epoch was none to save at: the final state is not lost."""
        if self._saves(trainer) and trainer.global_step > self._first_step:
            self._write_last(trainer)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Save what there is, unless the end of this very step is saved already."""
        # Loops of the user's own need not call the hooks of a fit.
        begun = self._first_step >= 0 or (trainer.fit_loop is None and trainer.ready)
        in_fit = trainer.stage == "fit" and begun and trainer.global_step > self._first_step
        if not in_fit or not self.save_on_exception or _is_a_trial(trainer):
            return
        if trainer.world is not None and trainer.world.closed:
            last = self.last_model_path or self.best_model_path
            exception.add_note(
                "no checkpoint was written: that takes all ranks, and they have not ended at the "
                f"same place; the last one is {last or 'none'}"
            )
            return
        self._write_last(trainer, always=True)

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        """No fit runs: a fault in what comes next is none in training."""
        self._first_step = -1

    def _saves(self, trainer: Any) -> bool:
        return trainer.stage == "fit" and trainer.exception is None and not _is_a_trial(trainer)

    def _cut_short(self, trainer: Any) -> bool:
        """Whether the epoch was left before its end: it is not judged, since it may go on."""
        return trainer.fit_loop is not None and trainer.fit_loop.train.interrupted

    def _epoch_due(self, trainer: Any) -> bool:
        every = self.every_n_epochs
        return every is not None and (trainer.current_epoch + 1) % every == 0

    def _at_epoch_end(self, trainer: Any) -> bool:
        return judges_at_epoch_end(trainer, self.save_on_train_epoch_end)

    # -- what ----------------------------------------------------------------------------------

    def _save(self, trainer: Any, may_wait: bool = False) -> None:
        """The file of this state, if it deserves one, `last.ckpt`, and then what is to go."""
        self._saved_time = trainer.clock()
        dropped: list[str] = []
        wrote = False
        if self._names_files:
            values = {
                **agreed_values(trainer),
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
            }
            missing = self._template.fields - values.keys()
            if self.monitor is not None and self.monitor not in values:
                missing.add(self.monitor)
            if missing and not may_wait:
                raise never_logged(self._call(), missing, trainer.callback_metrics)
            self._deferred = bool(missing)
            if not missing:
                wrote, dropped = self._write_named(trainer, values)
        self._write_last(trainer, again=wrote)
        # Not before: what last.ckpt says is kept, there must be.
        for path in dropped:
            self._delete(trainer, path)

    def _write_named(self, trainer: Any, values: dict[str, Any]) -> tuple[bool, list[str]]:
        """Write a file under a name of its own, if the state deserves it; and what is to go."""
        if self.monitor is None:
            kept = self.filename is not None or self.save_top_k == -1
            dropped = [] if kept or not self.best_model_path else [self.best_model_path]
            path = self._path(trainer, values, dropped)
            self._write(trainer, path, best_model_path=path)
            return True, [other for other in dropped if other != path]
        score = as_score(values[self.monitor])
        self.current_score = score
        if not self._deserves(score):
            return False, []
        models = dict(self.best_k_models)
        dropped = []
        if len(models) == self.save_top_k:
            dropped = [self._worst()]
            del models[dropped[0]]
        path = self._path(trainer, values, dropped)
        best_path, best_score = self.best_model_path, self.best_model_score
        if not score.isnan() and (
            best_score is None or better(score.item(), best_score.item(), self.mode)
        ):
            best_path, best_score = path, score
        self._write(
            trainer,
            path,
            best_k_models={**models, path: score},
            best_model_path=best_path,
            best_model_score=best_score,
        )
        return True, [other for other in dropped if other != path]

    def _deserves(self, score: Tensor) -> bool:
        if self.save_top_k == -1:
            return True
        if score.isnan():
            return False
        if len(self.best_k_models) < self.save_top_k:
            return True
        return better(score.item(), self.best_k_models[self._worst()].item(), self.mode)

    def _worst(self) -> str:
        """The file to go; of equal ones the newest."""
        newest_first = list(reversed(self.best_k_models.items()))
        pick = max if self.mode == "min" else min
        return pick(newest_first, key=lambda item: item[1].item())[0]

    def _write_last(self, trainer: Any, again: bool = False, always: bool = False) -> None:
        """Write `last.ckpt`; not `again` for a step at which it was written."""
        if self._interrupted or not (self.save_last or always):
            return
        if again or trainer.global_step != self._saved_step:
            path = str(self._folder / self.LAST)
            changes: dict[str, Any] = {"last_model_path": path}
            if self.monitor is None and not self._names_files:
                changes["best_model_path"] = path
            self._write(trainer, path, **changes)
            self._saved_step = trainer.global_step

    def _write(self, trainer: Any, path: str, **changes: Any) -> None:
        """Write a file that counts itself; if that fails, nothing has changed."""
        before = {name: getattr(self, name) for name in changes}
        vars(self).update(changes)
        try:
            # Every rank: gathering the state may need them all.
            trainer.save_checkpoint(
                path,
                weights_only=self.save_weights_only,
                trainable_only=self.save_trainable_only,
            )
        except BaseException:
            vars(self).update(before)
            raise
        if self.verbose and trainer.is_global_zero:
            judged = ""
            if self.current_score is not None:
                judged = f", {self.monitor} = {self.current_score:.5g}"
            print(f"step {trainer.global_step}{judged}: saved {path}")

    def _path(self, trainer: Any, values: dict[str, Any], dropped: list[str]) -> str:
        """A path that is free, or that of a file of ours which is to go anyway; as rank 0 finds."""
        if trainer.world is None:
            return self._free_path(values, dropped)
        path = self._free_path(values, dropped) if trainer.is_global_zero else None
        found: str = trainer.world.broadcast("the name of a checkpoint", path)
        return found

    def _free_path(self, values: dict[str, Any], dropped: list[str]) -> str:
        name = self._template.fill(values)
        path = self._folder / f"{name}.ckpt"
        version = 0
        while str(path) not in dropped and (path.exists() or str(path) in self.best_k_models):
            version += 1
            path = self._folder / f"{name}-v{version}.ckpt"
        return str(path)

    @property
    def _folder(self) -> Path:
        assert self.dirpath is not None  # since setup
        return self.dirpath

    def _delete(self, trainer: Any, path: str) -> None:
        if not trainer.is_global_zero:
            return
        # The path may come from a file that somebody else has written: it leads nowhere else.
        if Path(path).parent != self._folder or Path(path).suffix != ".ckpt":
            return
        try:
            if (Path(path) / "state.ckpt").is_file():  # of a sharded training
                shutil.rmtree(path)
            else:
                Path(path).unlink(missing_ok=True)
        except OSError as error:
            # The new files are there: no reason to end a training.
            warnings.warn(f"an old checkpoint could not be deleted: {error}", stacklevel=2)

    def _call(self) -> str:
        given = [f"monitor={self.monitor!r}"] if self.monitor is not None else []
        given += [f"filename={self.filename!r}"] if self.filename is not None else []
        return f"ModelCheckpoint({', '.join(given)})"

    # -- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Which files there are and what they are worth."""
        return {
            "dirpath": str(self.dirpath),
            "best_model_path": self.best_model_path,
            "best_model_score": self.best_model_score,
            "best_k_models": dict(self.best_k_models),
            "last_model_path": self.last_model_path,
            "current_score": self.current_score,
            "deferred": self._deferred,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the files that are still there; those of another folder are left alone."""
        self.best_model_path = state_dict["best_model_path"]
        self.best_model_score = state_dict["best_model_score"]
        self.current_score = state_dict["current_score"]
        self._deferred = state_dict["deferred"]
        folder = self.dirpath
        self.best_k_models = {
            path: score
            for path, score in state_dict["best_k_models"].items()
            if Path(path).parent == folder and Path(path).exists()
        }
        last = state_dict["last_model_path"]
        self.last_model_path = last if last and Path(last).parent == folder else ""


def _seconds(interval: timedelta | float | None) -> float | None:
    """An interval in seconds; a number counts minutes."""
    if interval is None:
        return None
    if isinstance(interval, timedelta):
        seconds = interval.total_seconds()
    elif isinstance(interval, (int, float)) and not isinstance(interval, bool):
        seconds = 60.0 * interval
    else:
        raise TypeError(
            f"train_time_interval must be a timedelta, or minutes as a number, got {interval!r}"
        )
    if not seconds >= 0:
        raise ValueError(f"train_time_interval must not be negative, got {interval!r}")
    return seconds


def _is_a_trial(trainer: Any) -> bool:
    """Whether nothing of this run is meant to last."""
    return bool(trainer.sanity_checking or trainer.fast_dev_run)


def _ends_step(trainer: Any, batch_idx: int) -> bool:
    """Whether this is the last loader batch of its step: then all that belongs to it has run."""
    loop = trainer.fit_loop
    return loop is None or batch_idx + 1 >= loop.train.batch_idx
