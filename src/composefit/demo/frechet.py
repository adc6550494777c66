"""The Fréchet distance: how far apart two clouds of feature vectors are."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""The Fréchet distance between normal distributions fitted to two sets of vectors.

    It is :math:`\|\mu_a - \mu_b\|^2 + \mathrm{tr}(C_a + C_b - 2 (C_a C_b)^{1/2})`, 0 where means
    and covariances agree. Computed in float64, with the symmetric form of the root: the
    eigenvalues of :math:`C_a C_b` are those of :math:`C_a^{1/2} C_b C_a^{1/2}`, so that nothing
    complex appears, not even where a covariance is singular.

    Args:
        a: (n, d), one vector a row.
        b: (m, d); m need not be n.

    Returns:
        The distance, in squared units of the features.

    Raises:
        ValueError: shapes that do not fit, or fewer than two vectors.

    Source: Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
    Equilibrium (2017), there in the feature space of an Inception network.

    >>> a = torch.tensor([[0.0], [2.0]])
    >>> round(frechet_distance(a, a + 3), 6)  # the same spread, means 3 apart
    9.0
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            "frechet_distance expects feature vectors (n, d) and (m, d) with n, m >= 2, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}: flatten each sample's features to one row"
        )
    a, b = a.double(), b.double()
    cov_a, cov_b = _covariance(a), _covariance(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float(means + cov_a.trace() + cov_b.trace() - 2 * cross)


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)
