"""F10 to F18: loaders, batches, their samples, and how they are cut."""

import dataclasses
import gc
import multiprocessing
import os
import signal
import time
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from composefit import LoopModule, SingleDevice, Strategy, ThreadDataParallel, tree
from composefit.data import Batches
from tests.faults.conftest import Tells
from tests.faults.fault import surfaces
from tests.faults.table import message
from tests.lockstep.steps import (
    data,
    every_strategy,
    linear,
    module,
    several_shards,
    trainer,
    weights,
)


def squares(self: Any, x: Tensor) -> Tensor:
    return self.net(x).square().mean()


def plain_loop(net: nn.Module, windows: list[list[Tensor]]) -> list[Tensor]:
    """What PyTorch makes of it: one SGD step on the mean over all samples of each window."""
    optimizer = SGD(net.parameters(), lr=0.1)
    for window in windows:
        optimizer.zero_grad()
        net(torch.cat(window)).square().mean().backward()
        optimizer.step()
    return weights(net)


# -- F10, F11: loaders that give nothing ---------------------------------------------------------


@pytest.mark.parametrize(
    "loader",
    [[], DataLoader(TensorDataset(data(6, 3)), batch_size=7, drop_last=True)],
    ids=["empty list", "drop_last"],
)
def test_f10_empty_loader(loader: Any, tells: Tells) -> None:
    net = module(squares)
    with surfaces(ValueError, "train_dataloaders gave no batch at all", "drop_last=True") as found:
        trainer().fit(net, loader)
    tells(found)
    with surfaces(ValueError, "val_dataloaders gave no batch at all", "drop_last=True"):
        type(net).validation_step = squares
        trainer().validate(net, loader)
    with surfaces(TypeError, "trainer.fit needs a loader", "define train_dataloader"):
        trainer().fit(net, None)
    with surfaces(TypeError, "train_dataloaders must be an iterable of batches", "got int"):
        trainer().fit(net, 3)


def test_f11_one_shot_iterator_for_several_epochs(tells: Tells) -> None:
    net = module(squares)
    before = weights(net)
    words = ("train_dataloaders", "one-shot iterator (generator)", "a DataLoader or a list")
    with surfaces(ValueError, *words) as found:
        trainer(max_epochs=2).fit(net, (data(6, 3) for _ in range(2)))
    tells(found)
    with surfaces(ValueError, *words):  # one among several
        trainer(max_epochs=2).fit(net, {"x": [data(6, 3)], "y": (data(6, 3) for _ in range(2))})
    assert all(map(torch.equal, weights(net), before))


def test_f11_one_shot_iterator_is_enough_for_one_epoch_or_a_limit_of_steps() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield data(6, 3)

    for options in ({"max_epochs": 1, "limit_train_batches": 2}, {"max_epochs": None}):
        run = trainer(max_steps=2, **options)
        run.fit(module(squares), endless())
        assert run.global_step == 2


def test_f11_the_check_does_not_iterate() -> None:
    """Iterating a DataLoader starts its workers and draws a seed."""

    class Counting(list[Tensor]):
        iterated = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.iterated += 1
            return super().__iter__()

    loader = Counting([data(6, 3)])
    trainer(max_epochs=2).fit(module(squares), loader)
    assert loader.iterated == 2


def test_f11_several_iterators_for_one_epoch() -> None:
    def step(self: Any, batch: Any) -> Tensor:
        return squares(self, batch["a"] + batch["b"])

    run = trainer()
    run.fit(
        module(step), {name: (data(6, 3) for _ in range(n)) for name, n in (("a", 2), ("b", 3))}
    )
    assert run.global_step == 2


