"""Several training loaders: what a step sees in each mode, law 1, and law 3 of a whole fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from composefit import (
    CombinedLoader,
    DataModule,
    Distributed,
    LoopModule,
    Mean,
    SingleDevice,
    Strategy,
    ThreadDataParallel,
)
from composefit.testing import assert_resumable
from tests.lockstep.steps import data, every_strategy, linear, trainer
from tests.ranks.pool import RankPool, closing_pools, pool

Make = Callable[[], Strategy]

# torchdata 0.11 as it is made.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

MODES = ["min_size", "max_size_cycle", "max_size", "sequential"]
SIDE_BY_SIDE = MODES[:3]
# In "max_size" a window may hold a shard without labelled samples beside one that has some: their
# losses must have the same terms, as below.
SETTINGS = [(mode, k) for mode in SIDE_BY_SIDE for k in (1, 2) if mode != "max_size" or k == 1]

# Rows by batch. The second has more batches, and its last is ragged; no batch can be divided by all
# numbers of shards, and the samples of the two are in no fixed proportion.
LABELLED, UNLABELLED = [5, 4], [11, 10, 7, 11, 3]


def rows(sizes: Sequence[int], width: int, seed: int) -> list[Tensor]:
    return [data(size, width, seed=seed + i) for i, size in enumerate(sizes)]


def labelled(sizes: Sequence[int] = LABELLED) -> list[tuple[Tensor, Tensor]]:
    return [(x, (x[:, 0] > 0).long()) for x in rows(sizes, 3, 10)]


def unlabelled(sizes: Sequence[int] = UNLABELLED) -> list[Tensor]:
    return rows(sizes, 3, 30)


class FixMatch(LoopModule):
    """Pseudo-labels of the sure ones of the unlabelled samples (Sohn et al., 2020).

    Each of its two means is over samples of its own, and says so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = linear(3, 2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)

    def training_step(self, batch: Any) -> Any:
        loss: Any = 0.0
        if batch["labelled"] is not None:
            x, y = batch["labelled"]
            losses = cross_entropy(self.net(x), y, reduction="none")
            loss = Mean(losses.sum(), len(losses))
        if batch["unlabelled"] is not None:
            loss = loss + consistency(self.net, batch["unlabelled"])
        return loss


def consistency(net: Any, x: Tensor) -> Mean:
    with torch.no_grad():
        sure, label = net(x).softmax(1).max(1)
    losses = cross_entropy(net(1.1 * x), label, reduction="none") * (sure > 0.6)
    return Mean(losses.sum(), len(losses))


def rounds(mode: str) -> list[tuple[Any, Any]]:
    """What an epoch gives, by hand."""
    short, long = labelled(), unlabelled()
    if mode == "min_size":
        return list(zip(short, long, strict=False))
    if mode == "max_size_cycle":
        return list(zip(cycle(short), long, strict=False))
    return [(short[i] if i < len(short) else None, x) for i, x in enumerate(long)]


