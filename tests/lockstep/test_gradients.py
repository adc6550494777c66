"""Rule 1: what is changed in place is a dense tensor of its own with its parameter's strides."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Adam

from composefit import SingleDevice, Strategy
from composefit.lockstep import gradients
from tests.lockstep.steps import F64, data, every_strategy, linear, module, same, trainer, weights


class Weights(nn.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for i, (name, shape) in enumerate(shapes.items()):
            self.register_parameter(name, Parameter(data(*shape, seed=10 + i)))


def by_hand(
    net: nn.Module, loss: Callable[[Any, Tensor], Tensor], x: Tensor, **options: Any
) -> None:
    """Three steps of the loop that one writes: `.grad`, clipped, added to, stepped."""
    optimizer = SGD(net.parameters(), lr=0.1, **options)
    for _ in range(3):
        optimizer.zero_grad()
        loss(net, x).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()


def check_against_hand(
    net: nn.Module, loss: Callable[[Any, Tensor], Tensor], strategy: Strategy
) -> None:
    x = data(7, 3)
    expected = copy.deepcopy(net)
    by_hand(expected, loss, x, momentum=0.9)
    before = weights(net)
    ours = module(
        lambda self, x: loss(self.net, x), lambda p: SGD(p, lr=0.1, momentum=0.9), net=net
    )
    run = trainer(strategy, gradient_clip_val=0.5)
    for _ in range(3):
        run.step(ours, [x])
    for p, q, start in zip(net.parameters(), expected.parameters(), before, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        assert (p - start).abs().max() > 1e-3


@every_strategy
def test_parameters_that_are_added_get_a_gradient_each(strategy: Callable[[], Strategy]) -> None:
    # The engine hands one buffer to both; changed in place twice it is doubly clipped and summed.
    def loss(net: Any, x: Tensor) -> Tensor:
        return (x @ (net.a + net.b)).square().mean()

    check_against_hand(Weights(a=(3, 2), b=(3, 2)), loss, strategy())


@every_strategy
def test_tied_parameters_sum_their_uses(strategy: Callable[[], Strategy]) -> None:
    def loss(net: Any, x: Tensor) -> Tensor:
        h = x @ net.a
        return (h @ net.a.T + net.b + net.b.flip(0)).square().mean()

    check_against_hand(Weights(a=(3, 2), b=(3,)), loss, strategy())


@every_strategy
def test_an_expanded_gradient_can_be_added_to(strategy: Callable[[], Strategy]) -> None:
    # The gradient of a sum is one number, expanded: an in-place sum into it raises or is wrong.
    def loss(net: Any, x: Tensor) -> Tensor:
        return net.a.sum() * x.mean() + net.b.square().sum() * 0.1

    check_against_hand(Weights(a=(3, 2), b=(3,)), loss, strategy())


@every_strategy
def test_overlapping_views_of_one_buffer_do_not_share_it(strategy: Callable[[], Strategy]) -> None:
    # The backward of cat (of constant_pad_nd, too, before torch 2.13) gives views of what it was
    # given: here of one buffer, which `whole` gets as it is. `left` and `right` lie in it, apart.
    def loss(net: Any, x: Tensor) -> Tensor:
        gap = torch.zeros(2, dtype=F64)
        w = net.whole + torch.cat([gap, net.left, gap, net.right])
        return (x[:, :1] * w - 1).square().mean()

    check_against_hand(Weights(whole=(8,), left=(2,), right=(2,)), loss, strategy())


def test_channels_last_gradients_take_their_parameters_strides() -> None:
    # A fused optimizer goes through memory and pairs numbers of different places otherwise.
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    expected = copy.deepcopy(net)
    optimizer = Adam(expected.parameters(), lr=0.05, fused=True)
    for _ in range(5):
        optimizer.zero_grad()
        expected(x).square().mean().backward()
        optimizer.step()
    ours = module(
        lambda self, x: self.net(x).square().mean(),
        lambda p: Adam(p, lr=0.05, fused=True),
        net=net,
    )
    run = trainer()
    for _ in range(5):
        run.step(ours, [x])
    assert same(net, expected)


class _Keeps(torch.autograd.Function):
    """Hands out a gradient that it keeps as well."""

    kept: Tensor

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Keeps.kept


@pytest.mark.parametrize("shards", [1, 3])
def test_a_gradient_that_a_function_keeps_is_not_overwritten(shards: int) -> None:
    _Keeps.kept = torch.ones(2, 3, dtype=F64)
    ours = module(lambda self, x: _Keeps.apply(self.net.weight), net=linear(3, 2, bias=False))
    trainer(SingleDevice("cpu", shards), gradient_clip_val=0.01).step(ours, [data(6, 3)])
    assert torch.equal(_Keeps.kept, torch.ones(2, 3, dtype=F64))


class _Saves(torch.autograd.Function):
    """Its gradient is a tensor that autograd holds, and no Python variable."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        mean = x.mean(0).expand_as(weight).contiguous()
        ctx.save_for_backward(mean)
        return (weight * mean).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mean,) = ctx.saved_tensors
        return mean, None


