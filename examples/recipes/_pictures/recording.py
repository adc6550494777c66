"""What is seen of a recipe while it trains, for its picture: nothing that it would notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from composefit import LoopModule, Trainer
from composefit.callbacks import EMA, Callback


@dataclass
class Run:
    """One fit.

    Attributes:
        trainer: that fits.
        module: that is fitted.
        steps: after which it was looked at, 0 among them.
        seen: what the look gave, for each of them.
    """

    trainer: Trainer
    module: LoopModule
    steps: list[int] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)


class Recorder(Callback):
    """Looks at a module before the first step, after every so many, and after the last.

    A look sees the module as an evaluation would: averaged weights, no dropout, no gradients. What
    it draws comes from a stream of its own, so that the training stays what it is.

    Args:
        look: the module -> anything.
        every: so many steps.
    """

    def __init__(self, look: Callable[[Any], Any], every: int) -> None:
        self.look, self.every = look, every
        self.runs: list[Run] = []

    def on_fit_start(self, trainer: Trainer, module: LoopModule) -> None:
        self.runs.append(Run(trainer, module))
        self._look()

    def on_train_batch_end(
        self, trainer: Trainer, module: LoopModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            self._look()

    def on_train_end(self, trainer: Trainer, module: LoopModule) -> None:
        self._look()

    def _look(self) -> None:
        run = self.runs[-1]
        trainer, module = run.trainer, run.module
        step = trainer.global_step
        if step in run.steps:  # another batch of the same step
            return
        training = [child for child in module.modules() if child.training]
        averages = [own for own in trainer.callbacks if isinstance(own, EMA)]
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            module.eval()
            for average in averages:
                average.on_test_start(trainer, module)
            try:
                run.seen.append(self.look(module))
                run.steps.append(step)
            finally:
                for average in averages:
                    average.on_test_end(trainer, module)
                for child in training:
                    child.training = True
