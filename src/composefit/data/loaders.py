"""What may be passed as a loader, and several of them side by side."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Sampler, SequentialSampler, SubsetRandomSampler

from composefit.data.combining import MODES, Place, Turns, rounds
from composefit.data.generators import samplers_of


class LoaderBatches(dict[Any, Any]):
    """One batch of each of several loaders, `{"labelled": ..., "unlabelled": ...}`.

    Each is cut into shards by itself; None stands for that of a loader which is at its end. A plain
    loss counts the samples of the first that is there.
    """


class LoaderList(list[Any]):
    """The same, of loaders in a list."""


def apart(batches: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What a structure of `LoaderBatches` and `LoaderList` holds, each with a name of its own.

    Example:
        >>> dict(apart(LoaderBatches({"a": 1, "b": LoaderList([2, 3])})))
        {'a': 1, 'b[0]': 2, 'b[1]': 3}
    """
    if (items := _items(batches)) is None:
        yield name, batches
        return
    for key, one in items:
        yield from apart(one, _inside(name, key))


def together(like: Any, found: Mapping[str, Any], name: str = "") -> Any:
    """The structure that `apart` takes apart, around others by the same names, or None.

    Example:
        >>> together(LoaderBatches({"a": 1, "b": LoaderList([2, 3])}), {"a": 4, "b[1]": 5})
        {'a': 4, 'b': [None, 5]}
    """
    if (items := _items(like)) is None:
        return found.get(name)
    others = [(key, together(one, found, _inside(name, key))) for key, one in items]
    return LoaderBatches(others) if isinstance(like, dict) else LoaderList(x for _, x in others)


