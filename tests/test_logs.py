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
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryPrecision,
    BinaryRecall,
    MulticlassAccuracy,
)

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
from composefit.images import Image
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


class Average(Metric):
    """A mean in double precision, whose states are never written in place."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            zero = torch.zeros((), dtype=torch.float64)
            self.add_state(name, zero, dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        self.total = self.total + values.sum()
        self.weight = self.weight + values.numel()

    def compute(self) -> Tensor:
        return self.total / self.weight


# -- arguments ------------------------------------------------------------------------------------

#: A value for each of these reductions, of a batch's first column.
REDUCTIONS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "mean": ("mean", Tensor.mean),
    "avg": ("avg", Tensor.mean),
    "torch.mean": (torch.mean, Tensor.mean),
    "sum": ("sum", Tensor.sum),
    "torch.sum": (torch.sum, Tensor.sum),
    "min": ("min", Tensor.min),
    "torch.min": (torch.min, Tensor.min),
    "max": ("max", Tensor.max),
    "torch.max": (torch.max, Tensor.max),
    "python max": (max, Tensor.max),
}


@every_strategy
@pytest.mark.parametrize("how", REDUCTIONS)
def test_every_reduction_is_that_of_the_samples(strategy: Make, how: str) -> None:
    """Whatever the shards: of each step's samples, and of all samples of the epoch."""
    reduce_fx, expected = REDUCTIONS[how]

    def log(self: Any, x: Tensor) -> None:
        value = expected(x[:, 0])
        self.log("x", value, on_epoch=True, reduce_fx=reduce_fx)

    whole = ramp(17)[torch.randperm(17, generator=torch.Generator().manual_seed(3))]
    net = logging(log)
    type(net).validation_step = log
    run, rows = fit(net, whole.split(7), whole.split(5), strategy(), num_sanity_val_steps=0)
    for (_, value), batch in zip(rows.of("x_step"), whole.split(7), strict=False):
        assert value == pytest.approx(expected(batch[:, 0]).item(), rel=1e-14)
    whole_epoch = pytest.approx(expected(whole[:, 0]).item(), rel=1e-14)
    for name in ("x_epoch", "x"):  # of training, of validation
        assert rows.of(name) == [(3, whole_epoch)]
    assert run.callback_metrics["x"].item() == pytest.approx(expected(whole[:, 0]).item())


