import math
import random
from pathlib import Path

import pytest
import torch

from composefit import checkpoint
from composefit.history import History, Picture, Point, Track
from composefit.images import Image


def track(values: list[float], limit: int) -> Track:
    made = Track(limit)
    for step, value in enumerate(values):
        made.add(step, step // 100, step / 10, value)
    return made


def resumed(history: History, path: Path, step: int | None = None, limit: int = 4000) -> History:
    """A history that went through a real checkpoint."""
    checkpoint.save(path, history.state_dict())
    state = checkpoint.load(path)
    other = History(limit)
    other.load_state_dict(state if step is None else {"step": step, **state})
    return other


# -- exact values ------------------------------------------------------------------------------


def test_values_and_steps_are_kept_exactly() -> None:
    history = History()
    values = [0.1 + 0.2, 1e-300, math.inf, -math.inf, -0.0, 3, True, float(torch.tensor(0.1))]
    for step, value in enumerate(values):
        history.log_metrics({"x": value, "epoch": step // 2}, step * 7)
    steps, kept = history.curves()["x"]
    assert (steps.dtype, kept.dtype) == (torch.int64, torch.float64)
    assert steps.tolist() == [7 * i for i in range(len(values))]
    assert kept.tolist() == values
    assert math.copysign(1, kept[4]) == -1
    assert history.tracks["x"].column("epoch").tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_metric_has_points_only_where_it_was_logged() -> None:
    history = History()
    history.log_metrics({"a": 1.0}, 1)
    history.log_metrics({"b": 2.0, "a": None}, 2)  # type: ignore[dict-item]
    curves = history.curves()
    assert {name: (s.tolist(), v.tolist()) for name, (s, v) in curves.items()} == {
        "a": ([1], [1.0]),
        "b": ([2], [2.0]),
    }


def test_the_epoch_is_no_curve_and_outlasts_a_call_without_it() -> None:
    history = History()
    history.log_metrics({"x": 1.0, "epoch": 3}, 1)
    history.log_metrics({"x": 1.0}, 2)
    assert list(history.curves()) == ["x"]
    assert history.tracks["x"].column("epoch").tolist() == [3, 3]
    assert (history.step, history.epoch) == (2, 3)


def test_a_value_that_is_no_number_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"metric 'x' is no number: got 'high'"):
        History().log_metrics({"x": "high"}, 1)  # type: ignore[dict-item]


# -- thinning ----------------------------------------------------------------------------------


def test_nothing_is_thinned_up_to_the_limit() -> None:
    values = [random.random() for _ in range(64)]
    kept = track(values, limit=64)
    assert [point.value for point in kept] == values
    assert not kept.thinned


def test_a_track_stays_within_its_limit_and_keeps_first_last_and_extremes() -> None:
    for seed in range(5):
        random.seed(seed)
        values = [random.gauss(0, 1) for _ in range(5000)]
        low, high = random.sample(range(5000), 2)
        values[low], values[high] = -100.0, 100.0
        made = Track(limit=100)
        for step, value in enumerate(values):
            made.add(step, 0, 0.0, value)
            assert len(made) <= 100
        kept = {point.step: point.value for point in made}
        assert {0, 4999, low, high} <= set(kept)
        assert all(values[step] == value for step, value in kept.items())


def test_extremes_stay_beside_each_other_and_beside_what_is_not_finite() -> None:
    for place in range(2000, 2016):
        values = [float(step % 3) for step in range(5000)]
        values[place : place + 3] = [-9.0, math.nan, 9.0]
        values[:2] = [1.0, math.nan]
        kept = {point.step for point in track(values, limit=100)}
        assert {0, 1, place, place + 1, place + 2, 4999} <= kept


def test_a_point_carries_the_range_and_number_of_those_it_stands_for() -> None:
    random.seed(0)
    values = [random.gauss(0, 1) for _ in range(3000)]
    begin = 0
    for point in track(values, limit=100):
        own = values[begin : begin + point.size]
        assert (point.low, point.high) == (min(own), max(own))
        assert begin <= point.step < begin + point.size
        begin += point.size
    assert begin == 3000


@pytest.mark.parametrize("length", [101, 350, 1000, 7777, 30_000])
def test_no_stretch_of_a_curve_is_thinned_much_more_than_the_rest(length: int) -> None:
    made = track([0.0] * length, limit=100)
    steps = made.column("step")
    assert len(made) >= 50
    # Groups double when three quarters of the limit would be filled: to 2 / 75 of the curve at
    # most, and two points of neighbouring groups are less than two groups apart.
    assert int(steps.diff().max()) < 2 * 2 / 75 * length + 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_outlives_the_thinning(bad: float) -> None:
    for place in range(2000, 2009):
        values = [1.0 + step % 3 for step in range(5000)]
        values[place] = bad
        found = [point for point in track(values, limit=100) if not math.isfinite(point.value)]
        assert [point.step for point in found] == [place]
        assert (found[0].low, found[0].high) in [(1.0, 3.0), (1.0, 2.0), (2.0, 3.0)]


def test_the_first_of_many_nans_stays() -> None:
    values = [math.nan if step >= 1234 else 1.0 for step in range(5000)]
    kept = track(values, limit=100)
    assert min(point.step for point in kept if math.isnan(point.value)) == 1234
    assert len(kept) <= 100


def test_a_curve_of_nothing_but_nan_is_thinned_too() -> None:
    kept = track([math.nan] * 5000, limit=100)
    assert len(kept) <= 100
    assert all(math.isnan(point.low) for point in kept)


def test_a_history_keeps_four_thousand_points_of_each_metric() -> None:
    history = History()
    for step in range(9000):
        history.log_metrics({"x": float(step)}, step)
    assert 2000 <= len(history.curves()["x"][0]) <= 4000


def test_a_limit_too_small_for_what_has_to_stay_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 8 points, got 7"):
        History(limit=7)


# -- the clock ---------------------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as its one item."""
    time = [1000.0]
    monkeypatch.setattr("composefit.history.time.monotonic", lambda: time[0])
    return time


def test_seconds_count_from_the_beginning_of_the_run(now: list[float]) -> None:
    history = History()
    now[0] += 50
    history.begin()
    now[0] += 2
    history.log_metrics({"x": 1.0}, 1)
    now[0] += 3
    history.log_metrics({"x": 1.0}, 2)
    history.finalize("finished")
    now[0] += 100
    assert history.tracks["x"].column("seconds").tolist() == [2.0, 5.0]
    assert (history.seconds, history.status) == (5.0, "finished")


def test_the_clock_goes_on_after_a_resumption(now: list[float], tmp_path: Path) -> None:
    history = History()
    now[0] += 7
    history.log_metrics({"x": 1.0}, 1)
    checkpoint.save(tmp_path / "c.ckpt", history.state_dict())
    now[0] += 5000  # nobody trains
    other = History()
    now[0] += 20  # nor here
    other.load_state_dict(checkpoint.load(tmp_path / "c.ckpt"))
    now[0] += 1
    other.log_metrics({"x": 1.0}, 2)
    assert other.tracks["x"].column("seconds").tolist() == [7.0, 8.0]


def test_a_new_run_forgets_the_one_before() -> None:
    history = History()
    history.log_metrics({"x": 1.0, "epoch": 2}, 9)
    history.log_image("p", Image(torch.rand(2, 2)), 9)
    history.finalize("failed")
    history.begin()
    assert (history.curves(), history.pictures, history.step, history.epoch) == ({}, {}, 0, 0)
    assert history.status == "running"


# -- state -------------------------------------------------------------------------------------


def test_all_points_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    random.seed(0)
    history = History(limit=50)
    for step in range(500):
        metrics = {"noise": random.gauss(0, 1), "epoch": step // 100}
        if step % 100 == 0:
            metrics["seldom"] = math.nan if step == 200 else step / 3
        history.log_metrics(metrics, step)
    other = resumed(history, tmp_path / "c.ckpt", limit=50)
    assert history.tracks["noise"].thinned
    for name in ("noise", "seldom"):
        assert repr(list(other.tracks[name])) == repr(list(history.tracks[name]))
    assert len(history.tracks["seldom"]) == 5


def test_a_resumed_history_thins_as_one_that_never_stopped(tmp_path: Path) -> None:
    random.seed(0)
    values = [random.gauss(0, 1) for _ in range(1000)]
    straight, stopped = History(limit=50), History(limit=50)
    for step, value in enumerate(values):
        straight.log_metrics({"x": value}, step)
        if step in (20, 333, 777):
            stopped = resumed(stopped, tmp_path / "c.ckpt", limit=50)
        stopped.log_metrics({"x": value}, step)

    def timeless(history: History) -> list[Point]:
        return [point._replace(seconds=0.0) for point in history.tracks["x"]]

    assert timeless(stopped) == timeless(straight)


def test_points_and_pictures_after_the_checkpoints_step_are_dropped(tmp_path: Path) -> None:
    history = History()
    for step in (10, 20, 30):
        history.log_metrics({"x": float(step)}, step)
        history.log_image("p", Image(torch.rand(2, 2)), step)
    history.log_metrics({"late": 1.0}, 30)
    history.log_image("late", Image(torch.rand(2, 2)), 30)
    other = resumed(history, tmp_path / "c.ckpt", step=20)
    assert {name: steps.tolist() for name, (steps, _) in other.curves().items()} == {"x": [10, 20]}
    assert {n: [one.step for one in kept] for n, kept in other.pictures.items()} == {"p": [10, 20]}
    assert other.step == 20


def test_columns_of_the_same_bytes_keep_their_own_types(tmp_path: Path) -> None:
    history = History()
    history.log_metrics({"x": 5e-324}, 1)  # as bits, this float is the integer 1
    steps, values = resumed(history, tmp_path / "c.ckpt").curves()["x"]
    assert (steps.tolist(), values.tolist()) == ([1], [5e-324])


def test_metrics_logged_together_share_their_steps_in_a_checkpoint(tmp_path: Path) -> None:
    def size(metrics: int) -> int:
        history = History()
        for step in range(1000):
            values = {f"metric {i}": random.random() for i in range(metrics)}
            history.log_metrics(values, step)
        checkpoint.save(tmp_path / "c.ckpt", history.state_dict())
        return (tmp_path / "c.ckpt").stat().st_size

    random.seed(0)
    # 8 bytes for a value; with a step, an epoch and a time of its own it would be 28.
    assert (size(11) - size(1)) / 10_000 < 10


# -- pictures ----------------------------------------------------------------------------------


def test_a_picture_is_kept_as_the_file_it_is(tmp_path: Path) -> None:
    image = Image(torch.rand(3, 4, 5), caption="four by five")
    history = History()
    history.log_image("samples", image, 12)
    expected = {"samples": [Picture(12, "four by five", image.png())]}
    assert history.pictures == expected
    assert resumed(history, tmp_path / "c.ckpt").pictures == expected


def test_of_many_pictures_the_first_the_latest_and_some_between_are_kept() -> None:
    history = History()
    for step in range(100):
        history.log_image("p", Image(torch.rand(2, 2)), step)
        kept = [one.step for one in history.pictures["p"]]
        assert len(kept) <= 8
        assert (kept[0], kept[-1]) == (0, step)
        assert kept == sorted(set(kept))
    assert len(kept) >= 4


# -- where a run is ----------------------------------------------------------------------------


def test_a_point_after_the_last_epoch_is_no_epoch_more() -> None:
    """A test after a fit of two epochs is logged in epoch 2, at the last step of epoch 1."""
    history = History()
    for step in (2, 4):
        history.log_metrics({"x": 0.0, "epoch": 0}, step)
    for step in (6, 8):
        history.log_metrics({"x": 0.0, "epoch": 1}, step)
    history.log_metrics({"x": 0.0, "test": 1.0, "epoch": 2}, 8)
    assert (history.step, history.epoch) == (8, 1)
    history.log_metrics({"x": 0.0, "epoch": 2}, 10)
    assert history.epoch == 2


def test_the_last_step_of_a_metric_is_its_own() -> None:
    history = History()
    history.log_metrics({"x": 0.0}, 3)
    history.log_metrics({"y": 0.0}, 7)
    assert [history.last_step(name) for name in ("x", "y", "z")] == [3, 7, 0]
