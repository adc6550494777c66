"""The Fréchet distance against closed forms."""

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from composefit.demo.frechet import frechet_distance


def exact_normal(n: int, mean: Tensor, root: Tensor) -> Tensor:
    """Vectors whose sample mean and covariance are exactly `mean` and `root @ root.T`."""
    x = torch.randn(n, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return white @ root.T + mean


def test_equals_the_closed_form_of_normal_distributions_with_independent_features() -> None:
    mean_a, mean_b = torch.tensor([[0.0, 1.0, -2.0], [0.5, 1.0, 3.0]], dtype=torch.float64)
    std_a, std_b = torch.tensor([[1.0, 2.0, 0.5], [3.0, 0.1, 0.5]], dtype=torch.float64)
    a = exact_normal(40, mean_a, std_a.diag())
    b = exact_normal(70, mean_b, std_b.diag())
    closed = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(closed.item(), rel=1e-10)


def test_equals_the_matrix_root_of_correlated_features() -> None:
    a = exact_normal(50, torch.zeros(4).double(), torch.randn(4, 4).double())
    b = exact_normal(60, torch.ones(4).double(), torch.randn(4, 4).double())
    cov_a, cov_b = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    by_scipy = 4 + (cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real).trace()
    assert frechet_distance(a, b) == pytest.approx(by_scipy, rel=1e-8)


def test_is_zero_to_itself_and_the_same_both_ways() -> None:
    a, b = torch.randn(30, 5), 2 * torch.randn(20, 5) + 1
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_holds_with_fewer_vectors_than_features() -> None:
    # Along a line each: covariances of rank one at a right angle, so that their product is zero.
    a, b = torch.zeros(3, 6), torch.zeros(3, 6)
    a[:, 0] = b[:, 1] = torch.tensor([-2.0, 0.0, 2.0])  # variance 4
    assert frechet_distance(a, b) == pytest.approx(8, rel=1e-10)


def test_rounding_below_zero_makes_no_nan() -> None:
    # Three vectors span two of six directions: the others' variances are zero, give or take.
    for _ in range(20):
        a = torch.randn(3, 6)
        assert frechet_distance(a, a + 1) == pytest.approx(6, rel=1e-5)


def test_a_constant_feature_does_no_harm() -> None:
    a = torch.randn(30, 3)
    a[:, 1] = 0
    shift = torch.tensor([0.0, 2.0, 0.0])
    assert frechet_distance(a, a + shift) == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b"), [((9, 3), (9, 4)), ((9, 3, 2), (9, 3, 2)), ((1, 3), (9, 3)), ((9,), (9,))]
)
def test_shapes_that_do_not_fit_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expects feature vectors \(n, d\) and \(m, d\)"):
        frechet_distance(torch.zeros(a), torch.zeros(b))
