import math
import random

import pytest

from composefit.report.numbers import labels, log_ticks, number, ticks


def test_ticks_are_round_few_and_cover_the_range() -> None:
    random.seed(0)
    for _ in range(2000):
        low = random.uniform(-1, 1) * 10 ** random.uniform(-200, 200)
        high = low + 10 ** random.uniform(-3, 3) * abs(low)
        found = ticks(low, high, 5)
        assert 2 <= len(found) <= 6
        step = (high - low) / 5
        assert all(low - step * 1e-6 <= tick <= high + step * 1e-6 for tick in found)
        gap = found[1] - found[0]
        mantissa = gap / 10.0 ** math.floor(math.log10(gap) + 1e-6)
        assert min(abs(mantissa - nice) for nice in (1, 2, 5)) < 1e-5
        assert found[0] - low < gap and high - found[-1] < gap


def test_ticks_of_whole_numbers_are_whole() -> None:
    assert ticks(0, 2, 5, whole=True) == [0, 1, 2]


def test_ticks_of_the_largest_range_are_finite() -> None:
    found = ticks(-1.7e308, 1.7e308, 4)
    assert len(found) >= 3
    assert all(map(math.isfinite, found))


def test_labels_tell_neighbours_apart() -> None:
    random.seed(0)
    for _ in range(2000):
        low = random.uniform(-1, 1) * 10 ** random.uniform(-8, 8)
        found = ticks(low, low + 10 ** random.uniform(-6, 6), 5)
        texts = labels(found)
        assert len(set(texts)) == len(found)
        for text, value in zip(texts, found, strict=True):
            assert float(text) == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_logarithmic_ticks_are_in_range_and_few() -> None:
    random.seed(0)
    for _ in range(500):
        low = 10 ** random.uniform(-300, 290)
        high = low * 10 ** random.uniform(2, 15)
        found = log_ticks(low, min(high, 1e308))
        assert 1 <= len(found) <= 9
        assert all(low <= tick <= high for tick in found)


@pytest.mark.parametrize("value", [0.1, 12.345, 99999.4, 0.00099, -1e-7, 3e12, 5e-324, 1.7e308])
def test_a_shown_number_is_near_the_number(value: float) -> None:
    assert float(number(value)) == pytest.approx(value, rel=5e-3)
