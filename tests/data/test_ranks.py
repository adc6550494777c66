"""A loader's batch is the world's: ranks get rows of it, and together what one process gets."""

import gc
import itertools
import os
import pickle
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
    get_worker_info,
)
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from composefit.data import Batches, LoaderBatches, PerRank, Rows
from composefit.data.digests import digest
from composefit.data.rows import Share
from composefit.data.streams import OwnRows, unpack
from tests.data.grid import (
    KINDS,
    PLAIN,
    SAMPLES,
    Augmented,
    Stream,
    batches_of,
    drawn,
    generator,
    loader,
    same,
    train,
)
from tests.data.test_loaders import left_behind
from tests.data.world import close, steps, whole, world

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

#: Datasets whose samples know from nobody but themselves where they are, so that they say it.
MAPS = [
    "shuffle",
    "persistent",
    "weighted",
    "subset",
    "batch_sampler",
    "own generator",
    "sampler with generators",
    "sampler with state",
    "set_epoch",
    "StatefulDataLoader",
    "StatefulDataLoader, weighted",
    "StatefulDataLoader, batch_sampler",
    "StatefulDataLoader, persistent",
]
STREAMS = [name for name in KINDS if "iterable" in name]


def alone(make: Callable[[], Any], epochs: int = 2) -> list[list[Any]]:
    torch.manual_seed(3)
    batches = batches_of(make())
    found = [train(batches, epoch) for epoch in range(epochs)]
    batches.close()
    return found


def together(make: Callable[[], Any], size: int, epochs: int = 2) -> list[list[list[Rows]]]:
    ranks = world(make, size)
    found = [steps(ranks, epoch) for epoch in range(epochs)]
    close(ranks)
    return found


# -- the same samples ---------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "size"), [(0, 2), (0, 3), (2, 3)])
@pytest.mark.parametrize("name", MAPS)
def test_map_style_batches_are_those_of_one_process(name: str, workers: int, size: int) -> None:
    def make() -> Any:
        return KINDS[name](workers)

    for one, several in zip(alone(make), together(make, size), strict=True):
        assert [len(batch) for batch in one][:-1] and len(one) == len(several)
        for batch, given in zip(one, several, strict=True):
            assert torch.equal(whole(given)[:, 0], batch[:, 0])
            # Rank 0 draws what one process draws for these rows; nobody else draws the like.
            first = len(given[0].batch)
            assert torch.equal(given[0].batch, batch[:first])
            draws = whole(given)[:, 1:].flatten().tolist()
            assert len(set(draws)) == len(draws)


@pytest.mark.parametrize(("workers", "size"), [(0, 2), (0, 3), (2, 3)])
@pytest.mark.parametrize("name", STREAMS)
def test_streams_are_those_of_one_process(name: str, workers: int, size: int) -> None:
    def make() -> Any:
        return KINDS[name](workers)

    for one, several in zip(alone(make), together(make, size), strict=True):
        assert same([whole(given) for given in several], one)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("dataset", [range(SAMPLES), Stream()], ids=["map", "stream"])
def test_the_last_ragged_batch(dataset: Any, drop_last: bool) -> None:
    def make() -> Any:
        return loader(dataset, 0, batch_size=7, drop_last=drop_last)

    (one,), (several,) = alone(make, 1), together(make, 4, 1)
    assert [given[0].sizes for given in several] == [(2, 2, 2, 1)] * 3 + (
        [] if drop_last else [(1, 0, 0, 0)]
    )
    assert same([whole(given) for given in several], one)


@pytest.mark.parametrize(("workers", "dataset"), [(0, range(9)), (2, range(9)), (0, Stream())])
def test_groups_stay_together(workers: int, dataset: Any) -> None:
    def make() -> Any:
        return loader(Subset(dataset, range(9)) if workers else dataset, workers, batch_size=9)

    ranks = world(make, 2, group=2)
    given = steps(ranks, 0, 1)[0]
    assert given[0].sizes == (4, 5)
    assert same([whole(given)], [alone(make, 1)[0][0]])
    close(ranks)


