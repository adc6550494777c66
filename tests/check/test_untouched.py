"""A check leaves everything bitwise as it was."""

import copy
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from composefit import LoopModule, Once, SingleDevice, Step, ThreadDataParallel
from composefit.check.copies import copied_module
from composefit.seeding import global_states
from composefit.trainer import Trainer
from tests.check.wrong import Net, labelled


def trainer(strategy: Any = None, **arguments: Any) -> Trainer:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"logger": False, "enable_checkpointing": False}
    return Trainer(strategy=strategy or SingleDevice("cpu"), **quiet | arguments)


class Everything(LoopModule):
    """Buffers, Python state, hooks, locks, stored activations, a generator, old weight norm."""

    queue: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.frozen = nn.Linear(8, 8).eval().requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.head = nn.utils.weight_norm(nn.Linear(8, 4))
        self.register_buffer("queue", torch.randn(10, 4))
        self.seen: list[Any] = []
        self.see = self.seen.append
        self.counts = {"steps": 0}
        self.lock = threading.Lock()
        self.generator = torch.Generator().manual_seed(3)
        self.net.register_forward_hook(lambda net, given, out: self.seen.append(out))
        self.activation = self.head(torch.randn(2, 8))  # with a graph
        self.shift = torch.zeros(3)
        self.net[0].weight.grad = torch.ones(8, 6)

    def training_step(self, batch: list[Tensor]) -> Step:
        x, y = batch
        x.mul_(0.5)
        y.add_(1).remainder_(4)
        self.see(1)
        self.counts["steps"] += 1
        self.shift += 1
        x = x + torch.randn(x.shape, generator=self.generator) + random.random() + np.random.rand()
        z = self.head(self.frozen(self.net(x)))
        yield from Once(self.enqueue, z)
        yield F.cross_entropy(z, y)

    def enqueue(self, z: Tensor) -> None:
        with self.lock:
            self.queue = torch.cat([self.queue, z])[-10:]
            self.seen.append(z)

    def configure_optimizers(self) -> Any:
        self.counts["optimizers"] = 1
        return torch.optim.Adam(self.parameters())


def state_of(module: nn.Module) -> dict[str, Any]:
    """All that is in a module, by value."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        for name, p in (*part._parameters.items(), *part._buffers.items()):
            assert p is not None
            found[f"{path}/{name}"] = (id(p), p.dtype, p.detach().clone(), p.requires_grad)
            found[f"{path}/{name}.grad"] = None if p.grad is None else p.grad.clone()
        for name, value in vars(part).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            held = value.copy() if isinstance(value, list | dict) else value
            if isinstance(value, Tensor):
                held = value.detach().clone()
            if isinstance(value, torch.Generator):
                held = value.get_state()
            found[f"{path}.{name}"] = (id(value), held)
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, type(threading.Lock())):
        return True
    return a is b or bool(a == b)


@pytest.mark.parametrize("strategy", [None, ThreadDataParallel(2)], ids=["one", "threads"])
def test_module_batch_and_generators_stay_bitwise_as_they_were(strategy: Any) -> None:
    module = Everything()
    batch = labelled()
    before, data = state_of(module), copy.deepcopy(batch)
    generators = global_states()
    report = trainer(strategy).check(module, batch, show=False)
    assert not report.ok
    assert same(global_states(), generators)
    assert same(batch, data)
    after = state_of(module)
    assert before.keys() == after.keys()
    assert [name for name in before if not same(before[name], after[name])] == []
    assert module.trainer is None


def test_default_dtype_and_thread_count_stay() -> None:
    threads = torch.get_num_threads()
    trainer(ThreadDataParallel(2)).check(Everything(), labelled(), show=False)
    assert torch.get_default_dtype() is torch.float32
    assert torch.get_num_threads() == threads


def test_a_check_that_fails_leaves_everything_too() -> None:
    class Failing(Everything):
        def training_step(self, batch: list[Tensor]) -> Any:
            next(super().training_step(batch))
            raise ZeroDivisionError

    module = Failing()
    before, generators = state_of(module), global_states()
    with pytest.raises(ZeroDivisionError) as caught:
        trainer().check(module, labelled(), show=False)
    assert "while the check ran the step" in "".join(caught.value.__notes__)
    assert same(global_states(), generators)
    after = state_of(module)
    assert [name for name in before if not same(before[name], after[name])] == []


def test_what_cannot_be_copied_is_shared_and_said() -> None:
    report = trainer().check(Everything(), labelled(), show=False)
    assert "Everything.lock could not be copied" in report.notes[-1]


def test_a_copy_has_functions_of_its_own() -> None:
    module = Everything()
    copied = copied_module(module).module
    assert isinstance(copied, Everything)
    copied.see(5)
    copied.net(torch.randn(2, 6))
    assert (len(module.seen), len(copied.seen)) == (0, 2)


def test_optimizers_of_the_originals_parameters_are_those_of_the_copies() -> None:
    """A function that was made around the module gives the same optimizer whoever calls it."""
    module = Net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.training_step = lambda batch: module.net(batch[0]).square().mean()  # type: ignore
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    report = trainer().check(module, labelled(), show=False)
    assert report.ok
    assert report.optimizers["optimizer"].difference is not None
    assert optimizer.param_groups[0]["params"][0] is module.net[0].weight


def test_a_fit_after_a_check_is_the_fit_without_one() -> None:
    class Right(Net):
        def training_step(self, batch: list[Tensor]) -> Any:
            x, y = batch
            return F.cross_entropy(self.net(F.dropout(x, 0.3)), y)

    found = []
    for check in (False, True):
        torch.manual_seed(0)
        module = Right()
        loader = DataLoader(TensorDataset(*labelled(40)), batch_size=8, shuffle=True)
        trainer(max_epochs=2, check=check).fit(module, loader)
        found.append([p.detach().clone() for p in module.parameters()])
    assert same(*found)


# -- loaders ---------------------------------------------------------------------------------------


class Drawing(Dataset[Tensor]):
    """A dataset with a generator and a cache of its own."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)
        self.random = random.Random(0)
        self.read: list[int] = []
        self.table = torch.zeros(1000, 1000)  # large data are shared, not copied

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        self.read.append(index)
        noise = self.generator.normal() + self.random.random()
        return torch.full((6,), noise) + self.table[index, :6]


