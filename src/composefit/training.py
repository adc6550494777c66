"""`Training`: the optimizers of a module, their schedulers, and the driver of its steps."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from composefit.lockstep.contract import Body
from composefit.lockstep.scatter import batch_size
from composefit.lockstep.shard import Shard
from composefit.lockstep.stepper import Stepper
from composefit.module import LoopModule, overridden
from composefit.optimizers import NamedOptimizer, Schedule, read_optimizers

if TYPE_CHECKING:
    from composefit.trainer import Trainer


class Training:
    """What one training of a module consists of, from `configure_optimizers` on.

    Args:
        trainer: whose settings it follows.
        module: is trained.

    Attributes:
        optimizers: name -> optimizer with its schedulers and clipping.
        stepper: steps them.
        driver: runs the steps.
        samples_seen: the samples trained on; None where nobody knows how many there are.
        batch_idx: the index of the first loader batch of the step that runs.
        losses: name -> the reduced loss of an optimizer's last update.
        monitors: schedulers that wait for the end of the step.
        norms: name -> the norm of an optimizer's gradients, where the step that runs was due.
    """

    def __init__(self, trainer: Trainer, module: LoopModule) -> None:
        self.trainer = trainer
        self.module = module
        self.optimizers = read_optimizers(module.configure_optimizers(), module)
        for one in self.optimizers.values():
            self._settle(one)
        own_step = overridden(module, "optimizer_step")
        own_clipping = overridden(module, "configure_gradient_clipping")
        self._own_schedules = overridden(module, "lr_scheduler_step")
        self.stepper = Stepper(
            module,
            self.optimizers,
            trainer.precision,
            trainer.strategy,
            self._own_step if own_step else trainer.strategy.optimizer_step,
            self,
            trainer.on_nonfinite,
            module.configure_gradient_clipping if own_clipping else None,
        )
        body = Body.method(module, "training_step", training=True)
        self.driver = trainer.driver(module, body, self.stepper)
        self.samples_seen: int | None = 0
        self.batch_idx = 0
        self.losses: dict[str, Tensor] = {}
        self.norms: dict[str, Tensor] = {}
        self.monitors: list[tuple[str, Schedule]] = []
        self._epoch_updates: Counter[str] = Counter()
        self._epoch_steps = 0
        self._samples_per_batch: int | None = None
        self._rates: dict[str, dict[str, float]] = {}
        self._normed: dict[str, int] = {}  # name -> the step of its last norm
        self._unrated = 0  # samples since the last call of `rate`
        self._since = time.monotonic()
        call = trainer.call
        # Asked once: these run at every update, and mostly nobody listens.
        self._backward_heard = call.anybody("on_after_backward", 0)
        self._before_heard = call.anybody("on_before_optimizer_step", 2)
        self._zero_grad_heard = call.anybody("on_before_zero_grad", 1)
        self._after_heard = call.anybody("on_after_optimizer_step", 2)
        if not module.training:  # else parts in evaluation mode, a frozen teacher say, stay in it
            module.train()

    def _settle(self, one: NamedOptimizer) -> None:
        """The trainer's clipping, where an optimizer has none of its own."""
        if one.gradient_clip_val is None:
            one.gradient_clip_val = self.trainer.gradient_clip_val
        if one.gradient_clip_val == math.inf:
            one.gradient_clip_val = None
        if one.gradient_clip_algorithm is None:
            one.gradient_clip_algorithm = self.trainer.gradient_clip_algorithm

    # -- after a step --------------------------------------------------------------------------

    def finish_step(self, shards: Sequence[Shard], batches: Sequence[Any]) -> None:
        """Count, and step the schedulers that waited for what the step logs."""
        self._epoch_steps += 1
        if self.driver.ranks is not None:
            if self.samples_seen is not None:
                self.samples_seen += self.driver.samples
            self._unrated += self.driver.samples
            return
        if self.samples_seen is not None:
            self._count_samples(shards, batches)

    def _count_samples(self, shards: Sequence[Shard], batches: Sequence[Any]) -> None:
        """For samples per second; the size of batches that nobody cut is asked once at most."""
        assert self.samples_seen is not None
        if self._samples_per_batch is not None and len(batches) == len(shards) == 1:
            samples = shards[0].known_samples or self._samples_per_batch
            self.samples_seen += samples
            self._unrated += samples
            return
        sizes = [shard.known_samples for shard in shards]
        if None in sizes:
            sizes = [self._samples_per_batch] * len(batches)
        if None in sizes:
            if not any(one.counts_samples for one in self.trainer.callbacks):
                self.samples_seen = None
                return
            try:
                sizes = [batch_size(self.module, batch) for batch in batches]
            except Exception:  # no step needs the size, so the module need not tell it
                self.samples_seen = None
                return
            self._samples_per_batch = sizes[0]
        samples = sum(size for size in sizes if size is not None)
        self.samples_seen += samples
        self._unrated += samples

    def rate(self) -> float:
        """Samples per second of training since the last call, of this process."""
        now = time.monotonic()
        rate = self._unrated / max(now - self._since, 1e-9)
        self._unrated, self._since = 0, now
        return rate

    def rates(self) -> dict[str, float]:
        """Learning rates as the step that was logged began with them, named as by the monitor."""
        used, self._rates = self._rates, {}
        found: dict[str, float] = {}
        for name, one in self.optimizers.items():
            found |= used[name] if name in used else _rates(name, one.optimizer)
        return found

    def pause(self, seconds: float) -> None:
        """Leave out a time in which something else was done."""
        self._since += seconds

    def warn_of_idle(self, epoch: int) -> None:
        """Warn of optimizers that no step of the epoch has updated."""
        stepper = self.stepper
        idle = [n for n, updates in stepper.updates.items() if updates == self._epoch_updates[n]]
        if self._epoch_steps and len(idle) == len(stepper.updates):
            warnings.warn(
                f"none of the {self._epoch_steps} steps of epoch {epoch} updated "
                "anything: training_step returned None, or ended without a yield, each time"
                + _left_out(stepper.left_out.total()),
                stacklevel=3,
            )
        elif self._epoch_steps:
            for name in idle:
                warnings.warn(
                    f"optimizer {name!r} was never updated in epoch {epoch}: no "
                    f"step yielded {{{name!r}: loss}}" + _left_out(stepper.left_out[name]),
                    stacklevel=3,
                )
        self._epoch_updates = Counter(stepper.updates)
        self._epoch_steps = 0
        stepper.left_out.clear()

    # -- an optimizer's step: what the stepper calls -------------------------------------------

    def before_optimizer_step(self, optimizer: Optimizer, name: str) -> None:
        """Hooks before an optimizer's step."""
        trainer = self.trainer
        if self._backward_heard:
            trainer.call("on_after_backward")
        if self._before_heard:
            trainer.call("on_before_optimizer_step", optimizer, name)
        step, every = trainer.global_step + 1, trainer.log_every_n_steps
        # At the steps that are logged; where it is not updated then, at the next update.
        if step % every == 0 and name not in self._rates:
            self._rates[name] = _rates(name, optimizer)
        last = self._normed.get(name)
        if last is None:
            last = trainer.history.last_step(f"grad_norm/{name}")  # where it is resumed
            last = self._normed[name] = last if last < step else 0
        if step // every > last // every or step == last:
            self._normed[name] = step
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            found = [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]
            self.norms[name] = self.trainer.strategy.norm(found)

    def before_zero_grad(self, optimizer: Optimizer) -> None:
        """Hooks while `.grad` is still there."""
        if self._zero_grad_heard:
            self.trainer.call("on_before_zero_grad", optimizer)

    def after_optimizer_step(self, optimizer: Optimizer, name: str) -> None:
        """Schedulers that count updates, and hooks after a step."""
        for schedule in self.optimizers[name].schedulers:
            if schedule.interval == "step" and schedule.due(self.stepper.updates[name]):
                if schedule.monitor is None:
                    self._step_scheduler(schedule, None)
                else:  # what this step logs is known at its end
                    self.monitors.append((name, schedule))
        if self._after_heard:
            self.trainer.call("on_after_optimizer_step", optimizer, name)

    def _own_step(self, optimizer: Optimizer, closure: Callable[[], Tensor] | None = None) -> None:
        step = self.module.optimizer_step
        closure = closure or partial(getattr, self.stepper, "loss")
        step(self.trainer.current_epoch, self.batch_idx, optimizer, closure)

    # -- schedulers ----------------------------------------------------------------------------

    def step_monitors(self) -> None:
        """At the end of a step: schedulers that count updates and look at a logged value."""
        waiting, self.monitors = self.monitors, []
        for name, schedule in waiting:
            self._step_schedule(name, schedule)

    def step_epoch_schedules(self, epochs: int) -> None:
        """At the end of an epoch, so many of which are over: schedulers that count these."""
        for one in self.optimizers.values():
            for schedule in one.schedulers:
                if schedule.interval == "epoch" and schedule.due(epochs):
                    self._step_schedule(one.name, schedule)

    def _step_schedule(self, name: str, schedule: Schedule) -> None:
        if schedule.monitor is None:
            self._step_scheduler(schedule, None)
            return
        known = self.trainer.known_values()
        if schedule.monitor in known:
            self._step_scheduler(schedule, known[schedule.monitor])
            return
        message = (
            f"the scheduler of optimizer {name!r} monitors {schedule.monitor!r}, which was never "
            f"logged; logged are {sorted(known)}"
        )
        if schedule.strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)

    def _step_scheduler(self, schedule: Schedule, value: float | None) -> None:
        if self._own_schedules:
            self.module.lr_scheduler_step(schedule.scheduler, value)
        elif value is None:
            schedule.scheduler.step()
        else:
            schedule.scheduler.step(value)


def _rates(name: str, optimizer: Optimizer) -> dict[str, float]:
    groups = optimizer.param_groups
    found: dict[str, float] = {}
    for i, group in enumerate(groups, 1):
        if "lr" in group:
            label = group.get("name", f"pg{i}" if len(groups) > 1 else None)
            found[f"lr/{name}" if label is None else f"lr/{name}/{label}"] = float(group["lr"])
    return found


def _left_out(count: int) -> str:
    return f", or its gradients were not finite ({count} times)" if count else ""
