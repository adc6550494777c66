"""Threads on shared parameters: each way in which plain torch goes wrong there, one by one."""

import copy
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from composefit import SingleDevice, Sum, ThreadDataParallel
from composefit.strategies.thread_data_parallel import usable_cores
from tests.lockstep.steps import data, linear, module, same, trainer, weights

pytestmark = pytest.mark.filterwarnings(
    # torch's old weight norm, which is tested here because it is old.
    "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"
)


def by_hand(net: nn.Module, loss: Callable[..., Tensor], x: Tensor, steps: int = 2) -> nn.Module:
    """The parameters after plain SGD on the whole batch."""
    net = copy.deepcopy(net)
    for _ in range(steps):
        found = torch.autograd.grad(loss(net, x), list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), found, strict=True):
                p -= 0.1 * g
    return net


def check(net: nn.Module, loss: Callable[..., Tensor], threads: int = 3) -> None:
    """Two steps in threads, against the same by hand."""
    x = data(7, 3)
    expected = by_hand(net, loss, x)
    ours = module(lambda self, x: loss(self.net, x), net=net)
    run = trainer(ThreadDataParallel(threads))
    before = weights(net)
    with run.strategy:
        for _ in range(2):
            run.step(ours, [x])
    for p, q in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)
    moved = max(
        (p - start).abs().max().item() for p, start in zip(net.parameters(), before, strict=True)
    )
    assert moved > 1e-3


def uneven() -> None:
    """Let threads arrive in an order of their own each time."""
    time.sleep(random.Random().uniform(0.0, 0.002))


# -- the table -------------------------------------------------------------------------------------


def test_gradients_are_summed_in_one_order_whoever_comes_first() -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        uneven()
        return (self.net(x) * self.scale).exp().mean()

    results = []
    for strategy in (SingleDevice("cpu", 4), *(ThreadDataParallel(4) for _ in range(6))):
        net = module(step, net=nn.Linear(3, 2).requires_grad_())
        net.net.load_state_dict(linear(3, 2).float().state_dict())
        # Of very different sizes, so that another order of summing rounds otherwise.
        net.scale = 3.0
        trainer(strategy).fit(net, [data(13, 3, seed=s).float() for s in range(5)])
        results.append(net)
    assert all(same(net, results[0]) for net in results[1:])


def test_post_accumulate_hooks_run_once_per_update() -> None:
    seen: list[int] = []
    net = module(lambda self, x: self.net(x).square().mean())
    net.net.weight.register_post_accumulate_grad_hook(lambda p: seen.append(threading.get_ident()))
    trainer(ThreadDataParallel(4)).fit(net, [data(8, 3)] * 3)
    assert seen == [threading.get_ident()] * 3


def test_batch_norm_statistics_are_the_same_in_every_run() -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        uneven()
        return self.net(x).square().mean()

    nets = []
    for _ in range(6):
        net = module(step, net=nn.Sequential(linear(3, 4), nn.BatchNorm1d(4).double()))
        trainer(ThreadDataParallel(4)).fit(net, [data(9, 3, seed=s) for s in range(5)])
        nets.append(net)
    assert all(same(net, nets[0]) for net in nets[1:])
    assert nets[0].net[1].num_batches_tracked == 5


def test_dropout_masks_are_the_same_in_every_run() -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        uneven()
        return F.dropout(self.net(x), 0.5).square().mean()

    nets = []
    for _ in range(6):
        net = module(step)
        trainer(ThreadDataParallel(4)).fit(net, [data(9, 3)] * 5)
        nets.append(net)
    assert all(same(net, nets[0]) for net in nets[1:])


def test_an_in_place_operation_in_one_shard_leaves_the_others_graphs_alone() -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        h = (self.net(x) * x[:, :2]).square().mean()
        yield Sum(x.detach().sum())  # all have their graphs
        if x[0, 0] == 0:
            x.mul_(1)
            h = (self.net(x) * x[:, :2]).square().mean()
        yield {"net": h}

    x = data(6, 3)
    x[:, 0] = torch.arange(6)
    run = trainer(ThreadDataParallel(3))
    run.step(module(step), [x])
    assert run.updates == {"net": 1}


