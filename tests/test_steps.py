import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from composefit import LoopModule, Mean, Sum, Update
from composefit.effects import Gather, Once, Reduce
from composefit.steps import Helper, as_effect, dropped_helper, offered
from composefit.updates import OnlyUpdate

LOSS = torch.tensor(1.0)


# -- reading what a step hands over ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "returned", "kind"),
    [
        (LOSS, True, OnlyUpdate),
        (LOSS, False, OnlyUpdate),
        (Mean(LOSS, 2), True, OnlyUpdate),
        (Mean(LOSS, 2), False, Reduce),
        (Sum(LOSS) + LOSS, False, Reduce),
        ({"a": LOSS}, False, Update),
        ({"loss": LOSS}, False, Update),
        ({"loss": LOSS}, True, OnlyUpdate),
        ({"loss": Mean(LOSS, 2)}, True, OnlyUpdate),
        ({"loss": None}, True, type(None)),
        (None, True, type(None)),
        (Update({"a": LOSS}), False, Update),
    ],
)
def test_what_is_handed_over_stands_for_an_effect(
    value: object, returned: bool, kind: type
) -> None:
    assert type(as_effect(value, returned)) is kind


@pytest.mark.parametrize(
    ("value", "returned", "words"),
    [
        (None, False, "yielded None, expected a loss.*to skip a step, `return`"),
        (1.5, True, r"returned float 1.5.*was \.item\(\) called"),
        ("critic", False, "yielded str 'critic'.*`yield from` a dict hands over its keys"),
        ((_ for _ in ()), False, r"yielded a generator.*write `yield from self\.helper"),
        ([LOSS], True, "returned list"),
        (range, True, "returned type"),
        (Gather(torch.ones(2, 1)), True, r"returned Gather\(\.\.\.\).*yield it"),
        (Once(print), True, r"returned Once\(\.\.\.\).*yield it"),
        (Reduce(Mean(LOSS, 2)), True, r"returned Reduce\(\.\.\.\).*yield it"),
    ],
)
def test_anything_else_is_a_type_error(value: object, returned: bool, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        as_effect(value, returned)


@pytest.mark.parametrize(
    ("function", "takes"),
    [
        (lambda: 0, 0),
        (lambda a: 0, 1),
        (lambda a, b: 0, 2),
        (lambda a, b, c=1: 0, 2),
        (lambda *a: 0, 2),
        (lambda a, *, b=1: 0, 1),
        (lambda a, **b: 0, 1),
    ],
)
def test_a_function_is_offered_no_more_than_it_declares(
    function: Callable[..., Any], takes: int
) -> None:
    assert offered(function, 2) == takes


# -- generators that notice when nobody runs them --------------------------------------------------


class Helping(LoopModule):
    def helper(self, n: int) -> Any:
        yield from range(n)
        return "done"

    def outer(self) -> Any:
        return (yield from self.helper(2))


def test_a_helper_is_a_generator_to_its_caller() -> None:
    assert list(Helping().helper(3)) == [0, 1, 2]
    assert list(Helping().outer()) == [0, 1]
    helper = Helping().helper(2)
    assert isinstance(helper, Helper) and next(helper) == 0 and helper.send(None) == 1
    helper.close()
    assert Helping.helper.__name__ == "helper" and dropped_helper() is None


def test_a_dropped_helper_is_noticed_once() -> None:
    Helping().helper(3)
    gc.collect()
    assert dropped_helper() == "Helping.helper"
    assert dropped_helper() is None