def by_hand(mode: str, accumulate: int) -> Any:
    """The weights after an epoch of the plain loop, every mean over all samples of a step."""
    net = linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    batches = rounds(mode)
    for i in range(0, len(batches), accumulate):
        window = batches[i : i + accumulate]
        known = [one for one, _ in window if one is not None]
        loss = torch.zeros(())
        if known:
            every, labels = (torch.cat(column) for column in zip(*known, strict=True))
            loss = cross_entropy(net(every), labels)
        x = torch.cat([x for _, x in window])
        sure, label = net(x).detach().softmax(1).max(1)
        loss = loss + (cross_entropy(net(1.1 * x), label, reduction="none") * (sure > 0.6)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def difference(a: Any, b: Any) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(((p - q).abs().max() / q.abs().max()).item() for p, q in pairs)


def loaders(mode: str) -> CombinedLoader:
    return CombinedLoader({"labelled": labelled(), "unlabelled": unlabelled()}, mode)


# -- law 1 --------------------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize(("mode", "accumulate"), SETTINGS)
def test_a_mean_for_each_loader_trains_as_the_loop_by_hand(
    strategy: Make, mode: str, accumulate: int
) -> None:
    net = FixMatch()
    trainer(strategy(), accumulate_grad_batches=accumulate).fit(net, loaders(mode))
    assert difference(net.net, by_hand(mode, accumulate)) <= 1e-10
    assert difference(net.net, linear(3, 2)) > 1e-3


@every_strategy
def test_a_loader_that_is_at_its_end_within_a_window_counts_with_weight_zero(
    strategy: Make,
) -> None:
    class Weighs(FixMatch):
        def training_step(self, batch: Any) -> Any:
            x, y = batch["labelled"] or (batch["unlabelled"][:0], torch.zeros(0).long())
            losses = cross_entropy(self.net(x), y, reduction="none")
            return consistency(self.net, batch["unlabelled"]) + Mean(losses.sum(), len(losses))

    short, long = labelled([5]), unlabelled([7, 6])
    net = Weighs()
    combined = CombinedLoader({"labelled": short, "unlabelled": long}, "max_size")
    trainer(strategy(), accumulate_grad_batches=2).fit(net, combined)
    expected = linear(3, 2)
    x = torch.cat(long)
    sure, label = expected(x).detach().softmax(1).max(1)
    loss = cross_entropy(expected(short[0][0]), short[0][1])
    loss = loss + (cross_entropy(expected(1.1 * x), label, reduction="none") * (sure > 0.6)).mean()
    with torch.no_grad():
        found = torch.autograd.grad(loss, list(expected.parameters()))
        for p, gradient in zip(expected.parameters(), found, strict=True):
            p -= 0.3 * gradient
    assert difference(net.net, expected) <= 1e-10


def test_a_plain_loss_over_another_loader_misses_the_bound() -> None:
    class Plain(FixMatch):
        def training_step(self, batch: Any) -> Any:
            x, y = batch["labelled"]
            loss: Tensor = self.net(batch["unlabelled"]).square().mean()
            return cross_entropy(self.net(x), y) + loss

    nets = [Plain(), Plain()]
    for net, shards in zip(nets, (1, 3), strict=True):
        trainer(SingleDevice("cpu", shards=shards)).fit(net, loaders("min_size"))
    assert difference(nets[0].net, nets[1].net) > 1e-6


# -- what a step sees ---------------------------------------------------------------------------


class Sees(LoopModule):
    """Collects the first number of what every loader gave."""

    def __init__(self) -> None:
        super().__init__()
        self.net = linear(1, 1)
        self.__dict__["seen"] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.__dict__["seen"].append((batch_idx, numbers(batch)))
        return self.net.weight.square().sum()  # type: ignore[no-any-return]


def numbers(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: numbers(one) for key, one in batch.items()}
    if isinstance(batch, list):
        return [numbers(one) for one in batch]
    return None if batch is None else int(batch.flatten()[0])


def tens(start: int, count: int) -> DataLoader[Any]:
    return DataLoader(torch.arange(start, start + count).double()[:, None], batch_size=1)


def seen(loader: Any, **options: Any) -> list[Any]:
    net = Sees()
    trainer(**options).fit(net, loader)
    found: list[Any] = net.__dict__["seen"]
    assert [i for i, _ in found] == [*range(len(found))]
    return [batch for _, batch in found]


def test_lists_and_nested_loaders_give_lists_in_training() -> None:
    assert seen(CombinedLoader([tens(0, 2), tens(10, 3)])) == [[0, 10], [1, 11]]
    nested = {"x": [tens(0, 2), tens(10, 3)], "y": tens(20, 4)}
    assert seen(CombinedLoader(nested, "max_size"))[2:] == [
        {"x": [None, 12], "y": 22},
        {"x": [None, None], "y": 23},
    ]


def test_sequential_training_is_one_loader_after_another() -> None:
    combined = CombinedLoader([tens(0, 2), tens(10, 3)], "sequential")
    assert seen(combined) == [0, 1, 10, 11, 12]


def test_a_plain_dict_ends_with_the_shortest() -> None:
    assert seen({"a": tens(0, 2), "b": tens(10, 3)}) == [{"a": 0, "b": 10}, {"a": 1, "b": 11}]


@pytest.mark.parametrize(("limit", "number"), [(3, 3), (0.5, 2), (9, 5), (1.0, 5)])
def test_limits_count_rounds(limit: float, number: int) -> None:
    combined = CombinedLoader([tens(0, 2), tens(10, 5)], "max_size_cycle")
    assert len(seen(combined, limit_train_batches=limit)) == number


def test_loaders_may_come_from_a_data_module() -> None:
    class Data(DataModule):
        def train_dataloader(self) -> Any:
            return CombinedLoader([tens(0, 1), tens(10, 2)], "max_size_cycle")

    net = Sees()
    trainer().fit(net, datamodule=Data())
    assert [batch for _, batch in net.__dict__["seen"]] == [[0, 10], [0, 11]]


def test_a_batch_that_is_too_small_for_its_shards_names_its_loader() -> None:
    short = CombinedLoader([[torch.zeros(6, 1)], [torch.zeros(2, 1)]])
    with pytest.raises(ValueError, match=r"loader '\[1\]' holds 2 samples .* into 3 shards.*drop_"):
        trainer(SingleDevice("cpu", shards=3)).fit(Sees(), short)


# -- law 3 --------------------------------------------------------------------------------------


class Trains(LoopModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = linear(3, 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def training_step(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            parts = [one[0] for one in batch.values() if one is not None]
        else:  # one after another
            parts = [batch[0]]
        losses = [self.net(x).square() for x in parts]
        return sum(Mean(loss.sum(), len(loss)) for loss in losses)


def shuffled(kind: Any, samples: int, size: int, **options: Any) -> Any:
    return kind(TensorDataset(torch.randn(samples, 3).double()), size, shuffle=True, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "workers", "strategy"),
    [
        (DataLoader, 0, lambda: SingleDevice("cpu")),
        (DataLoader, 0, lambda: ThreadDataParallel(2)),
        (DataLoader, 1, lambda: SingleDevice("cpu")),
        (StatefulDataLoader, 0, lambda: SingleDevice("cpu")),
    ],
)
def test_a_fit_stopped_at_any_step_and_resumed_is_the_fit_never_stopped(
    mode: str, kind: Any, workers: int, strategy: Make
) -> None:
    def make() -> CombinedLoader:
        # Two and five batches.
        short = shuffled(kind, 8, 4, num_workers=workers)
        return CombinedLoader({"short": short, "long": shuffled(kind, 14, 3)}, mode)

    assert_resumable(
        Trains,
        make,
        [strategy()],
        via=["exception"],
        stops=(1, 3, 4, 6) if workers and mode != "min_size" else None,
        accumulate=(1,) if workers else (1, 2) if mode != "max_size" else (1,),
    )


# -- ranks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with closing_pools():
        yield pool(2)


def distributed() -> Strategy:
    return Distributed(accelerator="cpu", timeout=60)


def trained_in_a_rank() -> dict[str, float]:
    found = {}
    for mode, accumulate in SETTINGS:
        net = FixMatch()
        trainer(distributed(), accumulate_grad_batches=accumulate).fit(net, loaders(mode))
        found[f"{mode}, {accumulate}"] = difference(net.net, by_hand(mode, accumulate))
    return found


def test_two_ranks_train_as_the_loop_by_hand(two_ranks: RankPool) -> None:
    for found in two_ranks.run(trained_in_a_rank):
        assert len(found) == 5
        assert max(found.values()) <= 1e-10, found
