"""Rule 9, and the weights: gradients of all shards together."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composefit import Gather, Mean, SingleDevice, Strategy, Sum, ThreadDataParallel
from composefit.lockstep import gradients
from tests.lockstep.steps import data, every_strategy, linear, module, trainer

Batch = tuple[Tensor, Tensor]

CUTS: dict[str, tuple[Callable[[], Strategy], dict[str, Any]]] = {
    "whole": (lambda: SingleDevice("cpu"), {}),
    "lanes": (lambda: SingleDevice("cpu", 3), {}),
    "threads": (lambda: ThreadDataParallel(3), {}),
    "time": (lambda: SingleDevice("cpu"), {"microbatch_size": 2}),
    "both": (lambda: ThreadDataParallel(2), {"microbatch_size": 2}),
    "accumulated": (lambda: SingleDevice("cpu", 2), {"accumulate_grad_batches": 2}),
}
every_cut = pytest.mark.parametrize(("strategy", "options"), CUTS.values(), ids=CUTS)


# -- weights ---------------------------------------------------------------------------------------
# Each gives the loss as a step writes it, and its value for a batch that is whole.


def samples(net: nn.Module, x: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
    loss = net(x).square().mean()
    return loss, loss


def token_mean(net: nn.Module, x: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
    total = (net(x) * mask).square().sum()
    return Mean(total, mask.sum()), total / mask.sum()


def token_mean_of_a_library(net: nn.Module, x: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
    mean = (net(x) * mask).square().sum() / mask.sum()  # NaN where there is no token
    return Mean.of(mean, mask.sum()), mean


def total(net: nn.Module, x: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
    loss = net(x).square().sum()
    return Sum(loss), loss


def all_together(net: nn.Module, x: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
    h = net(x)
    masked, exps, squares, plain = (
        (h * mask).square().sum(),
        h.exp().sum(),
        h.square().sum(),
        h.sin().mean(),
    )
    # Each keeps its own denominator; 1.5 boxes in a row.
    ours = Mean(masked, mask.sum()) - 0.1 * Mean(exps, 1.5 * len(x)) + Sum(squares) / 50 + plain
    value = masked / mask.sum() - 0.1 * exps / (1.5 * len(x)) + squares / 50 + plain
    return ours, value


@every_cut
@pytest.mark.parametrize(
    "loss", [samples, token_mean, token_mean_of_a_library, total, all_together]
)
def test_every_kind_of_loss_is_that_of_the_whole_batch(
    loss: Callable[..., tuple[Any, Tensor]],
    strategy: Callable[[], Strategy],
    options: dict[str, Any],
) -> None:
    def step(self: Any, batch: Batch) -> Iterator[Any]:
        for _ in range(2):
            seen.append((yield {"net": loss(self.net, *batch)[0]})["net"])

    seen: list[Tensor] = []
    expected = linear(3, 3)
    net = module(step, net=copy.deepcopy(expected))
    x, mask = data(11, 3), data(11, 3, seed=2) > 0
    mask[:4] = False  # shards without a token among them
    values = []
    for _ in range(2):
        value = loss(expected, x, mask)[1]
        found = torch.autograd.grad(value, list(expected.parameters()))
        values.append(value.detach())
        with torch.no_grad():
            for p, g in zip(expected.parameters(), found, strict=True):
                p -= 0.1 * g
    cuts = [7, 4] if "accumulate_grad_batches" in options else [11]
    batches = list(zip(x.split(cuts), mask.split(cuts), strict=True))
    trainer(strategy(), **options).step(net, batches)
    shards = len(seen) // 2
    torch.testing.assert_close(seen[shards - 1], values[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[-1], values[1], rtol=1e-12, atol=1e-12)
    for p, q in zip(net.net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


def test_a_mean_over_nothing_at_all_raises() -> None:
    net = module(lambda self, x: Mean(self.net(x).sum() * 0, 0))
    for strategy in (SingleDevice("cpu"), SingleDevice("cpu", 3)):
        with pytest.raises(ValueError, match="a mean over nothing"):
            trainer(strategy).step(net, [data(6, 3)])


@pytest.mark.parametrize(
    ("loss", "alone", "several"),
    [(samples, 1, 1), (total, 1, 1), (token_mean, 1, 1), (all_together, 1, 3)],
)
def test_only_a_denominator_unknown_until_all_have_run_costs_a_backward(
    loss: Callable[..., Any], alone: int, several: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = 0
    differentiate = gradients.differentiate

    def counting(*arguments: Any) -> Any:
        nonlocal walks
        walks += 1
        return differentiate(*arguments)

    monkeypatch.setattr(gradients, "differentiate", counting)
    net = module(lambda self, batch: loss(self.net, *batch)[0], net=linear(3, 3))
    batch = data(6, 3), torch.ones(6, 3)
    for shards, expected in ((1, alone), (3, 3 * several)):
        walks = 0
        trainer(SingleDevice("cpu", shards)).step(net, [batch])
        assert walks == expected


def test_a_large_number_of_uneven_shards_is_still_the_whole() -> None:
    net = module(lambda self, x: self.net(x).square().mean())
    expected, x = linear(3, 2), data(101, 3)
    found = torch.autograd.grad(expected(x).square().mean(), list(expected.parameters()))
    trainer(SingleDevice("cpu", 7), microbatch_size=2).step(net, [x])
    for p, q, g in zip(net.net.parameters(), expected.parameters(), found, strict=True):
        torch.testing.assert_close(p, q - 0.1 * g, rtol=1e-12, atol=1e-12)


# -- graphs that are held --------------------------------------------------------------------------


class _Token:
    """Alive as long as a node of a graph."""


class _Alive:
    """Counts graphs: those whose nodes are alive, and those whose saved tensors are."""

    def __init__(self) -> None:
        self.nodes: weakref.WeakSet[_Token] = weakref.WeakSet()
        self.tensors: weakref.WeakSet[_Token] = weakref.WeakSet()
        self.seen: list[tuple[int, int]] = []

    def forward(self, net: nn.Module, x: Tensor) -> Tensor:
        """`net` in a graph that is counted while it is there."""

        class Marked(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, h: Tensor) -> Tensor:
                ctx.token = _Token()
                self.nodes.add(ctx.token)
                return h.clone()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                return gradient

        def pack(tensor: Tensor) -> tuple[Tensor, _Token]:
            token = _Token()
            self.tensors.add(token)
            return tensor, token

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]):
            return Marked.apply(net(x)).exp()

    def look(self) -> None:
        self.seen.append((len(self.nodes), len(self.tensors)))


def _returns(self: Any, x: Tensor) -> Any:
    self.alive[0].look()
    return self.alive[0].forward(self.net, x).mean()


def _returns_with_a_variable(self: Any, x: Tensor) -> Any:
    self.alive[0].look()
    h = self.alive[0].forward(self.net, x)
    loss = h.mean()
    return {"loss": loss}


def _yields(self: Any, x: Tensor) -> Any:
    self.alive[0].look()
    yield {"net": self.alive[0].forward(self.net, x).mean()}
    self.alive[0].look()
    yield {"net": self.alive[0].forward(self.net, x).mean()}


def _returns_a_mean(self: Any, x: Tensor) -> Any:
    self.alive[0].look()
    h = self.alive[0].forward(self.net, x)
    return Mean(h.sum(), len(x)) + 0.1 * Mean(h.square().sum(), 1.5)


HOLDERS = [_returns, _returns_with_a_variable, _yields, _returns_a_mean]


@pytest.mark.parametrize("step", HOLDERS)
@pytest.mark.parametrize(
    "options",
    [{"microbatch_size": 1}, {"accumulate_grad_batches": 8}],
    ids=["micro-batches", "accumulation"],
)
def test_one_graph_at_a_time_is_held(step: Callable[..., Any], options: dict[str, Any]) -> None:
    net = module(step)
    alive = _Alive()
    net.alive = [alive]  # in a list: replicas share it
    batches = [data(8, 3)] if "microbatch_size" in options else [data(1, 3)] * 8
    run = trainer(**options)
    gc.disable()  # what only the collector frees would not be free in time
    try:
        for _ in range(2):
            run.step(net, batches)
    finally:
        gc.enable()
    assert len(alive.seen) == (32 if step is _yields else 16)
    assert set(alive.seen) == {(0, 0)}
    alive.look()
    assert alive.seen[-1] == (0, 0)


@every_strategy
@pytest.mark.parametrize("step", HOLDERS)
def test_after_a_step_no_graph_is_left(
    step: Callable[..., Any], strategy: Callable[[], Strategy]
) -> None:
    net = module(step)
    alive = _Alive()
    net.alive = [alive]
    run = trainer(strategy())
    run.step(net, [data(6, 3)])
    alive.look()
    assert alive.seen[-1] == (0, 0)


def test_a_generators_variables_keep_their_graphs_over_a_yield() -> None:
    # What a user can see in memory: the graph is one's own as long as one holds it.
    alive = _Alive()

    def step(self: Any, x: Tensor) -> Any:
        h = alive.forward(self.net, x)
        yield {"net": h.mean()}
        alive.look()
        del h

    trainer(microbatch_size=1).step(module(step), [data(4, 3)])
    assert [nodes for nodes, _ in alive.seen] == [4, 3, 2, 1]


def test_after_a_gather_every_graph_is_held_until_the_barrier() -> None:
    alive = _Alive()

    def step(self: Any, x: Tensor) -> Any:
        h, _ = yield Gather(alive.forward(self.net, x))
        alive.look()
        yield {"net": h.mean()}

    trainer(microbatch_size=1).step(module(step), [data(4, 3)])
    assert [nodes for nodes, _ in alive.seen] == [4] * 4
    alive.look()
    assert alive.seen[-1] == (0, 0)
