"""What our iteration over a DataLoader leaves as it is, and what it refuses."""

import gc
import math
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from composefit.data import Batches
from composefit.data.batches import in_order
from tests.data.grid import (
    BATCHES,
    SAMPLES,
    SIZE,
    Augmented,
    Counting,
    DrawsEachBatch,
    Reiterable,
    Stream,
    StreamWithState,
    batches_of,
    generator,
    loader,
    reloaded,
    same,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


def indices(batches: list[Tensor]) -> list[int]:
    return [int(i) for batch in batches for i in batch[:, 0]]


# -- order and draws ----------------------------------------------------------------------------


def test_skipped_samples_are_not_loaded() -> None:
    batches = batches_of(loader(Augmented(), 0, shuffle=True))
    train(batches, 0, 4)
    dataset = Augmented()
    resumed = batches_of(loader(dataset, 0, shuffle=True))
    resumed.load_state_dict(reloaded(batches.state_dict()))
    left = train(resumed, 0)
    assert dataset.loaded == indices(left)
    assert len(dataset.loaded) == SAMPLES - 4 * SIZE


def test_a_sequence_is_indexed_from_the_position() -> None:
    class Disk(list[Tensor]):
        def __init__(self) -> None:
            super().__init__(torch.arange(5.0)[:, None])
            self.read: list[int] = []

        def __getitem__(self, i: Any) -> Any:
            self.read.append(i)
            return super().__getitem__(i)

    batches = batches_of(Disk())
    train(batches, 0, 3)
    disk = Disk()
    resumed = batches_of(disk)
    disk.read.clear()
    resumed.load_state_dict(batches.state_dict())
    assert [int(i) for i in train(resumed, 0)] == [3, 4]
    assert disk.read == [3, 4, 5]  # the last is where it ends


def test_samples_are_each_given_once_an_epoch_in_another_order_and_with_other_draws() -> None:
    batches = batches_of(loader(Augmented(), 0, shuffle=True))
    first, second = train(batches, 0), train(batches, 1)
    assert sorted(indices(first)) == sorted(indices(second)) == [*range(SAMPLES)]
    assert indices(first) != indices(second) and indices(first) != [*range(SAMPLES)]
    draws = torch.cat(first + second)[:, 1:].flatten().tolist()
    assert len(set(draws)) == 3 * 2 * SAMPLES


def test_the_number_of_workers_changes_nothing() -> None:
    found = [train(batches_of(loader(Augmented(), n, shuffle=True)), 0) for n in (0, 1, 2)]
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_another_seed_gives_another_order_and_other_draws() -> None:
    a, b = (train(batches_of(loader(Augmented(), 0), seed=n), 0) for n in (1, 2))
    assert indices(a) == indices(b)
    assert not (torch.cat(a)[:, 1:] == torch.cat(b)[:, 1:]).any()
    a, b = (train(batches_of(loader(Augmented(), 0, shuffle=True), seed=n), 0) for n in (1, 2))
    assert indices(a) != indices(b)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda w: loader(Augmented(), w, shuffle=True),
        lambda w: loader(Augmented(), w, batch_sampler=DrawsEachBatch()),
        lambda w: loader(TensorDataset(torch.arange(9)), w, shuffle=True),
        lambda w: loader(Stream(), w),
        lambda w: loader(Augmented(), w, StatefulDataLoader, shuffle=True),
        lambda w: Reiterable(),
    ],
    ids=["shuffle", "batch_sampler", "tensors", "iterable", "StatefulDataLoader", "any"],
)
def test_the_process_draws_as_if_nothing_was_fetched(make: Any, workers: int) -> None:
    def draws() -> list[float]:
        # An odd number of NumPy's normals: the second of the pair is kept by NumPy.
        return [torch.rand(()).item(), random.gauss(0, 1), float(np.random.normal())]

    batches = batches_of(make(workers))
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = [draws() for _ in range(6)]
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    found = [draws()]
    for _ in batches.epoch(0):
        found.append(draws())
        batches.mark()
        if len(found) == 4:
            break
    found += [draws(), draws()]
    assert found == expected