def test_checkpointed_dropout_draws_the_same_mask_again() -> None:
    # Dropout that is linear in x: with another mask the gradient is another one.
    def step(self: Any, x: Tensor) -> Tensor:
        uneven()
        h = checkpoint(lambda x: F.dropout(self.net(x), 0.5), x, use_reentrant=False)
        masks.append((x.clone(), (h.detach() != 0).to(h.dtype) * 2))
        return (h * h.detach()).mean()

    for _ in range(5):
        masks: list[tuple[Tensor, Tensor]] = []
        net = module(step, net=linear(3, 50))
        expected = copy.deepcopy(net.net)
        trainer(ThreadDataParallel(4)).step(net, [data(8, 3)])
        xs, ms = (torch.cat(column) for column in zip(*masks, strict=True))
        h = expected(xs) * ms
        found = torch.autograd.grad((h * h.detach()).mean(), list(expected.parameters()))
        for p, q, g in zip(net.net.parameters(), expected.parameters(), found, strict=True):
            torch.testing.assert_close(p, q - 0.1 * g, rtol=1e-11, atol=1e-12)


def test_functional_call_swaps_parameters_of_its_own_shard_only() -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        swapped = {name: p * x.shape[1] for name, p in net.named_parameters()}
        first = functional_call(net, swapped, (x,))
        return (first + net(x)).square().mean() / 10

    net = nn.Sequential(linear(3, 4), nn.Tanh(), linear(4, 2, seed=1))
    parameters = list(net.parameters())
    for _ in range(5):
        check(net, loss)
    assert all(p is q for p, q in zip(net.parameters(), parameters, strict=True))


@pytest.mark.parametrize("norm", ["weight", "spectral"])
def test_old_weight_and_spectral_norm_work(norm: str) -> None:
    layer = linear(3, 2)
    wrap = getattr(nn.utils, f"{norm}_norm")
    nets = [nn.Sequential(wrap(copy.deepcopy(layer))) for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    for net, strategy in zip(nets, (ThreadDataParallel(3), SingleDevice("cpu")), strict=False):
        ours = module(lambda self, x: self.net(x).square().mean(), net=net)
        trainer(strategy).fit(ours, [data(7, 3)] * 3)
    states = [net.state_dict() for net in nets]
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-11, atol=1e-12)


def test_lazy_modules_must_have_run_once() -> None:
    net = module(lambda self, x: self.net(x).square().mean(), net=nn.LazyLinear(2))
    with pytest.raises((ValueError, RuntimeError), match="run one forward first"):
        trainer(ThreadDataParallel(3)).step(net, [torch.ones(6, 3)])
    net.net(torch.ones(6, 3))
    run = trainer(ThreadDataParallel(3))
    run.step(net, [torch.ones(6, 3)])
    assert run.updates == {"net": 1}


class _Stores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(3, 4), linear(4, 2, seed=1)

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.first(x)
        time.sleep(0.002)  # let the others write theirs
        return self.second(self.h.tanh())


def test_what_a_forward_stores_on_itself_is_its_shards_own() -> None:
    net = _Stores()
    check(net, lambda net, x: net(x).square().mean())


def test_no_optimizer_steps_while_another_shard_is_still_in_its_backward() -> None:
    running = 0
    most = 0
    lock = threading.Lock()

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.02)
            with lock:
                running -= 1
            return gradient

    during: list[int] = []
    net = module(lambda self, x: Slow.apply(self.net(x)).square().mean())
    type(net).on_before_optimizer_step = lambda self, *_: during.append(running)
    trainer(ThreadDataParallel(3)).fit(net, [data(6, 3)] * 3)
    assert during == [0] * 3
    assert most > 1  # and yet backwards run side by side


# -- the threads themselves ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["threads", "intra_op_threads"])
@pytest.mark.parametrize("value", [0, -2, 1.5, "2", True])
def test_a_number_of_threads_that_cannot_be_raises(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=\.\.\.\) expects a positive number, got"):
        ThreadDataParallel(**{name: value})


def test_none_means_the_cores_that_may_be_used() -> None:
    assert ThreadDataParallel().lanes == usable_cores() >= 1
    if hasattr(os, "sched_getaffinity"):
        assert usable_cores() == len(os.sched_getaffinity(0))


def test_it_says_how_a_batch_is_cut() -> None:
    assert ThreadDataParallel(2).describe(32) == "32 = 2 threads x 16"


