"""Rules 5, 6, 8 and 10: agreement of the shards, and what they may write."""

import copy
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from composefit import (
    Callback,
    Gather,
    LoopModule,
    Mean,
    Once,
    SingleDevice,
    Strategy,
    ThreadDataParallel,
)
from tests.lockstep.steps import (
    F64,
    data,
    every_strategy,
    linear,
    module,
    same,
    several_shards,
    trainer,
    weights,
)

# -- rule 10: shards that disagree -----------------------------------------------------------------


def disagreeing(first: Callable[..., Any], others: Callable[..., Any]) -> Callable[..., Any]:
    """A step that runs `first` in the shard of row 0, and `others` elsewhere."""

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield from (first if x[0, 0] == 0 else others)(self, x)

    return step


def _a(self: Any, x: Tensor) -> Iterator[Any]:
    yield {"a": self.a(x).mean()}


def _b(self: Any, x: Tensor) -> Iterator[Any]:
    yield {"b": self.b(x).mean()}


def _both(self: Any, x: Tensor) -> Iterator[Any]:
    yield {"a": self.a(x).mean(), "b": self.b(x).mean()}


def _ends(self: Any, x: Tensor) -> Iterator[Any]:
    yield from ()


def _reduces(self: Any, x: Tensor) -> Iterator[Any]:
    yield Mean(x.sum(), 1)


def _gathers(self: Any, x: Tensor) -> Iterator[Any]:
    yield Gather(x)


def _gathers_a_column(self: Any, x: Tensor) -> Iterator[Any]:
    yield Gather(x[:, :1])


def _runs_once(self: Any, x: Tensor) -> Iterator[Any]:
    yield Once(print)


@several_shards
@pytest.mark.parametrize(
    ("first", "others", "words"),
    [
        (_a, _b, ["yielded {'a': loss}", "yielded {'b': loss}"]),
        (_a, _both, ["yielded {'a': loss}", "yielded {'a': loss, 'b': loss}"]),
        (_a, _ends, ["yielded {'a': loss}", "ended"]),
        (_ends, _a, ["ended", "yielded {'a': loss}"]),
        (_gathers, _gathers_a_column, ["yielded Gather((2, 3))", "yielded Gather((2, 1))"]),
        (_reduces, _runs_once, ["yielded Mean(", "yielded Once(print)"]),
    ],
)
def test_shards_that_disagree_raise_with_each_ones_yield(
    first: Callable[..., Any],
    others: Callable[..., Any],
    words: list[str],
    strategy: Callable[[], Strategy],
) -> None:
    x = data(6, 3)
    x[:, 0] = torch.arange(6)
    net = module(disagreeing(first, others), a=linear(3, 2), b=linear(3, 2, seed=1))
    before = weights(net)
    with pytest.raises(RuntimeError, match="the shards of this step disagree") as caught:
        trainer(strategy()).step(net, [x])
    lines = str(caught.value).splitlines()[1:4]
    for i, line in enumerate(lines):
        body, said = (first, words[0]) if i == 0 else (others, words[1])
        assert line.startswith(f"  shard {i} ({__file__}:") and said in line
        if said != "ended":
            assert f":{body.__code__.co_firstlineno + 1})" in line
    assert "value = yield Mean(total, weight)" in str(caught.value)
    assert all(map(torch.equal, weights(net), before))


