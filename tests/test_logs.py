"""Logging: one value for all shards, weighted, named as in Lightning, read only when asked for."""

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torchmetrics import MaxMetric, MeanMetric, Metric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryPrecision, BinaryRecall

from composefit import (
    Callback,
    LoopModule,
    Mean,
    Once,
    SingleDevice,
    Strategy,
    Sum,
    ThreadDataParallel,
    Trainer,
)
from composefit.logged import Logged, LogOptions
from composefit.loggers import Logger
from composefit.logs import Logs
from tests.lockstep.steps import STRATEGIES, data, every_strategy, linear, module

Make = Callable[[], Strategy]
QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class Rows(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))

    def of(self, name: str) -> list[tuple[int, float]]:
        return [(step, row[name]) for step, row in self.rows if name in row]


def fit(
    net: LoopModule, batches: Any, val: Any = None, strategy: Strategy | None = None, **options: Any
) -> tuple[Trainer, Rows]:
    """A run whose rows are kept, one for each step."""
    rows = Rows()
    options = {"max_epochs": 1, "log_every_n_steps": 1, "seed": 0, "logger": rows, **options}
    run = Trainer(strategy=strategy or SingleDevice("cpu"), **QUIET, **options)
    run.fit(net, batches, val)
    return run, rows


def logging(log: Callable[[Any, Tensor], None]) -> Any:
    """A module whose step logs like this."""

    def step(self: Any, x: Tensor) -> Tensor:
        log(self, x)
        return self.net(x).square().mean()

    return module(step)


def ramp(n: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + n, dtype=torch.float64).unsqueeze(1).expand(-1, 3) / 7


# -- reduction ----------------------------------------------------------------------------------

HOW = [{}, {"microbatch_size": 2}, {"accumulate_grad_batches": 2}]


@every_strategy
@pytest.mark.parametrize("how", HOW, ids=["plain", "micro-batches", "accumulated"])
def test_a_value_is_that_of_the_whole_batch(strategy: Make, how: dict[str, Any]) -> None:
    def log(self: Any, x: Tensor) -> None:
        big = x[:, 0][x[:, 0] > 0.5]
        self.log("samples", x[:, 0].mean())
        self.log("tokens", Mean(big.sum(), len(big)))
        self.log("of", Mean.of(big.mean(), len(big)))
        self.log("sum", Sum(big.sum()))
        self.log("given", x.max(), batch_size=3)
        self.log("number", 2.5)

    whole = ramp(14)[torch.randperm(14, generator=torch.Generator().manual_seed(0))]
    batches = whole.split(7) if "accumulate_grad_batches" in how else [whole]
    _, rows = fit(logging(log), batches, strategy=strategy(), **how)
    ((step, row),) = rows.rows
    values = whole[:, 0]
    assert step == 1
    assert row["samples"] == pytest.approx(values.mean().item(), rel=1e-14)
    assert row["tokens"] == pytest.approx(values[values > 0.5].mean().item(), rel=1e-14)
    assert row["of"] == pytest.approx(row["tokens"], rel=1e-14)
    assert row["sum"] == pytest.approx(values[values > 0.5].sum().item(), rel=1e-14)
    assert row["number"] == 2.5


def test_batch_size_is_a_values_weight() -> None:
    def log(self: Any, x: Tensor) -> None:
        self.log("x", float(x[0, 0] * 7), batch_size=1 if x[0, 0] == 0 else 3)
        self.log("epoch", float(x[0, 0] * 7), batch_size=1 if x[0, 0] == 0 else 3, on_epoch=True)

    _, rows = fit(logging(log), [ramp(4)], strategy=SingleDevice("cpu", shards=2))
    assert rows.of("x") == [(1, (0 * 1 + 2 * 3) / 4)]
    run, _ = fit(logging(log), [ramp(2), ramp(1, 2)])
    assert run.callback_metrics["epoch_epoch"] == (0 * 1 + 2 * 3) / 4


