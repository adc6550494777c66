"""What tests of resumption share: datasets that draw, loaders of every kind, what a run gets."""

import io
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from composefit.data import Batches

SAMPLES, SIZE, BATCHES = 22, 4, 6  # the last batch is ragged


def drawn(i: int) -> Tensor:
    """A sample, augmented from each of the global generators."""
    draws = [torch.rand(()).item(), float(np.random.normal()), random.random()]
    return torch.tensor([i, *draws], dtype=torch.float64)


class Augmented(Dataset[Tensor]):
    """Records what is loaded from it, in this process."""

    def __init__(self) -> None:
        self.loaded: list[int] = []

    def __getitem__(self, i: int) -> Tensor:
        self.loaded.append(i)
        return drawn(i)

    def __len__(self) -> int:
        return SAMPLES


class SeesSeed(Augmented):
    """Shows the seed that its loader's workers were started with."""

    def __getitem__(self, i: int) -> Tensor:
        worker = get_worker_info()
        return super().__getitem__(i) + ((worker.seed - worker.id) % 1000 if worker else 0)


class Stream(IterableDataset[Tensor]):
    """Workers share it. Its order is drawn when it is iterated over, not when a sample is."""

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = [*range(first, SAMPLES, step)]
        random.shuffle(mine)
        return map(drawn, mine)


class StreamWithState(IterableDataset[Tensor]):
    """Goes on where it was, and counts the epochs that it began."""

    def __init__(self) -> None:
        self.next = 0
        self.epochs = 0
        self.given = 0

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        if not self.next:
            self.epochs += 1
        while self.next * step + first < SAMPLES:
            self.next += 1
            self.given += 1
            yield drawn((self.next - 1) * step + first + 100 * self.epochs)
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next, self.epochs = state["next"], state["epochs"]


class Continuing:
    """A stream with a state goes on where it was only if that was loaded, else from its start."""

    continues = False
    next: int

    def __iter__(self) -> Iterator[Tensor]:
        if not self.continues:
            self.next = 0
        self.continues = False
        before = self.next
        for sample in super().__iter__():  # type: ignore[misc]
            yield sample
            before = self.next
        self.next = before

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)  # type: ignore[misc]
        self.continues = True


class StreamThatContinues(Continuing, StreamWithState):
    """The same samples for whoever reads them."""


class Counting(Augmented):
    """A map-style dataset with a state that goes into its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __getitem__(self, i: int) -> Tensor:
        self.count += 1
        return super().__getitem__(i) + 100 * self.count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class DrawsEachBatch(Sampler[list[int]]):
    """Draws from the global generators while it is iterated over."""

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(BATCHES):
            i = torch.randint(SAMPLES, ())
            yield [int(i), random.randrange(SAMPLES), int(np.random.randint(SAMPLES))]

    def __len__(self) -> int:
        return BATCHES


class OwnGenerators(Sampler[int]):
    """Draws from generators of its own, one of each kind, sample by sample."""

    def __init__(self) -> None:
        self.a = torch.Generator().manual_seed(1)
        self.b = np.random.default_rng(2)
        self.c = random.Random(3)
        self.d = np.random.RandomState(4)

    def __iter__(self) -> Iterator[int]:
        for _ in range(SAMPLES):
            a = int(torch.randint(SAMPLES, (), generator=self.a))
            drawn = a + int(self.b.integers(SAMPLES)) + self.c.randrange(SAMPLES)
            yield (drawn + int(self.d.randint(SAMPLES))) % SAMPLES

    def __len__(self) -> int:
        return SAMPLES


class Shuffles(Sampler[int]):
    """Has a state: what it shuffled last, which it shuffles on; and shuffles in `__iter__`."""

    def __init__(self) -> None:
        self.order = [*range(SAMPLES)]

    def __iter__(self) -> Iterator[int]:
        random.Random(str(self.order)).shuffle(self.order)
        return iter([*self.order])

    def __len__(self) -> int:
        return SAMPLES

    def state_dict(self) -> dict[str, Any]:
        return {"order": [*self.order]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order = [*state["order"]]


class Epochs(Sampler[int]):
    """Its order is a function of the epoch that it is told."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(SAMPLES, generator=generator).tolist())

    def __len__(self) -> int:
        return SAMPLES


class Reiterable:
    """Any iterable of batches, which draws."""

    def __iter__(self) -> Iterator[Tensor]:
        shift = random.random()
        for i in range(BATCHES):
            yield drawn(i) + shift


