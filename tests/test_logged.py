"""Options of `self.log`: which words and functions it takes, and which values."""

from typing import Any

import pytest
import torch
from torchmetrics import MeanMetric

from composefit import Mean, Sum
from composefit.images import Image
from composefit.logged import log_options, one_term, samples_of

FLAGS = (False, True, True, True)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("mean", "mean"),
        ("avg", "mean"),
        ("AVG", "mean"),
        ("Sum", "sum"),
        ("MIN", "min"),
        ("max", "max"),
        (torch.mean, "mean"),
        (torch.sum, "sum"),
        (torch.min, "min"),
        (torch.max, "max"),
        (torch.amin, "min"),
        (torch.amax, "max"),
        (sum, "sum"),
        (min, "min"),
        (max, "max"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_words_and_functions_of_the_same_name_mean_the_same(given: Any, name: str) -> None:
    assert log_options(*FLAGS, given).reduce == name


def test_any_other_function_is_kept_as_it_is() -> None:
    assert log_options(*FLAGS, torch.median).reduce is torch.median


@pytest.mark.parametrize("given", ["median", "", 3, None])
def test_an_unknown_reduction_is_refused_with_those_there_are(given: Any) -> None:
    with pytest.raises(ValueError, match=r"'mean', 'sum', 'min', 'max' or a function.*got") as e:
        log_options(*FLAGS, given)
    assert repr(given) in str(e.value)


def test_the_same_options_are_the_same_object() -> None:
    """They are asked for at every call of `self.log`."""
    assert log_options(*FLAGS, "mean") is log_options(*FLAGS, "mean")


def test_a_logged_term_has_no_graph_and_is_a_copy() -> None:
    total = torch.ones((), requires_grad=True) * 3
    (term,) = one_term("x", Mean(total, 2)).terms
    with torch.no_grad():
        total += 1
    assert not term.total.requires_grad
    assert (term.total.item(), float(term.weight)) == (3.0, 2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "weight"),
    [
        (1.5, 7),
        (Mean(torch.ones(()), 2), None),
        (Sum(torch.ones(())), None),
        (MeanMetric(), None),
        (Image(torch.zeros(2, 2)), None),
    ],
    ids=["number", "Mean", "Sum", "metric", "image"],
)
def test_only_plain_values_weigh_samples(value: Any, weight: int | None) -> None:
    asked: list[int] = []
    assert samples_of(value, lambda: asked.append(1) or 7) == weight  # type: ignore[func-returns-value]
    assert len(asked) == (weight is not None)


def test_nothing_to_log_is_refused() -> None:
    with pytest.raises(ValueError, match="one must be True"):
        log_options(False, True, False, False, "mean")