def test_a_gradient_that_autograd_holds_is_not_overwritten() -> None:
    weight = Parameter(data(2, 3))
    loss = _Saves.apply(weight, data(6, 3))
    expected = data(6, 3).mean(0).expand(2, 3)
    for _ in range(2):  # the graph kept in between
        found = gradients.differentiate([loss], [torch.ones_like(loss)], [weight], True)
        (owned,) = gradients.own(found, [weight])
        assert torch.equal(owned, expected)
        owned.mul_(0)


def test_what_a_backward_starts_with_is_not_overwritten() -> None:
    # The loss hands it to the bias as its gradient, and the driver keeps it for the next step.
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = Parameter(torch.ones((), dtype=F64))

    net = module(lambda self, x: self.net.bias + x.mean(), net=Scale())
    run = trainer(gradient_clip_val=0.5)
    for _ in range(3):
        run.step(net, [data(6, 3)])
    # The norm is 1 each time, clipped to a half (torch adds 1e-6 to the norm).
    moved = 3 * 0.1 * 0.5 / (1 + 1e-6)
    assert net.net.bias.item() == pytest.approx(1 - moved, rel=1e-12)


def test_what_is_its_own_already_is_not_copied() -> None:
    weight = Parameter(data(2, 3))
    loss = (data(4, 3) @ weight.T).square().mean()
    found = gradients.differentiate([loss], [torch.ones_like(loss)], [weight], False)
    address = found[0].data_ptr()
    (owned,) = gradients.own(found, [weight])
    assert owned.data_ptr() == address


def _mixed_graph() -> tuple[list[Tensor], list[Tensor]]:
    w, v, unused = (Parameter(data(3, 3, seed=s)) for s in range(3))
    h = torch.tanh(data(4, 3) @ w)
    return [h @ v, (h * w.sum()).sum()], [w, v, h, unused]


@pytest.mark.parametrize("retain_graph", [True, False])
def test_the_direct_way_into_the_engine_equals_autograd_grad(
    retain_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gradients._run_backward is not None
    found = []
    for direct in (True, False):
        if not direct:
            monkeypatch.setattr(gradients, "_run_backward", None)
        outputs, inputs = _mixed_graph()
        cotangents = [data(*o.shape, seed=5) for o in outputs]
        found.append(gradients.differentiate(outputs, cotangents, inputs, retain_graph))
        if retain_graph:
            gradients.differentiate(outputs, cotangents, inputs, False)
        with pytest.raises(RuntimeError, match="second time"):
            gradients.differentiate(outputs, cotangents, inputs, False)
    outputs, inputs = _mixed_graph()
    cotangents = [data(*o.shape, seed=5) for o in outputs]
    expected = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    for one in found:
        assert one[3] is expected[3] is None
        assert all(map(torch.equal, one[:3], expected[:3]))


def test_outputs_without_a_graph_contribute_nothing() -> None:
    w = Parameter(data(3))
    outputs = [torch.ones((), dtype=F64), w.sum()]
    ones = [torch.ones((), dtype=F64)] * 2
    (found,) = gradients.differentiate(outputs, ones, [w], False)
    assert torch.equal(found, torch.ones(3, dtype=F64))
    assert gradients.differentiate(outputs[:1], ones[:1], [w], False) == (None,)
    assert gradients.differentiate([w.sum()], ones[:1], [], False) == ()


def test_sparse_and_missing_gradients_add_up() -> None:
    table = Parameter(data(5, 2))
    dense = Parameter(data(2))
    indices = torch.tensor([[0, 3]])

    def sparse(value: float) -> Tensor:
        values = torch.full((2, 2), value, dtype=F64)
        return torch.sparse_coo_tensor(indices, values, (5, 2), check_invariants=True)

    total = gradients.own([sparse(1.0), None], [table, dense])
    gradients.add_(total, [sparse(2.0), torch.ones(2, dtype=F64)], [table, dense])
    gradients.add_(total, [None, torch.ones(2, dtype=F64)], [table, dense])
    gradients.scale_(total, 0.5)
    expected = torch.zeros(5, 2, dtype=F64)
    expected[[0, 3]] = 1.5
    assert total[0].is_sparse and torch.equal(total[0].to_dense(), expected)
    assert torch.equal(total[1], torch.ones(2, dtype=F64))
    assert torch.equal(gradients.values(total)[0], torch.full((2, 2), 1.5, dtype=F64))


def test_a_summand_that_comes_later_is_made_its_own() -> None:
    # The first shard did not reach the parameter: what the second gives is the start of a sum.
    weight, held = Parameter(data(2, 3)), torch.ones(2, 3, dtype=F64)
    total: gradients.Gradients = [None]
    gradients.add_(total, [held], [weight])
    gradients.add_(total, [torch.ones(2, 3, dtype=F64)], [weight])
    assert torch.equal(held, torch.ones(2, 3, dtype=F64))
    assert torch.equal(total[0], torch.full((2, 3), 2.0, dtype=F64))
