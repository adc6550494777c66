"""Losses as functions: what an optimizer that asks again gets, and what it finds unchanged."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam

from composefit import Callback, LoopModule, OptimizerConfig, SingleDevice, Strategy
from composefit.testing import assert_resumable
from tests.lockstep.steps import data, every_strategy, linear, module, same, trainer

Make = Callable[[], Strategy]
CALLS = 5  # evaluations of one step


def lbfgs(parameters: Any) -> LBFGS:
    """Without a line search: evaluated CALLS times."""
    return LBFGS(parameters, lr=0.1, max_iter=CALLS, tolerance_grad=0, tolerance_change=0)


def fitted(step: Callable[..., Any], strategy: Strategy | None = None, **options: Any) -> Any:
    children = options.pop("children", {})
    net = module(step, options.pop("make", lbfgs), **children)
    fitter = trainer(strategy, **options)
    fitter.step(net, [data(7, 3)])
    return net


def test_one_shard_is_bitwise_the_loop_by_hand() -> None:
    def step(self: Any, x: Tensor) -> Any:
        return lambda: self.net(x).square().mean()

    net = fitted(step)
    plain = linear(3, 2)
    optimizer = lbfgs(plain.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = plain(data(7, 3)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(net.net.weight, plain.weight)


@every_strategy
def test_every_evaluation_draws_the_same(strategy: Make) -> None:
    drawn: dict[int, list[Any]] = {}
    after: dict[int, list[float]] = {}

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        torch.rand(3)
        own: list[Any] = drawn.setdefault(len(x) * 1000 + int(x[0, 0] * 100), [])

        def loss() -> Tensor:
            mask = F.dropout(torch.ones_like(x), 0.5)
            noise = self.random.normal(len(x), 3)
            coin = self.random.shared.uniform()
            own.append((mask, noise, coin, torch.rand(())))
            return self.net(x * mask + noise).square().mean() * (1 + coin)

        yield loss
        after[id(own)] = [torch.rand(()).item(), self.random.normal(len(x))[0].item()]

    fitted(step, strategy())
    for own in drawn.values():
        assert len(own) == CALLS
        first, *others = own
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
        assert first[0].unique().numel() == 2
    of_five, drawn = dict(after), {}
    after.clear()
    fitted(step, strategy(), make=lambda parameters: SGD(parameters, lr=0.1))
    assert sorted(after.values()) == sorted(of_five.values())


@every_strategy
def test_buffers_move_once_however_often_the_loss_is_evaluated(strategy: Make) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3, dtype=torch.float64)
            self.layer = linear(3, 2)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("rebound", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.rebound = self.rebound + 1
            result: Tensor = self.layer(self.norm(x))
            return result

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        self.net(x)
        yield lambda: self.net(x).square().mean()

    net = fitted(step, strategy(), children={"net": Counting()}).net
    assert net.calls == 2 and net.rebound == 2
    assert net.norm.num_batches_tracked == 2


@every_strategy
def test_an_optimizer_that_asks_once_evaluates_once(strategy: Make) -> None:
    calls: list[int] = []

    def step(self: Any, x: Tensor) -> Any:
        def loss() -> Tensor:
            calls.append(len(x))
            return self.net(x).square().mean()

        return loss

    net = fitted(step, strategy(), make=lambda parameters: Adam(parameters, lr=0.1))
    assert sum(calls) == 7
    plain = linear(3, 2)
    optimizer = Adam(plain.parameters(), lr=0.1)
    plain(data(7, 3)).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(net.net.weight, plain.weight, rtol=1e-12, atol=0)


@every_strategy
def test_functions_and_losses_update_together(strategy: Make) -> None:
    """Both gradients are those before either optimizer steps."""

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield {
            "a": (self.a(x) - self.b(x)).square().mean(),
            "b": lambda: (self.a(x) - self.b(x)).abs().mean(),
        }

    def make(parameters: Any) -> SGD:
        return SGD(parameters, lr=0.1)

    children = {"a": linear(3, 2), "b": linear(3, 2, seed=1)}
    net = fitted(step, strategy(), make=make, children=children)
    a, b, x = linear(3, 2), linear(3, 2, seed=1), data(7, 3)
    (of_a,) = torch.autograd.grad((a(x) - b(x)).square().mean(), a.weight)
    (of_b,) = torch.autograd.grad((a(x) - b(x)).abs().mean(), b.weight)
    torch.testing.assert_close(net.a.weight, a.weight - 0.1 * of_a, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(net.b.weight, b.weight - 0.1 * of_b, rtol=1e-12, atol=1e-14)


@every_strategy
def test_every_evaluation_is_clipped_and_hooks_run_once(strategy: Make) -> None:
    norms: list[float] = []

    class Norms(LBFGS):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            for _ in range(3):
                closure()
                grads = [p.grad for p in self.param_groups[0]["params"]]
                norms.append(torch.nn.utils.get_total_norm(grads).item())

    class Heard(Callback):
        calls = 0

        def on_before_optimizer_step(self, *_: Any) -> None:
            self.calls += 1

    def step(self: Any, x: Tensor) -> Any:
        return lambda: 100 * self.net(x).square().mean()

    heard = Heard()
    fitted(step, strategy(), make=Norms, gradient_clip_val=0.5, callbacks=heard)
    assert norms == pytest.approx([0.5] * 3, rel=1e-4)
    assert heard.calls == 1


def test_ones_own_optimizer_step_gets_the_closure() -> None:
    class Own(LoopModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = linear(3, 2)
            self.losses: list[float] = []

        def configure_optimizers(self) -> LBFGS:
            return lbfgs(self.parameters())

        def training_step(self, x: Tensor) -> Any:
            return lambda: self.net(x).square().mean()

        def optimizer_step(self, epoch: int, idx: int, optimizer: Any, closure: Any = None) -> None:
            def noted() -> Tensor:
                loss: Tensor = closure()
                self.losses.append(loss.item())
                return loss

            optimizer.step(noted)

    net = Own()
    trainer().step(net, [data(7, 3)])
    assert len(net.losses) == CALLS
    assert net.losses == sorted(net.losses, reverse=True)
    assert len(set(net.losses)) == CALLS


# -- what cannot be --------------------------------------------------------------------------------


def test_an_optimizer_that_asks_again_needs_a_function_in_a_step_that_yields() -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield {"net": self.net(x).square().mean()}

    with pytest.raises(TypeError, match=r"'net' is LBFGS.*\{'net': lambda: loss_of") as raised:
        fitted(step)
    assert any(entry.name == "step" for entry in raised.traceback)


def test_a_function_that_yields_is_an_error() -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        def loss() -> Iterator[Any]:
            yield {"net": self.net(x).square().mean()}

        yield loss

    with pytest.raises(TypeError, match="a loss function yields"):
        fitted(step)


@pytest.mark.parametrize("value", [3.0, None, torch.ones(3)])
def test_a_function_that_returns_no_loss_is_an_error(value: Any) -> None:
    def step(self: Any, x: Tensor) -> Any:
        return lambda: value

    with pytest.raises((TypeError, ValueError), match="what the loss function of 'net' returned"):
        fitted(step)


def test_float16_scales_losses_and_functions_are_called_without() -> None:
    def step(self: Any, x: Tensor) -> Any:
        return lambda: self.net(x).square().mean()

    net = module(step, lbfgs, net=nn.Linear(3, 2))
    with pytest.raises(ValueError, match="'16-mixed' scales losses: use 'bf16-mixed' or '32'"):
        trainer(precision="16-mixed").step(net, [data(7, 3).float()])


@every_strategy
def test_a_later_evaluation_that_is_not_finite_says_so(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Any:
        return lambda: -(self.net(x).square().mean() ** 4)

    def wild(parameters: Any) -> LBFGS:
        return LBFGS(parameters, lr=1e60, max_iter=8, tolerance_grad=0, tolerance_change=0)

    with pytest.raises(FloatingPointError, match=r"LBFGS has evaluated it anew.*line search"):
        fitted(step, strategy(), make=wild)


@every_strategy
def test_what_a_later_evaluation_raises_is_the_users_own_and_training_goes_on(
    strategy: Make,
) -> None:
    class Broken(Exception):
        pass

    faults = {"left": 1}

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        calls = []

        def loss() -> Tensor:
            calls.append(1)
            if len(calls) == 3 and faults["left"]:
                faults["left"] = 0
                raise Broken("in the third evaluation")
            return self.net(x).square().mean()

        yield loss

    net, fitter = module(step, lbfgs), trainer(strategy())
    with pytest.raises(Broken, match="third") as raised:
        fitter.step(net, [data(7, 3)])
    assert any("step 0" in note for note in raised.value.__notes__)
    assert any("LBFGS has forgotten its history" in note for note in raised.value.__notes__)
    assert raised.traceback[-1].name == "loss"
    assert same(net.net, linear(3, 2))
    assert all(p.grad is None for p in net.parameters())
    fitter.step(net, [data(7, 3)])
    assert fitter.updates == {"net": 1}


def test_a_graph_of_before_the_yield_through_the_weights_is_stale() -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        y = self.net(x).tanh() @ self.net.weight
        yield lambda: y.square().mean()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fitted(step)


def test_a_run_with_lbfgs_is_resumed_bitwise() -> None:
    class Two(LoopModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))

        def training_step(self, x: Tensor) -> Iterator[Any]:
            yield {"adam": self.net(x).square().mean()}
            yield {"lbfgs": lambda: (self.net(x) - 1).square().mean()}

        def configure_optimizers(self) -> dict[str, Any]:
            adam = OptimizerConfig(Adam(self.parameters(), lr=1e-3))
            return {"adam": adam, "lbfgs": LBFGS(self.parameters(), lr=0.05, max_iter=3)}

    def loader() -> list[Tensor]:
        return list(data(12, 3).float().split(4))

    strategies = [SingleDevice("cpu"), SingleDevice("cpu", shards=2)]
    assert assert_resumable(Two, loader, strategies, via=["exception"]) == 12