@every_strategy
def test_an_epochs_mean_weighs_samples(strategy: Make) -> None:
    def log(self: Any, x: Tensor) -> None:
        self.log("x", x[:, 0].mean(), on_step=False, on_epoch=True)
        self.log("seen", Sum(torch.tensor(float(len(x)))), on_step=False, on_epoch=True)

    whole = ramp(17)
    _, rows = fit(logging(log), whole.split(7), strategy=strategy())
    ((step, row),) = rows.rows
    assert step == 3
    assert row["x"] == pytest.approx(whole[:, 0].mean().item(), rel=1e-14)
    assert row["seen"] == 17


def test_shards_that_log_nothing_do_not_count() -> None:
    def log(self: Any, x: Tensor) -> None:
        if x[0, 0] > 0:
            self.log("late", x[:, 0].mean())

    _, rows = fit(logging(log), [ramp(4)], strategy=SingleDevice("cpu", shards=2))
    assert rows.of("late") == [(1, pytest.approx(2.5 / 7))]


def test_a_mean_over_nothing_is_nan_not_zero() -> None:
    nothing = Mean(torch.zeros(()), 0)
    _, rows = fit(logging(lambda self, x: self.log("x", nothing)), [ramp(4)])
    assert math.isnan(rows.of("x")[0][1])


# -- names and places -----------------------------------------------------------------------------


def test_names_are_lightnings() -> None:
    def log(self: Any, x: Tensor) -> None:
        value = x[:, 0].sum()
        self.log("both", value * 7, on_epoch=True)
        self.log("default", value * 7)
        self.log("mean", value * 7, on_step=False, on_epoch=True)
        self.log("quiet", value * 7, logger=False, prog_bar=True)

    run, rows = fit(logging(log), [ramp(1, 1), ramp(1, 3)], max_epochs=2)
    assert rows.of("default") == [(1, 1.0), (2, 3.0), (3, 1.0), (4, 3.0)]
    assert rows.of("both_step") == rows.of("default")
    assert rows.of("both_epoch") == rows.of("mean") == [(2, 2.0), (4, 2.0)]
    assert {name for _, row in rows.rows for name in row} == {
        "epoch",
        "default",
        "both_step",
        "both_epoch",
        "mean",
    }
    assert run.logged_metrics == {"default": 3.0, "both_step": 3.0, "both_epoch": 2.0, "mean": 2.0}
    assert run.progress_bar_metrics == {"quiet": 3.0}
    assert run.callback_metrics == {
        "both": 2.0,
        "both_step": 3.0,
        "both_epoch": 2.0,
        "default": 3.0,
        "mean": 2.0,
        "quiet": 3.0,
    }


def test_the_progress_bar_keeps_the_order_of_the_step() -> None:
    def log(self: Any, x: Tensor) -> None:
        self.log("loss", 1.0, prog_bar=True)
        self.log("hidden", 1.0)
        self.log("accuracy", 2.0, prog_bar=True)

    run, _ = fit(logging(log), [ramp(4)])
    assert list(run.progress_bar_metrics) == ["loss", "accuracy"]


def test_log_every_n_steps_counts_steps() -> None:
    net = logging(lambda self, x: self.log("x", x[0, 0] * 7))
    _, rows = fit(
        net, [ramp(2, i) for i in range(12)], log_every_n_steps=2, accumulate_grad_batches=2
    )
    assert [step for step, _ in rows.of("x")] == [2, 4, 6]


def test_logging_the_same_name_twice_in_a_step_keeps_the_last() -> None:
    def log(self: Any, x: Tensor) -> None:
        self.log_dict({"x": 1.0, "y": 3.0})
        self.log("x", 2.0)

    _, rows = fit(logging(log), [ramp(4)])
    assert rows.rows == [(1, {"epoch": 0, "x": 2.0, "y": 3.0})]