@every_strategy
def test_a_function_gets_every_value_of_the_epoch(strategy: Make) -> None:
    def log(self: Any, x: Tensor) -> None:
        self.log("x", x[0, 0] * 7, on_step=False, on_epoch=True, reduce_fx=torch.median)

    whole = ramp(15)
    _, rows = fit(logging(log), whole.split(5), strategy=strategy())
    firsts = [0, 5, 10] if strategy().lanes == 1 else [0, 2, 4, 5, 7, 9, 10, 12, 14]
    assert rows.of("x") == [(3, float(sorted(firsts)[len(firsts) // 2]))]


@every_strategy
def test_a_nan_shows_in_every_reduction(strategy: Make) -> None:
    def log(self: Any, x: Tensor) -> None:
        for how in ("mean", "sum", "min", "max"):
            value = math.nan if x[0, 0] == 0 else 1.0
            self.log(how, value, on_step=False, on_epoch=True, reduce_fx=how)

    _, rows = fit(logging(log), [ramp(6), ramp(6, 6)], strategy=strategy())
    ((_, row),) = rows.rows
    assert all(math.isnan(row[how]) for how in ("mean", "sum", "min", "max"))


@every_strategy
@pytest.mark.parametrize(
    "options",
    [
        {"sync_dist": True},
        {"sync_dist": False},
        {"rank_zero_only": True},
        {"sync_dist_group": "world"},
        {"metric_attribute": "net"},
    ],
    ids=str,
)
def test_what_lightning_needs_and_this_does_not_changes_nothing(
    strategy: Make, options: dict[str, Any]
) -> None:
    def log(self: Any, x: Tensor) -> None:
        self.log("plain", x[:, 0].mean(), on_epoch=True)
        self.log("told", x[:, 0].mean(), on_epoch=True, **options)

    run, _ = fit(logging(log), ramp(11).split(6), strategy=strategy())
    found = run.callback_metrics
    assert found["told_step"] == found["plain_step"] == pytest.approx(ramp(5, 6)[:, 0].mean())
    assert found["told_epoch"] == found["plain_epoch"] == pytest.approx(ramp(11)[:, 0].mean())


@every_strategy
def test_log_dict_logs_each_item_with_the_same_options(strategy: Make) -> None:
    def log(self: Any, x: Tensor) -> None:
        values = {"mean": x[:, 0].mean(), "rows": Sum(torch.tensor(float(len(x))))}
        self.log_dict(values, on_step=False, on_epoch=True, prog_bar=True, logger=False)

    run, rows = fit(logging(log), ramp(11).split(6), strategy=strategy())
    assert rows.rows == []
    assert run.progress_bar_metrics == {"mean": pytest.approx(5 / 7), "rows": 11.0}


def test_a_graph_is_refused() -> None:
    net = logging(lambda self, x: self.log("x", x.sum(), enable_graph=True))
    with pytest.raises(ValueError, match="a logged value has no graph; return it"):
        fit(net, [ramp(4)])


def test_a_value_of_both_rates_shows_both_in_the_bar() -> None:
    net = logging(lambda self, x: self.log("x", x[0, 0] * 7, prog_bar=True, on_epoch=True))
    run, _ = fit(net, [ramp(1, 1), ramp(1, 3)])
    assert run.progress_bar_metrics == {"x_step": 3.0, "x_epoch": 2.0}


def test_metrics_have_the_types_that_readers_expect() -> None:
    def log(self: Any, x: Tensor) -> None:
        self.log("int", 3, prog_bar=True)
        self.log("float32", x[0, 0].float() / 3, on_epoch=True)
        self.log("bool", torch.tensor(True))

    run, rows = fit(logging(log), [ramp(1, 7)])
    for metrics in (run.callback_metrics, run.logged_metrics):
        for value in metrics.values():
            assert (type(value), value.dtype, value.shape) == (Tensor, torch.float64, ())
    assert run.callback_metrics["float32"].item() == float(torch.tensor(1 / 3))
    assert {name: type(v) for name, v in run.progress_bar_metrics.items()} == {"int": float}
    assert all(type(v) in (float, int) for _, row in rows.rows for v in row.values())


# -- what a logger gets, and when -----------------------------------------------------------------


@every_strategy
def test_a_value_is_handed_over_once_at_the_next_step_that_is_logged(strategy: Make) -> None:
    """A row has no value from a step that an earlier row already stood for."""

    def log(self: Any, x: Tensor) -> None:
        self.log("always", float(self.global_step))
        if self.global_step % 3 == 0:
            self.log("seldom", float(self.global_step))

    run, rows = fit(logging(log), [ramp(3)] * 8, strategy=strategy(), log_every_n_steps=2)
    assert rows.of("always") == [(2, 1.0), (4, 3.0), (6, 5.0), (8, 7.0)]
    assert rows.of("seldom") == [(2, 0.0), (4, 3.0), (8, 6.0)]
    assert run.logged_metrics == {"always": 7.0, "seldom": 6.0}


def test_evaluation_steps_are_handed_over_where_they_were_logged() -> None:
    net = logging(lambda self, x: None)
    type(net).validation_step = lambda self, x: self.log("x", x[0, 0] * 7, on_step=True)
    loaders = {"a": [ramp(1, 1), ramp(1, 3)], "b": [ramp(1, 8)]}
    _, rows = fit(net, [ramp(2)] * 2, loaders, num_sanity_val_steps=0)
    assert [row for _, row in rows.rows] == [
        {"epoch": 0, "x/dataloader_idx_0_step": 1.0},
        {"epoch": 0, "x/dataloader_idx_0_step": 3.0},
        {"epoch": 0, "x/dataloader_idx_1_step": 8.0},
        {"epoch": 0, "x/dataloader_idx_0_epoch": 2.0, "x/dataloader_idx_1_epoch": 8.0},
    ]


def test_the_epochs_row_comes_before_what_saves_its_state() -> None:
    rows = Rows()
    seen: list[Any] = []

    class Saver(Callback):
        saves_state = True

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            if not trainer.sanity_checking:
                seen.append(rows.rows[-1][1])

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            seen.append(rows.rows[-1][1])

    class Late(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            module.log("from a hook", 2.0)

    net = logging(lambda self, x: self.log("x", 1.0, on_step=False, on_epoch=True))
    type(net).validation_step = lambda self, x: self.log("val", 3.0)
    fit(net, [ramp(2)], [ramp(2)], callbacks=[Saver(), Late()], logger=rows)
    assert seen == [{"epoch": 0, "val": 3.0}, {"epoch": 0, "x": 1.0, "from a hook": 2.0}]


def test_a_sanity_check_leaves_no_trace() -> None:
    """Neither values, nor pictures, nor what metrics have counted, whether logged or not."""

    class Pictures(Rows):
        def log_image(self, name: str, image: Image, step: int) -> None:
            self.rows.append((step, {name: 0.0}))

    def check(self: Any, x: Tensor) -> None:
        self.counted.update(x[:, 0])
        self.shown.update(x[:, 0])
        self.log("shown", self.shown, on_step=True, on_epoch=True)
        self.log("val", x[0, 0], prog_bar=True, on_step=True)
        self.log("picture", Image(torch.zeros(2, 2)))

    found: list[Any] = []

    class Look(Callback):
        def on_sanity_check_end(self, trainer: Any, module: Any) -> None:
            assert rows.rows == []

        def on_train_start(self, trainer: Any, module: Any) -> None:
            found.append((trainer.callback_metrics, trainer.progress_bar_metrics))
            found.append((module.counted._update_count, module.counted.total.item()))

    rows = Pictures()
    net = module(
        lambda self, x: self.net(x).mean(),
        net=linear(3, 1),
        counted=Average(),
        shown=Average(),
    )
    type(net).validation_step = check
    run, _ = fit(net, [ramp(2)], [ramp(4, 2)] * 3, callbacks=Look(), logger=rows)
    assert found == [({}, {}), (0, 0.0)]
    assert net.counted._update_count == 3
    assert run.history.curves().keys() >= {"shown_epoch"}
    assert run.history.tracks["shown_epoch"].column("step").tolist() == [1]


def test_several_loggers_get_the_same() -> None:
    first, second = Rows(), Rows()
    net = logging(lambda self, x: self.log("x", x[0, 0]))
    run, _ = fit(net, [ramp(2)] * 3, logger=[first, second])
    assert first.rows == second.rows
    assert len(first.rows) == 3
    assert net.logger is first and net.loggers == [first, second] == run.loggers


# -- several loaders, callbacks, pictures ---------------------------------------------------------

TWO = {"a": ramp(7).split(3), "b": ramp(5, 20).split(2)}


@every_strategy
@pytest.mark.parametrize("shared", [True, False], ids=["one metric", "two metrics"])
def test_a_metric_has_a_value_for_each_loader(strategy: Make, shared: bool) -> None:
    """Also one that is logged for both: it would otherwise hold the first loader's, too."""

    def step(self: Any, x: Tensor, batch_idx: int, dataloader_idx: int) -> None:
        metric = self.first if shared or dataloader_idx == 0 else self.second
        metric.update(x[:, 0])
        self.log("mean", metric, on_step=True, on_epoch=True)
        self.log("plain", x[:, 0].mean())

    metrics = {name: Average() for name in ("first", "second")}
    net = module(lambda self, x: self.net(x).mean(), net=linear(3, 1), **metrics)
    type(net).validation_step = step
    run, rows = fit(net, [ramp(3)], TWO, strategy(), max_epochs=2, num_sanity_val_steps=0)
    means = [ramp(7)[:, 0].mean().item(), ramp(5, 20)[:, 0].mean().item()]
    for i, mean in enumerate(means):
        for name in (f"mean/dataloader_idx_{i}_epoch", f"plain/dataloader_idx_{i}"):
            assert rows.of(name) == [(step, pytest.approx(mean)) for step in (1, 2)]
        per_step = rows.of(f"mean/dataloader_idx_{i}_step")
        assert per_step[2][1] == pytest.approx(mean)  # the last batch's: the loader so far
        assert run.callback_metrics[f"mean/dataloader_idx_{i}"] == pytest.approx(mean)
    results = run.validate(net, TWO, verbose=False)
    assert [one[f"mean/dataloader_idx_{i}"] for i, one in enumerate(results)] == [
        pytest.approx(mean) for mean in means
    ]


@every_strategy
def test_without_an_index_in_its_name_a_value_is_that_of_all_loaders(strategy: Make) -> None:
    def step(self: Any, x: Tensor, batch_idx: int, dataloader_idx: int) -> None:
        self.metric.update(x[:, 0])
        self.log("metric", self.metric, add_dataloader_idx=False)
        self.log("plain", x[:, 0].mean(), add_dataloader_idx=False)

    net = module(lambda self, x: self.net(x).mean(), net=linear(3, 1), metric=Average())
    type(net).validation_step = step
    _, rows = fit(net, [ramp(3)], TWO, strategy(), num_sanity_val_steps=0)
    mean = torch.cat([ramp(7), ramp(5, 20)])[:, 0].mean().item()
    for name in ("metric", "plain"):
        assert rows.of(name) == [(1, pytest.approx(mean))]


def test_a_name_of_ones_own_may_look_like_a_loaders() -> None:
    net = logging(lambda self, x: None)
    type(net).validation_step = lambda self, x: self.log("x/dataloader_idx_3", 1.0)
    run, _ = fit(net, [ramp(2)])
    assert run.validate(net, [ramp(2)], verbose=False) == [{"x/dataloader_idx_3": 1.0}]


@every_strategy
def test_callbacks_log_by_themselves_or_by_the_module(strategy: Make) -> None:
    class Logging(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any) -> None:  # type: ignore[override]
            self.log("own", float(trainer.global_step))
            module.log("its", float(trainer.global_step), on_epoch=True)

        def on_validation_batch_end(self, trainer: Any, module: Any) -> None:  # type: ignore[override]
            self.log_dict({"val": float(trainer.global_step), "two": 2.0})

    net = module(lambda self, x: self.net(x).square().mean())
    type(net).validation_step = lambda self, x: None
    _, rows = fit(net, [ramp(7), ramp(2)], [ramp(3)] * 2, strategy(), callbacks=Logging())
    assert rows.of("own") == rows.of("its_step") == [(1, 0.0), (2, 1.0)]
    assert rows.of("its_epoch") == [(2, 0.5)]
    assert rows.of("val") == rows.of("two") == [(2, 2.0)]


@every_strategy
def test_a_picture_is_logged_once_a_step_not_once_a_shard(strategy: Make) -> None:
    class Subclass(Image):
        pass

    class Pictures(Rows):
        def __init__(self) -> None:
            super().__init__()
            self.pictures: list[tuple[str, int, float]] = []

        def log_image(self, name: str, image: Image, step: int) -> None:
            self.pictures.append((name, step, image.pixels[0, 0].item()))

    def log(self: Any, x: Tensor) -> None:
        if self.global_step < 3:
            kind = Subclass if self.global_step else Image
            self.log("train", kind(x[:1, :2] / 100))
        self.log("hidden", Image(x[:1, :2]), logger=False)

    def validate(self: Any, x: Tensor) -> None:
        self.log("val", Image(x[:1, :2] / 100))

    net = logging(log)
    type(net).validation_step = validate
    loggers = [Pictures(), Pictures()]
    run, _ = fit(
        net,
        [ramp(6, 10 * i) for i in range(5)],
        [ramp(6, 40), ramp(6, 50)],
        strategy(),
        logger=loggers,
        log_every_n_steps=2,
    )
    expected = [("train", 2, 10 / 700), ("train", 4, 20 / 700), ("val", 5, 50 / 700)]
    assert loggers[0].pictures == loggers[1].pictures
    assert [(n, s, pytest.approx(v)) for n, s, v in loggers[0].pictures] == expected
    assert {n: [one.step for one in kept] for n, kept in run.history.pictures.items()} == {
        "train": [2, 4],
        "val": [5],
    }


def test_a_metric_can_be_trained_with_after_an_evaluation() -> None:
    """What was made in inference mode could not be updated in place outside of it."""

    def measure(self: Any, x: Tensor) -> None:
        self.metric.update(x[:, 0])
        name = "train" if torch.is_grad_enabled() else "val"
        self.log(name, self.metric, on_step=False, on_epoch=True)

    def step(self: Any, x: Tensor) -> Any:
        measure(self, x)
        return self.net(x).mean()

    net = module(step, net=linear(3, 1), metric=MeanMetric())
    type(net).validation_step = measure
    run, _ = fit(net, [ramp(3)])
    assert run.validate(net, [ramp(3, 7)], verbose=False) == [{"val": pytest.approx(8 / 7)}]
    run.fit(net, [ramp(3)])
    assert run.callback_metrics["train"].item() == pytest.approx(1 / 7)


def test_a_metric_of_several_numbers_says_what_to_write() -> None:
    net = module(
        lambda self, x: self.net(x).mean(),
        net=linear(3, 1),
        metric=MulticlassAccuracy(3, average=None),
    )

    def step(self: Any, x: Tensor) -> None:
        self.metric.update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))
        self.log("accuracy", self.metric)

    type(net).validation_step = step
    with pytest.raises(ValueError, match=r"MulticlassAccuracy computes shape \(3,\).*the parts of"):
        fit(net, [ramp(2)], [ramp(2)])


# -- a run that is stopped and goes on ------------------------------------------------------------


class Stopped(Exception):
    pass


class StopAt(Callback):
    """Saves after this step, and fails after a later one."""

    def __init__(self, saves: int, fails: int) -> None:
        self.saves, self.fails = saves, fails

    def on_train_batch_end(self, trainer: Any, module: Any) -> None:  # type: ignore[override]
        if trainer.global_step == self.saves:
            trainer.save_checkpoint("mid.ckpt")
        if trainer.global_step == self.fails:
            raise Stopped


def test_values_of_an_epoch_go_on_where_it_was_stopped() -> None:
    """Also those of a function, which no checkpoint holds, and what waits for the next row."""

    def step(self: Any, x: Tensor) -> Tensor:
        value = x[0, 0] * 7
        self.metric.update(value)
        self.log("metric", self.metric, on_step=False, on_epoch=True)
        for how in ("mean", "sum", "min", "max", torch.median, torch.Tensor.std):
            name = how if isinstance(how, str) else how.__name__  # type: ignore[attr-defined]
            self.log(name, value, on_step=False, on_epoch=True, reduce_fx=how)
        if self.global_step < 3:  # not after the stop
            self.log("early", value, on_step=False, on_epoch=True, reduce_fx=torch.median)
        if self.global_step == 4:  # between the rows of steps 4 and 6, before the stop
            self.log("waiting", value)
        loss: Tensor = self.net(x).square().mean()
        return loss

    def net() -> Any:
        return module(step, net=linear(3, 1), metric=Average())

    batches = [ramp(1, start) for start in (10, 9, 8, 3, 6, 5, 4)]
    whole, expected = fit(net(), batches, log_every_n_steps=3)
    with pytest.raises(Stopped):
        fit(net(), batches, log_every_n_steps=3, callbacks=StopAt(5, 5))
    rows = Rows()
    run = Trainer(strategy="single", max_epochs=1, log_every_n_steps=3, logger=rows, **QUIET)
    run.fit(net(), batches, ckpt_path="mid.ckpt")
    assert rows.rows == expected.rows[-len(rows.rows) :]
    assert rows.of("waiting") == [(6, 6.0)]
    assert rows.of("median") == [(7, 6.0)]
    assert rows.of("early") == [(7, 9.0)]
    assert run.callback_metrics == whole.callback_metrics


@every_strategy
def test_a_validation_that_failed_does_not_count_twice(strategy: Make) -> None:
    """What it had counted is forgotten: by the trainer itself, and in what its failure saved."""

    class Failing(list[Tensor]):
        fails = True

        def __iter__(self) -> Any:
            for i, batch in enumerate(super().__iter__()):
                if i == 2 and self.fails:
                    raise Stopped
                yield batch

    class Save(Callback):
        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            trainer.save_checkpoint("failed.ckpt")

    def validate(self: Any, x: Tensor) -> None:
        self.logged.update(x[:, 0])
        self.unlogged.update(x[:, 0])
        self.log("logged", self.logged)
        self.log("sum", Sum(x[:, 0].sum()))
        self.log("largest", x[:, 0].max(), reduce_fx="max")

    def net() -> Any:
        metrics = {name: Average() for name in ("logged", "unlogged")}
        made = module(lambda self, x: self.net(x).mean(), net=linear(3, 1), **metrics)
        type(made).validation_step = validate
        type(made).on_validation_epoch_end = lambda self: self.log("unlogged", self.unlogged)
        return made

    val = Failing([ramp(4), ramp(5, 4), ramp(3, 20)])
    values = torch.cat([*list.__iter__(val)])[:, 0]
    expected = {
        "epoch": 0,
        "logged": pytest.approx(values.mean().item()),
        "unlogged": pytest.approx(values.mean().item()),
        "sum": pytest.approx(values.sum().item()),
        "largest": values.max().item(),
    }
    failed = net()
    options: dict[str, Any] = {"strategy": strategy(), "num_sanity_val_steps": 0}
    with pytest.raises(Stopped):
        fit(failed, [ramp(3)], val, callbacks=Save(), **options)
    val.fails = False
    _, rows = fit(failed, [ramp(3)], val, **options)
    assert rows.rows == [(1, expected)]
    rows = Rows()
    run = Trainer(max_epochs=1, logger=rows, callbacks=Save(), **options, **QUIET)
    run.fit(net(), [ramp(3)], val, ckpt_path="failed.ckpt")
    assert rows.rows == [(1, expected)]


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
    assert running.hooks.total.far is not None and running.hooks.total.far.is_meta
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
