"""Rules 2, 3 and 11: from total gradients to new weights."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from composefit import Callback, LoopModule, OptimizerConfig, SingleDevice, Strategy
from tests.lockstep.steps import (
    data,
    every_strategy,
    linear,
    module,
    same,
    several_shards,
    trainer,
    weights,
)

ADAM = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


def two(step: Callable[..., Any], **options: Any) -> Any:
    """A module of two layers, each with an optimizer."""
    return module(step, a=linear(3, 2), b=linear(3, 2, seed=1), **options)


# -- rule 3: all gradients of a yield before any step ----------------------------------------------


@every_strategy
@pytest.mark.parametrize("bad", ["a", "b"])
def test_simultaneous_updates_all_wait_for_the_check(
    bad: str, strategy: Callable[[], Strategy]
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield {
            name: net(x).square().mean() * (math.nan if name == bad else 1.0)
            for name, net in (("a", self.a), ("b", self.b))
        }

    net = two(step)
    before = weights(net)
    run = trainer(strategy())
    with pytest.raises(FloatingPointError, match=f"update of '{bad}' in step 0 is not finite"):
        run.step(net, [data(6, 3)])
    assert all(map(torch.equal, weights(net), before))
    assert run.updates == {"a": 0, "b": 0}
    assert all(p.grad is None for p in net.parameters())


@every_strategy
def test_simultaneous_updates_see_the_weights_before_either(
    strategy: Callable[[], Strategy],
) -> None:
    # Both losses go through both layers: stepping the first before the second's gradient is taken
    # would give the second another one (or an error of autograd's).
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        both = self.a(x) * self.b(x)
        yield {"a": both.square().mean(), "b": both.exp().mean()}

    net, x = two(step), data(6, 3)
    expected = copy.deepcopy(net)
    optimizers = [SGD(layer.parameters(), lr=0.1) for layer in (expected.a, expected.b)]
    both = expected.a(x) * expected.b(x)
    grads = [
        torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
        for loss, layer in (
            (both.square().mean(), expected.a),
            (both.exp().mean(), expected.b),
        )
    ]
    for optimizer, found in zip(optimizers, grads, strict=True):
        for p, g in zip(optimizer.param_groups[0]["params"], found, strict=True):
            p.grad = g
        optimizer.step()
    trainer(strategy()).step(net, [x])
    torch.testing.assert_close(net.state_dict(), expected.state_dict(), rtol=1e-12, atol=1e-12)


@every_strategy
def test_an_update_skipped_for_a_nan_changes_nothing(strategy: Callable[[], Strategy]) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        factor = math.inf if self.global_step == 1 else 1.0
        yield {"a": self.a(x).square().mean(), "b": self.b(x).square().mean() * factor}

    net = two(step)
    run = trainer(strategy(), on_nonfinite="skip")
    run.step(net, [data(6, 3)])
    before = weights(net)
    run.step(net, [data(6, 3)])
    assert all(map(torch.equal, weights(net), before))
    assert run.updates == {"a": 1, "b": 1} and run.global_step == 2
    run.step(net, [data(6, 3)])
    assert run.updates == {"a": 2, "b": 2}


def test_a_nan_is_let_through_where_it_is_ignored() -> None:
    net = module(lambda self, x: self.net(x).mean() * math.nan)
    trainer(on_nonfinite="ignore").step(net, [data(6, 3)])
    assert all(p.isnan().all() for p in net.parameters())


def test_the_error_of_a_nan_names_the_first_bad_parameter() -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        return self.net[0](x).mean() + (self.net[1].weight * math.inf).sum()

    net = module(step, net=nn.Sequential(linear(3, 2), linear(2, 2)))
    with pytest.raises(FloatingPointError) as caught:
        trainer().step(net, [data(4, 3)])
    assert "loss inf" in str(caught.value) or "loss nan" in str(caught.value)
    assert "net.1.weight (1 of 4 parameters)" in str(caught.value)
    assert "gradient_clip_val" in str(caught.value) and "on_nonfinite" in str(caught.value)


def test_gradients_of_several_dtypes_are_all_checked() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.short = nn.Parameter(torch.ones(2))
            self.long = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def step(self: Any, x: Tensor) -> Tensor:
        bad = math.inf if self.global_step else 1.0
        return self.net.short.sum() + (self.net.long * bad).sum().float()

    net = module(step, net=Mixed())
    run = trainer()
    run.step(net, [data(2, 1)])
    before = weights(net)
    with pytest.raises(FloatingPointError, match=r"net\.long \(1 of 2"):
        run.step(net, [data(2, 1)])
    assert all(map(torch.equal, weights(net), before))


# -- rule 3: float16 -------------------------------------------------------------------------------


class Half(LoopModule):
    """Two float32 layers, updated together; `b` overflows float16 at the second step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(3, 2) for _ in range(3))

    def configure_optimizers(self) -> dict[str, Any]:
        return {name: SGD(net.parameters(), lr=0.1) for name, net in self.named_children()}

    def training_step(self, x: Tensor) -> Iterator[Any]:
        factor = 1e4 if self.global_step == 1 else 1.0
        # In float32: a float16 mean cannot take a scale of 2**16.
        a, b, c = (net(x).float().square() for net in (self.a, self.b, self.c))
        yield {"a": a.mean(), "b": (b * factor).mean()}
        yield {"c": c.mean()}