def test_numpys_generator_may_be_of_another_kind() -> None:
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(1))
        expected = [np.random.rand() for _ in range(3)]
        np.random.set_bit_generator(np.random.PCG64(1))
        found = [np.random.rand()]
        first = train(batches_of(loader(Augmented(), 0)), 0)
        np.random.set_bit_generator(np.random.PCG64(1))
        found = [np.random.rand()]
        batches = Batches(loader(Augmented(), 0), "train")
        batches.seed = 7
        second = train(batches, 0)
        found += [np.random.rand(), np.random.rand()]
    finally:
        np.random.set_bit_generator(before)
    assert found == expected
    assert same(first, second)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_generator_of_the_users_means_what_it_means_in_a_bare_loop(
    workers: int, persistent: bool
) -> None:
    def make() -> Any:
        data = TensorDataset(torch.arange(SAMPLES)[:, None])
        options = {"persistent_workers": persistent and workers > 0}
        return loader(data, workers, shuffle=True, generator=generator(), **options)

    bare = make()
    expected = [[batch[0] for batch in bare] for _ in range(3)]
    batches = batches_of(make())
    found = [[batch[0] for batch in train(batches, epoch)] for epoch in range(3)]
    batches.close()
    assert all(map(same, found, expected))
    assert indices(found[0]) != indices(found[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_under_a_limit_workers_that_are_ahead_draw_nothing_from_a_users_generator(
    workers: int,
) -> None:
    def make(n: int) -> Batches:
        sampler = RandomSampler(range(SAMPLES), replacement=True, num_samples=400)
        options = {"batch_size": 16, "sampler": sampler}
        sampler.generator = generator()
        return batches_of(loader(range(SAMPLES), n, **options), limit=2)

    plain, batches = make(0), make(workers)
    expected = [train(plain, epoch) for epoch in range(3)]
    assert same(train(batches, 0), expected[0])
    state = reloaded(batches.state_dict())
    assert same(train(batches, 1), expected[1])
    resumed = make(workers)
    resumed.load_state_dict(state)
    assert same(train(resumed, 1), expected[1])
    assert same(train(resumed, 2), expected[2])


def test_a_sampler_whose_draws_nobody_can_repeat_is_found() -> None:
    class Secret(RandomSampler):
        def __iter__(self) -> Iterator[int]:
            return iter(np.random.default_rng().permutation(SAMPLES).tolist())

    batches = batches_of(loader(Augmented(), 0, sampler=Secret(range(SAMPLES))))
    train(batches, 0, 2)
    for workers in (0, 2):
        resumed = batches_of(loader(Augmented(), workers, sampler=Secret(range(SAMPLES))))
        resumed.load_state_dict(batches.state_dict())
        with pytest.raises(ValueError, match=r"Secret.* does not give the same batches.*batch 1"):
            train(resumed, 0)


def test_a_sampler_that_ends_early_is_found() -> None:
    batches = batches_of(loader(Augmented(), 0, batch_sampler=[[0], [1], [2]]))
    train(batches, 0, 3)
    state = batches.state_dict()
    short = [[0], [1]]
    resumed = batches_of(loader(Augmented(), 0, batch_sampler=short))
    state["batches"] = 2
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match="2 batches only"):
        train(resumed, 0)


def test_sequential_gives_the_same_samples_in_every_epoch() -> None:
    weighted = WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)
    for options in ({"shuffle": True}, {"sampler": weighted}):
        for kind in (DataLoader, StatefulDataLoader):
            batches = Batches(
                loader(Augmented(), 0, kind, **options), "train", 2, epochs=2, sequential=True
            )
            for epoch in range(2):
                assert indices(train(batches, epoch)) == [*range(2 * SIZE)]
    subset = loader(Augmented(), 0, sampler=SubsetRandomSampler([5, 3, 4]))
    assert indices(train(Batches({"a": subset}["a"], "train", sequential=True), 0)) == [5, 3, 4]
    own = loader(Augmented(), 0, batch_sampler=DrawsEachBatch())
    assert in_order(own) is own
    unbatched = loader(Augmented(), 0, shuffle=True, batch_size=None)
    assert [int(x[0]) for x in in_order(unbatched)] == [*range(SAMPLES)]
    batched = DataLoader(Augmented(), batch_sampler=BatchSampler(RandomSampler([0] * 6), 4, True))
    assert indices(list(in_order(batched))) == [*range(20)]


