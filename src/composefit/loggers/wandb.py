"""Curves, pictures and settings in Weights & Biases."""

from __future__ import annotations

import glob
import os
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from composefit.images import Image
from composefit.loggers.extras import require
from composefit.loggers.logger import Logger
from composefit.loggers.wandb_file import cut, entries

if TYPE_CHECKING:
    from wandb import Run

_AXIS = "global_step"
#: Seconds between two writes of W&B's service; its own default is 15, lost if it is killed.
_WRITE_EVERY = 0.05
#: Seconds that the service gets for writing what it has been given.
_PATIENCE = 10.0


class WandbLogger(Logger):
    """Logs a run to Weights & Biases, by default to local files that `wandb sync` uploads.

    All curves are over `global_step`. The run's id is in the checkpoint, so that a resumed run
    continues the same curves: offline, what the local files hold from after the checkpoint is cut
    off. What the server has of it (`mode="online"`, or after `wandb sync`) stays there, and the
    steps that are done again are there twice.

    Args:
        project: the project; None for W&B's default.
        name: what the run is called; None for a random name.
        save_dir: the folder in which W&B makes its folder `wandb`.
        mode: `"offline"`, `"online"`, `"shared"` or `"disabled"`.
        id: of the run; None for a random one. With the id of an earlier run that one is continued.
        init: further arguments of `wandb.init`, such as `entity`, `tags` or `settings`.

    Raises:
        ModuleNotFoundError: W&B is not installed: `pip install "composefit[wandb]"`.

    Source: `wandb.init`, `wandb.Run.log`, `wandb.Run.define_metric`.
    """

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        save_dir: str | os.PathLike[str] = "runs",
        mode: Literal["offline", "online", "shared", "disabled"] = "offline",
        id: str | None = None,
        **init: Any,
    ) -> None:
        require("wandb", "wandb")
        self.save_dir = Path(save_dir)
        self.id = id
        self._init = {**init, "project": project, "name": name, "mode": mode}
        self._params: dict[str, Any] = {}
        self._run: Run | None = None
        self._is_ours = True
        self._resumed_at: int | None = None
        self._next_row = 0  # W&B's number of it, as far as the file has been read
        self._logged = self._written = 0  # of this logger's rows in this run
        self._read_to = 0

    @property
    def experiment(self) -> Run:
        """The run itself, for what only W&B has; it begins with the first use."""
        if self._run is None:
            self._run = self._begin()
        return self._run

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Add a row.

        Raises:
            ValueError: a metric is called `global_step`, which is the axis.
            RuntimeError: a run has to be continued while the script has another one open.
        """
        if _AXIS in metrics:
            raise ValueError(f"{_AXIS!r} is the axis of all curves: log under another name")
        self._log(dict(metrics), step)

    def log_image(self, name: str, image: Image, step: int) -> None:
        """Add a picture with its caption."""
        picture = require("wandb", "wandb").Image
        self._log({name: picture(image.array(), caption=image.caption or None)}, step)

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        """Add to the run's config; one that has not begun begins with it."""
        self._params.update(params)
        if self._run is not None:
            config: Any = self._run.config  # untyped
            config.update(params, allow_val_change=True)

    def flush(self) -> None:
        """Wait until W&B's service has written all rows to the local file."""
        if self._run is None or not os.path.exists(file := self._run.settings.sync_file):
            return
        patience = _PATIENCE + self._run.settings.x_transaction_log_flush_interval
        end = time.monotonic() + patience
        while True:
            self._read(file)
            if self._written >= self._logged:
                return
            if time.monotonic() > end:
                warnings.warn(
                    f"W&B has not written all rows to {file} within {patience:g} s: a run that is "
                    "resumed from this checkpoint may miss some",
                    stacklevel=2,
                )
                return
            time.sleep(_WRITE_EVERY / 5)

    def finalize(self, status: str) -> None:
        """End the run and, unless another run needs it, W&B's service.

        A run that the script had begun itself is left open. A later call begins where this ended.
        """
        run, self._run = self._run, None
        if run is None or not self._is_ours:
            return
        wandb = require("wandb", "wandb")
        try:
            run.finish(exit_code=0 if status == "finished" else 1)
        finally:  # if the service has died, the next run needs another one
            try:
                if wandb.setup().most_recent_active_run in (None, run):
                    wandb.teardown()
            finally:  # the file is complete only now
                self._read(run.settings.sync_file)

    def state_dict(self) -> dict[str, Any]:
        """The run's id, and W&B's number of its next row."""
        self.flush()
        return {"id": self.id, "next_row": self._next_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the run of the checkpoint."""
        self.finalize("finished")
        self.id = state["id"] or self.id
        self._next_row = state["next_row"]
        self._resumed_at = state["step"]

    def _log(self, row: dict[str, Any], step: int) -> None:
        run = self.experiment
        # W&B's own number of a row begins at 0 in every folder; it must not go back either.
        number = None if self._logged else max(run.step, self._next_row)
        run.log({**row, _AXIS: step}, step=number, commit=True)
        self._logged += 1

    def _read(self, file: str) -> None:
        """Read what has been added to the local file."""
        if os.path.exists(file):
            for entry in entries(Path(file), self._read_to):
                self._read_to = entry.end
                if entry.is_row:
                    self._next_row = entry.values["_step"] + 1
                    self._written += _AXIS in entry.values

    def _cut_off(self) -> None:
        """Drop what the local files hold from after the checkpoint of a resumed run."""
        step, self._resumed_at = self._resumed_at, None
        if step is None or self.id is None or self._init["mode"] == "disabled":
            return
        pattern = f"offline-run-*/run-{glob.escape(self.id)}.wandb"
        for file in (self.save_dir / "wandb").glob(pattern):
            cut(file, _AXIS, step)

    def _begin(self) -> Run:
        wandb = require("wandb", "wandb")
        self._cut_off()
        self.save_dir.mkdir(parents=True, exist_ok=True)  # else W&B warns
        arguments = {"dir": str(self.save_dir), "config": self._params or None, **self._init}
        if self.id is not None:
            arguments |= {"id": self.id, "resume": "allow"}
        settings = arguments.get("settings") or {}
        if isinstance(settings, dict):
            arguments["settings"] = {"x_transaction_log_flush_interval": _WRITE_EVERY, **settings}
        before = wandb.run
        run: Run = wandb.init(**arguments)
        if self.id is not None and run.id != self.id:
            raise RuntimeError(
                f"the W&B run {self.id!r} cannot be continued while {run.id!r} is open: call "
                "wandb.finish() before"
            )
        self.id = run.id
        self._is_ours = run is not before
        self._logged = self._written = self._read_to = 0
        run.define_metric(_AXIS)
        run.define_metric("*", step_metric=_AXIS)
        return run