@pytest.mark.parametrize("shards", [1, 3])
def test_an_infinite_float16_gradient_skips_all_names_of_its_update(shards: int) -> None:
    net, x = Half(), torch.randn(6, 3)
    run = trainer(SingleDevice("cpu", shards), precision="16-mixed")
    run.step(net, [x])
    assert run.updates == {"a": 1, "b": 1, "c": 1}
    before = weights(net)
    run.step(net, [x])
    assert run.updates == {"a": 1, "b": 1, "c": 2}
    after = weights(net)
    assert all(map(torch.equal, after[:4], before[:4]))
    assert not any(map(torch.equal, after[4:], before[4:]))
    stepper = run.training.stepper
    assert stepper is not None
    scales = {name: scale.value.item() for name, scale in stepper.scales.items()}
    assert scales == {"a": 2.0**15, "b": 2.0**15, "c": 2.0**16}
    run.step(net, [x])  # and on it goes
    assert run.updates == {"a": 2, "b": 2, "c": 3}


def test_float16_is_torchs_grad_scaler_and_autocast() -> None:
    net, x = Half(), torch.randn(6, 3)
    expected = copy.deepcopy(net)
    optimizers = expected.configure_optimizers()
    # One scaler each, as here; the inverse scale is rounded once, a power of two is not at all.
    scalers = {name: torch.amp.GradScaler("cpu") for name in optimizers}
    run = trainer(precision="16-mixed", gradient_clip_val=0.1)
    for number in range(4):
        with torch.autocast("cpu", torch.float16):
            factor = 1e4 if number == 1 else 1.0
            losses = {
                name: (net(x).float().square() * (factor if name == "b" else 1.0)).mean()
                for name, net in expected.named_children()
            }
        for name, loss in losses.items():
            if name == "a" and number == 1:
                continue  # with one scaler each only `b` is skipped: here `a` is, with it
            optimizers[name].zero_grad()
            scalers[name].scale(loss).backward()
            scalers[name].unscale_(optimizers[name])
            nn.utils.clip_grad_norm_(getattr(expected, name).parameters(), 0.1)
            scalers[name].step(optimizers[name])
            scalers[name].update()
        run.step(net, [x])
    for p, q in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_hook_sees_unscaled_gradients_not_yet_clipped() -> None:
    seen: list[float] = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            seen.append(float(module.net.weight.grad.abs().max()))

    net = module(lambda self, x: self.net.weight.sum() * 3.0, net=nn.Linear(3, 2))
    trainer(precision="16-mixed", gradient_clip_val=0.01, callbacks=Look()).step(
        net, [torch.ones(4, 3)]
    )
    assert seen == [3.0]


# -- clipping --------------------------------------------------------------------------------------