class Exhausted:
    """Gives its batches to whoever iterates first."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        while self.batches:
            yield self.batches.pop()


def test_f11_iterable_that_is_empty_in_epoch_2() -> None:
    run = trainer(max_epochs=3)
    with surfaces(
        ValueError, "no batch in its epoch 2", "not re-iterable", "a DataLoader or a list"
    ):
        run.fit(module(squares), Exhausted([data(6, 3)] * 2))
    assert run.global_step == 2


# -- F12, F13: samples and shards ----------------------------------------------------------------


@several_shards
@pytest.mark.parametrize("samples", [1, 2])
def test_f12_batch_smaller_than_the_number_of_shards(
    samples: int, strategy: Callable[[], Strategy]
) -> None:
    seen: list[int] = []

    def step(self: Any, x: Tensor) -> Tensor:
        seen.append(len(x))
        return squares(self, x)

    net, x = module(step), data(samples, 3)
    trainer(strategy()).fit(net, [x])
    assert seen == [1] * samples
    expected = plain_loop(module(step).net, [[x]])
    for p, q in zip(weights(net), expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


class Normalised(LoopModule):
    """Cannot train on a shard of one sample."""

    def __init__(self, group: int = 1) -> None:
        super().__init__()
        self.net = nn.Sequential(linear(3, 2), nn.BatchNorm1d(2, dtype=torch.float64))
        self.samples_per_group = group

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)

    def training_step(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x).square().mean()
        return found


@pytest.mark.parametrize(
    "strategy",
    [lambda: ThreadDataParallel(4), lambda: SingleDevice("cpu", shards=4)],
    ids=["threads", "shards"],
)
def test_f12_batch_norm_on_a_shard_of_one(strategy: Callable[[], Strategy], tells: Tells) -> None:
    net = Normalised()
    before = weights(net)
    words = ("Expected more than 1 value per channel", "samples_per_group = 2", "drop_last=True")
    with surfaces(ValueError, *words) as found:
        trainer(strategy()).fit(net, [data(7, 3)])
    assert found.line == "found: Tensor = self.net(x).square().mean()"
    assert "shard 3 (lane 3" in found.notes
    hint = message(found.note("samples_per_group"))
    tells("fewer shards; where BatchNorm cannot do with one sample: torch's error, and", hint)
    assert all(map(torch.equal, weights(net), before))
    trainer(strategy()).fit(Normalised(group=2), [data(7, 3)])


def test_f12_the_hint_is_for_shards_not_for_a_batch_of_one() -> None:
    with surfaces(ValueError, "Expected more than 1 value per channel") as found:
        trainer().fit(Normalised(), [data(1, 3)])
    assert "samples_per_group" not in found.text


@every_strategy
@pytest.mark.parametrize("accumulate", [1, 2])
def test_f13_ragged_last_batch_and_window(
    accumulate: int, strategy: Callable[[], Strategy], tells: Tells
) -> None:
    batches = [data(n, 3, seed=n) for n in (6, 7, 1)]
    windows = [batches[i : i + accumulate] for i in range(0, 3, accumulate)]
    net = module(squares)
    trainer(strategy(), accumulate_grad_batches=accumulate).fit(net, batches)
    for p, q in zip(weights(net), plain_loop(module(squares).net, windows), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    tells("trains as the plain loop over the whole batch or window does, to 1e-12")


# -- F14 to F16b: what a batch may be made of ----------------------------------------------------

ROWS = torch.arange(6, dtype=torch.float64)[:, None].expand(6, 3).contiguous()


def parts_of(batch: Any, x: Callable[[Any], Tensor], strategy: Callable[[], Strategy]) -> list[Any]:
    """What each shard of a step gets of a batch, in sample order; `x` finds `ROWS` in it."""
    found: list[Any] = []

    def step(self: Any, part: Any) -> Tensor:
        found.append(part)
        return squares(self, x(part))

    trainer(strategy()).step(module(step), [batch])
    return sorted(found, key=lambda part: x(part)[0, 0].item())


def by_key(part: Any) -> Tensor:
    rows: Tensor = part["x"]
    return rows


def by_name(part: Any) -> Tensor:
    rows: Tensor = part.x
    return rows


@several_shards
def test_f14_leaves_that_are_no_tensors(strategy: Callable[[], Strategy]) -> None:
    one_for_all = {"name": "train", "step": 3, "rate": 0.5, "none": None, "flag": True}
    batch = {"x": ROWS, "files": list("abcdef"), "temperature": torch.tensor(2.0), **one_for_all}
    parts = parts_of(batch, by_key, strategy)
    assert [part["files"] for part in parts] == [["a", "b"], ["c", "d"], ["e", "f"]]
    for part in parts:
        assert {name: part[name] for name in one_for_all} == one_for_all
        assert part["temperature"].item() == 2.0


@several_shards
def test_f14_list_of_another_length(strategy: Callable[[], Strategy], tells: Tells) -> None:
    batch = {"x": ROWS, "meta": {"files": list("abcde")}}
    net = module(lambda self, part: squares(self, part["x"]))
    words = (
        'batch["x"] has 6 samples, but batch["meta"]["files"] has 5',
        "lists to hold one item per sample",
        "override LoopModule.scatter_batch",
        "step 0, batch 0",
    )
    with surfaces(ValueError, *words) as found:
        trainer(strategy()).fit(net, [batch])
    tells("a list with an item per sample is cut, the rest goes to all; another list:", found)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclasses.dataclass(frozen=True)
class Record:
    x: Tensor
    name: str


class Encoding(UserDict[str, Any]):
    """Like a transformers' BatchEncoding: a mapping with attributes and a `to` of its own."""

    encodings = "fast"

    def to(self, device: Any) -> "Encoding":
        raise AssertionError("its values are moved, not the loader's own object")


