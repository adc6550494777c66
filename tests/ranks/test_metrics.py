"""Metrics that ranks update apart: whole between steps, on every rank, and counted once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics
from torch import nn
from torchmetrics import CatMetric, MetricCollection, SumMetric
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score

from composefit.replicas import RankMetrics, Replica, merge
from tests.ranks.fake import FakeWorld, ranks
from tests.replicas.test_metrics import METRICS, NO_RATE, _arguments

#: The samples of each rank, in each of three steps; the second rank has none in the last.
ROWS = {
    2: [[slice(0, 3), slice(3, 8)], [slice(8, 9), slice(9, 14)], [slice(14, 20), None]],
    3: [[slice(0, 3), slice(3, 5), slice(5, 8)], [slice(8, 9), slice(9, 11), slice(11, 14)],
        [slice(14, 20), None, None]],
}  # fmt: skip


def one_epoch(
    world: Any, metric: Any, kind: str, joins: tuple[int, ...], metrics: RankMetrics
) -> None:
    for step, of_ranks in enumerate(ROWS[world.size]):
        metrics.part()
        rows = of_ranks[world.rank]
        if rows is not None:
            metric.update(*_arguments(kind, rows))
        if step in joins:
            metrics.join()
    metrics.join()


def holder(metric: Any) -> Any:
    module = nn.Module()
    module.metric = metric
    return module


@pytest.mark.filterwarnings(NO_RATE)
@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("size", [2, 3])
def test_metrics_are_those_of_all_samples_on_every_rank(kind: str, size: int) -> None:
    reference = METRICS[kind]()
    for of_ranks in ROWS[size]:
        for rows in of_ranks:
            if rows is not None:
                reference.update(*_arguments(kind, rows))
    once, goes_on = reference.compute(), copy.deepcopy(reference)
    for of_ranks in ROWS[size]:
        for rows in of_ranks:
            if rows is not None:
                goes_on.update(*_arguments(kind, rows))
    twice = goes_on.compute()

    def on_rank(world: Any) -> list[Any]:
        module, found = holder(METRICS[kind]()), []
        with RankMetrics(world, module) as metrics:
            for joins in ((), (0, 1, 2)):
                one_epoch(world, module.metric, kind, joins, metrics)
                found.append(module.metric.compute())
            module.metric.reset()  # by a hook
            one_epoch(world, module.metric, kind, (), metrics)
            found.append(module.metric.compute())
        return found

    for found in ranks(size, on_rank):
        for got, expected in zip(found, (once, twice, once), strict=True):
            if kind == "cat":
                got, expected = got.sort().values, expected.sort().values
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_ranks_whose_first_samples_suggest_other_groups_of_a_collection() -> None:
    """A rank on whose first sample both agree would have the second metric follow the first."""

    def collection() -> Any:
        return MetricCollection(
            {"low": BinaryAccuracy(threshold=0.5), "high": BinaryAccuracy(threshold=0.9)}
        )

    def on_rank(world: Any) -> list[float]:
        module = holder(collection())
        with RankMetrics(world, module) as metrics:
            metrics.part()
            for score in [(0.95, 0.7), (0.7, 0.6)][world.rank]:
                module.metric.update(torch.tensor([score]), torch.tensor([1]))
            metrics.join()
            found = [value.item() for value in module.metric.compute().values()]
        assert module.metric._enable_compute_groups
        return found

    assert ranks(2, on_rank) == [[0.25, 1.0]] * 2  # high, low: by name


def test_a_collection_whose_groups_are_known_keeps_them() -> None:
    data = torch.tensor([0.9, 0.2, 0.8, 0.1]), torch.tensor([1, 1, 0, 0])

    def on_rank(world: Any) -> Any:
        module = holder(MetricCollection([BinaryAccuracy(), BinaryF1Score()]))
        module.metric.update(*data)  # before the run, on each rank alike
        assert module.metric._groups_checked and len(module.metric._groups) == 1
        with RankMetrics(world, module) as metrics:
            for _ in range(2):
                metrics.part()
                module.metric.update(*data)
                metrics.join()
            counts = {m.update_count for m in module.metric.values(copy_state=False)}
            return counts, module.metric.compute()

    (counts, found), _ = ranks(2, on_rank)
    assert counts == {5} and found["BinaryAccuracy"] == 0.5


@pytest.mark.parametrize("merge_lanes", [1, 2])
def test_lanes_within_ranks_count_once(merge_lanes: int) -> None:
    def on_rank(world: Any) -> float:
        module = holder(SumMetric())
        replicas = [Replica(module) for _ in range(merge_lanes)]
        with RankMetrics(world, module) as metrics:
            for _ in range(3):
                metrics.part()
                for lane, replica in enumerate(replicas):
                    replica.refresh()
                    replica.module.metric.update(1.0 + 10 * world.rank + 100 * lane)
                merge(module, replicas, [1.0] * merge_lanes)
            metrics.join()
            return module.metric.compute().item()

    assert set(ranks(2, on_rank)) == {3.0 * sum(1 + 10 * r + 100 * lane for r in (0, 1)
                                                for lane in range(merge_lanes))}  # fmt: skip


def test_each_number_travels_once() -> None:
    def on_rank(world: Any) -> list[int]:
        sizes: list[int] = []
        gather = world.gather

        def counting(what: str, value: Any) -> Any:
            sizes.append(len(pickle.dumps(value)))
            return gather(what, value)

        world.gather = counting
        module = holder(CatMetric())
        with RankMetrics(world, module) as metrics:
            for _ in range(3):
                metrics.part()
                module.metric.update(torch.rand(4000))
                metrics.join()
            metrics.join()
        assert len(module.metric.compute()) == 2 * 3 * 4000
        return sizes

    for sizes in ranks(2, on_rank):
        assert len(sizes) == 3 and max(sizes) < 4000 * 4 + 4000


def test_a_part_of_a_batch_does_not_take_the_batch_along() -> None:
    def on_rank(world: Any) -> int:
        module = holder(CatMetric())
        with RankMetrics(world, module) as metrics:
            metrics.part()
            module.metric.value.append(torch.rand(100_000)[:10])
            module.metric._update_count = 1
            before = world.gather
            size = [0]

            def counting(what: str, value: Any) -> Any:
                size[0] = len(pickle.dumps(value))
                return before(what, value)

            world.gather = counting
            metrics.join()
        return size[0]

    assert max(ranks(2, on_rank)) < 10_000


# -- states that cannot be merged -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "arguments", "why"),
    [
        (
            torchmetrics.PearsonCorrCoef,
            (torch.rand(8), torch.rand(8)),
            r"metric \(PearsonCorrCoef\).*from several ranks.*Once\(self\.metric\.update",
        ),
        (
            lambda: torchmetrics.wrappers.Running(SumMetric(), window=3),
            (1.0,),
            "several ranks: update\\(\\) changes '_num_vals_seen'",
        ),
    ],
)
def test_what_shards_cannot_merge_ranks_cannot_either(
    metric: Callable[[], Any], arguments: Any, why: str
) -> None:
    def on_rank(world: Any) -> None:
        module = holder(metric())
        with pytest.raises(ValueError, match=why), RankMetrics(world, module) as metrics:
            metrics.part()
            module.metric.update(*arguments)
            metrics.join()

    ranks(2, on_rank)


def test_what_the_first_update_settles_is_known_to_ranks_without_one() -> None:
    class Settling(torchmetrics.Metric):
        def __init__(self) -> None:
            super().__init__()
            self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
            self.task: str | None = None

        def update(self, x: float) -> None:
            self.task = "binary"
            self.total = self.total + x

        def compute(self) -> Any:
            return self.task, self.total.item()

    def on_rank(world: Any) -> Any:
        module = holder(Settling())
        with RankMetrics(world, module) as metrics:
            metrics.part()
            if world.rank == 1:
                module.metric.update(3.0)
            metrics.join()
            return module.metric.compute()

    assert ranks(2, on_rank) == [("binary", 3.0)] * 2


def test_a_function_that_all_ranks_call_with_all_samples_counts_once() -> None:
    """As `Once` does: every rank updates with everybody's rows."""

    def on_rank(world: Any) -> list[float]:
        module, seen = holder(SumMetric()), []
        module.metric.update(0.5)  # before the run, on each rank alike
        with RankMetrics(world, module) as metrics:
            for _ in range(2):
                metrics.part()
                module.metric.update(10.0 * (1 + world.rank))  # this rank's own
                with metrics.whole():
                    module.metric.update(1.0)
                    seen.append(module.metric.compute().item())
                module.metric.update(100.0 * (1 + world.rank))
            metrics.join()
            return [*seen, module.metric.compute().item()]

    assert ranks(2, on_rank) == [[1.5, 2.5, 0.5 + 2 * (1 + 30 + 300)]] * 2


