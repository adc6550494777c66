"""`Evaluation`: what validation, test and prediction have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from composefit import tree
from composefit.data import Batches, Rows
from composefit.lockstep.contract import Body
from composefit.lockstep.driver import Lockstep
from composefit.lockstep.shard import Shard
from composefit.logs import Logs
from composefit.metric_types import Metric
from composefit.module import LoopModule
from composefit.ranks import World
from composefit.replicas import MetricState, RankMetrics
from composefit.seeding import global_states, restore_global_states

if TYPE_CHECKING:
    from composefit.trainer import Trainer


class Evaluation:
    """The evaluations of a trainer: modes, drivers and logs.

    Args:
        trainer: whose settings it follows.

    Attributes:
        logs: what the evaluations since the last fit began have logged.
        numbers: batches of each loader of the evaluation that runs.
        sanity_checking: whether these are the validation batches before training.
        batch_samples: of the batch whose outputs were joined last, on all ranks; None where
            nobody knows.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.logs = Logs()
        self.numbers: list[float] = []
        self.sanity_checking = False
        self.batch_samples: int | None = None
        self._drivers: dict[str, Lockstep] = {}
        self._name = "validation"
        self._joins = True
        self._suffix = ""  # of what the loader's steps log, where there are several
        self._at_most = -1  # batches of each loader; -1 for all

    def forget(self) -> None:
        """Other hooks, sessions or modules from now on."""
        self._drivers.clear()

    @property
    def _ranks(self) -> World | None:
        return self.trainer.world

    @property
    def _metrics(self) -> RankMetrics | None:
        return self.trainer.rank_metrics

    # -- what loops call -----------------------------------------------------------------------

    @contextmanager
    def running(
        self, module: LoopModule, name: str, loaders: Sequence[Batches] = (), keep: bool = True
    ) -> Iterator[None]:
        """Around an evaluation: no gradients, all parts in evaluation mode, logs of its own.

        Args:
            module: is evaluated.
            name: `"validation"`, `"test"` or `"predict"`: whose step.
            loaders: it runs over these.
            keep: the loop looks at what the steps of a prediction return.
        """
        trainer, call = self.trainer, self.trainer.call
        modes = {part: part.training for part in module.modules()}
        if self._metrics is not None:  # what training has counted by now is not this one's part
            self._metrics.join()
        metrics = [MetricState(part) for part in modes if isinstance(part, Metric)]
        generators = global_states()
        module.eval()
        self._name, self._suffix = name, ""
        numbers = [one.number for one in loaders]
        if self._at_most >= 0:
            numbers = [min(number, self._at_most) for number in numbers]
        self.numbers = numbers
        # What cannot be joined does no harm where nobody looks at it.
        self._joins = (
            (name == "predict" and keep)
            or call.anybody(f"on_{name}_batch_end", 4)
            or call.takes(f"on_{name}_epoch_end", 1)
        )
        quiet = torch.inference_mode() if trainer.inference_mode else torch.no_grad()
        began = time.monotonic()
        try:
            with quiet, trainer.hearing(self.logs), trainer.profiled_as(name):
                yield
            self._finish()
            if self.sanity_checking:
                self._put_back(metrics)
            elif self._metrics is not None:
                self._metrics.join()
        except BaseException:
            # It begins anew when the run is resumed: what it has counted would count twice.
            self.logs.forget_epoch()
            self._put_back(metrics)
            restore_global_states(generators)
            raise
        finally:
            self._joins = True
            if trainer.training is not None:
                trainer.training.pause(time.monotonic() - began)
            for part, training in modes.items():
                part.training = training

    def _finish(self) -> None:
        """What the steps of this rank have written, all ranks must have written."""
        driver = self._drivers.get(self._name)
        if driver is not None and driver.ranks is not None:
            driver.ranks.finish()

    def _put_back(self, metrics: list[MetricState]) -> None:
        for one in metrics:
            one.put_back()
        if self._metrics is not None:
            self._metrics.forget()

    def step(self, module: LoopModule, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """One evaluation step; see `Trainer.evaluate`."""
        trainer, name = self.trainer, self._name
        driver = self._drivers.get(name)
        if driver is None or driver.owner is not module:
            body = Body.method(module, f"{name}_step", training=False)
            driver = self._drivers[name] = trainer.driver(module, body, None)
        driver.dataloader_idx = dataloader_idx
        several = len(self.numbers) > 1
        driver.log_suffix = f"/dataloader_idx_{dataloader_idx}" if several else ""
        self._suffix = driver.log_suffix
        if self._metrics is not None:
            self._metrics.part()
        shards = driver.step([batch], batch_idx, batch_idx)
        self.logs.add(shards)
        if (batch_idx + 1) % trainer.log_every_n_steps == 0 and not self.sanity_checking:
            self._exchange()
            trainer.write(self.logs.take_steps())
        return self._joined(shards, driver.device, batch)

    def _exchange(self, whole: bool = False) -> None:
        """Let all ranks know what all have logged; with `whole`, all that metrics have counted."""
        world = self._ranks
        if world is not None:
            self.logs.exchange(world, self._metrics, whole)

    def _joined(self, shards: Sequence[Shard], device: torch.device, batch: Any) -> Any:
        """What the step returned, of all shards and ranks, in the order of the samples."""
        world = self._ranks
        outputs = [shard.output for shard in shards]
        if world is None and len(outputs) == 1:
            return outputs[0]
        if not self._joins:
            return None
        samples = [shard.samples for shard in shards]
        if world is not None:
            # Those of a rank without samples are none of the batch's.
            mine = (tree.map_tensors(_travelling, outputs), samples)
            everyone = world.gather("what an evaluation step returned", mine)
            outputs = [output for own, _ in everyone for output in own]
            samples = [count for _, own in everyone for count in own]
        self.batch_samples = sum(samples)
        dim = getattr(self.trainer.module, "batch_dim", 0)
        whole = batch.batch if isinstance(batch, Rows) else batch
        leading = {tuple(one.shape[:dim]) for one in tree.tensors(whole)} if dim else set()
        joined = _join(
            outputs, samples, partial(tree.join, dim=dim, sizes=samples, leading=leading)
        )
        return joined if world is None else tree.move(joined, device)

    def batches(self, batches: Batches) -> Iterator[Any]:
        """A loader's batches, the same at every evaluation; the first few in a sanity check."""
        batches.seed = self.trainer.run_seed
        for i, batch in enumerate(batches.epoch(0)):
            yield batch
            if i + 1 == self._at_most:
                break
        if self._suffix:
            self._exchange(whole=True)
            self.logs.end_loader(self._suffix)

    @contextmanager
    def sanity_check(self, batches: int) -> Iterator[None]:
        """Around a validation that only shows whether validation works: nothing of it is kept.

        Args:
            batches: of each loader; -1 for all.
        """
        self.sanity_checking, self._at_most = True, batches
        try:
            with self.trainer.call.span("on_sanity_check_start", "on_sanity_check_end"):
                yield
        finally:
            self.sanity_checking, self._at_most = False, -1
            self.logs = Logs()

    def end(self) -> None:
        """The last batch is done: the means are known, and metrics are of all ranks' samples."""
        self._exchange(whole=True)
        self.logs.end_epoch()

    def write(self) -> None:
        """Hand the means to the loggers, with what hooks have logged at the end."""
        self._exchange()
        self.logs.end_epoch()
        values, images = self.logs.take_epoch(), self.logs.take_images()
        if not self.sanity_checking:
            self.trainer.write(values, images)

    def results(self) -> list[dict[str, float]]:
        """For each loader, name -> value of what was logged over it."""
        found: list[dict[str, float]] = [{} for _ in self.numbers]
        for name, value in self.logs.all_values().items():
            _, mark, index = name.rpartition("/dataloader_idx_")
            of_one = mark and index.isdecimal() and int(index) < len(found)
            own = [found[int(index)]] if of_one else found
            for one in own:
                one[name] = value
        return found


def _travelling(tensor: Tensor) -> Tensor:
    """On the CPU, and without the rest of a larger tensor that it may be a part of."""
    return tensor.detach().to("cpu", copy=True)


def _join(parts: list[Any], samples: list[int], join: Callable[[list[Any]], Any]) -> Any:
    """Join outputs, of which a number is a mean over the part's samples, as a plain loss is.

    That is a float, or a 0-dim floating tensor, returned by itself or as a value of a dict: it
    becomes the mean over all samples, as it is where the batch is a single part. Everything else
    is joined by `join`.
    """
    first = parts[0]
    if all(type(part) is float for part in parts):
        return _mean(parts, samples)
    if all(_is_number(part) for part in parts):
        mean = _mean([part.double() for part in parts], samples)
        return mean.to(first.dtype)
    if all(type(part) is dict and part.keys() == first.keys() for part in parts):
        return {key: _join([part[key] for part in parts], samples, join) for key in first}
    return join(parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def _mean(values: list[Any], samples: list[int]) -> Any:
    if len(values) == 1:
        return values[0]
    return sum(value * count for value, count in zip(values, samples, strict=True)) / sum(samples)
