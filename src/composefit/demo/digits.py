"""The data: 1,797 handwritten digits of 8 x 8 pixels, which scikit-learn brings along.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998), the test
part, as in `sklearn.datasets.load_digits`.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

#: Number of classes, the digits 0 to 9.
CLASSES = 10


def real_digits() -> tuple[Tensor, Tensor]:
    """All images and what they show, shuffled in a fixed order.

    Returns:
        images (1797, 1, 8, 8), float32, from -1 (paper) to 1 (ink); labels (1797,), int64.

    >>> images, labels = real_digits()
    >>> tuple(images.shape), images.min().item(), images.max().item()
    ((1797, 1, 8, 8), -1.0, 1.0)
    """
    found = load_digits()
    images = torch.as_tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.as_tensor(found.target, dtype=torch.int64)
    # The file is ordered by writer: its halves would differ in more than chance.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


def batches(
    images: Tensor, labels: Tensor, batch_size: int, seed: int
) -> DataLoader[tuple[Tensor, ...]]:
    """A loader of `[images, labels]` that shuffles anew in each epoch, by its own generator."""
    return DataLoader(
        TensorDataset(images, labels),
        batch_size=batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )
