"""Batches and loaders: what several loaders give together, and errors of loaders explained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader


class LoaderBatches(dict[str, Any]):
    """One batch of each of several loaders, `{"labelled": ..., "unlabelled": ...}`.

    Each is cut into shards by itself. A plain loss counts the samples of the first.
    """


class Loaders:
    """Several loaders side by side; ends with the shortest.

    Args:
        loaders: name -> loader.
    """

    def __init__(self, loaders: Mapping[str, Iterable[Any]]) -> None:
        if not loaders:
            raise ValueError("expected at least one {name: loader}, got an empty dict")
        self.loaders = dict(loaders)

    def __iter__(self) -> Iterator[LoaderBatches]:
        for batches in zip(*self.loaders.values(), strict=False):
            yield LoaderBatches(zip(self.loaders, batches, strict=True))

    def __len__(self) -> int:
        number = min(map(_number_of_batches, self.loaders.values()))
        if number == math.inf:
            raise TypeError("none of these loaders says how many batches it has")
        return int(number)


class Batches:
    """A loader's batches, epoch after epoch, guarding the fetching and only that.

    A `StopIteration` ends the epoch only here, never when the user's step raises it.

    Args:
        loader: an iterable of batches, such as a DataLoader, or a dict of such.
        name: what the user knows it as, for messages.
        limit: no more than this many batches an epoch, or as a float this fraction of them.
        epochs: how many times it will be iterated over.

    Raises:
        TypeError: it is no loader.
        ValueError: a fraction of a number that nobody knows; a one-shot iterator for several
            epochs.

    Attributes:
        number: batches an epoch; infinity where the loader does not say.
    """

    def __init__(
        self, loader: object, name: str, limit: int | float | None = None, epochs: float = 1
    ) -> None:
        self.loader = as_loader(loader, name)
        self.name = name
        self.number = _limited(self.loader, name, limit)
        # Without a limit the loader's end counts: what it says of its length may be an estimate.
        self._limit = None if limit is None or self.number == math.inf else int(self.number)
        self.epochs = 0
        if epochs > 1 and (once := _one_shot(self.loader)) is not None:
            raise ValueError(
                f"{name} is a one-shot iterator ({type(once).__name__}), not "
                "re-iterable: it would be empty from the second epoch on. Pass something that can "
                "be iterated again, such as a DataLoader or a list"
            )

    def epoch(self) -> Iterator[Any]:
        """The batches of one epoch.

        Raises:
            ValueError: no batch at all: in the first epoch an empty loader, later one that cannot
                be iterated twice.
        """
        self.epochs += 1
        empty = True
        for batch in islice(self.loader, self._limit):
            empty = False
            yield batch
        if not empty:
            return
        if self.epochs > 1:
            raise ValueError(
                f"{self.name} gave no batch in its epoch {self.epochs}: it is not re-iterable. "
                "Pass something that can be iterated again, such as a DataLoader or a list"
            )
        raise ValueError(
            f"{self.name} gave no batch at all: is the dataset empty, or smaller than one batch "
            "with drop_last=True?"
        )


def as_loader(loader: object, name: str) -> Iterable[Any]:
    """What a user passed as a loader: an iterable of batches, or a dict of such.

    Raises:
        TypeError: neither.
    """
    if isinstance(loader, Mapping):
        return Loaders({str(k): as_loader(v, f"{name}[{k!r}]") for k, v in loader.items()})
    if not isinstance(loader, Iterable):
        raise TypeError(
            f"{name} must be an iterable of batches, such as a DataLoader, or a dict of such, "
            f"got {type(loader).__name__}"
        )
    if isinstance(loader, list | tuple) and loader and isinstance(loader[0], DataLoader):
        raise TypeError(
            f"{name} is a {type(loader).__name__} of loaders, whose items would be taken for "
            'batches: write {"name": loader, ...} for several loaders side by side'
        )
    return loader


def _limited(loader: Iterable[Any], name: str, limit: int | float | None) -> float:
    available = _number_of_batches(loader)
    if limit is None or isinstance(limit, int):
        return available if limit is None else min(limit, available)
    if limit == 1.0:
        return available
    if available == math.inf:
        raise ValueError(
            f"{name} does not say how many batches it has, so {limit} of them is no number: give "
            "a whole number of batches"
        )
    return min(available, max(1, int(available * limit)))


def _number_of_batches(loader: Iterable[Any]) -> float:
    try:
        return len(loader) if isinstance(loader, Sized) else math.inf
    except TypeError:  # a DataLoader over an IterableDataset has a __len__ that raises
        return math.inf


def _one_shot(loader: Iterable[Any]) -> Iterable[Any] | None:
    """The loader, or the first of several, that can be iterated only once."""
    if isinstance(loader, Loaders):
        return next((found for one in loader.loaders.values() if (found := _one_shot(one))), None)
    # Not `iter(loader) is loader`: that starts a DataLoader's workers, and draws a seed.
    return loader if isinstance(loader, Iterator) else None