@several_shards
def test_f15_the_types_of_a_batch_are_kept(strategy: Callable[[], Strategy]) -> None:
    y = torch.arange(6)
    for part in parts_of(Pair(ROWS, y), by_name, strategy):
        assert type(part) is Pair and torch.equal(part.x[:, 0], part.y.double())
    for part in parts_of(Record(ROWS, "train"), by_name, strategy):
        assert type(part) is Record and part.name == "train" and len(part.x) == 2
    for part in parts_of(Encoding(x=ROWS, y=y), by_key, strategy):
        assert type(part) is Encoding and part.encodings == "fast"
        assert torch.equal(part["x"][:, 0], part["y"].double())
    nested = {"x": ROWS, "views": [(y, {"y": y})]}
    for part in parts_of(nested, by_key, strategy):
        ((first, second),) = part["views"]
        assert type(part["views"]) is list and torch.equal(first, second["y"])
        assert torch.equal(part["x"][:, 0], first.double())


class Graphs:
    """Like a torch_geometric batch: nodes of several graphs, and a `to` of its own."""

    def __init__(self, x: Tensor, graph: Tensor) -> None:
        self.x, self.graph = x, graph

    def to(self, device: Any, non_blocking: bool = False) -> "Graphs":
        return Graphs(self.x.to(device), self.graph.to(device))


def graphs() -> Graphs:
    """Three graphs of 3, 2 and 1 nodes."""
    return Graphs(ROWS, torch.tensor([0, 0, 0, 1, 1, 2]))


def cut_graphs(batch: Graphs, sizes: Any) -> list[Graphs]:
    ends = torch.tensor(list(sizes)).cumsum(0).tolist()
    chosen = [
        (batch.graph >= end - size) & (batch.graph < end)
        for end, size in zip(ends, sizes, strict=True)
    ]
    return [Graphs(batch.x[rows], batch.graph[rows]) for rows in chosen]


@several_shards
def test_f15_custom_type_that_nobody_can_cut(
    strategy: Callable[[], Strategy], tells: Tells
) -> None:
    net = module(lambda self, part: squares(self, part["x"]))
    words = ('batch["graphs"]', "Graphs", "composefit.tree.split", "LoopModule.scatter_batch")
    with surfaces(TypeError, *words) as found:
        trainer(strategy()).fit(net, [{"x": ROWS, "graphs": graphs()}])
    tells("a shard's batch is of the same type; one that nobody has told how to cut:", found)


@several_shards
def test_f15_custom_type_that_is_registered(strategy: Callable[[], Strategy]) -> None:
    class Registered(Graphs):
        def to(self, device: Any, non_blocking: bool = False) -> "Registered":
            return Registered(self.x.to(device), self.graph.to(device))

    tree.samples_of.register(Registered, lambda batch: int(batch.graph.max()) + 1)
    tree.split.register(Registered, cut_graphs)
    found = parts_of(Registered(ROWS, graphs().graph), by_name, strategy)
    assert [len(part.x) for part in found] == [3, 2, 1]


@several_shards
def test_f15_scatter_batch_overrides(strategy: Callable[[], Strategy]) -> None:
    found: list[int] = []

    def step(self: Any, part: Graphs) -> Tensor:
        found.append(len(part.x))
        return squares(self, part.x)

    net = module(step)
    type(net).batch_size = lambda self, batch: len(batch.graph.unique())
    type(net).scatter_batch = lambda self, batch, n: cut_graphs(batch, [1] * n)
    trainer(strategy()).step(net, [graphs()])
    assert sorted(found) == [1, 2, 3]


