"""Bytes alive, counted by hand."""

import threading

import torch
from torch import nn

from composefit.explain.memory import LiveBytes, bytes_of, resident

FLOAT = 4


def test_live_bytes_are_those_of_new_storages_until_they_die() -> None:
    given = torch.ones(1000)
    with LiveBytes() as live:
        a = given + 1
        b = a * 2
        view = b.view(10, 100)
        given.mul_(2)  # in place: nothing new
        assert live.live == 2 * 1000 * FLOAT
        del a
        assert live.live == 1000 * FLOAT
        del b
        assert live.live == 1000 * FLOAT  # the view holds it
        del view
        assert live.live == 0
    assert live.peak == 2 * 1000 * FLOAT


def test_what_a_graph_holds_is_alive() -> None:
    weight = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        loss = weight.exp().sum()  # the graph keeps what exp gave
        assert live.live == (1000 + 1) * FLOAT
        loss.backward()
        del loss
        assert live.live == 1000 * FLOAT  # the gradient
        weight.grad = None
        assert live.live == 0


def test_the_peak_of_a_backward_is_that_of_its_operations() -> None:
    x, net = torch.randn(50, 8), nn.Linear(8, 16, bias=False)
    with LiveBytes() as live:
        y = net(x)
        (gradient,) = torch.autograd.grad(y.sum(), [net.weight])
        assert live.live == (50 * 16 + 8 * 16) * FLOAT
    # forward: y, its sum; backward: one, the gradient of the weight (the expanded one is a view)
    assert live.peak == (50 * 16 + 1 + 1 + 8 * 16) * FLOAT
    assert gradient.shape == (16, 8)


def test_threads_count_together() -> None:
    live, kept = LiveBytes(), []

    def work() -> None:
        with live:
            kept.append(torch.zeros(1000))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert live.live == live.peak == 4 * 1000 * FLOAT
    kept.clear()
    assert live.live == 0


def test_sparse_tensors_have_numbers_and_their_places() -> None:
    sparse = torch.eye(5).to_sparse()
    assert bytes_of([sparse, torch.ones(2)]) == 5 * (FLOAT + 2 * 8) + 2 * FLOAT


def test_resident_counts_what_is_shared_once_and_lazy_parameters_not_yet() -> None:
    module = nn.ModuleList([nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2), nn.LazyLinear(4)])
    module.append(module[0])
    optimizer = torch.optim.SGD(module[0].parameters(), lr=0.1, momentum=0.9)
    module[0].weight.grad = torch.ones(2, 3)
    optimizer.step()
    # weight and momentum; BatchNorm's weight, bias and statistics, and its count (int64)
    assert resident(module, [optimizer]) == (6 + 6 + 4 * 2) * FLOAT + 8
