"""Rule 7, and where samples are: cutting a batch into shards."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from composefit import LoopModule, SingleDevice, Strategy, Sum, ThreadDataParallel
from composefit.data import LoaderBatches
from composefit.lockstep.scatter import batch_size, scatter
from tests.lockstep.steps import data, every_strategy, linear, module, several_shards, trainer


class Plain(LoopModule):
    pass


def rows(parts: list[Any]) -> list[list[int]]:
    return [part.batch.flatten().tolist() for part in parts]


def test_parts_are_contiguous_over_lanes_then_over_time() -> None:
    parts = scatter(Plain(), torch.arange(7), 3, lanes=2, microbatch=2)
    assert rows(parts) == [[0, 1], [2, 3], [4, 5], [6]]
    assert [part.lane for part in parts] == [0, 0, 1, 1]
    assert [part.samples for part in parts] == [2, 2, 2, 1]
    assert {part.batch_idx for part in parts} == {3}


@pytest.mark.parametrize("samples", range(1, 12))
@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
@pytest.mark.parametrize("microbatch", [None, 1, 2, 3])
def test_parts_hold_every_sample_once_in_order(
    samples: int, lanes: int, microbatch: int | None
) -> None:
    parts = scatter(Plain(), torch.arange(samples), 0, lanes, microbatch)
    assert [row for part in rows(parts) for row in part] == list(range(samples))
    assert [part.lane for part in parts] == sorted(part.lane for part in parts)
    assert len({part.lane for part in parts}) == min(lanes, samples)
    assert all(len(row) <= (microbatch or samples) for row in rows(parts))


def test_nobody_asks_for_the_size_of_a_batch_that_is_not_cut() -> None:
    (part,) = scatter(Plain(), object(), 0, lanes=1, microbatch=None)
    assert part.samples is None


def test_groups_are_not_cut_apart() -> None:
    net = Plain()
    net.samples_per_group = 3
    assert rows(scatter(net, torch.arange(9), 0, 2, None)) == [[0, 1, 2, 3, 4, 5], [6, 7, 8]]


def test_samples_may_be_counted_in_another_dimension() -> None:
    net = Plain()
    net.batch_dim = 1
    parts = scatter(net, torch.arange(6).view(2, 3), 0, 3, None)
    assert rows(parts) == [[0, 3], [1, 4], [2, 5]]


def test_the_module_may_count_and_cut_itself() -> None:
    class Own(LoopModule):
        def batch_size(self, batch: Any) -> int:
            return len(batch[0])

        def scatter_batch(self, batch: Any, n: int) -> list[Any]:
            words = batch[0]
            size = -(-len(words) // n)
            return [(words[i : i + size],) for i in range(0, len(words), size)]

    parts = scatter(Own(), ("abcdefg",), 0, 3, None)
    assert [part.batch for part in parts] == [("abc",), ("def",), ("g",)]
    assert [part.samples for part in parts] == [3, 3, 1]


def test_a_module_that_cuts_wrongly_is_told() -> None:
    class Loses(LoopModule):
        def scatter_batch(self, batch: Any, n: int) -> list[Any]:
            return list(batch.split(1))[:n]

    with pytest.raises(ValueError, match=r"the batch's 7 samples together, got parts of \[1, 1\]"):
        scatter(Loses(), torch.arange(7), 0, 2, None)
    with pytest.raises(ValueError, match="at most n = 2 parts, got 7"):

        class TooMany(LoopModule):
            def scatter_batch(self, batch: Any, n: int) -> list[Any]:
                return list(batch.split(1))

        scatter(TooMany(), torch.arange(7), 0, 2, None)


def test_batches_of_several_loaders_are_cut_each_by_itself() -> None:
    batch = LoaderBatches({"a": torch.arange(6), "b": torch.arange(4)})
    parts = scatter(Plain(), batch, 0, 2, None)
    assert [part.batch["a"].tolist() for part in parts] == [[0, 1, 2], [3, 4, 5]]
    assert [part.batch["b"].tolist() for part in parts] == [[0, 1], [2, 3]]
    batch = LoaderBatches({"a": torch.arange(6), "b": torch.arange(1)})
    with pytest.raises(ValueError, match=r"loader 'b' holds 1 samples.*2 shards"):
        scatter(Plain(), batch, 0, 2, None)


@pytest.mark.parametrize("batch", [torch.zeros(0, 3), [torch.zeros(0)]])
def test_an_empty_batch_is_an_error(batch: Any) -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        batch_size(Plain(), batch)


@every_strategy
def test_a_step_may_change_its_part_of_the_batch_in_place(
    strategy: Callable[[], Strategy],
) -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        return (self.net(x) * x[:, :2]).square().mean()

    net, x, expected = module(step), data(7, 3), linear(3, 2)
    loss = (expected(2 * x) * 2 * x[:, :2]).square().mean()
    found = torch.autograd.grad(loss, list(expected.parameters()))
    trainer(strategy()).step(net, [x.clone()])
    for p, q, g in zip(net.parameters(), expected.parameters(), found, strict=True):
        torch.testing.assert_close(p, q - 0.1 * g, rtol=1e-12, atol=1e-12)


@several_shards
def test_what_a_shard_writes_in_place_does_not_break_anothers_graph(
    strategy: Callable[[], Strategy],
) -> None:
    # All graphs stand at the first effect. Views of one batch have one version counter: what one
    # shard writes then makes the others' backwards raise.
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        loss = (self.net(x) * x[:, :2]).square().mean()
        yield Sum(x.detach().sum())
        if x[0, 0] == 0:
            x.add_(0)
            loss = (self.net(x) * x[:, :2]).square().mean()
        yield {"net": loss}

    x = data(6, 3)
    x[:, 0] = torch.arange(6)
    run = trainer(strategy())
    run.step(module(step), [x])
    assert run.updates == {"net": 1}


@pytest.mark.parametrize("batches", [1, 2])
def test_a_shards_index_is_its_loader_batchs(batches: int) -> None:
    seen: list[tuple[int, int]] = []

    def step(self: Any, x: Tensor, batch_idx: int) -> Tensor:
        seen.append((batch_idx, len(x)))
        return self.net(x).mean()

    run = trainer(SingleDevice("cpu", 2), accumulate_grad_batches=batches)
    run.fit(module(step), [data(3, 3), data(4, 3)])
    # With accumulation lane 0 runs its shards of both batches, then lane 1.
    assert sorted(seen) == [(0, 1), (0, 2), (1, 2), (1, 2)]


def test_more_threads_than_samples_leave_some_idle() -> None:
    sizes: list[int] = []

    def step(self: Any, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return self.net(x).square().mean()

    net, x = module(step), data(2, 3)
    expected = linear(3, 2)
    found = torch.autograd.grad(expected(x).square().mean(), list(expected.parameters()))
    trainer(ThreadDataParallel(4)).step(net, [x])
    assert sizes == [1, 1]
    for p, q, g in zip(net.parameters(), expected.parameters(), found, strict=True):
        torch.testing.assert_close(p, q - 0.1 * g, rtol=1e-12, atol=1e-12)