def test_a_metric_that_only_once_updates_may_be_any() -> None:
    x, y = torch.rand(8), torch.rand(8)

    def on_rank(world: Any) -> tuple[float, float]:
        module = nn.Module()
        module.corr = torchmetrics.PearsonCorrCoef()
        module.range = torchmetrics.wrappers.MinMaxMetric(SumMetric())
        with RankMetrics(world, module) as metrics:
            metrics.part()
            with metrics.whole():
                module.corr.update(x, y)
                module.range.update(2.0)
                module.range.compute()
            metrics.join()
            return module.corr.compute().item(), module.range.compute()["max"].item()

    reference = torchmetrics.PearsonCorrCoef()
    reference.update(x, y)
    assert ranks(2, on_rank) == [(reference.compute().item(), 2.0)] * 2


# -- torchmetrics' own synchronisation ------------------------------------------------------------


class Sending(SumMetric):
    """Says that there are other ranks, and that nobody may ask them."""

    def __init__(self, **how: Any) -> None:
        super().__init__(distributed_available_fn=lambda: True, dist_sync_fn=_refuse, **how)


def _refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("torchmetrics has sent a message")


@pytest.mark.parametrize("on_step", [False, True])
def test_it_is_off_in_a_run_and_back_afterwards(on_step: bool) -> None:
    def on_rank(world: Any) -> None:
        module = holder(Sending(dist_sync_on_step=on_step))
        module.several = [Sending()]
        metric = module.metric
        ours = metric.distributed_available_fn
        with RankMetrics(world, module) as metrics:
            metrics.part()
            metric(1.0)  # the batch's value, and the sum
            module.several[0].update(1.0)
            metrics.join()
            assert metric.compute() == module.several[0].compute() == 2.0
            metric.reset()
        assert metric.distributed_available_fn is ours
        metric.update(1.0)
        with pytest.raises(AssertionError, match="has sent"):
            metric.compute()

    ranks(2, on_rank)