@several_shards
def test_shards_with_different_numbers_of_effects_disagree(
    strategy: Callable[[], Strategy],
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        for _ in range(len(x)):
            yield {"net": self.net(x).square().mean()}

    with pytest.raises(RuntimeError, match="disagree"):
        trainer(strategy()).step(module(step), [data(7, 3)])


# -- rule 5: buffers -------------------------------------------------------------------------------


class Normed(nn.Module):
    """BatchNorm on float64, and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=F64)
        self.out = linear(3, 2)
        self.register_buffer("queue", torch.zeros(4, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


@pytest.mark.parametrize("yields", [1, 2])
@pytest.mark.parametrize(
    ("strategy", "options", "sizes"),
    [
        (lambda: SingleDevice("cpu", 3), {}, [3, 2, 2]),
        (lambda: ThreadDataParallel(3), {}, [3, 2, 2]),
        (lambda: SingleDevice("cpu"), {"microbatch_size": 3}, [3, 2, 2]),
    ],
    ids=["lanes", "threads", "time"],
)
def test_statistics_are_the_weighted_mean_of_the_shards_changes(
    strategy: Callable[[], Strategy], options: dict[str, Any], sizes: list[int], yields: int
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        for _ in range(yields):
            yield {"net": self.net(x).square().mean()}

    net, x = module(step, net=Normed()), data(7, 3) + 2
    mean, var = torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)
    for _ in range(2):
        # Every shard starts from the step's statistics, in space and in time.
        moved = []
        for part in x.split(sizes):
            m, v = mean, var
            for _ in range(yields):
                m = 0.9 * m + 0.1 * part.mean(0)
                v = 0.9 * v + 0.1 * part.var(0)
            moved.append((m, v, len(part)))
        mean = sum(m * n for m, _, n in moved) / 7
        var = sum(v * n for _, v, n in moved) / 7
    run = trainer(strategy(), **options)
    for _ in range(2):
        run.step(net, [x])
    norm = net.net.norm
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, var, rtol=1e-12, atol=1e-12)
    assert norm.num_batches_tracked == 2 * yields


@several_shards
def test_a_buffer_that_shards_write_differently_raises_before_the_update(
    strategy: Callable[[], Strategy],
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        self.net.queue[: len(x)] = x[:, 0]
        yield {"net": self.net(x).square().mean()}

    net = module(step, net=Normed())
    before = copy.deepcopy(net)
    with pytest.raises(RuntimeError, match=r"buffer 'net\.queue'.*`yield from Once\("):
        trainer(strategy()).step(net, [data(6, 3)])
    assert same(net, before)


@every_strategy
def test_a_buffer_that_all_shards_write_alike_is_taken_over(
    strategy: Callable[[], Strategy],
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        self.net.queue += 1
        yield {"net": self.net(x).square().mean()}
        self.net.queue += 1

    net = module(step, net=Normed())
    run = trainer(strategy())
    for _ in range(2):
        run.step(net, [data(6, 3)])
    assert torch.equal(net.net.queue, torch.full((4,), 4.0, dtype=F64))


@several_shards
def test_a_buffer_written_after_the_last_yield_is_checked_too(
    strategy: Callable[[], Strategy],
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield {"net": self.net(x).square().mean()}
        self.net.queue[0] = x[0, 0]

    net = module(step, net=Normed())
    with pytest.raises(RuntimeError, match=r"buffer 'net\.queue'"):
        trainer(strategy()).step(net, [data(6, 3)])
    assert not net.net.queue.any()


@several_shards
def test_declared_running_statistics_merge_as_means(strategy: Callable[[], Strategy]) -> None:
    class Centre(nn.Module):
        running_statistics = ("centre",)

        def __init__(self) -> None:
            super().__init__()
            self.out = linear(3, 2)
            self.register_buffer("centre", torch.zeros(3, dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            self.centre += 0.5 * (x.mean(0) - self.centre)
            return self.out(x)

    net, x = module(lambda self, x: self.net(x).square().mean(), net=Centre()), data(7, 3)
    trainer(strategy()).step(net, [x])
    torch.testing.assert_close(net.net.centre, 0.5 * x.mean(0), rtol=1e-12, atol=1e-12)


def test_an_error_in_a_step_leaves_the_owners_buffers_as_they_were() -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        self.net(x)
        raise ValueError("mine")

    net = module(step, net=Normed())
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match="mine"):
        trainer(SingleDevice("cpu", 3)).step(net, [data(6, 3)])
    assert same(net, before)


# -- rule 6: what shards may set -------------------------------------------------------------------


@several_shards
def test_setting_an_attribute_of_the_module_names_once(strategy: Callable[[], Strategy]) -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        self.last = x
        return self.net(x).square().mean()

    net = module(step)
    with pytest.raises(RuntimeError, match=r"self\.last = .*`yield from Once\(self\.method"):
        trainer(strategy()).step(net, [data(6, 3)])
    assert not hasattr(net, "last")


def test_with_one_shard_an_attribute_may_be_set() -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        self.last = x
        return self.net(x).square().mean()

    net, x = module(step), data(6, 3)
    trainer().step(net, [x])
    assert torch.equal(net.last, x)


class Stores(nn.Module):
    """Keeps a value on itself between two parts of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(3, 3), linear(3, 2, seed=1)

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.first(x)
        return self.read()

    def read(self) -> Tensor:
        return self.second(self.h.tanh())


@several_shards
def test_what_a_child_sets_in_its_forward_stays_in_its_shard(
    strategy: Callable[[], Strategy],
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        self.net(x)
        yield Mean(x.sum(), 1)  # every shard has been there
        assert len(self.net.h) == len(x)
        yield {"net": self.net.read().square().mean()}

    net, x = module(step, net=Stores()), data(7, 3)
    expected = copy.deepcopy(net.net)
    found = torch.autograd.grad(expected(x).square().mean(), list(expected.parameters()))
    trainer(strategy()).step(net, [x])
    assert not hasattr(net.net, "h")
    for p, q, g in zip(net.net.parameters(), expected.parameters(), found, strict=True):
        torch.testing.assert_close(p, q - 0.1 * g, rtol=1e-12, atol=1e-12)


@several_shards
def test_appending_to_a_list_reaches_the_owner(strategy: Callable[[], Strategy]) -> None:
    net = module(lambda self, x: None)
    net.outputs = []
    type(net).validation_step = lambda self, x: self.outputs.append(len(x))
    trainer(strategy()).validate(net, [data(7, 3)])
    assert sorted(net.outputs) == [2, 2, 3]


@several_shards
def test_a_metric_is_that_of_all_samples(strategy: Callable[[], Strategy]) -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        self.metric.update(x)
        self.log("mean", self.metric)
        return self.net(x).square().mean()

    net, x = module(step), data(7, 3)
    net.metric = MeanMetric()  # float32, whatever it is given
    net.configure_optimizers = lambda: torch.optim.SGD(net.net.parameters(), lr=0.1)
    run = trainer(strategy())
    run.step(net, [x])
    assert run.logged_metrics["mean"] == pytest.approx(x.mean().item(), rel=1e-6)


@several_shards
def test_attributes_set_between_steps_reach_the_shards(strategy: Callable[[], Strategy]) -> None:
    seen: set[float] = set()

    def step(self: Any, x: Tensor) -> Tensor:
        seen.add(self.factor)
        return self.net(x).square().mean()

    net, run = module(step), trainer(strategy())
    for factor in (1.0, 2.0):
        net.factor = factor
        seen.clear()
        run.step(net, [data(6, 3)])
        assert seen == {factor}


# -- Once ------------------------------------------------------------------------------------------


class Queue(LoopModule):
    """Remembers rows in a buffer, and how often it was asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.net = linear(3, 2)
        self.register_buffer("rows", torch.zeros(0, 3, dtype=F64))
        self.calls = 0
        self.seen: list[Tensor] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

    def remember(self, rows: Tensor) -> int:
        assert not torch.is_grad_enabled() and not rows.requires_grad
        self.rows = torch.cat([self.rows, rows])
        self.calls += 1
        return self.calls

    def training_step(self, x: Tensor) -> Iterator[Any]:
        calls = yield from Once(self.remember, x)
        assert calls == self.calls  # visible in every shard
        self.seen.append(self.rows)
        yield (self.net(self.rows).mean(0) - self.net(x)).square().mean()


@every_strategy
def test_once_writes_for_all_shards_in_sample_order(strategy: Callable[[], Strategy]) -> None:
    net, x = Queue(), data(7, 3)
    run = trainer(strategy())
    run.step(net, [x])
    run.step(net, [x + 1])
    assert torch.equal(net.rows, torch.cat([x, x + 1])) and net.calls == 2
    assert all(len(rows) in (7, 14) for rows in net.seen)
    assert torch.equal(net.seen[-1], net.rows)


@every_strategy
def test_once_gives_a_closure_the_module_itself(strategy: Callable[[], Strategy]) -> None:
    owners: list[object] = []

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        def note(rows: Tensor) -> Tensor:
            owners.append(self)
            self.centre = rows.mean(0)
            return rows * 2

        doubled = yield from Once(note, x, rows=True)
        assert torch.equal(doubled, 2 * x)  # one's own rows of what the function returned
        yield {"net": (self.net(x - self.centre)).square().mean()}

    net, x = module(step), data(7, 3)
    trainer(strategy()).step(net, [x])
    assert owners == [net]
    assert torch.equal(net.centre, x.mean(0))


@several_shards
def test_once_with_rows_checks_their_number(strategy: Callable[[], Strategy]) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        rows = yield from Once(lambda rows: rows[:5], x, rows=True)
        yield {"net": self.net(rows).mean()}

    run = trainer(strategy())
    with pytest.raises(ValueError, match=r"row for each of the 7 rows handed in.*returned 5"):
        run.step(module(step), [data(7, 3)])


@every_strategy
def test_logs_and_draws_of_once_count_once(strategy: Callable[[], Strategy]) -> None:
    drawn: list[Tensor] = []

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        def note(rows: Tensor) -> None:
            self.log("rows", float(len(rows)))
            drawn.append(torch.cat([torch.rand(2), self.random.normal(2).float()]))

        yield from Once(note, x)
        yield {"net": self.net(x).square().mean()}

    run = trainer(strategy())
    run.step(module(step), [data(7, 3)])
    assert run.logged_metrics["rows"] == 7.0
    reference = trainer()
    reference.step(module(step), [data(7, 3)])
    assert torch.equal(drawn[0], drawn[1])


# -- rule 8: streams -------------------------------------------------------------------------------


def _shard_draws(strategy: Strategy, late: int) -> dict[int, Tensor]:
    """What each shard's own stream gives in two visits, by the row that it begins with."""
    draws: dict[int, list[Tensor]] = {}

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        row = int(x[0, 0])
        for _ in range(2):
            if row == late:  # the others draw first, where shards run side by side
                time.sleep(0.02)
            draws.setdefault(row, []).append(torch.rand(3))
            yield {"net": self.net(x).square().mean()}

    x = data(6, 3)
    x[:, 0] = torch.arange(6)
    trainer(strategy, seed=5).step(module(step), [x])
    return {row: torch.cat(parts) for row, parts in draws.items()}


@several_shards
@pytest.mark.parametrize("late", [0, 2, 4])
def test_each_shard_draws_from_a_stream_of_its_own(
    late: int, strategy: Callable[[], Strategy]
) -> None:
    found, expected = _shard_draws(strategy(), late), _shard_draws(SingleDevice("cpu", 3), -1)
    assert sorted(found) == [0, 2, 4]
    assert all(torch.equal(found[row], expected[row]) for row in found)
    numbers = torch.cat(list(found.values()))
    assert len(numbers.unique()) == 18


class Dropping(nn.Module):
    """Dropout in a layer, in attention and in an LSTM, and a draw of the forward's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
        self.lstm = nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x, x)[0] + torch.randn_like(x)
        x, _ = torch.utils.checkpoint.checkpoint(self.lstm, x, use_reentrant=False)
        return torch.utils.checkpoint.checkpoint(self.dropout, x.tanh(), use_reentrant=False)


def test_threads_draw_what_shards_in_turn_draw() -> None:
    nets = []
    for strategy in (SingleDevice("cpu", 4), *(ThreadDataParallel(4) for _ in range(5))):
        net = module(lambda self, x: self.net(x).square().mean(), net=Dropping())
        trainer(strategy).fit(net, [torch.ones(8, 3, 4)] * 3)
        nets.append(net)
    assert all(same(net, nets[0]) for net in nets[1:])
    assert not same(nets[0].net, Dropping())


DRAWS: dict[str, Callable[[], object]] = {
    "random.random": random.random,
    "random.shuffle": lambda: random.shuffle([1, 2, 3]),
    "np.random.rand": lambda: np.random.rand(),
    "np.random.permutation": lambda: np.random.permutation(3),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_global_generators_are_refused_where_shards_run_side_by_side(draw: str) -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        DRAWS[draw]()
        return self.net(x).square().mean()

    net = module(step)
    before = weights(net)
    run = trainer(ThreadDataParallel(3))
    with pytest.raises(RuntimeError, match=r"self\.random\.uniform\(n, \.\.\.\)"):
        run.step(net, [data(6, 3)])
    assert all(map(torch.equal, weights(net), before))
    run.step(net, [data(1, 3)])  # a single shard has them to itself
    trainer(SingleDevice("cpu", 3)).step(module(step), [data(6, 3)])
    assert run.updates == {"net": 1}


def test_own_generators_of_python_and_numpy_are_fine() -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        factor = random.Random(1).random() + np.random.default_rng(1).random()
        return self.net(x).square().mean() * factor

    run = trainer(ThreadDataParallel(3))
    run.step(module(step), [data(6, 3)])
    assert run.updates == {"net": 1}


# -- what only one piece of code may do ------------------------------------------------------------


@several_shards
def test_parameters_written_in_the_step_are_refused(strategy: Callable[[], Strategy]) -> None:
    # BYOL's momentum update at the start of the step: once per shard, silently.
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        with torch.no_grad():
            self.teacher.weight.lerp_(self.net.weight, 0.1)
        yield {"net": self.net(x).mean()}

    net = module(step, net=linear(3, 2), teacher=linear(3, 2, seed=5))
    net.teacher.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"parameter 'teacher\.weight' in each of its shards"):
        trainer(strategy()).step(net, [data(7, 3)])


@several_shards
def test_parameters_written_once_are_none_of_the_shards_doing(
    strategy: Callable[[], Strategy],
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield from Once(lambda: self.teacher.weight.lerp_(self.net.weight, 0.1))
        yield {"net": self.net(x).mean()}
        yield {"net": self.net(x).mean()}

    net = module(step, net=linear(3, 2), teacher=linear(3, 2, seed=5))
    net.teacher.requires_grad_(False)
    expected = net.teacher.weight.lerp(net.net.weight, 0.1)
    trainer(strategy()).step(net, [data(7, 3)])
    assert torch.equal(net.teacher.weight, expected)


def test_draws_of_a_function_that_runs_once_are_no_draws_of_the_shards() -> None:
    # An image pool draws from Python's generator, at the barrier, where nobody runs beside it.
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield from Once(lambda: random.random())
        yield {"net": self.net(x).mean()}

    trainer(ThreadDataParallel(2)).step(module(step), [data(6, 3)])


@every_strategy
def test_what_hooks_draw_does_not_move_the_default_generator(
    strategy: Callable[[], Strategy],
) -> None:
    class Noise(Callback):
        def on_before_optimizer_step(
            self, trainer: Any, module: Any, optimizer: Any, name: str
        ) -> None:
            torch.randn(3)

    before = torch.get_rng_state()
    trainer(strategy(), callbacks=[Noise()]).step(
        module(lambda self, x: self.net(x).mean()), [data(7, 3)]
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_within_itself_is_refused() -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        self.trainer.step(self, [x])
        return self.net(x).mean()

    with pytest.raises(RuntimeError, match="called from within itself"):
        trainer().step(module(step), [data(6, 3)])


@every_strategy
def test_an_exception_that_takes_no_notes_comes_out_as_itself(
    strategy: Callable[[], Strategy],
) -> None:
    class Frozen(Exception):
        def add_note(self, note: str) -> None:
            raise AttributeError("frozen")

    def step(self: Any, x: Tensor) -> Tensor:
        raise Frozen(3)

    with pytest.raises(Frozen):
        trainer(strategy()).step(module(step), [data(6, 3)])
