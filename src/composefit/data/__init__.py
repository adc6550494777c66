"""Loaders: what a batch of several is, and how an epoch is resumed in its middle.

Attributes:
    Batches: a loader's batches, epoch after epoch (`batches`).
    Loaders: several loaders side by side (`loaders`).
    LoaderBatches: one batch of each of them.
    as_loader: what a user passed as a loader.
"""

from composefit.data.batches import Batches
from composefit.data.loaders import LoaderBatches, Loaders, as_loader

__all__ = ["Batches", "LoaderBatches", "Loaders", "as_loader"]