@pytest.mark.parametrize("make", [lambda: range(5), Stream], ids=["map", "stream"])
def test_a_rank_without_rows_gets_a_spare_group(make: Any) -> None:
    ranks = world(lambda: loader(make(), 0, batch_size=5), 4, group=2)
    given = steps(ranks, 0, 1)[0]
    assert given[0].sizes == (2, 3, 0, 0)
    assert [rows.spare for rows in given] == [False, False, True, True]
    for rows in given[2:]:
        assert torch.equal(rows.batch, given[0].batch)  # the first group


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [range(SAMPLES), Stream()], ids=["map", "stream"])
def test_a_collate_function_gets_a_ranks_own_samples_and_gives_what_it_likes(
    dataset: Any, workers: int
) -> None:
    seen = world(lambda: loader(dataset, workers, collate_fn=as_dict), 2)
    one = alone(lambda: loader(dataset, workers, collate_fn=as_dict), 1)[0]
    for batch, given in zip(one, steps(seen), strict=True):
        assert given[0].batch["all"] + given[1].batch["all"] == batch["all"]
        assert [rows.batch["number"] for rows in given] == [*given[0].sizes]
    close(seen)


def as_dict(samples: Any) -> dict[str, Any]:
    assert type(samples) is list
    return {"all": [str(sample) for sample in samples], "number": len(samples)}


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, iter, set])
def test_a_batch_sampler_may_give_indices_of_any_kind(kind: Any) -> None:
    class Sampled(Sampler[Any]):
        def __iter__(self) -> Iterator[Any]:
            return (kind([i, i + 1, i + 2]) for i in (0, 3, 6))

        def __len__(self) -> int:
            return 3

    def make() -> Any:
        return loader(TensorDataset(torch.arange(9)), 0, batch_sampler=Sampled())

    one, several = alone(make, 1)[0], together(make, 2, 1)[0]
    for (batch,), given in zip(one, several, strict=True):
        assert given[0].sizes == (2, 1)
        assert torch.equal(torch.cat([rows.batch[0] for rows in given]), batch)


def test_workers_that_are_not_forked_can_take_rows() -> None:
    collate: OwnRows = pickle.loads(pickle.dumps(OwnRows(torch.stack, Share(1, 2))))
    batch, sizes, _ = collate([torch.tensor(i) for i in range(5)])
    assert batch.tolist() == [3, 4]
    assert sizes == (3, 2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["shuffle", "iterable"])
def test_a_loader_of_ones_own_kind_gets_the_bare_rows(name: str, workers: int) -> None:
    class Shifted(DataLoader[Any]):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                yield batch[:, :1] + 100

    def make() -> Any:
        dataset, options = {
            "shuffle": (Augmented(), {"shuffle": True}),
            "iterable": (Stream(), {}),
        }[name]
        return loader(dataset, workers, Shifted, batch_size=7, **options)

    assert same([whole(given) for given in together(make, 2, 1)[0]], alone(make, 1)[0])


# -- what is loaded, and what is drawn ----------------------------------------------------------


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_a_rank_loads_its_own_rows_only(kind: Any) -> None:
    datasets = [Augmented() for _ in range(3)]
    waiting = iter(datasets)
    ranks = world(lambda: loader(next(waiting), 0, kind, shuffle=True), 3)
    given = steps(ranks)
    for rank, dataset in enumerate(datasets):
        rows = [g[rank] for g in given]
        assert dataset.loaded == [int(i) for r in rows for i in r.batch[:, 0]]
    spare = sum(r.spare for g in given for r in g)
    assert spare == 1  # 2 samples for 3 ranks at the end
    assert sum(len(dataset.loaded) for dataset in datasets) == SAMPLES + spare