def _items(batches: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(batches, LoaderBatches):
        return list(batches.items())
    return list(enumerate(batches)) if isinstance(batches, LoaderList) else None


def _inside(name: str, key: Any) -> str:
    return f"{name}[{key!r}]" if name or not isinstance(key, str) else key


class CombinedLoader:
    """Several loaders as one; the modes are those of Lightning's class of this name.

    A batch has the structure of the loaders: of a dict it is a dict, of a list or tuple a list.
    Each is cut into shards by itself, and is resumed by itself. Where loaders are evaluated, those
    of `"sequential"` run one after another, and are told apart by `dataloader_idx`.

    Args:
        iterables: loaders in a dict, list or tuple, which may be nested; or a single one. A list
            within is a loader, of batches, unless it is made of loaders. A `CombinedLoader` within
            is one loader.
        mode: what an epoch is:

            - `"min_size"`: it ends with the shortest loader.
            - `"max_size_cycle"`: it ends with the longest; the others begin anew, in a new order
              where they shuffle, as often as it takes.
            - `"max_size"`: it ends with the longest; one at its end gives None.
            - `"sequential"`: one loader after another; a batch is that of a single loader.

    Attributes:
        iterables: as given.
        mode: as given.
        loaders: name -> loader; the name says where it is.
        structure: of a batch.

    Raises:
        ValueError: another mode, no loader, or two of one name.
        TypeError: something is no loader.

    Example:
        >>> loader = CombinedLoader({"a": [1, 2], "b": [4, 5, 6]}, "max_size_cycle")
        >>> len(loader), list(loader)
        (3, [{'a': 1, 'b': 4}, {'a': 2, 'b': 5}, {'a': 1, 'b': 6}])
        >>> list(CombinedLoader([[1, 2], [4, 5, 6]], "max_size"))
        [[1, 4], [2, 5], [None, 6]]
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in MODES:
            raise ValueError(
                f"CombinedLoader(mode=...) is one of {', '.join(map(repr, MODES))}, got {mode!r}"
            )
        self.iterables = iterables
        self.mode = mode
        self.structure = _structure(iterables)
        found = list(apart(self.structure))
        self.loaders = {name: as_loader(one, f"the loader {name!r}") for name, one in found}
        if not found:
            raise ValueError(f"expected at least one loader, got {iterables!r}")
        if len(self.loaders) < len(found):
            raise ValueError(f"two loaders have one name: {', '.join(name for name, _ in found)}")

    def __iter__(self) -> Iterator[Any]:
        def turns(name: str, loader: Iterable[Any]) -> Turns:
            return Turns(name, lambda repeat, skip: iter(loader), lambda: None, Place())

        every = [turns(name, one) for name, one in self.loaders.items()]
        return map(self.batch, rounds(every, self.mode))

    def batch(self, found: Mapping[str, Any]) -> Any:
        """What a step gets of what the loaders gave, by their names."""
        if self.mode == "sequential":
            (batch,) = found.values()
            return batch
        return together(self.structure, found)

    def __len__(self) -> int:
        number = self.number_of_batches()
        if number == math.inf:
            which = "none" if self.mode == "min_size" else "not every one"
            raise TypeError(f"{which} of these loaders says how many batches it has")
        return int(number)

    def number_of_batches(self, ranks: int = 1) -> float:
        """Batches an epoch, among so many ranks; infinity where nobody knows."""
        numbers = [number_of_batches(one, ranks) for one in self.loaders.values()]
        if self.mode == "sequential":
            return sum(numbers)
        return min(numbers) if self.mode == "min_size" else max(numbers)

    def like(self, function: Callable[[Iterable[Any]], Iterable[Any]]) -> CombinedLoader:
        """The same of other loaders: of what a function makes of each."""
        others = {name: function(one) for name, one in self.loaders.items()}
        return CombinedLoader(together(self.structure, others), self.mode)


def _structure(loaders: Any, outermost: bool = True) -> Any:
    if isinstance(loaders, Mapping):
        return LoaderBatches({key: _structure(one, False) for key, one in loaders.items()})
    if isinstance(loaders, list | tuple) and (outermost or _of_loaders(loaders)):
        return LoaderList(_structure(one, False) for one in loaders)
    return loaders


def _of_loaders(items: Any) -> bool:
    """Whether a list is made of loaders, or of lists of loaders; else it holds batches."""
    return len(items) > 0 and all(
        _of_loaders(item) if isinstance(item, list | tuple) else is_loader(item) for item in items
    )


def is_loader(value: object) -> bool:
    """Whether an item of a list is a loader, not a batch."""
    if isinstance(value, DataLoader):
        return True
    batch = isinstance(value, Tensor | list | tuple | Mapping | str | bytes)
    return not batch and isinstance(value, Iterable) and not hasattr(value, "__array__")


def one_after_another(loaders: Any) -> list[Any]:
    """What is evaluated, loader by loader: those of a dict or list, or of `"sequential"` ones."""
    if isinstance(loaders, CombinedLoader) and loaders.mode == "sequential":
        return list(loaders.loaders.values())
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    if isinstance(loaders, list | tuple) and loaders and all(map(is_loader, loaders)):
        return list(loaders)
    return [loaders]


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
        if isinstance(loader, Mapping | CombinedLoader) or not isinstance(loader, Iterable):
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
        try:
            return CombinedLoader(loader)
        except (TypeError, ValueError) as error:
            error.add_note(f"in {name}")
            raise
    if not isinstance(loader, Iterable):
        raise TypeError(
            f"{name} must be an iterable of batches, such as a DataLoader, or a dict of such, "
            f"got {type(loader).__name__}"
        )
    kinds: tuple[type, ...] = (DataLoader, PerRank, CombinedLoader)
    if isinstance(loader, list | tuple) and loader and isinstance(loader[0], kinds):
        raise TypeError(
            f"{name} is a {type(loader).__name__} of loaders, whose items would be taken for "
            'batches: write {"name": loader, ...} or CombinedLoader([loader, ...]) for several '
            "loaders side by side"
        )
    return loader


def number_of_batches(loader: Iterable[Any], ranks: int = 1) -> float:
    """As many as the loader says; infinity where it does not say.

    Of several ranks, none knows how many batches of their own the others have.
    """
    if isinstance(loader, CombinedLoader):
        return loader.number_of_batches(ranks)
    if ranks > 1 and isinstance(loader, PerRank):
        return math.inf
    try:
        return len(loader) if isinstance(loader, Sized) else math.inf
    except TypeError:  # a DataLoader over an IterableDataset has a __len__ that raises
        return math.inf


def one_shot(loader: Iterable[Any]) -> Iterable[Any] | None:
    """The loader, or the first of several, that can be iterated only once."""
    if isinstance(loader, CombinedLoader):
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
    if isinstance(loader, CombinedLoader):
        return loader.like(in_order)
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
