import weakref
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from composefit.data_parallel import DataParallel
from composefit.strategies import SingleDevice
from tests.data_parallel.conftest import Parallel


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def agree(found: Tensor, expected: Tensor, inputs: list[Tensor], **more: bool) -> None:
    gradients = [torch.autograd.grad(y.square().sum(), inputs, **more) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


class Watched(nn.Module):
    """A linear layer that notes when its weight's gradient is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))
        # No list: of lists each shard has a copy, which comes back when the forward ends.
        self.computed: deque[bool] = deque()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _Watch.apply(self.weight, self.computed))


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, computed):
        ctx.computed = computed
        return x.clone()

    @staticmethod
    def backward(ctx, cotangent):
        ctx.computed.append(True)
        return cotangent, None


def test_only_the_gradients_asked_for_are_computed(parallel: Parallel) -> None:
    critic = parallel(Watched())
    x = torch.randn(5, 3, requires_grad=True)
    loss = critic(x).sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward(inputs=[x], retain_graph=True)
    assert not critic.computed
    torch.autograd.grad(loss, critic.weight, retain_graph=True)
    assert list(critic.computed) == [True] * 2
    loss.backward()
    assert list(critic.computed) == [True] * 4


def test_frozen_parameters_get_no_gradient(parallel: Parallel) -> None:
    inner = net()
    wrapped = parallel(inner)
    inner[0].requires_grad_(False)
    wrapped(torch.randn(5, 3)).sum().backward()
    assert inner[0].weight.grad is None
    assert inner[2].weight.grad is not None
    inner[0].requires_grad_(True)
    wrapped(torch.randn(5, 3)).sum().backward()
    assert inner[0].weight.grad is not None


def test_a_parameter_that_no_shard_reached_keeps_none(parallel: Parallel) -> None:
    inner = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    inner.forward = lambda x: inner["used"](x)
    seen = []
    inner["unused"].weight.register_hook(seen.append)
    loss = parallel(inner)(torch.randn(4, 2)).sum()
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(loss, inner["unused"].weight, retain_graph=True)
    loss.backward()
    assert inner["unused"].weight.grad is None
    assert seen == []


class Expert(nn.Module):
    """Positive samples go one way, the others another."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x[0, 0] > 0)](x)


def test_a_parameter_that_one_shard_reached_gets_its_gradient(parallel: Parallel) -> None:
    x = torch.cat([torch.ones(2, 2), -torch.ones(2, 2)])
    wrapped = parallel(Expert())
    wrapped(x).sum().backward()
    assert [float(e.weight.grad.sum()) for e in wrapped.experts] == [-8.0, 8.0]


def test_gradients_accumulate_in_grad(parallel: Parallel) -> None:
    inner = net()
    wrapped, x = parallel(inner), torch.randn(5, 3)
    wrapped(x).sum().backward()
    once = inner[0].weight.grad.clone()
    wrapped(x).sum().backward()
    torch.testing.assert_close(inner[0].weight.grad, 2 * once)


def test_gradients_have_their_parameters_strides(parallel: Parallel) -> None:
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    parallel(conv)(x).square().sum().backward()
    assert conv.weight.grad.stride() == conv.weight.stride()


def test_parameters_that_are_added_do_not_share_a_gradient(parallel: Parallel) -> None:
    """Autograd hands both the same tensor, which is summed in place."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * (self.a + self.b)

    inner, x = Added(), torch.randn(5, 2)
    agree(parallel(inner)(x), inner(x), [inner.a, inner.b])


def test_tied_and_sparse_parameters(parallel: Parallel) -> None:
    inner = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3), nn.Linear(3, 3))
    inner[2].weight = inner[1].weight
    tokens = torch.randint(5, (7, 2))
    found, expected = parallel(inner, 3)(tokens), inner(tokens)
    for y in (found, expected):
        y.square().sum().backward()
        gradients = [p.grad.to_dense().clone() for p in inner.parameters()]
        if y is found:
            assert inner[0].weight.grad.is_sparse
            first = gradients
            inner.zero_grad()
    torch.testing.assert_close(first, gradients, rtol=1e-12, atol=1e-12)


def test_hooks_on_parameters_see_the_total_once(parallel: Parallel) -> None:
    inner = nn.Linear(1, 1, bias=False)
    totals, accumulated = [], []

    def halve(gradient: Tensor) -> Tensor:
        totals.append(float(gradient))
        return gradient / 2

    inner.weight.register_hook(halve)
    inner.weight.register_post_accumulate_grad_hook(lambda p: accumulated.append(float(p.grad)))
    parallel(inner, 3)(torch.ones(6, 1)).sum().backward()
    assert (totals, accumulated) == ([6.0], [3.0])


def test_a_hook_on_an_output_inside_the_forward_runs_once_per_shard(parallel: Parallel) -> None:
    seen = []

    class Hooked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            out.register_hook(lambda gradient: seen.append(len(gradient)))
            return out

    parallel(Hooked(2, 2))(torch.randn(5, 2)).sum().backward()
    assert sorted(seen) == [2, 3]


def test_several_outputs_of_which_one_is_used(parallel: Parallel) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.a(x), self.b(x), x.argmax(1), self.a(x).detach()

    inner, x = Two(), torch.randn(5, 3)
    outputs = parallel(inner)(x)
    assert [y.requires_grad for y in outputs] == [True, True, False, False]
    outputs[1].sum().backward()
    assert inner.a.weight.grad is None
    torch.testing.assert_close(inner.b.weight.grad[0], x.sum(0))


def test_branches_can_be_walked_one_by_one_without_retaining(parallel: Parallel) -> None:
    inner = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
    inner.forward = lambda x: [layer(x) for layer in inner]
    first, second = parallel(inner)(torch.randn(5, 3))
    first.sum().backward()
    second.sum().backward()
    assert all(layer.weight.grad is not None for layer in inner)


def test_retain_graph_and_its_absence(parallel: Parallel) -> None:
    inner, x = net(), torch.randn(5, 3)
    loss, own = parallel(inner)(x).square().sum(), list(inner.parameters())
    first = torch.autograd.grad(loss, own, retain_graph=True)
    again = torch.autograd.grad(loss, own)
    assert all(map(torch.equal, first, again))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, own)


@pytest.mark.parametrize("retain", [True, False])
def test_a_backward_frees_what_the_shards_saved(parallel: Parallel, retain: bool) -> None:
    saved: list[weakref.ref[Tensor]] = []

    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            hidden = x.detach() * 2
            saved.append(weakref.ref(hidden))
            return self.weight * hidden

    loss = parallel(Saving())(torch.randn(4, 2)).sum()
    assert [tensor() is not None for tensor in saved] == [True, True]
    loss.backward(retain_graph=retain)
    assert [tensor() is not None for tensor in saved] == [retain, retain]


def test_outputs_are_not_kept_twice(parallel: Parallel) -> None:
    shards: list[weakref.ref[Tensor]] = []

    class Last(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            shards.append(weakref.ref(out))
            return out

    out = parallel(Last(2, 3))(torch.randn(4, 2))
    assert out.requires_grad
    assert [tensor() for tensor in shards] == [None, None]


def test_double_backward_is_refused_in_plain_words(parallel: Parallel) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    out = parallel(net())(x).sum()
    with pytest.raises(RuntimeError, match=r"gradients cannot be differentiated again.*penalty"):
        torch.autograd.grad(out, x, create_graph=True)


def test_a_gradient_penalty_inside_the_forward(parallel: Parallel) -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.critic = net()

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.critic(x).sum(), x, create_graph=True)
            return (slope.norm(dim=1) - 1).square()

    inner, x = Penalised(), torch.randn(5, 3)
    found, expected = parallel(inner)(x), inner(x)
    # The last bias has no part in a slope.
    agree(found, expected, list(inner.parameters())[:-1])


def test_outputs_may_be_changed_in_place(parallel: Parallel) -> None:
    inner, x = net(), torch.randn(5, 3)
    found, expected = parallel(inner)(x), inner(x)
    agree(found.mul_(3).add_(1), expected.mul_(3).add_(1), list(inner.parameters()))
    pair = nn.ModuleList([inner])
    pair.forward = lambda x: (inner(x), inner(2 * x))
    for found, expected in zip(parallel(pair)(x), pair(x), strict=True):
        agree(found.mul_(3), expected.mul_(3), list(inner.parameters()), retain_graph=True)


def test_items_of_a_list_may_be_changed_in_place(parallel: Parallel) -> None:
    """The graph of tanh saves what it returns."""
    inner = nn.Linear(2, 2)
    holder = nn.ModuleList([inner])
    holder.forward = lambda items: [inner(item).tanh() for item in items]
    items = [torch.randn(n, 2) for n in (2, 1, 3)]
    found, expected = parallel(holder)(items), holder(items)
    agree(found[0].add_(1), expected[0] + 1, [inner.weight], retain_graph=True)


def test_weights_changed_before_a_backward_are_autograds_error(parallel: Parallel) -> None:
    inner = net()
    loss = parallel(inner)(torch.randn(5, 3, requires_grad=True)).sum()
    with torch.no_grad():
        inner[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as found:
        loss.backward()
    assert "backward of DataParallel(Sequential)" in found.value.__notes__[-1]


def test_tensors_that_are_no_parameters_get_their_gradient(parallel: Parallel) -> None:
    outside = torch.randn(3, requires_grad=True)

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.style = torch.randn(3, requires_grad=True)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.style + outside * (x[0, 0] == first)

    inner, x = Uses(), torch.randn(5, 3)
    first = x[0, 0]  # one shard alone uses the tensor from outside
    found = parallel(inner)(x)
    gradients = torch.autograd.grad(found.sum(), [inner.style, outside])
    torch.testing.assert_close(gradients, (x.sum(0), torch.full((3,), 3.0)))


def test_a_tensor_made_outside_by_a_graph_is_an_error_not_a_wrong_gradient(
    parallel: Parallel,
) -> None:
    inner = nn.Linear(3, 3)
    source = torch.randn(3, requires_grad=True)
    inner.style = source.exp()
    inner.forward = lambda x: F.linear(x, inner.weight) * inner.style
    wrapped = DataParallel(inner, strategy=SingleDevice("cpu", shards=2))
    with pytest.raises(RuntimeError, match="second time"):
        wrapped(torch.randn(5, 3)).sum().backward()


class Noisy(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return self.head(checkpoint(self.body, x, use_reentrant=False))
        return self.head(self.body(x))


def test_activation_checkpointing_draws_the_same_again(parallel: Parallel) -> None:
    inner = Noisy(checkpointed=False)
    wrapped, x, own = parallel(inner), torch.randn(6, 3), list(inner.parameters())
    gradients = []
    for checkpointed in (False, True):
        inner.checkpointed = checkpointed
        torch.manual_seed(5)
        loss = wrapped(x).square().sum()
        wrapped(x)  # draws in between, on other replicas
        gradients.append(torch.autograd.grad(loss, own))
    assert all(map(torch.equal, *gradients))


def test_seeded_training_with_dropout_is_bitwise_the_same(parallel: Parallel) -> None:
    def train() -> list[Tensor]:
        torch.manual_seed(1)
        inner = Noisy(checkpointed=True)
        wrapped = parallel(inner, 4)
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            wrapped(torch.randn(9, 3)).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in inner.parameters()]

    first = train()
    assert all(all(map(torch.equal, first, train())) for _ in range(4))


def test_an_error_in_a_backward_hook_is_the_users_own(parallel: Parallel) -> None:
    def fail(*_: object) -> None:
        raise KeyError("my own")

    inner = net()
    handle = inner[2].register_full_backward_hook(fail)
    wrapped, x = parallel(inner), torch.randn(4, 3)
    loss = wrapped(x).sum()
    with pytest.raises(KeyError, match="my own") as found:
        loss.backward()
    assert "shard 0 of 2 (thread MainThread), backward of DataParallel(Sequential)" in (
        found.value.__notes__
    )
    handle.remove()
    wrapped(x).sum().backward()
    assert inner[0].weight.grad is not None


def test_autocast_backward_agrees_with_the_plain_one(parallel: Parallel) -> None:
    inner, x = net().float(), torch.randn(8, 3, dtype=torch.float32)
    wrapped, own = parallel(inner), list(inner.parameters())
    gradients = []
    for call in (wrapped, inner):
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(x).float().square().sum() + call(x).float().sum()
        gradients.append(torch.autograd.grad(loss, own))
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-2)
    assert all(g.dtype is torch.float32 for g in gradients[0])