# -- what the user's code sees ------------------------------------------------------------------


class Asks(Dataset[Any]):
    """Tells what a dataset sees of itself in a worker."""

    name = "asks"

    def __getitem__(self, i: int) -> Any:
        info: Any = get_worker_info()
        return {"i": i, "type": type(i).__name__, "same": info is None or info.dataset is self}

    def __len__(self) -> int:
        return 4


def start(worker_id: int) -> None:
    dataset: Any = get_worker_info().dataset  # type: ignore[union-attr]
    assert type(dataset) is Asks
    dataset.name = f"started {worker_id}"


class Collate:
    def __call__(self, samples: list[Any]) -> Any:
        info: Any = get_worker_info()
        assert type(samples) is list
        return samples, info.dataset.name if info else None


class Doubled(DataLoader[Any]):
    """A loader of its own kind, which reads its attributes while it iterates."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch, self.dataset.name, self.batch_sampler.batch_size, len(self)


@pytest.mark.parametrize("workers", [0, 1])
def test_users_code_sees_what_it_would_see(workers: int) -> None:
    options = {"collate_fn": Collate(), "worker_init_fn": start if workers else None}
    made = [loader(Asks(), workers, Doubled, batch_size=2, **options) for _ in range(2)]
    expected = list(made[0])
    assert train(batches_of(made[1]), 0) == expected
    assert made[1].dataset.name == "asks"
    assert all(sample["same"] for (samples, _), *_ in expected for sample in samples)


def test_getitems_of_the_dataset_is_used() -> None:
    class Many(Asks):
        def __getitems__(self, indices: list[int]) -> list[int]:
            assert type(indices) is list
            return [10 * i for i in indices]

    assert [b.tolist() for b in train(batches_of(loader(Many(), 0)), 0)] == [[0, 10, 20, 30]]


def test_spawned_workers_load_the_same() -> None:
    options = {"multiprocessing_context": "spawn", "worker_init_fn": started_anywhere}
    batches = batches_of(loader(Augmented(), 1, shuffle=True, **options), limit=1)
    assert same(train(batches, 0), train(batches_of(loader(Augmented(), 0, shuffle=True)), 0, 1))


def started_anywhere(worker_id: int) -> None:
    assert type(get_worker_info().dataset).__name__ == "Augmented"  # type: ignore[union-attr]


# -- what is left behind ------------------------------------------------------------------------


def left_behind() -> tuple[int, int, int, int]:
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > 1 and time.monotonic() < deadline:
        time.sleep(0.01)  # xdist has a thread of its own, which stays
    return (
        len(multiprocessing.active_children()),
        len([t for t in threading.enumerate() if "Queue" in t.name]),
        len(os.listdir("/proc/self/fd")),
        len([name for name in os.listdir("/dev/shm") if f"_{os.getpid()}_" in name]),
    )


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks Linux")
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("persistent", [False, True])
def test_no_process_thread_or_file_is_left(kind: Any, persistent: bool) -> None:
    def make() -> Batches:
        return batches_of(loader(Augmented(), 2, kind, persistent_workers=persistent))

    first = make()
    train(first, 0)
    first.close()
    del first  # multiprocessing opens some files once
    before = left_behind()[2:]
    whole = make()
    train(whole, 0)
    stopped = make()
    train(stopped, 0, 2)
    if not persistent:  # at once, not when somebody closes it
        assert not multiprocessing.active_children()
    else:
        assert len(multiprocessing.active_children()) == 4
    raising = make()
    iterator = raising.epoch(0)
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    for batches in (whole, stopped, raising):
        batches.close()
    assert not multiprocessing.active_children()
    del whole, stopped, raising, batches, iterator
    assert left_behind() == (0, 0, *before)


# -- what is refused ----------------------------------------------------------------------------


def test_a_state_of_another_loader_is_refused() -> None:
    state = batches_of(loader(Augmented(), 0)).state_dict()
    ten = [torch.zeros(1)] * BATCHES
    with pytest.raises(ValueError, match="train is a list, but the state is that of a DataLoader"):
        batches_of(ten).load_state_dict(state)
    with pytest.raises(ValueError, match="state is that of a list"):
        batches_of(loader(Augmented(), 0)).load_state_dict(batches_of(ten).state_dict())
    with pytest.raises(ValueError, match=r"train has 11 batches an epoch, .*with 6 batches"):
        batches_of(loader(Augmented(), 0, batch_size=2)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"train has 21 samples in its .*with 22 samples"):
        batches_of(loader(range(21), 0)).load_state_dict(state)
    stream = batches_of(loader(Stream(), 1))
    with pytest.raises(ValueError, match=r"train has 2 workers, .*with 1 workers"):
        batches_of(loader(Stream(), 2)).load_state_dict(stream.state_dict())
    two = batches_of({"a": ten, "b": ten})
    with pytest.raises(ValueError, match=r"loaders are a, c, .*of the state are a, b"):
        batches_of({"a": ten, "c": ten}).load_state_dict(two.state_dict())
    with pytest.raises(ValueError, match=r"'b'.* is a DataLoader, but .* a list"):
        batches_of({"a": ten, "b": loader(Augmented(), 0)}).load_state_dict(two.state_dict())
    own = batches_of(loader(Augmented(), 0, shuffle=True, generator=generator()))
    own.load_state_dict(state)
    with pytest.raises(ValueError, match=r"has generator as generators .* had nothing"):
        train(own, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: loader(StreamWithState(), 1, persistent_workers=True),
        lambda: loader(Counting(), 1),
    ],
)
def test_a_state_that_is_in_the_workers_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="torchdata's StatefulDataLoader, or num_workers=0"):
        batches_of(make()).state_dict()


def test_a_state_is_saved_again_as_it_was_loaded() -> None:
    for made in (loader(Augmented(), 0, shuffle=True), loader(StreamWithState(), 0)):
        batches = batches_of(made)
        train(batches, 0, 2)
        state = batches.state_dict()
        batches.load_state_dict(state)
        assert str(batches.state_dict()) == str(state)
        assert batches.position == 2


def test_batches_that_were_fetched_ahead_come_again() -> None:
    batches = batches_of(loader(Augmented(), 0, StatefulDataLoader))
    given = batches.epoch(0)
    first = [next(given), next(given)]
    assert batches.position == 0
    batches.mark()
    assert batches.position == 2
    ahead = [next(given), next(given)]
    state = reloaded(batches.state_dict())
    resumed = batches_of(loader(Augmented(), 0, StatefulDataLoader))
    resumed.load_state_dict(state)
    assert same(train(resumed, 0)[:2], ahead)
    assert indices(first + ahead) == [*range(4 * SIZE)]


def test_unordered_workers_are_put_in_order() -> None:
    class Slow(Augmented):
        def __getitem__(self, i: int) -> Tensor:
            time.sleep(0.2 if i == 0 else 0)
            return super().__getitem__(i)

    batches = batches_of(loader(Slow(), 2, in_order=False))
    assert indices(train(batches, 0)) == [*range(SAMPLES)]


def test_an_unknown_length_is_resumed_too() -> None:
    batches = batches_of(loader(Stream(), 0), limit=3)
    assert batches.number == 3
    assert batches_of(loader(Stream(), 0)).number == math.inf