def test_what_is_whole_after_a_run_is_not_added_up_again() -> None:
    def on_rank(world: Any) -> None:
        module = holder(MetricCollection({"sum": Sending(), "cat": CatMetric()}))
        metric = module.metric["sum"]
        for _ in range(2):  # the second run goes on with what the first has left
            with RankMetrics(world, module) as metrics:
                metrics.part()
                metric.update(1.0 + world.rank)
                metrics.join()
        metric._computed = None
        assert metric.compute() == 6.0
        assert copy.deepcopy(metric).update_count == 4
        again = copy.deepcopy(metric)
        again._computed = None
        assert again.compute() == 6.0
        for one in (metric, again):
            one.reset()
            one.update(1.0)
            with pytest.raises(AssertionError, match="has sent"):
                one.compute()

    ranks(2, on_rank)


# -- modes and places -----------------------------------------------------------------------------


def test_states_of_an_evaluation_may_be_updated_in_place_in_training() -> None:
    class InPlace(torchmetrics.Metric):
        def __init__(self) -> None:
            super().__init__()
            self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

        def update(self, x: float) -> None:
            self.total += x

        def compute(self) -> torch.Tensor:
            return self.total

    def on_rank(world: Any) -> float:
        module = holder(InPlace())
        with RankMetrics(world, module) as metrics:
            with torch.inference_mode():
                metrics.part()
                module.metric.update(1.0)
                metrics.join()
                metrics.part()
                metrics.join()
            module.metric.update(1.0)  # by a hook, on all ranks alike
            metrics.part()
            module.metric.update(1.0)
            metrics.join()
            return module.metric.compute().item()

    assert ranks(2, on_rank) == [5.0, 5.0]


def test_states_that_were_put_back_are_nobodys_part() -> None:
    def on_rank(world: Any) -> float:
        module = holder(SumMetric())
        with RankMetrics(world, module) as metrics:
            module.metric.update(5.0)
            metrics.part()
            module.metric.update(1.0)
            module.metric.reset()
            module.metric.update(5.0)
            metrics.forget()
            metrics.part()
            module.metric.update(1.0)
            metrics.join()
            return module.metric.compute().item()

    assert ranks(2, on_rank) == [7.0, 7.0]


def test_a_run_that_fails_leaves_what_all_ranks_had_when_they_last_met() -> None:
    def on_rank(world: Any) -> float:
        module = holder(SumMetric())
        with pytest.raises(ValueError, match="in a step"), RankMetrics(world, module) as metrics:
            metrics.part()
            module.metric.update(1.0)
            metrics.join()
            metrics.part()
            module.metric.update(5.0)
            raise ValueError("in a step")
        return module.metric.compute().item()

    assert ranks(2, on_rank) == [2.0, 2.0]


def test_a_run_ends_with_whole_metrics() -> None:
    def on_rank(world: Any) -> float:
        module = holder(SumMetric())
        with RankMetrics(world, module) as metrics:
            metrics.part()
            module.metric.update(1.0 + world.rank)
        return module.metric.compute().item()

    assert ranks(2, on_rank) == [3.0, 3.0]


def test_nothing_is_sent_where_no_step_was_done() -> None:
    def on_rank(world: FakeWorld) -> list[str]:
        with RankMetrics(world, holder(SumMetric())) as metrics:  # type: ignore[arg-type]
            metrics.join()
        return world.places

    assert ranks(2, on_rank) == [[], []]
