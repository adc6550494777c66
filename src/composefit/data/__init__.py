"""Loaders: what a batch of several is, and how an epoch is resumed in its middle.

Attributes:
    Batches: a loader's batches, epoch after epoch (`batches`).
    CombinedLoader: several loaders as one (`loaders`).
    LoaderBatches: one batch of each of them; of a list of loaders a `LoaderList`.
    PerRank: says that a loader gives each rank batches of its own.
    Rows: what a rank gets of a batch, where a loader loads no more than that.
    as_loader: what a user passed as a loader.
"""

from composefit.data.batches import Batches
from composefit.data.loaders import (
    CombinedLoader,
    LoaderBatches,
    LoaderList,
    PerRank,
    as_loader,
)
from composefit.data.rows import Rows

__all__ = [
    "Batches",
    "CombinedLoader",
    "LoaderBatches",
    "LoaderList",
    "PerRank",
    "Rows",
    "as_loader",
]