def test_getitems_gets_a_ranks_own_indices() -> None:
    class Many(Augmented):
        def __getitems__(self, indices: list[int]) -> list[Tensor]:
            assert type(indices) is list
            self.loaded += indices
            return [drawn(i) for i in indices]

    datasets = [Many(), Many()]
    waiting = iter(datasets)
    steps(world(lambda: loader(next(waiting), 0), 2), 0, 2)
    assert [dataset.loaded for dataset in datasets] == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_of_a_stream_a_rank_collates_its_own_rows_only() -> None:
    collated: list[int] = []

    def collate(samples: list[Tensor]) -> Tensor:
        collated.append(len(samples))
        return torch.stack(samples)

    steps(world(lambda: loader(Stream(), 0, collate_fn=collate), 2), 0, 2)
    assert collated == [2, 2, 2, 2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("dataset", [range(SAMPLES), Stream()], ids=["map", "stream"])
def test_ranks_do_not_draw_alike_in_collate_functions(
    dataset: Any, kind: Any, workers: int
) -> None:
    def make() -> Any:
        return loader(dataset, workers, kind, collate_fn=mixed)

    one = alone(make, 1)[0]
    ranks = world(make, 3)
    given = steps(ranks)
    close(ranks)
    assert same([g[0].batch for g in given], one)
    draws = torch.stack([rows.batch for g in given for rows in g]).flatten().tolist()
    assert len(set(draws)) == len(draws)


def mixed(samples: Any) -> Tensor:
    return torch.tensor([torch.rand(()), random.random(), np.random.rand()])


@pytest.mark.parametrize("persistent", [False, True])
def test_ranks_seed_their_workers_differently(persistent: bool) -> None:
    def seeds(dataset: Any, rank: int) -> set[int]:
        options = {"collate_fn": worker_seed, "persistent_workers": persistent}
        batches = Batches(loader(dataset, 2, **options), "train", ranks=(rank, 2))
        found = {rows.batch for rows in batches.epoch(0)}
        batches.close()
        return found

    assert not seeds(range(SAMPLES), 0) & seeds(range(SAMPLES), 1)
    # What a stream draws from it is alike on all ranks.
    assert seeds(Stream(), 0) == seeds(Stream(), 1)


def worker_seed(samples: Any) -> int:
    info = get_worker_info()
    assert info is not None
    return info.seed


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["shuffle", "iterable", "StatefulDataLoader", "dict"])
def test_the_process_draws_as_if_nothing_was_fetched(name: str, workers: int) -> None:
    def draws() -> list[float]:
        return [torch.rand(()).item(), random.gauss(0, 1), float(np.random.normal())]

    (_, batches) = world(lambda: KINDS[name](workers), 2)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = [draws() for _ in range(7)]
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    assert [draws() for _ in batches.epoch(0)] + [draws()] == expected
    batches.close()


