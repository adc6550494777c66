import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

from composefit.data_parallel import DataParallel
from composefit.data_parallel.lanes import Pool
from composefit.strategies import ThreadDataParallel
from tests.data_parallel.conftest import Parallel, Seen, lanes


def test_forward_and_backward_run_in_all_threads(parallel: Parallel) -> None:
    seen = Seen()
    net = parallel(nn.Sequential(nn.Linear(2, 2), seen), 3)
    net(torch.randn(6, 2)).sum().backward()
    names = {"MainThread", "composefit-lane-1", "composefit-lane-2"}
    assert set(seen.forwards) == set(seen.backwards) == names


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_shards_run_at_the_same_time(parallel: Parallel, direction: str) -> None:
    """Each waits for the other: one after another they would not get past the barrier."""
    barrier = threading.Barrier(2, timeout=30)

    def meet(*_: object) -> None:
        barrier.wait()

    inner = nn.Linear(2, 2)
    if direction == "forward":
        inner.register_forward_hook(meet)
    else:
        inner.register_full_backward_hook(meet)
    net = parallel(inner)
    net(torch.randn(4, 2, requires_grad=True)).sum().backward()
    assert not barrier.broken


def test_threads_start_at_the_first_call_and_end_at_close() -> None:
    before = len(lanes())
    net = DataParallel(nn.Linear(2, 2), 3)
    assert len(lanes()) == before
    net(torch.randn(6, 2))
    assert len(lanes()) == before + 2
    net.close()
    net.close()
    assert len(lanes()) == before
    net(torch.randn(6, 2)).sum().backward()
    assert len(lanes()) == before + 2
    net.close()


def test_threads_end_with_the_wrapper_and_the_last_graph() -> None:
    before = len(lanes())
    net = DataParallel(nn.Linear(2, 2), 2)
    inner = net.module
    loss = net(torch.randn(4, 2)).sum()
    gone = weakref.ref(net)
    del net
    assert gone() is None
    assert len(lanes()) == before + 1
    loss.backward()
    assert inner.weight.grad is not None
    torch.set_num_threads(3)
    del loss
    assert len(lanes()) == before
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)


def test_nothing_of_a_wrapper_needs_the_garbage_collector() -> None:
    before = len(lanes())
    gc.collect()
    gc.disable()
    try:
        net = DataParallel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 2)
        for _ in range(3):
            net(torch.randn(4, 2)).sum().backward()
        del net
        assert len(lanes()) == before
    finally:
        gc.enable()


def test_the_loop_keeps_its_intra_op_threads(parallel: Parallel) -> None:
    inside = []

    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            (x.expand(1000, -1) @ x.expand(1000, -1).T).exp()  # makes torch ask for its threads
            inside.append(torch.get_num_threads())
            return x

    torch.set_num_threads(2)
    try:
        net = parallel(Asking())
        for _ in range(2):
            net(torch.ones(2, 50))
            assert torch.get_num_threads() == 2
        assert inside == [1] * 4
        torch.set_num_threads(3)
        net.close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_a_worker_does_not_take_over_the_loops_intra_op_threads() -> None:
    """It would at its first use of them, if that came while the loop has many."""
    pool, found = Pool(ThreadDataParallel(2)), []

    def ask() -> None:
        torch.ones(2000, 2000).exp_()
        found.append(torch.get_num_threads())

    torch.set_num_threads(2)
    try:
        pool.open()
        pool.strategy.run([lambda: None, ask])
        assert found == [1]
    finally:
        pool.close()
        torch.set_num_threads(1)


def test_a_graph_keeps_its_buffers_while_others_are_made(parallel: Parallel) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.register_buffer("scale", torch.tensor([2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * self.scale * x

    net = parallel(Scale())
    first = net(torch.ones(4)).sum()
    net.module.scale = torch.tensor([3.0])
    second = net(torch.ones(4)).sum()
    gradients = [torch.autograd.grad(loss, net.weight)[0] for loss in (first, second)]
    assert gradients == [8.0, 12.0]


def test_critic_and_batchnorm_in_eval_mode_may_be_called_often_before_a_backward(
    parallel: Parallel,
) -> None:
    inner = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    inner[1].running_mean += 0.5
    net = parallel(inner)
    batches = [torch.randn(n, 2) for n in (4, 3, 6)]
    loss = sum(net(x).square().sum() for x in batches)
    expected = sum(inner(x).square().sum() for x in batches)
    own = list(inner.parameters())
    for a, b in zip(
        torch.autograd.grad(loss, own), torch.autograd.grad(expected, own), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_replicas_are_used_again_when_their_graph_is_gone(parallel: Parallel) -> None:
    net = parallel(nn.BatchNorm1d(2))
    for _ in range(10):
        loss = net(torch.randn(4, 2)).sum() + net(torch.randn(4, 2)).sum()
        loss.backward()
    del loss
    assert 1 <= len(net._pool._crews) <= 4


def test_a_failed_forward_gives_its_replicas_back(parallel: Parallel) -> None:
    net = parallel(nn.Linear(2, 2))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            net(torch.randn(4, 3))
    assert len(net._pool._crews) == 1


def test_an_error_leaves_nothing_for_the_garbage_collector(parallel: Parallel) -> None:
    net = parallel(nn.Sequential(nn.Linear(2, 2), Seen()), 3)
    gc.collect()
    gc.disable()
    try:
        saved = torch.randn(6, 3)
        gone = weakref.ref(saved)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            net(saved)
        del saved
        assert gone() is None
    finally:
        gc.enable()


def test_calls_from_several_threads_take_turns(parallel: Parallel) -> None:
    net = parallel(nn.Linear(3, 2))
    batches = [torch.randn(5, 3) for _ in range(4)]
    found: dict[int, bool] = {}

    def call(i: int) -> None:
        with torch.no_grad():
            expected = net.module(batches[i])
            found[i] = all(torch.equal(net(batches[i]), expected) for _ in range(20))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == dict.fromkeys(range(4), True)