@several_shards
def test_f16_leaves_that_disagree(strategy: Callable[[], Strategy], tells: Tells) -> None:
    net = module(lambda self, part: squares(self, part[0]))
    before = weights(net)
    words = (
        "batch[0] has 6 samples, but batch[1] has 5",
        "LoopModule.batch_dim",
        "a tensor without dimensions",
        "step 1, batch 1",
    )
    run = trainer(strategy())
    with surfaces(ValueError, *words) as found:
        run.fit(net, [(ROWS, ROWS[:, 0]), (ROWS, ROWS[:5, 0])])
    tells(found)
    assert run.updates == {"net": 1}
    assert not any(map(torch.equal, weights(net), before))


@several_shards
def test_f16_several_loaders_are_cut_each_by_itself(strategy: Callable[[], Strategy]) -> None:
    found: list[tuple[int, int]] = []

    def step(self: Any, part: Any) -> Tensor:
        found.append((len(part["labelled"]), len(part["unlabelled"])))
        return squares(self, part["labelled"])

    loaders = {"labelled": [data(6, 3)], "unlabelled": [data(9, 3)]}
    trainer(strategy()).fit(module(step), loaders)
    assert found == [(2, 3)] * 3


@every_strategy
@pytest.mark.parametrize("samples", [2, 4])
def test_f16b_default_collates_list_is_structure(
    samples: int, strategy: Callable[[], Strategy], tells: Tells
) -> None:
    pairs = [(data(3, seed=i), torch.tensor(float(i))) for i in range(samples)]
    batch = default_collate(pairs)
    assert type(batch) is list and len(batch) == 2  # as many as samples, the first time
    found: list[tuple[int, ...]] = []

    def step(self: Any, part: Any) -> Tensor:
        x, y = part
        found.append((*x.shape, *y.shape))
        return (self.net(x)[:, 0] - y).square().mean()

    net = module(step, net=linear(3, 1))
    trainer(strategy()).step(net, [batch])
    assert sum(shape[0] for shape in found) == samples
    assert all(len(shape) == 3 and shape[0] == shape[2] for shape in found)
    tells("is structure: both tensors are cut by samples, the list is not")


# -- F17, F18: loaders that raise, die or hang ---------------------------------------------------


class Faulty(Dataset[Tensor]):
    """Ten samples; loading sample 7 is faulty."""

    def __init__(self, fault: Callable[[], object]) -> None:
        self.fault = fault

    def __getitem__(self, i: int) -> Tensor:
        if i == 7:
            self.fault()
        return data(3, seed=i)

    def __len__(self) -> int:
        return 10


class FaultyStream(IterableDataset[Tensor], Faulty):
    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(10))


def corrupt() -> None:
    raise OSError("sample 7 is corrupt")


def missing() -> None:
    {}["name of a file"]


def exhausted() -> None:
    next(iter(()))


# torchdata 0.11 as it is made.
stateful = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


def fetch(loader: Any, epochs: int = 1) -> list[Any]:
    """Batches that were given before the fault."""
    batches, found = Batches(loader, "train_dataloaders", epochs=epochs), []
    for epoch in range(epochs):
        for batch in batches.epoch(epoch):
            found.append(batch)
            batches.mark()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_f17_the_dataset_raises(workers: int, tells: Tells) -> None:
    words = ["sample 7 is corrupt", "train_dataloaders loaded sample 7 for batch 3 of epoch 0"]
    loader = DataLoader(Faulty(corrupt), batch_size=2, num_workers=workers)
    with surfaces(OSError, *words, *["in worker 1"] * (workers > 0)) as found:
        fetch(loader)
    if not workers:
        assert found.line == 'raise OSError("sample 7 is corrupt")'
        assert "worker" not in found.notes
        tells("the dataset's own error, with the note", message(found.note("batch 3")))
    assert 'raise OSError("sample 7 is corrupt")' in found.text + found.line
    assert not multiprocessing.active_children()