def state_of_dataset(dataset: Drawing) -> Any:
    state = dataset.generator.bit_generator.state
    return repr(state), dataset.random.getstate(), list(dataset.read)


class Autoencoder(Net):
    def training_step(self, batch: Tensor) -> Any:
        return self.net(batch).square().mean()


LOADERS: dict[str, Callable[[Drawing], Any]] = {
    "shuffled": lambda data: DataLoader(data, 5, shuffle=True),
    "its own generator": lambda data: DataLoader(
        data, 5, shuffle=True, generator=torch.Generator().manual_seed(1)
    ),
    "dict": lambda data: {"a": DataLoader(data, 5, shuffle=True), "b": DataLoader(data, 5)},
}


@pytest.mark.parametrize("name", LOADERS)
def test_loader_gives_afterwards_what_it_would_have_given(name: str) -> None:
    class Step(Autoencoder):
        def training_step(self, batch: Any) -> Any:
            return super().training_step(batch["a"] if isinstance(batch, dict) else batch)

    data, other, module = Drawing(), Drawing(), Step()
    loader, expected = LOADERS[name](data), LOADERS[name](other)
    generators, before = global_states(), state_of_dataset(data)
    assert trainer().check(module, loader, batches=3, show=False).ok
    assert same(global_states(), generators)
    assert state_of_dataset(data) == before
    if name != "dict":
        torch.manual_seed(7)
        found = list(loader)
        torch.manual_seed(7)
        assert same(found, list(expected))


def test_workers_that_are_at_work_stay_at_it() -> None:
    data, module = Drawing(), Autoencoder()
    loader = DataLoader(data, 5, num_workers=1, persistent_workers=True)
    batches = iter(loader)
    next(batches)
    workers = loader._iterator
    assert trainer().check(module, loader, show=False).ok
    assert loader._iterator is workers
    assert len(list(batches)) == 3


def test_loader_with_workers_stays_as_it_was() -> None:
    generator = torch.Generator().manual_seed(1)
    data, module = Drawing(), Autoencoder()
    loader = DataLoader(
        data, 5, shuffle=True, generator=generator, num_workers=1, persistent_workers=True
    )
    generators, before = global_states(), generator.get_state()
    assert trainer().check(module, loader, show=False).ok
    assert same(global_states(), generators)
    assert torch.equal(generator.get_state(), before)
    assert loader._iterator is None


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_loader_with_a_state_stays_as_it_was() -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    loader = torchdata.StatefulDataLoader(Drawing(), 5, shuffle=True)
    next(iter(loader))
    before = repr(loader.state_dict())
    assert trainer().check(Autoencoder(), loader, show=False).ok
    assert repr(loader.state_dict()) == before


def test_iterable_dataset_stays_as_it_was() -> None:
    class Stream(IterableDataset[Tensor]):
        position = 0

        def __iter__(self) -> Iterator[Tensor]:
            while self.position < 30:
                self.position += 1
                yield torch.full((6,), float(self.position))

    data = Stream()
    assert trainer().check(Autoencoder(), DataLoader(data, 5), show=False).ok
    assert data.position == 0


def test_one_shot_iterator_is_refused() -> None:
    with pytest.raises(ValueError, match="one-shot iterator"):
        trainer().check(Autoencoder(), iter([torch.randn(4, 6)]), show=False)
