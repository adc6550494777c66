import pytest

from composefit import SingleDevice, ThreadDataParallel
from composefit.strategies import choose


@pytest.mark.parametrize(
    ("name", "kind"),
    [("auto", SingleDevice), ("single", SingleDevice), ("threads", ThreadDataParallel)],
)
def test_a_name_stands_for_a_strategy(name: str, kind: type) -> None:
    assert type(choose(name)) is kind


def test_a_strategy_is_taken_as_it_is() -> None:
    strategy = SingleDevice("cpu", shards=2)
    assert choose(strategy) is strategy


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'dpp'.*'auto', 'single', 'threads'"):
        choose("dpp")


def test_a_class_without_parentheses_is_told_so() -> None:
    with pytest.raises(TypeError, match=r"write ThreadDataParallel\(\) with parentheses"):
        choose(ThreadDataParallel)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a Strategy or a name, got 3"):
        choose(3)  # type: ignore[arg-type]
