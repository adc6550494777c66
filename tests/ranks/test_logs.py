"""What ranks log apart: every rank reads the same, whoever logged what."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from composefit import Mean, Sum
from composefit.images import Image
from composefit.logged import Logged, LogOptions
from composefit.logs import Logs
from composefit.logs.sums import exactly, rounded
from composefit.replicas import RankMetrics
from tests.ranks.fake import FakeWorld, ranks


def options(
    reduce: Any = "mean", step: bool = True, epoch: bool = True, logger: bool = True
) -> LogOptions:
    return LogOptions(prog_bar=True, logger=logger, on_step=step, on_epoch=epoch, reduce=reduce)


def shard(samples: int, **values: Any) -> Any:
    """One that has logged these: a value, or a value and its options."""
    logs = {}
    for name, value in values.items():
        given, how = value if isinstance(value, tuple) else (value, options())
        weighs = how.on_epoch and not isinstance(given, (Image, Sum, Mean))
        logs[name] = Logged(given, samples if weighs else None, how)
    return SimpleNamespace(
        context=SimpleNamespace(logs=logs),
        samples=samples,
        known_samples=samples,
        owners=lambda metric: metric,
    )


def hook(logs: Logs, value: Any, how: LogOptions | None = None, name: str = "x") -> None:
    logs.add_hook({name: Logged(value, None, how or options())})


def agreed(size: int, write: Any, read: Any = Logs.all_values) -> Any:
    """What all ranks read after each wrote its own and they have met; the same on each."""

    def on_rank(world: FakeWorld) -> Any:
        logs = Logs()
        write(logs, world.rank)
        logs.exchange(world)  # type: ignore[arg-type]
        logs.end_epoch()
        return read(logs)

    first, *others = ranks(size, on_rank)
    assert all(other == first for other in others)
    return first


def test_means_are_weighted_by_the_samples_of_all_ranks() -> None:
    values, sizes = [[1.0, 5.0], [2.0, 7.0], [9.0, 3.0]], [4, 1, 3]

    def write(logs: Logs, rank: int) -> None:
        for value in values[rank]:
            logs.add([shard(sizes[rank], x=value)])

    found = agreed(3, write)
    step = sum(own[1] * size for own, size in zip(values, sizes, strict=True)) / 8
    epoch = sum(sum(own) * size for own, size in zip(values, sizes, strict=True)) / 16
    assert found["x_step"] == pytest.approx(step, abs=1e-15)
    assert found["x_epoch"] == pytest.approx(epoch, abs=1e-15)


def test_a_step_value_of_a_rank_with_one_shard_is_weighted_too() -> None:
    def write(logs: Logs, rank: int) -> None:
        logs.add([shard(1 + 2 * rank, x=(float(rank), options(epoch=False)))])

    assert agreed(2, write)["x"] == 0.75


def test_several_shards_of_several_ranks_are_one_sum() -> None:
    def write(logs: Logs, rank: int) -> None:
        logs.add([shard(2, x=1.0 + rank), shard(3, x=10.0 * rank)])

    assert agreed(2, write)["x_step"] == pytest.approx((2 * 1 + 2 * 2 + 3 * 10) / 10)


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [("sum", 13.0), ("min", 1.0), ("max", 7.0), (lambda v: v.max() - v.min(), 6.0)],
)
def test_other_reductions(reduce: Any, expected: float) -> None:
    values = [1.0, 5.0, 7.0]

    def write(logs: Logs, rank: int) -> None:
        logs.add([shard(2 + rank, x=(values[rank], options(reduce)))])

    assert agreed(3, write)["x_epoch"] == expected
    assert agreed(3, write)["x_step"] == expected


def test_mean_and_sum_add_up_over_ranks() -> None:
    def write(logs: Logs, rank: int) -> None:
        tokens = torch.tensor([3.0, 5.0][rank])
        logs.add([shard(4, mean=Mean(tokens * (rank + 1), tokens), sum=Sum(tokens))])

    found = agreed(2, write)
    assert (found["mean_epoch"], found["sum_epoch"]) == (13.0 / 8.0, 8.0)


def test_nan_shows() -> None:
    def write(logs: Logs, rank: int) -> None:
        value = math.nan if rank else 1.0
        logs.add([shard(1, x=value, y=(value, options("max")))])

    def on_nan(logs: Logs) -> list[bool]:
        return [math.isnan(value) for value in logs.all_values().values()]

    assert agreed(2, write, on_nan) == [True] * 6


def test_a_name_that_one_rank_logs_is_known_to_all_and_nothing_hangs() -> None:
    def write(logs: Logs, rank: int) -> None:
        logs.add([shard(2, **({"rare": 3.0} if rank == 1 else {}))])

    found = agreed(3, write)
    assert found["rare_step"] == found["rare_epoch"] == 3.0
    assert agreed(3, write, Logs.bar_values) == {"rare_step": 3.0, "rare_epoch": 3.0}


def test_loggers_get_what_another_rank_has_logged() -> None:
    def on_rank(world: FakeWorld) -> Any:
        logs = Logs()
        logs.add([shard(2, **({"rare": 3.0} if world.rank == 1 else {}))])
        logs.exchange(world)  # type: ignore[arg-type]
        first, again = logs.take_steps(), logs.take_steps()
        logs.exchange(world)  # type: ignore[arg-type]
        assert not again and not logs.take_steps()
        logs.end_epoch()
        return first, logs.take_epoch()

    assert ranks(2, on_rank) == [({"rare_step": 3.0}, {"rare_epoch": 3.0})] * 2


def test_a_steps_value_is_of_the_last_step_at_which_any_rank_logged_it() -> None:
    def write(logs: Logs, rank: int) -> None:
        logs.add([shard(1, x=100.0)])
        logs.add([shard(1, **({"x": 5.0} if rank == 1 else {}))])

    assert agreed(2, write)["x_step"] == 5.0


def test_a_rank_without_samples_counts_as_a_step_and_as_nothing_else() -> None:
    def write(logs: Logs, rank: int) -> None:
        logs.add([shard(2, x=1.0)])
        logs.add([] if rank == 1 else [shard(2, x=7.0)])

    found = agreed(2, write)
    assert found["x_step"] == 7.0
    assert found["x_epoch"] == (1.0 + 1.0 + 7.0) / 3


def test_nothing_counts_twice_however_often_ranks_meet() -> None:
    values = [[0.1, 0.7, 1e16, 3.3], [0.2, 0.4, -1e16, 1.1]]

    def on_rank(world: FakeWorld, meetings: tuple[int, ...]) -> dict[str, float]:
        logs = Logs()
        for i, value in enumerate(values[world.rank]):
            logs.add([shard(1, x=value, y=(value, options("max")), z=(value, options("sum")))])
            logs.add_hook({"h": Logged(0.1 * i, None, options("sum"))})
            if i in meetings:
                logs.exchange(world)  # type: ignore[arg-type]
        logs.exchange(world)  # type: ignore[arg-type]
        logs.exchange(world)  # type: ignore[arg-type]
        logs.end_epoch()
        return logs.all_values()

    seldom = ranks(2, lambda world: on_rank(world, ()))
    often = ranks(2, lambda world: on_rank(world, (0, 1, 2, 3)))
    assert seldom == often and seldom[0] == seldom[1]
    assert seldom[0]["z_epoch"] == math.fsum(values[0] + values[1])
    assert seldom[0]["h_epoch"] == math.fsum([0.1 * i for i in range(4)])


def test_reading_sends_nothing_and_gives_what_the_last_meeting_gave() -> None:
    def on_rank(world: FakeWorld) -> None:
        logs = Logs()
        logs.add([shard(1, x=float(world.rank))])
        assert logs.all_values() == {"x": world.rank, "x_step": world.rank}  # before any: its own
        logs.exchange(world)  # type: ignore[arg-type]
        logs.add([shard(1, y=5.0)])
        hook(logs, 50.0)
        sent = len(world.places)
        assert logs.all_values()["x"] == 0.5
        logs.bar_values(), logs.take_steps(), logs.step_values()
        logs.end_epoch(whole=False)
        assert len(world.places) == sent
        assert logs.all_values()["x_epoch"] == 0.5

    ranks(2, on_rank)


def test_an_exchange_is_one_message() -> None:
    def on_rank(world: FakeWorld) -> list[str]:
        logs = Logs()
        for _ in range(3):
            logs.add([shard(1, x=1.0, y=(2.0, options(max)), **{f"own{world.rank}": 1.0})])
            hook(logs, 3.0, name="h")
        logs.exchange(world)  # type: ignore[arg-type]
        return world.places

    assert ranks(3, on_rank) == [["what was logged"]] * 3


# -- hooks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["mean", "sum", "min", "max", torch.median])
@pytest.mark.parametrize("size", [2, 3])
def test_what_all_hooks_log_alike_counts_once_to_the_bit(reduce: Any, size: int) -> None:
    def write(logs: Logs, rank: int) -> None:
        hook(logs, 0.1, options(reduce))

    assert agreed(size, write) == {"x": 0.1, "x_step": 0.1, "x_epoch": 0.1}


def test_hooks_that_log_at_several_times_of_an_epoch_are_those_of_one_process() -> None:
    alone = Logs()

    def write(logs: Logs, rank: int) -> None:
        for i in range(4):
            logs.add([])
            for reduce in ("mean", "sum", "min", "max"):
                hook(logs, 0.1 * i, options(reduce), reduce)
            hook(logs, 0.1 * i, options(lambda v: v.sum()), "function")

    write(alone, 0)
    alone.end_epoch()
    assert agreed(3, write) == alone.all_values()


def test_hooks_that_differ_log_the_mean_of_the_ranks_that_do() -> None:
    def write(logs: Logs, rank: int) -> None:
        if rank:
            hook(logs, float(rank), options("sum"))
            hook(logs, float(rank), options("max"), "largest")

    found = agreed(4, write)
    assert found["x_epoch"] == found["x_step"] == 2.0
    assert found["largest_epoch"] == found["largest_step"] == 3.0


def test_a_zero_of_a_hook_counts() -> None:
    def write(logs: Logs, rank: int) -> None:
        hook(logs, 4.0 * rank, options("sum"))

    assert agreed(2, write)["x_epoch"] == 2.0


def test_a_mean_or_sum_in_a_hook_is_the_ranks_own_part() -> None:
    def write(logs: Logs, rank: int) -> None:
        hook(logs, Mean(torch.tensor(10.0 * rank), torch.tensor(1.0 + 3 * rank)), name="mean")
        hook(logs, Sum(torch.tensor(1.0 + rank)), name="sum")

    found = agreed(2, write)
    assert (found["mean_epoch"], found["sum_epoch"]) == (2.0, 3.0)


def test_a_hook_after_a_step_comes_later_than_the_step_on_any_rank() -> None:
    def write(logs: Logs, rank: int) -> None:
        logs.add([shard(1, x=(1.0, options(epoch=False)))])
        if rank == 0:
            hook(logs, 9.0, options(epoch=False))

    assert agreed(2, write)["x"] == 9.0


# -- what does not travel -------------------------------------------------------------------------


def test_a_function_that_one_rank_knows_is_computed_there() -> None:
    def write(logs: Logs, rank: int) -> None:
        if rank < 2:
            logs.add([shard(1, x=(4.0 - rank, options(lambda v: v.prod())))])
        else:
            logs.add([shard(1)])

    found = agreed(3, write)
    assert found["x_step"] == found["x_epoch"] == 12.0


def test_pictures_are_those_of_the_first_rank_that_has_one() -> None:
    def picture(value: float) -> tuple[Image, LogOptions]:
        return Image(torch.full((2, 2), value)[:1], str(value)), options()

    def on_rank(world: FakeWorld) -> tuple[dict[str, str], int]:
        logs = Logs()
        if world.rank:
            logs.add([shard(1, all=picture(0.1 * world.rank), later=picture(0.1 * world.rank))])
        else:
            logs.add([shard(1, all=picture(0.0))])
        logs.exchange(world)  # type: ignore[arg-type]
        return {name: one.caption for name, one in logs.take_images().items()}, len(world.places)

    (first, sent), *_ = ranks(3, on_rank)
    assert first == {"all": "0.0", "later": "0.1"} and sent == 2


def test_what_was_logged_by_the_step_of_an_epoch_that_is_left_does_not_count() -> None:
    def on_rank(world: FakeWorld) -> dict[str, float]:
        logs = Logs()
        logs.add([shard(1, x=50.0)])
        logs.exchange(world)  # type: ignore[arg-type]
        logs.forget_epoch()
        logs.add([shard(1, x=float(world.rank))])
        logs.exchange(world)  # type: ignore[arg-type]
        logs.end_epoch()
        return logs.take_epoch()

    assert ranks(2, on_rank) == [{"x_epoch": 0.5}] * 2


# -- metrics --------------------------------------------------------------------------------------


class WithMetric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric()


@pytest.mark.parametrize("everybody", [True, False])
def test_a_metric_logged_per_step_is_that_of_all_ranks_so_far(everybody: bool) -> None:
    def on_rank(world: Any) -> list[float]:
        logs, module, found = Logs(), WithMetric(), []
        with RankMetrics(world, module) as metrics:
            for step in range(3):
                metrics.part()
                logged = {}
                if everybody or world.rank == 1:
                    module.metric.update(float(10 * world.rank + step))
                    logged = {"m": (module.metric, options())}
                logs.add([shard(1, **logged)])
                logs.exchange(world, metrics)
                found.append(logs.take_steps()["m_step"])
                metrics.part()  # the next step begins: what was logged stays what it was
                assert logs.all_values()["m_step"] == found[-1]
            logs.exchange(world, metrics, whole=True)
            logs.end_epoch()
            found.append(logs.take_epoch()["m_epoch"])
            assert not module.metric.update_called  # it is reset, on every rank
        return found

    expected = [5.0, 5.5, 6.0, 6.0] if everybody else [10.0, 10.5, 11.0, 11.0]
    assert ranks(2, on_rank) == [expected] * 2


def test_a_metric_for_the_epoch_costs_no_message_before_its_end() -> None:
    def on_rank(world: Any) -> tuple[list[str], float]:
        logs, module = Logs(), WithMetric()
        with RankMetrics(world, module) as metrics:
            for step in range(4):
                metrics.part()
                module.metric.update(float(step + world.rank))
                logs.add([shard(1, m=(module.metric, options(step=False)))])
            logs.exchange(world, metrics)
            before = list(world.places)
            logs.exchange(world, metrics, whole=True)
            logs.end_epoch()
        return before, logs.all_values()["m"]

    assert ranks(2, on_rank) == [(["what was logged"], 2.0)] * 2


def test_a_metric_that_is_no_part_of_the_module_is_refused_on_all_ranks() -> None:
    def on_rank(world: Any) -> None:
        logs, metric = Logs(), MeanMetric()
        with RankMetrics(world, nn.Module()) as metrics:
            metrics.part()
            metric.update(1.0)
            logs.add([shard(1, m=(metric, options()))])
            with pytest.raises(ValueError, match=r"no part of Module.*self\.metric = "):
                logs.exchange(world, metrics)

    ranks(2, on_rank)


# -- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("later", [1, 2, 3])
def test_a_state_of_two_ranks_goes_on_with_any_number(later: int) -> None:
    values = [[0.1, 0.2, 0.3], [1e17, 5.5, 7.0]]  # of which a float would lose some
    module = nn.Module()

    def first(world: FakeWorld) -> dict[str, Any]:
        logs = Logs()
        for value in values[world.rank]:
            logs.add([shard(3, x=value, low=(value, options("min")))])
        logs.exchange(world)  # type: ignore[arg-type]
        return logs.state_dict(module)

    state, other = ranks(2, first)
    assert state == other

    def then(world: FakeWorld) -> dict[str, float]:
        logs = Logs()
        logs.load_state_dict(state, module)
        logs.add([shard(3, x=-1e17 + world.rank, low=(-1.0 * world.rank, options("min")))])
        if world.size > 1:
            logs.exchange(world)  # type: ignore[arg-type]
        logs.end_epoch()
        return logs.all_values()

    found = ranks(later, then)
    assert all(one == found[0] for one in found)
    every = [*values[0], *values[1], *(-1e17 + rank for rank in range(later))]
    mean = math.fsum(3 * value for value in every) / (3 * len(every))
    assert found[0]["x_epoch"] == mean
    assert found[0]["low_epoch"] == min(0.1, 1.0 - later)


def test_a_state_without_the_rest_of_a_sum_still_loads() -> None:
    logs, module = Logs(), nn.Module()
    logs.add([shard(2, x=0.5)])
    state = logs.state_dict(module)
    state["epochs"]["x"].pop("rest")
    resumed = Logs()
    resumed.load_state_dict(state, module)
    resumed.end_epoch()
    assert resumed.all_values()["x_epoch"] == 0.5


def test_sums_are_exact_whatever_their_order() -> None:
    values = [1e16, 1.0, -1e16, 0.1, 3e-20, 1e300, -1e300]
    assert exactly(values) == exactly(values[::-1]) == exactly([*exactly(values[:3]), *values[3:]])
    assert rounded(exactly(values)) == math.fsum(values)
    assert exactly([math.inf, 1.0]) == (math.inf,) and exactly([]) == ()
    assert math.isnan(*exactly([math.inf, -math.inf]))
    assert exactly([1e308, 1e308]) == (math.inf,)