# -- in hooks -------------------------------------------------------------------------------------


class Watching(Callback):
    """Logs in hooks of every kind."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        module.log("at fit start", 1.0)

    def on_train_batch_end(self, trainer: Any, module: Any) -> None:  # type: ignore[override]
        module.log("steps done", float(trainer.global_step))

    def on_before_optimizer_step(self, trainer: Any, module: Any) -> None:  # type: ignore[override]
        module.log("norm", sum(p.grad.norm() for p in module.parameters()))
        module.log("norms", 2.0 * (trainer.global_step + 1), on_epoch=True)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        assert trainer.callback_metrics["norms_epoch"] == 3.0
        module.log("at epoch end", 4.0)

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        module.log("at fit end", 5.0)


@every_strategy
def test_hooks_log_alike_under_every_strategy(strategy: Make) -> None:
    """A hook within a step belongs to no shard: what it logs counts once, not by samples."""
    net = module(lambda self, x: self.net(x).square().mean())
    rows = Rows()
    fit(net, [ramp(7), ramp(2)], strategy=strategy(), callbacks=Watching(), logger=rows)
    assert rows.of("norms_epoch") == [(2, 3.0)]
    assert rows.of("norms_step") == [(1, 2.0), (2, 4.0)]
    assert [step for step, _ in rows.of("norm")] == [1, 2]
    # What a hook after the step logs is in the next step's row.
    assert rows.of("steps done") == [(2, 1.0)]
    assert rows.of("at fit start") == [(2, 1.0)]
    assert rows.of("at epoch end") == [(2, 4.0)]
    assert rows.of("at fit end") == [(2, 5.0)]


@every_strategy
def test_once_functions_log_once(strategy: Make) -> None:
    def seen(self: Any, x: Tensor) -> None:
        self.log("rows", float(len(x)))
        self.log("mean", x[:, 0].mean(), on_step=False, on_epoch=True)

    def step(self: Any, x: Tensor) -> Any:
        yield from Once(self.seen, x)
        yield self.net(x).square().mean()

    net = module(step)
    type(net).seen = seen
    whole = ramp(9)
    _, rows = fit(net, whole.split(7), strategy=strategy())
    assert rows.of("rows") == [(1, 7.0), (2, 2.0)]
    assert rows.of("mean") == [(2, pytest.approx(whole[:, 0].mean().item(), rel=1e-14))]


# -- metrics --------------------------------------------------------------------------------------


class Classifier(LoopModule):
    """Measures itself in training and validation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = linear(3, 1)
        self.seen = BinaryAccuracy()
        self.accuracy = BinaryAccuracy()
        self.all = MetricCollection([BinaryAccuracy(), BinaryPrecision(), BinaryRecall()])

    def configure_optimizers(self) -> Any:
        return SGD(self.net.parameters(), lr=0.0)

    def training_step(self, batch: Any) -> Any:
        x, y = batch
        scores = self.net(x).squeeze(1)
        self.seen.update(scores.sigmoid(), y)
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        return nn.functional.binary_cross_entropy_with_logits(scores, y.double())

    def validation_step(self, batch: Any) -> None:
        x, y = batch
        scores = self.net(x).squeeze(1).sigmoid()
        self.accuracy(scores, y)
        self.all.update(scores, y)
        self.log("accuracy", self.accuracy)
        self.log_dict(self.all)  # type: ignore[arg-type]


def labelled(n: int, batch: int) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    x, y = data(n, 3), (data(n, seed=5) > 0.3).long()
    return x, y, list(zip(x.split(batch), y.split(batch), strict=True))