def test_f17_without_batches_and_in_a_dict() -> None:
    loaders = {"a": [1] * 10, "b": DataLoader(Faulty(missing), batch_size=None, num_workers=1)}
    with surfaces(KeyError, "train_dataloaders['b'] loaded sample 7 for batch 7", "in worker 0"):
        fetch(loaders)


@pytest.mark.parametrize("workers", [0, 1])
def test_f17_a_stream_raises(workers: int) -> None:
    words = ["sample 7 of the stream for batch 2 of epoch 0", *["in worker 0"] * workers]
    with surfaces(OSError, "sample 7 is corrupt", *words):
        fetch(DataLoader(FaultyStream(corrupt), batch_size=3, num_workers=workers))


@stateful
@pytest.mark.parametrize("workers", [0, 1])
def test_f17_a_loader_with_a_state_raises(workers: int) -> None:
    words = ["sample 7 is corrupt", "train_dataloaders loaded batch 3 of epoch 0"]
    with surfaces(OSError, *words, *["in worker 0"] * workers):
        fetch(StatefulDataLoader(Faulty(corrupt), batch_size=2, num_workers=workers))


def test_f17_collate_and_sampler_raise() -> None:
    class Sampler(list[list[int]]):
        def __iter__(self) -> Iterator[list[int]]:
            yield from super().__iter__()
            raise OSError("no more")

    for workers in (0, 2):
        # Workers are asked for all of them at once, but the batches before the fault come first.
        loader = DataLoader(range(9), batch_sampler=Sampler([[0], [1]]), num_workers=workers)
        found: list[Tensor] = []
        with surfaces(OSError, "no more", "train_dataloaders loaded batch 2 of epoch 0"):
            found.extend(Batches(loader, "train_dataloaders").epoch(0))
        assert [int(batch) for batch in found] == [0, 1]
    with surfaces(OSError, "corrupt", "train_dataloaders loaded batch 0 of epoch 0") as caught:
        fetch(DataLoader(range(9), collate_fn=lambda _: corrupt()))
    assert "loaded sample" not in caught.notes


@pytest.mark.parametrize("workers", [0, 1])
def test_f17_stop_iteration_in_the_dataset_does_not_end_the_epoch(workers: int) -> None:
    words = ("the dataset raised StopIteration", "sample 7 for batch 7 of epoch 0")
    with surfaces(RuntimeError, *words):
        fetch(DataLoader(Faulty(exhausted), num_workers=workers))


def test_f17_the_batch_that_raised_comes_again() -> None:
    faults = [corrupt]
    dataset = Faulty(lambda: faults.pop()() if faults else None)  # mended after the first time
    loader = DataLoader(dataset, batch_size=2)
    batches, found = Batches(loader, "train_dataloaders"), []
    with surfaces(OSError, "corrupt"):
        for batch in batches.epoch(0):
            found.append(batch)
            batches.mark()
    resumed = Batches(loader, "train_dataloaders")
    resumed.load_state_dict(batches.state_dict())
    found.extend(resumed.epoch(0))
    assert torch.equal(torch.cat(found), torch.stack([data(3, seed=i) for i in range(10)]))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@stateful
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (kill, ("was killed by signal 9 (SIGKILL)", "memory")),
        (lambda: os._exit(3), ("exited with code 3",)),
    ],
    ids=["killed", "exits"],
)
def test_f18_a_worker_dies(fault: Callable[[], None], words: Any, kind: Any) -> None:
    pids = ("a worker of train_dataloaders died", "of epoch 0: pid ", "the last checkpoint holds")
    with surfaces(RuntimeError, *pids, *words):
        fetch(kind(Faulty(fault), batch_size=2, num_workers=1))
    assert not multiprocessing.active_children()
    with warnings.catch_warnings():
        # torchdata 0.11 opens ten files to find out whether it still can, and closes none of them.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_f18_a_worker_hangs(tells: Tells) -> None:
    loader = DataLoader(
        Faulty(lambda: time.sleep(3)), batch_size=2, num_workers=1, timeout=2, prefetch_factor=1
    )
    words = ("batch 3 of epoch 0 within its timeout of 2 seconds", "0: pid ", "checkpoint holds")
    with surfaces(RuntimeError, "train_dataloaders gave no", *words) as found:
        fetch(loader)
    assert not multiprocessing.active_children()
    tells("a worker that dies is named, with the signal that has killed it; one that hangs:", found)