def test_forward_and_backward_run_side_by_side_in_threads_of_their_own() -> None:
    meeting = threading.Barrier(3, timeout=10)

    class Meets(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            meeting.wait()
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            meeting.wait()
            return gradient

    # If any two of them took turns, the barrier would break.
    net = module(lambda self, x: Meets.apply(self.net(x)).square().mean())
    run = trainer(ThreadDataParallel(3))
    run.fit(net, [data(6, 3)] * 2)
    assert run.updates == {"net": 2}


def test_workers_use_the_intra_op_threads_asked_for_and_the_callers_are_put_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen: list[int] = []

        def step(self: Any, x: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return self.net(x).mean()

        for asked in (1, 3):
            seen.clear()
            net = module(step)
            trainer(ThreadDataParallel(3, intra_op_threads=asked)).fit(net, [data(6, 3)] * 2)
            assert seen == [asked] * 6
            assert torch.get_num_threads() == 2
            strategy = ThreadDataParallel(2, intra_op_threads=asked)
            with pytest.raises(ValueError, match="mine"), strategy:
                raise ValueError("mine")
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("error", [None, ValueError])
def test_no_thread_is_left_after_a_fit(error: type[Exception] | None) -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        if error is not None:
            raise error("mine")
        return self.net(x).mean()

    before = set(threading.enumerate())
    run = trainer(ThreadDataParallel(4))
    if error is None:
        run.fit(module(step), [data(8, 3)] * 2)
    else:
        with pytest.raises(error, match="mine"):
            run.fit(module(step), [data(8, 3)] * 2)
    assert set(threading.enumerate()) == before


def test_threads_are_kept_for_the_run() -> None:
    seen: list[str] = []

    def step(self: Any, x: Tensor) -> Tensor:
        seen.append(threading.current_thread().name)
        return self.net(x).mean()

    trainer(ThreadDataParallel(3), max_epochs=2).fit(module(step), [data(6, 3)] * 3)
    names = {"MainThread", "composefit-lane-1", "composefit-lane-2"}
    assert set(seen) == names and all(seen.count(name) == 6 for name in names)


def test_nothing_of_a_finished_task_is_kept_by_a_worker() -> None:
    with ThreadDataParallel(3) as strategy:
        held = [bytearray(8) for _ in range(3)]
        before = [sys.getrefcount(one) for one in held]
        strategy.run([lambda one=one: None for one in held])
        gc.collect()
        assert [sys.getrefcount(one) for one in held] == before


def test_a_task_given_during_a_wake_too_many_is_not_lost() -> None:
    with ThreadDataParallel(2) as strategy:
        (worker,) = strategy._workers
        ran: list[int] = []

        class Stopped(type(worker)):  # type: ignore[misc]
            """Its `task` is set right after it was found to be none."""

            @property
            def task(self) -> Any:
                found = vars(self).get("task")
                if found is None and not ran and not self.stopping:
                    vars(self)["task"] = lambda: ran.append(1)
                    self.busy = True
                    self.wake()
                return found

            @task.setter
            def task(self, value: Any) -> None:
                vars(self)["task"] = value

        worker.__class__ = Stopped
        worker.wake()
        for _ in range(200):
            if ran:
                break
            time.sleep(0.01)
        assert ran == [1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_task_that_ends_its_thread_is_not_waited_for() -> None:
    def dies() -> None:
        raise ValueError("against the contract")

    with ThreadDataParallel(2) as strategy:
        (worker,) = strategy._workers
        strategy.run([lambda: None, dies])
        assert not worker.busy


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_threads_that_cannot_be_started_leave_all_as_before(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = threading.Thread.start, []

    def fails(self: threading.Thread) -> None:
        if len(started) == 2:
            raise error("no more threads")
        started.append(self)
        start(self)

    before, number = set(threading.enumerate()), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        strategy = ThreadDataParallel(4)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fails)
            with pytest.raises(error, match="no more threads"), strategy:
                pass
        assert len(started) == 2 and set(threading.enumerate()) == before
        assert torch.get_num_threads() == 2
        with strategy:
            assert len(set(threading.enumerate()) - before) == 3
        assert set(threading.enumerate()) == before
    finally:
        torch.set_num_threads(number)


def test_an_error_while_the_threads_are_stopped_puts_the_callers_number_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        strategy = ThreadDataParallel(3)
        strategy.open()
        workers = list(strategy._workers)

        def interrupted() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(workers[0], "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            strategy.close()
        assert torch.get_num_threads() == 2
        for worker in workers:  # all were told to stop
            worker.thread.join(10)
            assert not worker.thread.is_alive()
    finally:
        torch.set_num_threads(number)


def test_a_strategy_in_use_is_refused_to_another_thread() -> None:
    entered, leave = threading.Event(), threading.Event()
    ran: list[str] = []

    def holds() -> None:
        entered.set()
        leave.wait(10)
        ran.append("held")

    with ThreadDataParallel(2) as strategy:
        other = threading.Thread(target=strategy.run, args=([holds, lambda: ran.append("other")],))
        other.start()
        entered.wait(10)
        with pytest.raises(RuntimeError, match=r"already running.*use another strategy object"):
            strategy.run([lambda: None, lambda: None])
        leave.set()
        other.join(10)
        assert sorted(ran) == ["held", "other"]
        strategy.run([lambda: ran.append("mine"), lambda: ran.append("mine")])
    assert ran.count("mine") == 2


def test_a_strategy_is_refused_within_its_own_step() -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        strategy.gradient(lambda net, x: net(x).mean(), self.net, x)
        return self.net(x).mean()

    strategy = ThreadDataParallel(2)
    with pytest.raises(RuntimeError, match=r"already running.*use another strategy object"):
        trainer(strategy).step(module(step), [data(8, 3)])


def test_strategies_in_two_threads_give_the_parametrize_cache_back() -> None:
    cache = parametrize._cache
    entered, leave = threading.Event(), threading.Event()
    with ThreadDataParallel(2) as first, ThreadDataParallel(2) as second:

        def holds() -> None:
            entered.set()
            leave.wait(10)

        other = threading.Thread(target=first.run, args=([holds, lambda: None],))

        def overlaps() -> None:
            leave.set()
            other.join(10)
            refused.append(parametrize._cache is not cache)

        refused: list[bool] = []
        other.start()
        entered.wait(10)
        second.run([overlaps, lambda: None])  # begins within the first's run, ends after it
        assert refused == [True]
    assert parametrize._cache is cache


# -- Ctrl-C ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Started in the background, a process ignores Ctrl-C, and Python leaves it at that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ctrl_c() -> None:
    """As the terminal sends it: to the main thread, whatever that waits for."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


def interrupting(where: int, log: list[str]) -> Callable[..., Iterator[Any]]:
    """A step in which the shard of this row sends Ctrl-C to the process, once."""

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        row = int(x[0, 0])
        try:
            yield {"net": self.net(x).square().mean()}
            if row == where and not log:
                time.sleep(0.05)  # from here on the calling thread waits, where it is another one
                log.append("sent")
                ctrl_c()
                time.sleep(0.05)
                log.append("worked on")
            yield {"net": self.net(x).square().mean()}
        finally:
            log.append(f"closed {row}")

    return step


def rows() -> Tensor:
    x = data(6, 3)
    x[:, 0] = torch.arange(6)
    return x


@pytest.mark.parametrize("where", [0, 2, 4])
def test_an_interrupt_during_a_hand_over_waits_for_all_shards(where: int) -> None:
    log: list[str] = []
    net, run = module(interrupting(where, log)), trainer(ThreadDataParallel(3))
    before = set(threading.enumerate())
    with run.strategy:
        workers = set(threading.enumerate()) - before
        with pytest.raises(KeyboardInterrupt):
            run.step(net, [rows()])
        # From a worker's code it reaches the main thread, which waits for that worker.
        assert log[0] == "sent" and ("worked on" in log) == (where != 0)
        if where:
            assert log.index("worked on") < log.index(f"closed {where}")
        assert sorted(line for line in log if "closed" in line) == [
            "closed 0",
            "closed 2",
            "closed 4",
        ]
        assert run.updates == {"net": 1}
        assert all(worker.is_alive() for worker in workers) and len(workers) == 2
        assert all(p.grad is None for p in net.parameters())
        run.step(net, [rows()])
        assert run.updates == {"net": 3}
    assert set(threading.enumerate()) == before


def test_run_returns_only_when_every_task_has_ended_interrupted_or_not() -> None:
    ended: list[str] = []

    def interrupts() -> None:
        time.sleep(0.05)  # the calling thread waits by then
        ctrl_c()
        time.sleep(0.05)
        ended.append("worker")

    with ThreadDataParallel(2) as strategy:
        with pytest.raises(KeyboardInterrupt):
            strategy.run([lambda: ended.append("caller"), interrupts])
        assert ended == ["caller", "worker"]
        strategy.run([lambda: ended.append("caller"), lambda: ended.append("worker")])
        assert sorted(ended) == ["caller", "caller", "worker", "worker"]


def test_interrupts_at_any_time_leave_the_threads_working() -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        for _ in range(2):
            yield {"net": self.net(x).square().mean()}

    net, run = module(step), trainer(ThreadDataParallel(3))
    before = set(threading.enumerate())
    interrupts = 0
    with run.strategy:
        workers = set(threading.enumerate()) - before
        run.step(net, [rows()])
        for number in range(15):
            timer = threading.Timer(0.0003 * (number + 1), ctrl_c)
            try:
                timer.start()
                while timer.is_alive():
                    run.step(net, [rows()])
                time.sleep(0.01)
            except KeyboardInterrupt:
                interrupts += 1
            timer.join()
            assert all(worker.is_alive() for worker in workers)
            done = run.updates["net"]
            run.step(net, [rows()])
            assert run.updates["net"] == done + 2
    assert interrupts == 15
    assert set(threading.enumerate()) == before