@every_strategy
def test_metrics_are_merged_not_averaged(strategy: Make) -> None:
    """Ragged batches and shards: a mean of accuracies is another number."""
    net = Classifier()
    x, y, batches = labelled(23, 7)
    _, rows = fit(net, batches, batches, strategy=strategy(), max_epochs=3)
    predicted = (net.net(x).squeeze(1) > 0).long()
    accuracy = (predicted == y).double().mean().item()
    precision = (y[predicted == 1] == 1).double().mean().item()
    recall = (predicted[y == 1] == 1).double().mean().item()
    assert len({accuracy, precision, recall}) == 3
    for name, expected in {
        "seen": accuracy,
        "accuracy": accuracy,
        "BinaryAccuracy": accuracy,
        "BinaryPrecision": precision,
        "BinaryRecall": recall,
    }.items():  # every epoch anew
        assert [value for _, value in rows.of(name)] == [pytest.approx(expected, rel=1e-6)] * 3


@every_strategy
def test_a_metric_per_step_is_the_epoch_so_far(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        self.metric.update(x[:, 0])
        self.log("mean", self.metric, on_epoch=True)
        self.log("again", self.metric)  # the metric is not reset between its two names
        return self.net(x).square().mean()

    net = module(step, net=linear(3, 1), metric=MeanMetric().double())
    whole = ramp(9)
    run, rows = fit(net, whole.split(7), strategy=strategy(), max_epochs=2)
    so_far = [whole[:7, 0].mean().item(), whole[:, 0].mean().item()]
    assert [value for _, value in rows.of("mean_step")] == pytest.approx([*so_far, *so_far])
    assert [value for _, value in rows.of("again")] == pytest.approx([*so_far, *so_far])
    assert [value for _, value in rows.of("mean_epoch")] == pytest.approx([so_far[1]] * 2)
    # The metric is empty again; nobody is warned that it is.
    assert run.callback_metrics["mean_step"].item() == pytest.approx(so_far[1])


def test_a_metric_that_is_logged_in_a_hook() -> None:
    def step(self: Any, x: Tensor) -> None:
        self.metric.update(x[:, 0])

    net = module(lambda self, x: self.net(x).mean(), net=linear(3, 1), metric=MaxMetric())
    type(net).validation_step = step
    type(net).on_validation_epoch_end = lambda self: self.log("max", self.metric)
    run, rows = fit(net, [ramp(4)], [ramp(4), ramp(2)], strategy=ThreadDataParallel(2))
    assert rows.of("max") == [(1, pytest.approx(3 / 7))]
    assert run.callback_metrics["max"].item() == pytest.approx(3 / 7)
    assert run.validate(net, [ramp(2)]) == [{"max": pytest.approx(1 / 7)}]


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ("high", TypeError, r"self.log\('x', ...\) expects a number.*got str 'high'"),
        (None, TypeError, "got None"),
        (torch.zeros(2), ValueError, r"one number, got shape \(2,\)"),
        (Mean(torch.ones(()), 1) + Sum(torch.ones(())), ValueError, "log its terms under names"),
        (MetricCollection([MeanMetric()]), TypeError, r"write self.log_dict\(collection\)"),
    ],
    ids=["str", "None", "shape", "two terms", "collection"],
)
def test_what_cannot_be_logged_raises_at_the_users_line(
    value: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        fit(logging(lambda self, x: self.log("x", value)), [ramp(4)], log_every_n_steps=50)
    assert "<lambda>" in [entry.name for entry in caught.traceback][-4:]


def test_logging_to_nowhere_is_refused() -> None:
    net = logging(lambda self, x: self.log("x", 1.0, on_step=False))
    with pytest.raises(ValueError, match="logs nothing"):
        fit(net, [ramp(4)])


# -- cost -----------------------------------------------------------------------------------------


def test_nothing_waits_for_the_device_before_it_is_read() -> None:
    """A tensor on the meta device has no value: reading one raises, as a wait would be seen."""
    far = torch.zeros((), device="meta")
    net = logging(lambda self, x: self.log("x", far, prog_bar=True))
    run, _ = fit(net, [ramp(2)] * 5, log_every_n_steps=6)
    with pytest.raises(RuntimeError, match="meta"):
        _ = run.progress_bar_metrics
    with pytest.raises(RuntimeError, match="meta"):
        fit(net, [ramp(2)] * 5)


def test_epoch_means_are_added_up_on_the_device() -> None:
    logs = Logs()
    options = LogOptions(prog_bar=False, logger=True, on_step=False, on_epoch=True)
    for _ in range(1000):
        far = torch.zeros((), device="meta")
        logs.add_hook({"x": Logged(far, 2, options), "y": Logged(Mean(far, far), None, options)})
    (running, _) = logs._epochs.values()
    assert running.total.is_meta
    assert len(running.values) < 256


@pytest.mark.parametrize("value", ["tensor", "Mean"])
def test_memory_does_not_grow_with_the_epoch(value: str) -> None:
    """Neither the values of all steps are kept, nor their graphs, nor what they are views of."""
    kept: list[weakref.ref[Tensor]] = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Tensor) -> Tensor:
            big = torch.zeros(1)
            kept.append(weakref.ref(big))
            context.big = big
            return x.clone()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient

    def step(self: Any, x: Tensor) -> Tensor:
        loss = Function.apply(self.net(x).square().mean())
        self.log("x", Mean(loss, 1) if value == "Mean" else loss, on_epoch=True)
        return loss

    net = module(step)
    alive: list[int] = []

    class Watch(Callback):
        def on_train_batch_end(self) -> None:  # type: ignore[override]
            if len(kept) == 5:  # of the epoch, whose means are not known yet
                gc.collect()
                alive.append(sum(ref() is not None for ref in kept))

    fit(net, [ramp(2)] * 5, callbacks=Watch(), logger=False)
    assert alive == [0]