class Loaded:
    """A loader that is no DataLoader and has a state."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < BATCHES:
            self.position += 1
            yield drawn(self.position)
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loader(dataset: Any, workers: int, kind: Any = DataLoader, **options: Any) -> Any:
    if "batch_sampler" not in options:
        options = {"batch_size": SIZE, **options}
    return kind(dataset, num_workers=workers, **options)


#: How to make each kind of loader with a number of workers; in a new process all begins anew.
KINDS: dict[str, Callable[[int], Any]] = {
    "shuffle": lambda w: loader(Augmented(), w, shuffle=True),
    "persistent": lambda w: loader(Augmented(), w, shuffle=True, persistent_workers=w > 0),
    "worker seed": lambda w: loader(SeesSeed(), w, shuffle=True),
    "worker seed, persistent": lambda w: loader(SeesSeed(), w, persistent_workers=w > 0),
    "weighted": lambda w: loader(
        Augmented(), w, sampler=WeightedRandomSampler([1.0 + i for i in range(SAMPLES)], SAMPLES)
    ),
    "subset": lambda w: loader(Augmented(), w, sampler=SubsetRandomSampler([*range(3, SAMPLES)])),
    "batch_sampler": lambda w: loader(Augmented(), w, batch_sampler=DrawsEachBatch()),
    "own generator": lambda w: loader(Augmented(), w, shuffle=True, generator=generator()),
    "own generator, persistent": lambda w: loader(
        Augmented(), w, shuffle=True, generator=generator(), persistent_workers=w > 0
    ),
    "sampler with generators": lambda w: loader(Augmented(), w, sampler=OwnGenerators()),
    "sampler with state": lambda w: loader(Augmented(), w, sampler=Shuffles()),
    "set_epoch": lambda w: loader(Augmented(), w, sampler=Epochs()),
    "batch_size=None": lambda w: loader(Augmented(), w, shuffle=True, batch_size=None),
    "iterable": lambda w: loader(Stream(), w),
    "iterable, persistent": lambda w: loader(Stream(), w, persistent_workers=w > 0),
    "iterable with state": lambda w: loader(StreamWithState(), w),
    "iterable that continues": lambda w: loader(StreamThatContinues(), w),
    "StatefulDataLoader": lambda w: loader(Augmented(), w, StatefulDataLoader, shuffle=True),
    "StatefulDataLoader, weighted": lambda w: loader(
        Augmented(), w, StatefulDataLoader, sampler=WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)
    ),
    "StatefulDataLoader, batch_sampler": lambda w: loader(
        Augmented(), w, StatefulDataLoader, batch_sampler=DrawsEachBatch()
    ),
    "StatefulDataLoader, iterable": lambda w: loader(StreamThatContinues(), w, StatefulDataLoader),
    "StatefulDataLoader, persistent": lambda w: loader(
        Augmented(), w, StatefulDataLoader, shuffle=True, persistent_workers=w > 0
    ),
    "dict": lambda w: {
        "a": loader(Augmented(), w, shuffle=True),
        "b": loader(Augmented(), 0, shuffle=True, generator=generator()),
    },
}
#: Those without workers.
PLAIN: dict[str, Callable[[int], Any]] = {
    "map with state": lambda _: loader(Counting(), 0, shuffle=True),
    "list": lambda _: [torch.tensor([float(i)]) for i in range(BATCHES)],
    "iterable": lambda _: Reiterable(),
    "loader with state": lambda _: Loaded(),
}


def batches_of(loader: Any, seed: int = 7, limit: int | None = None) -> Batches:
    """In a process whose own generators are in a state of their own."""
    scramble()
    batches = Batches(loader, "train", limit, epochs=9)
    batches.seed = seed
    return batches


def scramble() -> None:
    """As in another process."""
    torch.seed()
    random.seed()
    np.random.seed()


def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file that a safe load reads."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def train(batches: Batches, epoch: int, number: int | None = None) -> list[Any]:
    """All or so many batches of an epoch, each trained on."""
    found = []
    iterator = batches.epoch(epoch)
    for batch in iterator:
        found.append(batch)
        batches.mark()
        if len(found) == number:
            break
    iterator.close()  # type: ignore[attr-defined]
    return found


def same(a: list[Any], b: list[Any]) -> bool:
    """Bitwise."""
    return len(a) == len(b) and all(map(_equal, a, b))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return torch.equal(a, b)
