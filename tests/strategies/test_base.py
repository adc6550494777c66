"""What every strategy has by the contract: sessions, and defaults that a new one may keep."""

import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from composefit import SingleDevice, Strategy
from composefit.strategies.base import Strategy as Base
from tests.lockstep.steps import data, linear, module, trainer


class Backwards(Strategy):
    """The smallest strategy there is: two lanes, of which the last goes first."""

    lanes = 2

    def __init__(self) -> None:
        self.calls: list[str] = []

    def open(self) -> None:
        self.calls.append("open")

    def close(self) -> None:
        self.calls.append("close")

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        assert self.calls[-1] == "open"
        for task in reversed(tasks):
            task()


def test_a_strategy_is_a_run_method_and_little_else() -> None:
    nets = []
    strategies: list[Base] = [Backwards(), SingleDevice("cpu", shards=2)]
    for strategy in strategies:
        net = module(lambda self, x: self.net(x).square().mean())
        trainer(strategy).fit(net, [data(7, 3)] * 3)
        nets.append(net)
    # Bitwise: shards are added up in their order, whichever ran first.
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


def test_sessions_nest_and_open_once() -> None:
    strategy = Backwards()
    with strategy, strategy.session(), strategy:
        assert strategy.calls == ["open"]
    assert strategy.calls == ["open", "close"]
    with pytest.raises(ValueError, match="mine"), strategy:
        raise ValueError("mine")
    assert strategy.calls == ["open", "close"] * 2


def test_it_is_closed_after_an_error_in_a_fit() -> None:
    def step(self: object, x: torch.Tensor) -> None:
        raise ValueError("mine")

    strategy = Backwards()
    with pytest.raises(ValueError, match="mine"):
        trainer(strategy).fit(module(step), [data(7, 3)])
    assert strategy.calls == ["open", "close"]
    trainer(strategy).fit(module(lambda self, x: self.net(x).square().mean()), [data(7, 3)])
    assert strategy.calls == ["open", "close"] * 2


def test_a_module_is_placed_in_its_dtype() -> None:
    net = nn.Linear(3, 2)
    Backwards().place(net, torch.float64)
    assert net.weight.dtype is torch.float64
    Backwards().place(net, None)
    assert net.weight.dtype is torch.float64


def test_the_default_sum_keeps_the_order_of_the_lanes() -> None:
    weight = linear(3, 2).weight
    lanes = [[torch.full((2, 3), v, dtype=torch.float64)] for v in (1e16, 1.0, -1e16)]
    (total,) = Backwards().add_up(lanes, [weight])
    assert torch.equal(total, torch.zeros(2, 3, dtype=torch.float64))  # (1e16 + 1) - 1e16


def test_no_thread_is_left_after_any_run() -> None:
    before = threading.active_count()
    trainer(Backwards()).fit(module(lambda self, x: self.net(x).mean()), [data(7, 3)])
    assert threading.active_count() == before