class Clipped(LoopModule):
    """Three layers: clipped by norm, by value, and as the trainer says."""

    def __init__(self) -> None:
        super().__init__()
        for i, name in enumerate("abc"):
            self.add_module(name, linear(3, 2, seed=i))

    def configure_optimizers(self) -> dict[str, Any]:
        def sgd(name: str) -> SGD:
            return SGD(getattr(self, name).parameters(), lr=0.1, momentum=0.9)

        return {
            "a": OptimizerConfig(sgd("a"), gradient_clip_val=0.3),
            "b": OptimizerConfig(sgd("b"), gradient_clip_val=0.05, gradient_clip_algorithm="value"),
            "c": sgd("c"),
        }

    def training_step(self, x: Tensor) -> Iterator[Any]:
        yield {"a": self.a(x).square().mean()}
        yield {name: getattr(self, name)(x).square().mean() for name in "bc"}


@every_strategy
def test_each_optimizer_is_clipped_by_its_own_rule(strategy: Callable[[], Strategy]) -> None:
    net, x = Clipped(), data(7, 3)
    expected = copy.deepcopy(net)
    optimizers = {
        name: SGD(getattr(expected, name).parameters(), lr=0.1, momentum=0.9) for name in "abc"
    }
    for _ in range(3):
        for name, optimizer in optimizers.items():
            optimizer.zero_grad()
            getattr(expected, name)(x).square().mean().backward()
            own = list(getattr(expected, name).parameters())
            if name == "b":
                nn.utils.clip_grad_value_(own, 0.05)
            else:
                norm = nn.utils.clip_grad_norm_(own, {"a": 0.3, "c": 0.2}[name])
                assert norm > 0.3  # there was something to clip
            optimizer.step()
    run = trainer(strategy(), gradient_clip_val=0.2)
    for _ in range(3):
        run.step(net, [x])
    torch.testing.assert_close(net.state_dict(), expected.state_dict(), rtol=1e-12, atol=1e-12)


# -- rule 2: the version counters ------------------------------------------------------------------


@every_strategy
@ADAM
def test_a_loss_older_than_an_update_of_its_weights_names_the_yield(
    fused: bool, strategy: Callable[[], Strategy]
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        h = self.a(x).tanh()
        old = self.b(h).square().mean()
        yield {"b": self.b(h.detach()).square().mean()}
        yield {"a": old}

    net = module(
        step, lambda p: Adam(p, lr=0.1, fused=fused), a=linear(3, 3), b=linear(3, 2, seed=1)
    )
    line = step.__code__.co_firstlineno + 3
    with pytest.raises(RuntimeError, match="has changed since") as caught:
        trainer(strategy()).step(net, [data(6, 3)])
    message = str(caught.value)
    assert (
        f"the loss of 'a' goes through weights that the update of 'b' ({__file__}:{line})"
        in message
    )
    assert "compute it" in message


@ADAM
def test_a_graph_of_weights_that_nobody_updated_may_be_old(fused: bool) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        fake = self.a(x)
        for _ in range(3):
            yield {"b": self.b(fake).square().mean()}
        yield {"a": self.b(fake).square().mean()}

    net = module(
        step, lambda p: Adam(p, lr=0.1, fused=fused), a=linear(3, 3), b=linear(3, 2, seed=1)
    )
    run = trainer()
    run.step(net, [data(6, 3)])
    assert run.updates == {"a": 1, "b": 3}


# -- rule 11 ---------------------------------------------------------------------------------------


@every_strategy
def test_post_accumulate_hooks_run_once_on_the_total(strategy: Callable[[], Strategy]) -> None:
    net, x = module(lambda self, x: self.net(x).square().mean()), data(7, 3)
    (expected,) = torch.autograd.grad(net.net(x).square().mean(), [net.net.weight])
    seen: list[Tensor] = []

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        seen.append(parameter.grad.clone())
        parameter.grad.mul_(2.0)

    net.net.weight.register_post_accumulate_grad_hook(hook)
    before = net.net.weight.detach().clone()
    trainer(strategy(), accumulate_grad_batches=1).step(net, [x])
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected, rtol=1e-12, atol=1e-12)
    moved = before - net.net.weight.detach()
    torch.testing.assert_close(moved, 0.2 * expected, rtol=1e-12, atol=1e-12)


