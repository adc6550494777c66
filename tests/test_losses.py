import pytest
import torch
from torch import Tensor

from composefit import Mean, Sum
from composefit.losses import SUMMED, Loss, as_loss, describe, scalar

ONE = torch.tensor(1.0)


def terms(loss: Loss) -> list[tuple[float, float | str | None]]:
    """Each term's total and weight: None for samples, "sum" for none."""
    found: list[tuple[float, float | str | None]] = []
    for term in loss.terms:
        weight = term.weight
        kind = "sum" if weight is SUMMED else None if weight is None else float(weight)
        found.append((term.total.item(), kind))
    return found


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (Mean(ONE * 6, 3), [(6, 3)]),
        (Mean(6, torch.tensor(3)), [(6, 3)]),
        (Sum(ONE * 2), [(2, "sum")]),
        (Mean(ONE, 3) + Mean(ONE, 5), [(1, 3), (1, 5)]),
        (Mean(ONE, 3) + 0.5 * Mean(ONE, 5), [(1, 3), (0.5, 5)]),
        (Mean(ONE, 3) * ONE * 2, [(2, 3)]),
        ((ONE * 2) * Mean(ONE, 3), [(2, 3)]),
        (Mean(ONE, 3) / 4, [(0.25, 3)]),
        (Mean(ONE, 3) / (ONE * 4), [(0.25, 3)]),
        (-Mean(ONE, 3), [(-1, 3)]),
        (Mean(ONE, 3) - Sum(ONE), [(1, 3), (-1, "sum")]),
        (Mean(ONE, 3) + ONE, [(1, 3), (1, None)]),
        (ONE + Mean(ONE, 3), [(1, 3), (1, None)]),
        (Mean(ONE, 3) - ONE, [(1, 3), (-1, None)]),
        (ONE - Mean(ONE, 3), [(-1, 3), (1, None)]),
        (sum([Mean(ONE, 3), Sum(ONE)]), [(1, 3), (1, "sum")]),
    ],
)
def test_losses_add_and_scale_and_each_term_keeps_its_denominator(
    loss: Loss, expected: list[tuple[float, object]]
) -> None:
    assert terms(loss) == expected


def test_arithmetic_keeps_the_graph_of_totals_and_none_of_weights() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    loss = 3 * Mean(x * x, x * 5) - x
    assert not loss.terms[0].weight.requires_grad
    (found,) = torch.autograd.grad(sum(term.total for term in loss.terms), x)
    assert found == 3 * 2 * 2 - 1
    assert not any(term.total.requires_grad for term in loss.detach().terms)
    assert terms(loss.detach()) == terms(loss)


@pytest.mark.parametrize("weight", [3, 3.0, torch.tensor(3), torch.tensor(3.0)])
def test_a_librarys_mean_comes_back_as_its_total(weight: float | Tensor) -> None:
    x = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    loss = Mean.of(x.mean(), weight)
    assert terms(loss) == [(9, 3)]
    (found,) = torch.autograd.grad(loss.terms[0].total, x)
    assert torch.equal(found, torch.ones(3))


@pytest.mark.parametrize("weight", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
def test_a_mean_over_nothing_is_left_out_and_so_is_its_gradient(weight: float | Tensor) -> None:
    x = torch.ones(3, requires_grad=True)
    empty = (x * 0).sum() / 0  # NaN, as torch gives
    loss = Mean.of(empty, weight) + x.sum()
    assert terms(loss) == [(0, 0), (3, None)]
    (found,) = torch.autograd.grad(sum(term.total for term in loss.terms), x)
    assert torch.equal(found, torch.ones(3))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: Mean(torch.ones(2), 1),
            ValueError,
            r"Mean's total .*got shape \(2,\).*\.mean\(\)",
        ),
        (
            lambda: Mean(ONE, torch.ones(2)),
            ValueError,
            r"0-dim weight, got shape \(2,\).*mask\.sum",
        ),
        (lambda: Mean(ONE, -1), ValueError, "a weight of zero or more, got -1"),
        (lambda: Mean(ONE, float("nan")), ValueError, "a weight of zero or more, got nan"),
        (lambda: Mean(ONE, "three"), TypeError, "a number or a 0-dim tensor as weight, got str"),
        (lambda: Mean.of(ONE, torch.ones(2)), ValueError, r"0-dim weight, got shape \(2,\)"),
        (lambda: Sum(torch.ones(2, 2)), ValueError, r"Sum's total .*got shape \(2, 2\)"),
        (lambda: Sum("two"), TypeError, "Sum's total must be a 0-dim tensor, got str 'two'"),
        (lambda: Mean(ONE, 1) + torch.ones(2), ValueError, r"a term of a loss .*shape \(2,\)"),
        (lambda: Mean(ONE, 1) + "x", TypeError, "a term of a loss must be"),
        (lambda: Mean(ONE, 1) + 1.5, TypeError, r"no gradient: was \.item\(\) called"),
        (lambda: as_loss(lambda: ONE, "the loss"), TypeError, "function"),
        (lambda: as_loss([ONE], "the loss of 'a'"), TypeError, "the loss of 'a' must be a 0-dim"),
        (lambda: scalar(True, "it"), TypeError, "it must be a 0-dim tensor, got bool True"),
    ],
)
def test_what_is_no_loss_raises(make: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()  # type: ignore[operator]


def test_a_loss_says_what_it_is() -> None:
    assert repr(Mean(6, 3) + 0.5 * Sum(2) + ONE) == "Mean(6, 3) + Sum(1) + 1 (mean over samples)"
    assert describe(torch.ones(2, 3)) == "a tensor of shape (2, 3)"
    assert len(describe("x" * 1000)) < 80


def test_a_tensor_cannot_swallow_a_loss() -> None:
    for operation in (torch.add, torch.mul, torch.sub):
        assert isinstance(operation(ONE, Mean(ONE, 2)), Loss)
    with pytest.raises(TypeError):
        torch.exp(Mean(ONE, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ONE / Mean(ONE, 2)
