import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from composefit.data_parallel.arguments import _aligned
from composefit.tree import cut
from tests.data_parallel.conftest import Parallel


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.tensor(1.5))

    def forward(self, *args):
        return self.function(self.weight, *args)


def both(parallel: Parallel, function, *args):
    """What the wrapper gives, and the plain call on the same arguments."""
    net = Function(function)
    return parallel(net, 3)(*args), net(*args)


def agree(found: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((y * weight).sum(), inputs) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_arguments_get_their_gradients_however_nested(parallel: Parallel) -> None:
    x, y, z = (torch.randn(7, 2, requires_grad=True) for _ in range(3))
    nested = {"y": (y, None), "rest": [z + z, "name"]}
    found, expected = both(
        parallel, lambda w, x, more: w * x * more["y"][0] + more["rest"][0].sin(), x, nested
    )
    agree(found, expected, x, y, z)


def test_an_argument_without_dimensions_gets_the_gradient_of_all_shards(parallel: Parallel) -> None:
    x, scale = torch.randn(7, 2, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    found, expected = both(parallel, lambda w, x, scale: w * x * scale.square(), x, scale)
    agree(found, expected, x, scale)


def test_one_argument_given_twice_gets_both_gradients(parallel: Parallel) -> None:
    x = torch.randn(5, 2, requires_grad=True)
    agree(*both(parallel, lambda w, a, b: w * a * b.exp(), x, x), x)


def test_a_list_of_samples_gets_its_gradients_item_by_item(parallel: Parallel) -> None:
    items = [torch.randn(n, 2, requires_grad=True) for n in (3, 1, 4, 2)]
    net = Function(lambda w, items: [w * item.sin() for item in items])
    found, expected = parallel(net, 3)(items), net(items)
    assert [len(item) for item in found] == [3, 1, 4, 2]
    agree(torch.cat(found), torch.cat(expected), *items)


def test_parts_are_matched_to_their_tensors() -> None:
    items, x = [torch.zeros(n, 2) for n in (3, 1, 4)], torch.zeros(3)
    batch = {"x": x, "items": items, "scale": torch.tensor(1.0)}
    found = _aligned(batch, cut(batch, [2, 1]))
    assert [argument.whole is t for argument, t in zip(found, [x, *items], strict=False)] == [
        True
    ] * 4
    assert [[None if p is None else len(p) for p in a.parts] for a in found[:4]] == [
        [2, 1],
        [3, None],
        [1, None],
        [None, 4],
    ]
    assert [p.dim() for p in found[4].parts] == [0, 0]


def test_an_argument_that_only_one_shard_uses_gets_zeros_elsewhere(parallel: Parallel) -> None:
    x, y = torch.tensor([1.0, 1, -1, -1, -1, -1]), torch.randn(6, requires_grad=True)
    found, expected = both(parallel, lambda w, x, y: w * (x + y if x[0] > 0 else x), x, y)
    found.sum().backward()
    assert y.grad.tolist() == [1.5, 1.5, 0, 0, 0, 0]
    assert torch.equal(found[:2], expected[:2])


def test_an_argument_that_nobody_uses_gets_no_gradient(parallel: Parallel) -> None:
    x, y = (torch.randn(4, requires_grad=True) for _ in range(2))
    seen: list[Tensor] = []
    y.register_hook(seen.append)
    found, _ = both(parallel, lambda w, x, y: w * x, x, y)
    found.sum().backward()
    assert x.grad is not None
    assert y.grad is None
    assert seen == []


def test_writing_to_an_argument_is_seen_by_the_loop(parallel: Parallel) -> None:
    x = torch.ones(4)
    saved = (x * torch.ones((), requires_grad=True)).sum()
    net = parallel(Function(lambda w, x: w * x.mul_(2)))
    net(x).sum().backward()
    assert x.tolist() == [2.0] * 4
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_writing_to_an_argument_that_requires_a_gradient_is_an_error(parallel: Parallel) -> None:
    x = torch.ones(4, requires_grad=True) * 1
    net = parallel(Function(lambda w, x: w * F.relu_(x)))
    with pytest.raises(RuntimeError, match=r"Write `x = x\.clone\(\)` at the beginning"):
        net(x)
    with torch.no_grad():
        net(x)


def test_an_argument_changed_before_its_backward_is_an_error(parallel: Parallel) -> None:
    x = torch.ones(4)
    out = parallel(Function(lambda w, x: w * x))(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="shape \\(4,\\), has been modified by an inplace"):
        out.sum().backward()


def test_a_forward_may_differentiate_by_its_own_argument(parallel: Parallel) -> None:
    """Forces from an energy: a leaf that the forward makes is no business of the loop's."""

    def forces(weight: Tensor, positions: Tensor) -> Tensor:
        positions = positions.detach().requires_grad_()
        energy = (weight * positions**3).sum()
        return torch.autograd.grad(energy, positions, create_graph=True)[0] + 0 * positions

    net = Function(forces)
    x = torch.randn(5, 3)
    found, expected = parallel(net)(x), net(x)
    agree(found, expected, net.weight)
