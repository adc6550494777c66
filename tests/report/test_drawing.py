import math
import re

import numpy as np
import pytest

from composefit.history import History
from composefit.report.chart import chart
from composefit.report.drawing import Scale, band, dots, line, marks
from composefit.report.plots import sections


def points(path: str) -> list[list[tuple[int, int]]]:
    """The corners of a path, stroke by stroke."""
    strokes = [stroke for stroke in path.split("M") if stroke]
    return [[(int(x), int(y)) for x, y in re.findall(r"(\d+) (\d+)", one)] for one in strokes]


def test_a_linear_axis_is_proportional() -> None:
    scale = Scale(-2.0, 8.0)
    assert scale.place(np.array([-2.0, 3.0, 8.0])).tolist() == [0.0, 0.5, 1.0]


def test_equal_ratios_are_equally_far_on_a_logarithmic_axis() -> None:
    places = Scale(0.01, 100.0, log=True).place(np.array([0.01, 0.1, 1.0, 10.0, 100.0]))
    assert np.allclose(places, [0.0, 0.25, 0.5, 0.75, 1.0], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "values",
    [[0.0], [5.0, 5.0], [-1e308, 1e308], [1.7e308, 1.79e308], [5e-324, 0.0], [1e-310], [-3, 7]],
)
def test_an_axis_holds_its_values_however_large_or_alike(values: list[float]) -> None:
    scale = Scale.around(np.array(values))
    places = scale.place(np.array(values))
    assert np.isfinite(places).all()
    assert ((places >= 0) & (places <= 1)).all()


def test_an_axis_begins_at_zero_where_zero_is_near() -> None:
    assert Scale.around(np.array([0.1, 5.0])).low == 0.0
    assert Scale.around(np.array([4.0, 5.0])).low == pytest.approx(3.95)
    assert Scale.around(np.array([-0.1, 5.0])).low < -0.1


def test_a_logarithmic_axis_needs_positive_values_over_two_decades() -> None:
    assert Scale.around_log(np.array([1.0, 100.0, np.nan])) is not None
    assert Scale.around_log(np.array([1.0, 99.0])) is None
    assert Scale.around_log(np.array([0.0, 1.0, 1000.0])) is None
    assert Scale.around_log(np.array([np.nan])) is None
    assert Scale.around_log(np.array([5e-324, 1e308])) is not None


def test_a_curve_breaks_where_it_is_not_finite() -> None:
    x, y = np.arange(6) / 5, np.array([0.0, 0.5, np.nan, 1.0, np.nan, 0.25])
    assert points(line(x, y)) == [[(0, 600), (240, 300)], [(720, 0)], [(1200, 450)]]


def test_a_long_curve_keeps_the_outline_of_every_column() -> None:
    rng = np.random.default_rng(0)
    x, y = np.linspace(0, 1, 50_000), rng.uniform(0.2, 0.8, 50_000)
    (drawn,) = points(line(x, y))
    assert len(drawn) <= 4 * 301
    for column in range(300):
        inside = (np.floor(x * 300) == column).nonzero()[0]
        heights = [h for place, h in drawn if column * 4 < place < column * 4 + 4]
        expected = np.round(600 * (1 - y[inside]))
        assert all(expected.min() <= height <= expected.max() for height in heights)
    assert min(height for _, height in drawn) == np.round(600 * (1 - y.max()))
    spike = y.copy()
    spike[23_456] = 0.0
    assert 600 in [height for _, height in points(line(x, spike))[0]]


def test_a_band_is_an_area_between_its_curves() -> None:
    x, low, high = np.array([0.0, 1.0]), np.array([0.25, 0.5]), np.array([0.75, 1.0])
    assert band(x, low, high) == "M0 150L1200 0L1200 300L0 450Z"


def test_dots_and_marks_are_where_values_are() -> None:
    x, values = np.array([0.0, 0.5, 0.75, 1.0]), np.array([1.0, np.nan, np.inf, -np.inf])
    assert dots(x, Scale(0, 2).place(values)) == "M0 300h0"
    assert marks(x, values) == "M600 600h0M900 0h0M1200 600h0"


# -- the plot ----------------------------------------------------------------------------------


def drawn(history: History) -> str:
    (section,) = sections(list(history.tracks))
    (plot,) = section.plots
    curves = {name: i for i, name in enumerate(history.tracks)}
    return chart(plot, history.tracks, curves, Scale(0.0, float(history.step)))


def shapes(html: str, kind: str) -> list[str]:
    return re.findall(rf'<path class="{kind}[^"]*" d="([^"]*)"', html)


def test_a_plot_is_whole_without_a_script() -> None:
    history = History()
    for step, value in enumerate([1.0, 3.0, 2.0, 4.0]):
        history.log_metrics({"loss": value, "val_loss": value + 1}, step * 100)
    html = drawn(history)
    low, high = (float(x) for x in re.findall(r'data-(?:low|high)="([^"]+)"', html))
    expected = [
        [
            (400 * step, round(600 * (1 - (value - low) / (high - low))))
            for step, value in enumerate(values)
        ]
        for values in ([1.0, 3.0, 2.0, 4.0], [2.0, 4.0, 3.0, 5.0])
    ]
    assert [points(path)[0] for path in shapes(html, "line")] == expected
    ticks = re.findall(r'class="y" style="bottom:([\d.]+)%">([\d.]+)<', html)
    assert len(ticks) >= 3
    for place, value in ticks:
        assert float(place) == pytest.approx(100 * (float(value) - low) / (high - low), abs=0.01)
    assert re.findall(r'class="x" style="left:([\d.]+)%">(\d+)<', html) == [
        ("0.00", "0"),
        ("33.33", "100"),
        ("66.67", "200"),
        ("100.00", "300"),
    ]


def test_a_logarithmic_plot_is_offered_over_decades() -> None:
    history = History()
    for step in range(5):
        history.log_metrics({"loss": 10.0**-step}, step)
    html = drawn(history)
    assert html.count('<div class="plot ') == 2
    assert '<input type="checkbox">' in html
    linear, log = (points(path)[0] for path in shapes(html, "line"))
    assert [y for _, y in log] == pytest.approx([600 * (0.2 + step) / 4.4 for step in range(5)], 1)
    assert log[1][1] - log[0][1] < 200 < linear[1][1] - linear[0][1]


def test_no_logarithm_is_offered_of_what_is_never_positive() -> None:
    history = History()
    for step in range(5):
        history.log_metrics({"loss": float(step)}, step)
    html = drawn(history)
    assert html.count('<div class="plot ') == 1
    assert "checkbox" not in html


def test_what_is_not_finite_is_marked_with_its_first_step() -> None:
    history = History()
    for step, value in enumerate([1.0, math.nan, 2.0, math.inf]):
        history.log_metrics({"loss": value}, step)
    html = drawn(history)
    assert shapes(html, "bad") == ["M400 600h0M1200 0h0"]
    assert "not finite first at step 1<" in html


def test_the_range_of_what_was_thinned_out_is_a_band() -> None:
    history = History(limit=50)
    for step in range(49):
        history.log_metrics({"loss": float(step % 2)}, step)
    assert shapes(drawn(history), "band") == []
    for step in range(49, 200):
        history.log_metrics({"loss": float(step % 2)}, step)
    (area,) = shapes(drawn(history), "band")
    top, bottom = (round(600 * (1 - value / 1.05)) for value in (1, 0))
    assert {y for _, y in points(area)[0]} == {top, bottom}