@pytest.mark.parametrize("strategy", list(STRATEGIES.values())[:2], ids=["one", "three"])
def test_a_logged_value_is_not_changed_afterwards(strategy: Make) -> None:
    """`loss += penalty` and an optimizer's step write into the very tensor that was logged."""

    def step(self: Any, x: Tensor) -> Tensor:
        loss = self.net(x).square().mean()
        self.log("loss", loss)
        self.log("mean", Mean(loss, 1))
        self.log("bias", self.net.bias[0])
        loss += 100.0
        return loss

    net = module(step, net=linear(3, 1))
    bias = net.net.bias.item()
    loss = net.net(ramp(6)).square().mean().item()
    _, rows = fit(net, [ramp(6)], strategy=strategy())
    assert rows.of("loss")[0][1] == pytest.approx(loss)
    assert rows.of("bias") == [(1, pytest.approx(bias))]
    assert rows.of("mean")[0][1] < 10


def test_sizes_are_asked_for_sample_means_only() -> None:
    """Neither a value of the step, nor a weight of one's own, nor a metric needs the samples."""

    class Sized(LoopModule):
        asked = 0
        asking = False

        def __init__(self) -> None:
            super().__init__()
            self.net = linear(3, 1)
            self.metric: Metric = MeanMetric()

        def configure_optimizers(self) -> Any:
            return SGD(self.net.parameters(), lr=0.1)

        def batch_size(self, batch: Any) -> int:
            self.asked += 1
            return len(batch)

        def training_step(self, x: Tensor) -> Tensor:
            loss = self.net(x).square().mean()
            self.metric.update(loss.detach())
            self.log("value", loss)
            self.log("given", loss, batch_size=4, on_epoch=True)
            self.log("mean", Mean(loss, 2), on_epoch=True)
            self.log("sum", Sum(loss), on_epoch=True)
            self.log("metric", self.metric, on_epoch=True)
            if self.asking:
                self.log("asks", loss, on_epoch=True)
            return loss

    net = Sized()
    fit(net, [ramp(2)] * 3)
    assert net.asked == 0
    net.asking = True
    fit(net, [ramp(2)] * 3)
    assert net.asked == 3