def test_nothing_is_kept_of_an_endless_stream() -> None:
    class Endless(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return itertools.count()

    for ranks in (1, 2):
        (batches, *_) = world(lambda: loader(Endless(), 0, batch_size=2), ranks)
        iterator = batches.epoch(0)
        for _ in range(50):
            next(iterator)
        source: Any = batches._source
        assert not source._indices.ahead and not source._arrived


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks Linux")
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_no_process_thread_or_file_is_left(kind: Any, persistent: bool) -> None:
    def go() -> None:
        (batches, *_) = world(lambda: loader(Stream(), 1, kind, persistent_workers=persistent), 2)
        train(batches, 0, 2)
        batches.close()

    go()  # multiprocessing opens some files once
    before = left_behind()[2:]
    go()
    assert left_behind() == (0, 0, *before)


def test_an_iterator_is_not_kept_alive_by_what_is_taken_off_its_batches() -> None:
    class Fetches:
        def _next_data(self) -> Any:
            return [torch.zeros(2), [2, 1], 5]  # tuples become lists where memory is pinned

    iterator: Any = Fetches()
    arrived: deque[Any] = deque()
    unpack(iterator, arrived)
    assert torch.equal(iterator._next_data(), torch.zeros(2))
    assert arrived == deque([((2, 1), 5)])
    gone = weakref.ref(iterator)
    gc.disable()
    try:
        del iterator
        assert gone() is None
    finally:
        gc.enable()


# -- what is given whole ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch_size=None", "list", "iterable", "loader with state"])
def test_what_no_rank_can_take_rows_of_comes_whole_and_alike_on_all(name: str) -> None:
    def make() -> Any:
        return {**KINDS, **PLAIN}[name](0)

    for one, several in zip(alone(make), together(make, 2), strict=True):
        for rank in range(2):
            assert same([given[rank] for given in several], one)


def test_one_rank_is_one_process() -> None:
    batches = Batches(PerRank(loader(range(4), 0)), "train", ranks=(0, 1))
    assert batches.number == 1
    assert same([*batches.epoch()], [torch.arange(4)])
    assert batches.fingerprint() == 0.0
    assert batches.rank_state() is None
    assert batches.state_dict()["kind"] == "a DataLoader"


# -- several loaders ----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_several_loaders_are_divided_each_by_itself(workers: int) -> None:
    def make() -> Any:
        return {
            "a": loader(Augmented(), workers, shuffle=True),
            "b": loader(Stream(), 0, batch_size=6),
            "c": {"d": [torch.arange(5) + i for i in range(9)]},
        }

    ranks = world(make, 2)
    several, one = steps(ranks), alone(make, 1)[0]
    assert len(several) == len(one)
    for given, batch in zip(several, one, strict=True):
        assert all(type(rows.batch) is LoaderBatches for rows in given)
        assert given[0].sizes == (2, 2)
        a, b, c = (
            torch.cat([r.batch[k] if k != "c" else r.batch[k]["d"] for r in given]) for k in "abc"
        )
        assert torch.equal(a[:, 0], batch["a"][:, 0])
        assert torch.equal(b, batch["b"])
        assert torch.equal(c, batch["c"]["d"])
    close(ranks)


def test_several_loaders_that_all_give_whole_batches_are_left_to_who_trains() -> None:
    lists = {"a": [torch.arange(4)], "b": [torch.arange(2)]}
    (given,) = steps(world(lambda: lists, 2))
    assert all(type(batch) is LoaderBatches for batch in given)


def test_a_whole_batch_beside_rows_is_cut_by_groups_where_it_is_the_first() -> None:
    def make() -> Any:
        whole_ones = {"x": torch.arange(6)[None]}
        return {"a": [whole_ones], "b": loader(range(10), 0, batch_size=10)}

    (given,) = steps(world(make, 2, group=2, dim=1))
    assert [rows.sizes for rows in given] == [(4, 2)] * 2
    assert [rows.batch["a"]["x"].tolist() for rows in given] == [[[0, 1, 2, 3]], [[4, 5]]]
    assert [rows.batch["b"].tolist() for rows in given] == [[*range(5)], [*range(5, 10)]]


@pytest.mark.parametrize(("first", "second"), [(9, 8), (12, 7)])
def test_a_rank_with_rows_of_one_loader_only_is_refused(first: int, second: int) -> None:
    def make() -> Any:
        return {"a": loader(range(first), 0), "b": loader(range(second), 0, batch_size=3)}

    for batches in world(make, 2):
        with pytest.raises(ValueError, match=r"'a' and 'b' hold \d and \d samples.*drop_last=True"):
            list(batches.epoch(0))


# -- digests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", KINDS)
def test_ranks_that_read_the_same_agree_and_their_epochs_differ(name: str, workers: int) -> None:
    ranks = world(lambda: KINDS[name](workers), 2)
    found = []
    for epoch in range(2):
        assert all(one.fingerprint() == 0.0 for one in ranks) or epoch
        steps(ranks, epoch, 1)
        a, b = (one.fingerprint() for one in ranks)
        assert a == b and 0 < a < 2**32 and a == int(a)
        found.append(a)
    shuffled = name not in ("worker seed, persistent", "StatefulDataLoader, iterable")
    assert (found[0] != found[1]) or not shuffled
    close(ranks)


class ByRank(IterableDataset[int]):
    """Divides itself."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, 20, 2))


def a_part(rank: int) -> Dataset[Any]:
    return Subset(range(20), range(rank, 20, 2))


@pytest.mark.parametrize(
    "make",
    [
        lambda rank: loader(ByRank(rank), 0),
        lambda rank: loader(ByRank(rank), 2),
        lambda rank: loader(ByRank(rank), 1, StatefulDataLoader),
        lambda rank: loader(a_part(rank), 0),
        lambda rank: loader(ConcatDataset([a_part(rank)]), 0),
        lambda rank: loader(TensorDataset(torch.arange(20).float() + rank), 0),
        lambda rank: loader(range(20), 0, shuffle=True, generator=generator(rank)),
        lambda rank: [torch.full((3,), float(rank))] * 3,
        lambda rank: ({"x": [{"y": np.full((2, 2), rank)}]} for _ in range(3)),
        lambda rank: {"a": [torch.zeros(2)], "b": loader(ByRank(rank), 0)},
        lambda rank: {"a": loader(range(9), 0), "b": [[str(rank)] * 3]},
    ],
)
def test_ranks_that_read_different_samples_are_found(make: Any) -> None:
    found = []
    for rank in range(2):
        batches = Batches(make(rank), "train", ranks=(rank, 2))
        iterator = batches.epoch(0)
        next(iterator)
        found.append(batches.fingerprint())
        batches.close()
    assert found[0] != found[1]


def test_a_digest_does_not_see_how_a_machine_rounds() -> None:
    exact = torch.linspace(0.1, 3, 40, dtype=torch.float64)
    other = exact * (1 + 1e-12)
    assert digest(exact) == digest(other)
    assert digest(exact.float()) == digest(exact.float() * (1 + 1e-7)) != digest(exact)
    assert digest(exact) != digest(exact * 1.01)
    assert digest(float("nan")) == digest(float("nan"))
    assert digest(object()) == digest(object())
    assert digest({"a": 1}) != digest({"b": 1}) != digest({"b": 2})
    assert digest(torch.zeros(2, device="meta")) != digest(torch.zeros(3, device="meta"))
    assert digest(torch.zeros(0, 3)) != digest(torch.zeros(0, 4))


# -- what is refused ----------------------------------------------------------------------------


def samplers() -> list[Any]:
    data = range(20)
    each = DistributedSampler(data, num_replicas=2, rank=1)

    class Accelerated(Sampler[Any]):
        """As other libraries have them: around a batch sampler."""

        def __init__(self) -> None:
            self.batch_sampler = BatchSampler(each, 4, False)

        def __iter__(self) -> Iterator[Any]:
            return iter(self.batch_sampler)

    class Lookalike:
        num_replicas, rank = 2, 0

        def __iter__(self) -> Iterator[int]:
            return iter(range(10))

        def __len__(self) -> int:
            return 10

    return [
        loader(data, 0, sampler=each),
        loader(data, 0, sampler=each, batch_size=None),
        loader(data, 0, batch_sampler=BatchSampler(each, 4, False)),
        loader(data, 0, batch_sampler=Accelerated()),
        loader(data, 0, sampler=Lookalike()),
        loader(data, 0, StatefulDataLoader, sampler=StatefulDistributedSampler(data, 2, 0)),
        {"a": [1], "b": loader(data, 0, sampler=each)},
    ]


@pytest.mark.parametrize("index", range(7))
def test_a_sampler_that_divides_the_samples_itself_is_refused(index: int) -> None:
    made = samplers()[index]
    with pytest.raises(ValueError, match=r"train.* of 2 ranks .*Give the plain loader: composefit"):
        Batches(made, "train", ranks=(0, 2))
    Batches(made, "train")  # one process, which has never heard of ranks


def test_a_sampler_of_one_replica_is_as_good_as_any() -> None:
    alike = DistributedSampler(range(8), num_replicas=1, rank=0)
    ranks = world(lambda: loader(range(8), 0, sampler=alike), 2)
    assert sum(rows.batch.numel() for given in steps(ranks) for rows in given) == 8


def test_errors_still_say_which_sample() -> None:
    class Broken(Augmented):
        def __getitem__(self, i: int) -> Tensor:
            if i == 3:
                raise KeyError("broken")
            return super().__getitem__(i)

    zero, one = world(lambda: loader(Broken(), 0), 2)
    next(zero.epoch(0))  # has no part in it
    with pytest.raises(KeyError) as raised:
        next(one.epoch(0))
    assert "while train loaded sample 3 for batch 0" in "".join(raised.value.__notes__)
