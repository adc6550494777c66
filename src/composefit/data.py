"""Batches and loaders: what several loaders give together, and errors of loaders explained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any


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
        sizes = [len(loader) for loader in self.loaders.values() if isinstance(loader, Sized)]
        if not sizes:
            raise TypeError("none of these loaders says how many batches it has")
        return min(sizes)


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
    return loader


def number_of_batches(loader: Iterable[Any]) -> int | float:
    """How many batches a loader says it has; infinity where it does not say."""
    try:
        return len(loader) if isinstance(loader, Sized) else float("inf")
    except TypeError:  # a DataLoader over an IterableDataset has a __len__ that raises
        return float("inf")


def _one_shot(loader: Iterable[Any]) -> Iterable[Any] | None:
    """The loader, or the first of several, that can be iterated only once."""
    if isinstance(loader, Loaders):
        return next((found for one in loader.loaders.values() if (found := _one_shot(one))), None)
    # Not `iter(loader) is loader`: that starts a DataLoader's workers, and draws a seed.
    return loader if isinstance(loader, Iterator) else None


class Batches:
    """Iterates over a loader, epoch after epoch, guarding the fetching and only that.

    A `StopIteration` ends the epoch only here, never when the user's step raises it.

    Raises (from `epoch`):
        ValueError: no batch at all: in the first epoch an empty loader, later one that cannot be
            iterated twice.
    """

    def __init__(self, loader: Iterable[Any], name: str) -> None:
        self.loader = loader
        self.name = name
        self.epochs = 0

    def epoch(self, epochs_wanted: int | float = 1) -> Iterator[Any]:
        """The batches of one epoch.

        Args:
            epochs_wanted: how many there will be: a one-shot iterator is refused for several.
        """
        if epochs_wanted > 1 and (once := _one_shot(self.loader)) is not None:
            raise ValueError(
                f"{self.name} is a one-shot iterator ({type(once).__name__}), not "
                "re-iterable: it would be empty from the second epoch on. Pass something that can "
                "be iterated again, such as a DataLoader or a list"
            )
        self.epochs += 1
        empty = True
        for batch in self.loader:
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