def test_a_hook_that_steps_in_the_backward_finds_the_total() -> None:
    # The idiom of optimizers that run in the backward: the hook may drop the gradient.
    net, x = module(lambda self, x: self.net(x).square().mean()), data(7, 3)
    (expected,) = torch.autograd.grad(net.net(x).square().mean(), [net.net.weight])
    before = net.net.weight.detach().clone()
    inner = SGD([net.net.weight], lr=0.5)

    def hook(parameter: Tensor) -> None:
        inner.step()
        inner.zero_grad()

    net.net.weight.register_post_accumulate_grad_hook(hook)
    trainer(SingleDevice("cpu", shards=3)).step(net, [x])
    moved = before - net.net.weight.detach()
    torch.testing.assert_close(moved, 0.5 * expected, rtol=1e-12, atol=1e-12)


@several_shards
def test_tensor_hooks_on_parameters_are_refused_with_several_shards(
    strategy: Callable[[], Strategy],
) -> None:
    net = module(lambda self, x: self.net(x).square().mean())
    net.net.weight.register_hook(lambda g: g)
    before = weights(net)
    with pytest.raises(RuntimeError, match="register_post_accumulate_grad_hook"):
        trainer(strategy()).step(net, [data(6, 3)])
    assert all(map(torch.equal, weights(net), before))


def test_a_tensor_hook_acts_with_one_shard() -> None:
    net, x = module(lambda self, x: self.net(x).square().mean()), data(6, 3)
    (expected,) = torch.autograd.grad(net.net(x).square().mean(), [net.net.weight])
    net.net.weight.register_hook(lambda g: 3 * g)
    before = net.net.weight.detach().clone()
    trainer().step(net, [x])
    torch.testing.assert_close(
        before - net.net.weight.detach(), 0.3 * expected, rtol=1e-12, atol=1e-12
    )


@every_strategy
def test_what_is_unfrozen_between_steps_is_trained_from_then_on(
    strategy: Callable[[], Strategy],
) -> None:
    first, second = linear(3, 3), linear(3, 2, seed=1)
    first.requires_grad_(False)
    net = module(lambda self, x: self.net(x).square().mean(), net=nn.Sequential(first, second))
    net.configure_optimizers = lambda: {"net": SGD(net.parameters(), lr=0.1)}
    run, frozen = trainer(strategy()), first.weight.clone()
    run.step(net, [data(6, 3)])
    assert torch.equal(first.weight, frozen)
    first.requires_grad_(True)
    run.step(net, [data(6, 3)])
    assert not torch.equal(first.weight, frozen)
    after = first.weight.detach().clone()
    first.requires_grad_(False)
    run.step(net, [data(6, 3)])
    assert torch.equal(first.weight, after)


def test_a_parameter_group_added_later_is_trained() -> None:
    net = module(lambda self, x: (self.net(x) + self.extra).square().mean())
    net.extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = SGD(net.net.parameters(), lr=0.1)
    net.configure_optimizers = lambda: {"net": optimizer}
    with pytest.warns(UserWarning, match="extra"):
        run = trainer()
        run.step(net, [data(6, 3)])
    assert torch.equal(net.extra, torch.ones(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [net.extra]})
    run.step(net, [data(6, 3)])
    assert not torch.equal(net.extra, torch.ones(2, dtype=torch.float64))


# -- what is left behind ---------------------------------------------------------------------------


@every_strategy
def test_a_parameter_that_no_shard_reached_keeps_none(strategy: Callable[[], Strategy]) -> None:
    # As in a loop with zero_grad(): weight decay and momentum leave it alone then.
    net = module(
        lambda self, x: self.net[0](x).square().mean(),
        lambda p: SGD(p, lr=0.1, weight_decay=0.5),
        net=nn.Sequential(linear(3, 2), linear(3, 2, seed=1)),
    )
    before = weights(net)
    trainer(strategy()).step(net, [data(6, 3)])
    after = weights(net)
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[2], before[2])
    assert all(p.grad is None for p in net.parameters())


