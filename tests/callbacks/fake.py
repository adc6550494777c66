"""A trainer whose hooks a test calls by hand, a module that remembers its logs, and a real fit."""

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from composefit import LoopModule, Trainer, checkpoint
from composefit.callbacks import Callback


class LoggingModule(nn.Module):
    """Remembers what hooks log: name -> values, and name -> the options of the last call."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, list[Any]] = {}
        self.options: dict[str, dict[str, Any]] = {}

    def log(self, name: str, value: Any, **options: Any) -> None:
        self.logged.setdefault(name, []).append(value)
        self.options[name] = options


class SteppedTrainer:
    """What callbacks read of a trainer; a test calls its steps, validations and ends.

    Hooks run as in a real run: callbacks that save state last.
    """

    def __init__(self, root: Path, *callbacks: Callback, module: Any = None, **given: Any) -> None:
        self.default_root_dir = root
        self.callbacks = list(callbacks)
        self.module = LoggingModule() if module is None else module
        self.global_step = 0
        self.current_epoch = 0
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self.optimizers: dict[str, Any] = {}
        self.stage = "fit"
        self.exception: BaseException | None = None
        self.should_stop = self.sanity_checking = self.fast_dev_run = False
        self.is_global_zero = True
        self.world: Any = None
        self.clock = time.monotonic
        self.log_every_n_steps = 1
        self.samples_seen: int | None = 0
        self.num_training_batches = math.inf
        self.num_val_batches: list[float] = [1.0]
        self.val_check_interval: int | float | None = 1.0
        self.check_val_every_n_epoch: int | None = 1
        self.window = 1
        self.fit_loop: Any = SimpleNamespace(train=SimpleNamespace(batch_idx=0, interrupted=False))
        self.ready = True
        self.saved: list[str] = []
        self.disk_full = False
        for name, value in given.items():
            setattr(self, name, value)

    def call(self, hook: str, *arguments: Any) -> None:
        for last in (False, True):
            for callback in self.callbacks:
                if callback.saves_state is last:
                    getattr(callback, hook)(self, self.module, *arguments)

    def log(self, **metrics: float) -> None:
        for name, value in metrics.items():
            self.callback_metrics[name] = torch.tensor(value, dtype=torch.float64)

    def begin(self, state: dict[str, Any] | None = None) -> None:
        self.stage = "fit"
        self.call("setup", "fit")
        if state is not None:
            self.global_step = state["global_step"]
            for callback in self.callbacks:
                if callback.state_key in state["callbacks"]:
                    callback.load_state_dict(state["callbacks"][callback.state_key])
        self.begin_fold()

    def begin_fold(self) -> None:
        """What a loop does that trains several times in a run."""
        self.call("on_fit_start")
        self.call("on_train_start")

    def step(self, **metrics: float) -> None:
        """One step over a window of loader batches."""
        loop = self.fit_loop.train
        first = loop.batch_idx
        for index in range(first, first + self.window):
            self.call("on_train_batch_start", None, index)
        self.update()
        self.log(**metrics)
        self.global_step += 1
        loop.batch_idx += self.window
        for index in range(first, first + self.window):
            self.call("on_train_batch_end", None, None, index)

    def update(self) -> None:
        """What a step does to the weights; a test may override it."""

    def validate(self, **metrics: float) -> None:
        self.call("on_validation_start")
        self.log(**metrics)
        self.call("on_validation_end")

    def end_epoch(self, **metrics: float) -> None:
        self.log(**metrics)
        self.call("on_train_epoch_end")
        self.current_epoch += 1
        self.fit_loop.train.batch_idx = 0

    def epoch(self, **metrics: float) -> None:
        """Two steps, and a validation that logs these."""
        self.step()
        self.step()
        self.validate(**metrics)
        self.end_epoch()

    def end(self) -> None:
        self.call("on_train_end")
        self.call("on_fit_end")
        self.call("teardown", "fit")

    def fail(self, error: BaseException) -> None:
        self.exception = error
        self.call("on_exception", error)
        self.end()

    def save_checkpoint(
        self, path: str | Path, weights_only: bool = False, trainable_only: bool = False
    ) -> None:
        if self.disk_full:
            raise OSError(28, "No space left on device")
        state: dict[str, Any] = {
            "composefit_checkpoint": checkpoint.FORMAT,
            "state_dict": self.module.state_dict(),
            "trainable_only": trainable_only,
        }
        if not weights_only:
            state["global_step"] = self.global_step
            state["callbacks"] = {one.state_key: one.state_dict() for one in self.callbacks}
        checkpoint.save(path, state)
        self.saved.append(Path(path).name)


# -- a real one ------------------------------------------------------------------------------------


class Pair(LoopModule):
    """Two networks with an optimizer each, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.generator = nn.Linear(3, 3, dtype=torch.float64)
        self.critic = nn.Linear(3, 1, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def configure_optimizers(self) -> Any:
        return {
            "critic": torch.optim.Adam(self.critic.parameters(), lr=0.01),
            "generator": torch.optim.SGD(self.generator.parameters(), lr=0.01, momentum=0.9),
        }

    def training_step(self, batch: Tensor) -> Any:
        fake = self.generator(batch)
        yield {"critic": (self.critic(fake) - self.critic(batch)).mean()}
        yield {"generator": self.critic(fake).square().mean()}

    def validation_step(self, batch: Tensor) -> None:
        self.log("val_loss", self.critic(self.generator(batch)).square().mean())


def batches(shuffle: bool = False) -> DataLoader[Any]:
    """24 samples in batches of 4."""
    samples = torch.randn(24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return DataLoader(samples, batch_size=4, shuffle=shuffle)  # type: ignore[arg-type]


def fit(
    root: Path, module: LoopModule, *callbacks: Callback, ckpt_path: Any = None, **settings: Any
) -> Trainer:
    """A fit of one epoch of six batches, with three of validation, and nothing on the screen."""
    given: dict[str, Any] = {
        "max_epochs": 1,
        "limit_val_batches": 3,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "strategy": "single",
        "seed": 3,
        **settings,
    }
    trainer = Trainer(default_root_dir=root, callbacks=list(callbacks), **given)
    trainer.fit(module, batches(shuffle=True), batches(), ckpt_path=ckpt_path)
    return trainer
