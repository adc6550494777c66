"""What may be passed as a loader, and several of them side by side."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from torch.utils.data import DataLoader, SequentialSampler, SubsetRandomSampler


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
        number = min(map(number_of_batches, self.loaders.values()))
        if number == math.inf:
            raise TypeError("none of these loaders says how many batches it has")
        return int(number)


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


def number_of_batches(loader: Iterable[Any]) -> float:
    """As many as the loader says; infinity where it does not say."""
    try:
        return len(loader) if isinstance(loader, Sized) else math.inf
    except TypeError:  # a DataLoader over an IterableDataset has a __len__ that raises
        return math.inf


def one_shot(loader: Iterable[Any]) -> Iterable[Any] | None:
    """The loader, or the first of several, that can be iterated only once."""
    if isinstance(loader, Loaders):
        return next((found for one in loader.loaders.values() if (found := one_shot(one))), None)
    # Not `iter(loader) is loader`: that starts a DataLoader's workers, and draws a seed.
    return loader if isinstance(loader, Iterator) else None


def in_order(loader: Iterable[Any]) -> Iterable[Any]:
    """The same loader without shuffling: it gives the same batches in every epoch.

    A DataLoader's RandomSampler or WeightedRandomSampler becomes a SequentialSampler, and a
    SubsetRandomSampler its indices in their order; a sampler of another kind stays.
    """
    if isinstance(loader, Loaders):
        return Loaders({name: in_order(one) for name, one in loader.loaders.items()})
    if not isinstance(loader, DataLoader):
        return loader
    batches: Any = loader.batch_sampler
    inner: Any = loader.sampler
    if batches is not None:
        inner = getattr(batches, "sampler", None)
    if batches is not None and type(batches).__name__ != "BatchSampler":
        return loader
    order: Any
    if type(inner).__name__ in ("RandomSampler", "WeightedRandomSampler"):  # torchdata's too
        order = SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    elif isinstance(inner, SubsetRandomSampler):
        order = inner.indices
    else:
        return loader
    if batches is None:
        return altered(loader, sampler=order)
    batched = type(batches)(order, batches.batch_size, batches.drop_last)
    return altered(loader, sampler=order, batch_sampler=batched)


def altered(loader: DataLoader[Any], **attributes: Any) -> DataLoader[Any]:
    """A shallow copy of a DataLoader, of the same class, with these attributes changed."""
    clone = copy.copy(loader)
    # DataLoader.__setattr__ refuses to change a sampler or a dataset.
    clone.__dict__.update(attributes, _iterator=None)
    return clone
