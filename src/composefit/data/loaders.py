"""What may be passed as a loader, and several of them side by side."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from torch.utils.data import DataLoader, Sampler, SequentialSampler, SubsetRandomSampler

from composefit.data.generators import samplers_of


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


class PerRank:
    """Says that a loader gives each rank batches of its own, instead of the same to all.

    Otherwise a loader's batch is that of all ranks, and is divided over them. Here the dataset has
    divided itself: by `torch.distributed.get_rank()`, or a library's way of splitting by node. A
    step takes one batch of each rank; their sizes may differ, and so may their number. An epoch
    lasts until no rank has a batch left: one that has run out takes part with weight zero. In a
    dict of loaders, as always, it ends with the shortest. How long an epoch is, no rank knows.

    With one process it changes nothing.

    Args:
        loader: an iterable of batches, such as a DataLoader over an iterable dataset.

    Raises:
        TypeError: it is no iterable.

    Example:
        >>> list(PerRank([1, 2]))
        [1, 2]
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        if isinstance(loader, Mapping) or not isinstance(loader, Iterable):
            raise TypeError(
                f"PerRank takes an iterable of batches, such as a DataLoader, got "
                f"{type(loader).__name__}; in a dict of loaders write it around each of them"
            )
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        if not isinstance(self.loader, Sized):
            raise TypeError(f"{type(self.loader).__name__} does not say how many batches it has")
        return len(self.loader)


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
    if isinstance(loader, list | tuple) and loader and isinstance(loader[0], DataLoader | PerRank):
        raise TypeError(
            f"{name} is a {type(loader).__name__} of loaders, whose items would be taken for "
            'batches: write {"name": loader, ...} for several loaders side by side'
        )
    return loader


def number_of_batches(loader: Iterable[Any], ranks: int = 1) -> float:
    """As many as the loader says; infinity where it does not say.

    Of several ranks, none knows how many batches of their own the others have.
    """
    if ranks > 1 and isinstance(loader, Loaders):
        return min(number_of_batches(one, ranks) for one in loader.loaders.values())
    if ranks > 1 and isinstance(loader, PerRank):
        return math.inf
    try:
        return len(loader) if isinstance(loader, Sized) else math.inf
    except TypeError:  # a DataLoader over an IterableDataset has a __len__ that raises
        return math.inf


def one_shot(loader: Iterable[Any]) -> Iterable[Any] | None:
    """The loader, or the first of several, that can be iterated only once."""
    if isinstance(loader, Loaders):
        return next((found for one in loader.loaders.values() if (found := one_shot(one))), None)
    if isinstance(loader, PerRank):
        return one_shot(loader.loader)
    # Not `iter(loader) is loader`: that starts a DataLoader's workers, and draws a seed.
    return loader if isinstance(loader, Iterator) else None


def in_order(loader: Iterable[Any]) -> Iterable[Any]:
    """The same loader without shuffling: it gives the same batches in every epoch.

    A DataLoader's RandomSampler or WeightedRandomSampler becomes a SequentialSampler, and a
    SubsetRandomSampler its indices in their order; a sampler of another kind stays.
    """
    if isinstance(loader, Loaders):
        return Loaders({name: in_order(one) for name, one in loader.loaders.items()})
    if isinstance(loader, PerRank):
        return PerRank(in_order(loader.loader))
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


def refuse_divided(loader: DataLoader[Any], name: str) -> None:
    """Raise ValueError if a loader's samples are divided over the ranks before it batches them.

    Such as by torch's DistributedSampler, also one inside of another sampler.
    """
    found = [sampler for _, sampler in samplers_of(loader)]
    for sampler in found:
        inside = getattr(sampler, "__dict__", {}).values()
        found += [one for one in inside if isinstance(one, Sampler) and one not in found]
        replicas = getattr(sampler, "num_replicas", 1)
        if replicas != 1 and hasattr(sampler, "rank"):
            raise ValueError(
                f"{name} has a {type(sampler).__name__}, which gives each of {replicas} ranks "
                "samples of its own, and they would be divided over the ranks once more. Give the "
                "plain loader: composefit divides its batches over the ranks itself. Its batch "
                "size is that of all ranks together, as in DataLoader(dataset, 64, shuffle=True)"
            )


def altered(loader: DataLoader[Any], **attributes: Any) -> DataLoader[Any]:
    """A shallow copy of a DataLoader, of the same class, with these attributes changed."""
    clone = copy.copy(loader)
    # DataLoader.__setattr__ refuses to change a sampler or a dataset.
    clone.__dict__.update(attributes, _iterator=None)
    return clone
