"""Gradients through what shards exchanged: `Gather` and bare reductions, against one device."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from composefit import Gather, Mean, Once, Strategy, Sum, Update
from tests.lockstep.steps import data, linear, module, trainer
from tests.lockstep.test_backward import every_cut

# Each test gives the step, and the same for a batch that is whole: `reference(nets, x)` yields
# {name: loss}, for the optimizers that then step.


def check(
    step: Callable[..., Any],
    reference: Callable[[Any, Tensor], Iterator[dict[str, Tensor]]],
    strategy: Callable[[], Strategy],
    options: dict[str, Any],
    steps: int = 2,
) -> None:
    net = module(step, a=linear(3, 4), b=linear(4, 4, seed=1))
    expected = copy.deepcopy(net)
    before = copy.deepcopy(net)
    run = trainer(strategy(), **options)
    cuts = [7, 4] if "accumulate_grad_batches" in options else [11]
    for number in range(steps):
        x = data(11, 3, seed=number)
        run.step(net, list(x.split(cuts)))
        for losses in reference(expected, x):
            found = {
                name: torch.autograd.grad(
                    loss, list(getattr(expected, name).parameters()), retain_graph=True
                )
                for name, loss in losses.items()
            }
            with torch.no_grad():
                for name, own in found.items():
                    for p, g in zip(getattr(expected, name).parameters(), own, strict=True):
                        p -= 0.1 * g
    for p, q in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)
    for name in ("a", "b"):
        moved = getattr(net, name).weight - getattr(before, name).weight
        assert moved.abs().max() > 1e-3


def info_nce(z: Tensor, everything: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.normalize(z, dim=1) @ F.normalize(everything, dim=1).T, labels)


@every_cut
def test_a_gather_gives_the_gradient_of_the_whole_batch(
    strategy: Callable[[], Strategy], options: dict[str, Any]
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        z = self.b(self.a(x).tanh())
        everything, offset = yield from Gather(z)
        labels = (torch.arange(offset, offset + len(z)) + 1) % len(everything)
        loss = info_nce(z, everything, labels)
        yield {"a": loss, "b": loss}

    def reference(net: Any, x: Tensor) -> Iterator[dict[str, Tensor]]:
        z = net.b(net.a(x).tanh())
        loss = info_nce(z, z, (torch.arange(len(z)) + 1) % len(z))
        yield {"a": loss, "b": loss}

    check(step, reference, strategy, options)


@every_cut
def test_gathers_nest(strategy: Callable[[], Strategy], options: dict[str, Any]) -> None:
    # The second gathers what was computed from the first: backward goes through both.
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        h = self.a(x)
        all_h, _ = yield from Gather(h)
        z = self.b(h - all_h.mean(0)).tanh()
        all_z, _ = yield from Gather(z)
        spread = (all_z - all_z.mean(0)).square().sum()
        yield {"a": (z * all_h.std(0)).square().mean() + Sum(spread / 50 / len(all_z) * len(x))}
        yield {"b": self.b(self.a(x)).square().mean()}

    def reference(net: Any, x: Tensor) -> Iterator[dict[str, Tensor]]:
        h = net.a(x)
        z = net.b(h - h.mean(0)).tanh()
        spread = (z - z.mean(0)).square().sum()
        yield {"a": (z * h.std(0)).square().mean() + spread / 50}
        yield {"b": net.b(net.a(x)).square().mean()}

    check(step, reference, strategy, options)


@every_cut
def test_tuples_are_gathered_together_and_labels_without_a_gradient(
    strategy: Callable[[], Strategy], options: dict[str, Any]
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        z, labels = self.b(self.a(x)), (x[:, 0] > 0).long()
        (all_z, all_labels), offset = yield from Gather((z, labels))
        assert not all_labels.requires_grad and all_labels.dtype is torch.int64
        assert torch.equal(all_labels[offset : offset + len(x)], labels)
        same = labels[:, None] == all_labels[None]
        yield {
            name: ((z @ all_z.T).sigmoid() - same.double()).square().mean() for name in ("a", "b")
        }

    def reference(net: Any, x: Tensor) -> Iterator[dict[str, Tensor]]:
        z, labels = net.b(net.a(x)), (x[:, 0] > 0).long()
        same = labels[:, None] == labels[None]
        loss = ((z @ z.T).sigmoid() - same.double()).square().mean()
        yield {"a": loss, "b": loss}

    check(step, reference, strategy, options)


@every_cut
def test_a_gather_before_and_between_updates(
    strategy: Callable[[], Strategy], options: dict[str, Any]
) -> None:
    # The graph of the first gather goes through `a` alone, which the first update leaves alone.
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        h = self.a(x).tanh()
        all_h, _ = yield from Gather(h)
        yield {"b": (self.b(h) - all_h.mean(0)).square().mean()}
        z = self.b(h)
        all_z, _ = yield from Gather(z)
        yield {"a": (z - all_z.mean(0)).exp().mean() + (h * all_h.sum(0)).mean()}

    def reference(net: Any, x: Tensor) -> Iterator[dict[str, Tensor]]:
        h = net.a(x).tanh()
        yield {"b": (net.b(h) - h.mean(0)).square().mean()}
        z = net.b(h)
        yield {"a": (z - z.mean(0)).exp().mean() + (h * h.sum(0)).mean()}

    check(step, reference, strategy, options)


@every_cut
def test_one_gathered_graph_kept_for_two_updates(
    strategy: Callable[[], Strategy], options: dict[str, Any]
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        z = self.b(self.a(x).detach())
        all_z, _ = yield from Gather(z)
        yield Update({"b": (z - all_z.mean(0)).square().mean()}, retain_graph=True)
        yield {"a": self.a(x).square().mean()}

    def reference(net: Any, x: Tensor) -> Iterator[dict[str, Tensor]]:
        z = net.b(net.a(x).detach())
        yield {"b": (z - z.mean(0)).square().mean()}
        yield {"a": net.a(x).square().mean()}

    check(step, reference, strategy, options)


@every_cut
def test_a_reduced_mean_carries_gradients_to_every_shard(
    strategy: Callable[[], Strategy], options: dict[str, Any]
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        h = self.b(self.a(x))
        mean = yield Mean(h.sum(), h.numel())
        norm = yield from Sum(h.square().sum()) + 0.5 * Mean(h.sum(), 7 * len(h))
        yield {
            "a": 10 * (h - mean).square().mean() / norm,
            "b": Mean((h * mean).square().sum(), h.numel()) + Sum(mean * norm * len(h) / 11),
        }

    def reference(net: Any, x: Tensor) -> Iterator[dict[str, Tensor]]:
        h = net.b(net.a(x))
        mean = h.mean()
        norm = h.square().sum() + 0.5 * h.sum() / (7 * len(h))
        yield {
            "a": 10 * (h - mean).square().mean() / norm,
            "b": (h * mean).square().mean() + mean * norm,
        }

    check(step, reference, strategy, options)


@every_cut
def test_control_flow_may_go_by_a_reduced_value(
    strategy: Callable[[], Strategy], options: dict[str, Any]
) -> None:
    taken: list[bool] = []

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        value = yield Mean(x[:, 0].sum(), len(x))
        taken.append(bool(value > 0))
        yield {"a" if value > 0 else "b": self.b(self.a(x)).square().mean()}

    def reference(net: Any, x: Tensor) -> Iterator[dict[str, Tensor]]:
        yield {"a" if x[:, 0].mean() > 0 else "b": net.b(net.a(x)).square().mean()}

    check(step, reference, strategy, options, steps=4)
    assert set(taken) == {True, False}


@every_cut
def test_a_parameter_may_be_gathered_itself(
    strategy: Callable[[], Strategy], options: dict[str, Any]
) -> None:
    # The source is a leaf, and each shard hands in the same one.
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        weight, _ = yield from Gather(self.a.weight)
        yield {
            "a": (x @ weight.T).square().mean() + self.a(x).mean(),
            "b": self.b(self.a(x).detach()).square().mean(),
        }

    def reference(net: Any, x: Tensor) -> Iterator[dict[str, Tensor]]:
        yield {
            "a": (x @ net.a.weight.T).square().mean() + net.a(x).mean(),
            "b": net.b(net.a(x).detach()).square().mean(),
        }

    check(step, reference, strategy, options)


@every_cut
def test_a_loss_that_ignores_what_was_gathered(
    strategy: Callable[[], Strategy], options: dict[str, Any]
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        h = self.a(x)
        yield Gather(h)
        yield from Once(lambda rows: None, h)
        yield {"a": h.square().mean(), "b": self.b(h.detach()).square().mean()}

    def reference(net: Any, x: Tensor) -> Iterator[dict[str, Tensor]]:
        h = net.a(x)
        yield {"a": h.square().mean(), "b": net.b(h.detach()).square().mean()}

    check(step, reference, strategy, options)


def test_a_stale_graph_behind_a_gather_names_the_yield() -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        z = self.b(self.a(x).tanh())
        all_z, _ = yield from Gather(z)
        yield {"b": self.b(self.a(x).detach()).square().mean()}
        yield {"a": (z - all_z.mean(0)).square().mean()}

    net = module(step, a=linear(3, 4), b=linear(4, 4, seed=1))
    with pytest.raises(RuntimeError, match="has changed since") as caught:
        trainer(microbatch_size=2).step(net, [data(6, 3)])
    assert f"the update of 'b' ({__file__}:{step.__code__.co_firstlineno + 3})" in str(caught.value)


class _Counted(nn.Module):
    """A layer that counts the walks through its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear(3, 4)
        self.walks: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        out.register_hook(lambda g: self.walks.append(1))
        return out


def test_after_a_gather_each_encoder_is_walked_once() -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        z = self.net(x)
        all_z, _ = yield from Gather(z)
        yield {"net": (z - all_z.mean(0)).square().mean()}

    net = module(step, net=_Counted())
    trainer(microbatch_size=2).step(net, [data(6, 3)])
    assert len(net.net.walks) == 3