def test_hooks_of_an_update_run_in_order_and_once_per_optimizer() -> None:
    seen: list[str] = []

    class Look(Callback):
        def on_before_optimizer_step(self, *arguments: Any) -> None:
            seen.append(f"before {arguments[-1]}")

        def on_after_optimizer_step(self, *arguments: Any) -> None:
            seen.append(f"after {arguments[-1]}")

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield {"a": self.a(x).square().mean(), "b": self.b(x).square().mean()}
        yield {"b": self.b(x).square().mean()}

    trainer(SingleDevice("cpu", 3), callbacks=Look()).step(two(step), [data(6, 3)])
    assert seen == ["before a", "after a", "before b", "after b", "before b", "after b"]


@every_strategy
def test_updates_are_checked_whatever_the_default_dtype(
    strategy: Callable[[], Strategy],
) -> None:
    # The fused check takes its scale and its flag in float32 only.
    net = two(lambda self, x: {"a": self.a(x).square().mean() * math.nan})
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(FloatingPointError, match="not finite"):
            trainer(strategy()).step(net, [data(6, 3)])
    finally:
        torch.set_default_dtype(torch.float32)


def test_equal_runs_end_equal() -> None:
    # What `same` compares with elsewhere in these tests must be able to differ.
    nets = [module(lambda self, x: self.net(x).square().mean()) for _ in range(3)]
    for net, rows in zip(nets, (6, 6, 5), strict=True):
        trainer().step(net, [data(rows, 3)])
    assert same(nets[0], nets[1]) and not same(nets[0], nets[2])


# -- gradients of other kinds ----------------------------------------------------------------------


@every_strategy
def test_sparse_float16_gradients_are_unscaled(strategy: Callable[[], Strategy]) -> None:
    nets = []
    for sparse in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            table = nn.Embedding(6, 3, sparse=sparse)
        net = module(lambda self, x: self.net(x).square().mean(), net=table)
        run = trainer(strategy(), precision="16-mixed")
        run.step(net, [torch.tensor([0, 1, 1, 2, 5, 5])])
        assert run.updates == {"net": 1}
        nets.append(net)
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]))


@every_strategy
def test_an_update_leaves_graphs_of_weights_that_it_does_not_reach_alone(
    strategy: Callable[[], Strategy],
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        first, second = (layer(x).square().mean() for layer in self.net)
        yield first
        yield second

    # Of two layers: the backward of the first alone would not read its weights.
    layers = [nn.Sequential(linear(3, 2, seed), nn.Tanh(), linear(2, 1, seed)) for seed in (0, 1)]
    net, x = module(step, net=nn.ModuleList(layers)), data(6, 3)
    expected = copy.deepcopy(net.net)
    for layer in expected:
        found = torch.autograd.grad(layer(x).square().mean(), list(layer.parameters()))
        with torch.no_grad():
            for p, g in zip(layer.parameters(), found, strict=True):
                p -= 0.1 * g
    trainer(strategy()).step(net, [x])
    torch.testing.assert_close(net.net.state_dict(), expected.state_dict(), rtol=1e-12, atol=1e-12)


class _Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.complex(data(3, 2), data(3, 2, seed=2)))


@every_strategy
@pytest.mark.parametrize("bad", [False, True])
def test_complex_gradients_are_checked_and_applied(
    bad: bool, strategy: Callable[[], Strategy]
) -> None:
    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return (x.to(weight.dtype) @ weight).abs().square().mean()

    def step(self: Any, x: Tensor) -> Tensor:
        # The gradient of the loss alone is finite, but for its imaginary part.
        return loss(self.net.weight, x) + (self.net.weight.imag * (math.inf if bad else 0)).sum()

    net, x = module(step, net=_Complex()), data(6, 3)
    (before,) = weights(net)
    leaf = before.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, x), leaf)
    if bad:
        with pytest.raises(FloatingPointError, match=r"gradient of net\.weight"):
            trainer(strategy()).step(net, [x])
        assert torch.equal(net.net.weight, before)
    else:
        trainer(strategy()).step(net, [x])
        torch.testing.assert_close(net.net.weight.detach(), before - 0.1 * gradient)
