"""Loaders: what a batch of several is, and how an epoch is resumed in its middle.

Attributes:
    Batches: a loader's batches, epoch after epoch (`batches`).
    Loaders: several loaders side by side (`loaders`).
    LoaderBatches: one batch of each of them.
    PerRank: says that a loader gives each rank batches of its own.
    Rows: what a rank gets of a batch, where a loader loads no more than that.
    as_loader: what a user passed as a loader.
"""

from composefit.data.batches import Batches
from composefit.data.loaders import LoaderBatches, Loaders, PerRank, as_loader
from composefit.data.rows import Rows

__all__ = ["Batches", "LoaderBatches", "Loaders", "PerRank", "Rows", "as_loader"]
