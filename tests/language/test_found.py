"""Gradients as values and losses as functions, where they meet something unusual."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam
from torch.utils.checkpoint import checkpoint
from torchmetrics import SumMetric

from composefit import Gradient, Grads, Strategy, Sum
from tests.language.test_functions import CALLS, fitted, lbfgs
from tests.lockstep.steps import data, every_strategy, linear, module, several_shards, trainer

Make = Callable[[], Strategy]


# -- optimizers that ask ---------------------------------------------------------------------------


class Climbing(SGD):
    """Goes uphill first, and asks for the loss there (sharpness-aware minimisation)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        climb = [p.grad * 0.5 / norm for p in parameters]
        for p, step in zip(parameters, climb, strict=True):
            p.add_(step)
        self.zero_grad()
        torch.enable_grad()(closure)()
        for p, step in zip(parameters, climb, strict=True):
            p.sub_(step)
        super().step()


@every_strategy
def test_an_optimizer_that_moves_before_it_asks_gets_the_gradients_of_where_it_is(
    strategy: Make,
) -> None:
    def step(self: Any, x: Tensor) -> Any:
        return lambda: self.net(x).square().mean()

    net = fitted(step, strategy(), make=lambda parameters: Climbing(parameters, lr=0.1))
    plain, x = linear(3, 2), data(7, 3)
    optimizer = Climbing(plain.parameters(), lr=0.1)

    def closure() -> None:
        optimizer.zero_grad()
        plain(x).square().mean().backward()

    closure()
    optimizer.step(closure)
    torch.testing.assert_close(net.net.weight, plain.weight, rtol=1e-12, atol=1e-14)


def barrier(net: nn.Linear, x: Tensor) -> Tensor:
    """Infinite where the weights are large."""
    return net(x).square().mean() - 1e-3 * torch.log(2 - net.weight.square().sum())


@every_strategy
def test_a_line_search_may_look_where_the_loss_is_not_finite(strategy: Make) -> None:
    def searching(parameters: Any) -> LBFGS:
        return LBFGS(parameters, lr=30, max_iter=20, line_search_fn="strong_wolfe")

    found: list[bool] = []

    def step(self: Any, x: Tensor) -> Any:
        def loss() -> Tensor:
            value = barrier(self.net, x)
            found.append(bool(value.isfinite()))
            return value

        return loss

    net = fitted(step, strategy(), make=searching)
    assert not all(found)
    plain, x = linear(3, 2), data(7, 3)
    optimizer = searching(plain.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = barrier(plain, x)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(net.net.weight, plain.weight, rtol=1e-9, atol=1e-12)


@every_strategy
def test_an_update_that_goes_too_far_is_left_out_where_that_is_asked_for(strategy: Make) -> None:
    def wild(parameters: Any) -> LBFGS:
        return LBFGS(parameters, lr=1e60, max_iter=8, tolerance_grad=0, tolerance_change=0)

    def step(self: Any, x: Tensor) -> Any:
        return lambda: -(self.net(x).square().mean() ** 4)

    net = module(step, wild)
    fitter = trainer(strategy(), on_nonfinite="skip")
    fitter.step(net, [data(7, 3)])
    assert torch.equal(net.net.weight, linear(3, 2).weight)
    assert fitter.updates == {"net": 0}


def test_an_interrupt_does_not_cost_an_optimizer_its_state_that_never_asks_again() -> None:
    class Interrupted(Adam):
        armed = False

        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            if self.armed:
                raise KeyboardInterrupt
            return super().step(closure)

    def step(self: Any, x: Tensor) -> Any:
        return lambda: self.net(x).square().mean()

    net, fitter = module(step, Interrupted), trainer()
    fitter.step(net, [data(7, 3)])
    optimizer: Any = fitter.optimizers["net"].optimizer
    optimizer.armed = True
    with pytest.raises(KeyboardInterrupt):
        fitter.step(net, [data(7, 3)])
    assert len(optimizer.state) == 2


# -- what a function finds -------------------------------------------------------------------------


def test_a_graph_that_is_recomputed_with_moved_weights_is_stale() -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        y = checkpoint(nn.Sequential(self.net, nn.Tanh(), self.net), x, use_reentrant=False)
        yield lambda: y.square().mean()

    with pytest.raises(RuntimeError, match="compute it within the function") as raised:
        fitted(step, children={"net": linear(3, 3)})
    assert any(entry.name == "step" for entry in raised.traceback)


@every_strategy
def test_a_buffer_written_past_its_counter_moves_once_too(strategy: Make) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear(3, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.data.add_(1)
            result: Tensor = self.layer(x) * self.calls
            return result

    def step(self: Any, x: Tensor) -> Any:
        return lambda: self.net(x).square().mean()

    assert fitted(step, strategy(), children={"net": Counting()}).net.calls == 1


@several_shards
def test_shards_whose_later_evaluations_differ_in_kind_are_an_error(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Any:
        calls: list[int] = []

        def loss() -> Any:
            calls.append(1)
            value = self.net(x).square().mean()
            return Sum(value) if len(calls) == 3 and len(x) == 3 else value

        return loss

    with pytest.raises(RuntimeError, match="shards of this step disagree"):
        fitted(step, strategy())


def test_a_stop_iteration_of_a_function_does_not_end_training_in_silence() -> None:
    def step(self: Any, x: Tensor) -> Any:
        return lambda: next(iter(()))

    with pytest.raises(RuntimeError, match="a loss function raised StopIteration"):
        fitted(step)


def test_a_mode_left_open_by_a_function_is_an_error() -> None:
    def step(self: Any, x: Tensor) -> Any:
        def loss() -> Tensor:
            torch.set_grad_enabled(False)
            return self.net(x).square().mean()

        return loss

    with pytest.raises(RuntimeError, match="grad mode is False and was True"):
        fitted(step)


# -- a step that is run again ----------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda loss: {"net": loss}, lambda loss: {"loss": loss}])
def test_a_returned_dict_is_run_again_as_well(form: Callable[[Tensor], Any]) -> None:
    def step(self: Any, x: Tensor) -> Any:
        return form(self.net(x).square().mean())

    def plain(self: Any, x: Tensor) -> Any:
        return lambda: self.net(x).square().mean()

    assert torch.equal(fitted(step).net.weight, fitted(plain).net.weight)


@every_strategy
def test_a_step_that_is_run_again_counts_and_logs_once_and_finds_its_batch_whole(
    strategy: Make,
) -> None:
    def step(self: Any, batch: Any) -> Any:
        x = batch.pop("x")
        self.rows(len(x))
        loss = self.net(x).square().mean()
        self.log("loss", loss)
        return loss

    net = module(step, lbfgs, net=linear(3, 2))
    net.rows = SumMetric()
    fitter = trainer(strategy(), log_every_n_steps=1)
    losses = fitter.step(net, [{"x": data(7, 3)}])
    assert net.rows.compute() == 7
    torch.testing.assert_close(fitter.callback_metrics["loss"], losses["loss"])


def test_a_step_that_writes_into_its_batch_cannot_be_run_again() -> None:
    def step(self: Any, x: Tensor) -> Any:
        return self.net(x.mul_(2)).square().mean()

    with pytest.raises(RuntimeError, match="training_step writes into its batch"):
        fitted(step)


# -- gradients -------------------------------------------------------------------------------------


def test_a_parameter_twice_in_wrt_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="holds a parameter twice"):
        Gradient({"a": weight.sum()}, wrt=[weight, weight])


@every_strategy
def test_sparse_gradients_are_unscaled_and_given_again(strategy: Make) -> None:
    found: list[Tensor] = []

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        gradients = yield from Gradient({"a": self.net(x).sum() / 7}, wrt="net")
        found.append(gradients["a"][0].to_dense())
        yield Grads(gradients["a"])

    net = module(step, net=nn.Embedding(9, 2, sparse=True))
    before = net.net.weight.detach().clone()
    fitter = trainer(strategy(), precision="16-mixed")
    for _ in range(3):
        fitter.step(net, [torch.tensor([0, 1, 1, 3, 4, 1, 0])])
    assert fitter.updates["net"] > 0
    counts = torch.tensor([2.0, 3, 0, 1, 1, 0, 0, 0, 0])[:, None]
    shards = len(found) // 3  # each divides by 7, and weighs as its samples
    weigh = {1: counts / 7}.get(shards, found[-1])
    torch.testing.assert_close(found[-1], weigh.expand(9, 2), rtol=0, atol=1e-3)
    moved = before - 0.1 * fitter.updates["net"] * found[-1]
    torch.testing.assert_close(net.net.weight, moved, rtol=0, atol=1e-3)


@several_shards
def test_tensor_hooks_on_parameters_in_wrt_are_refused(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield from Gradient({"a": self.net(x).mean()}, wrt=self.net.parameters())

    net = module(step)
    net.net.weight.register_hook(lambda gradient: gradient.clamp(max=0.05))
    with pytest.raises(RuntimeError, match="hook"):
        trainer(strategy()).step(net, [data(7, 3)])


def test_what_ranks_compare_of_given_gradients_tells_orders_and_takes_nan() -> None:
    gradient = data(5)
    same = Grads([gradient.clone()])
    assert torch.equal(Grads([gradient]).fingerprint(), same.fingerprint())
    assert not torch.equal(Grads([gradient.flip(0)]).fingerprint(), same.fingerprint())
    assert not torch.equal(Grads([None, gradient]).fingerprint(), same.fingerprint())
    nan = torch.full((3,), float("nan"))
    assert torch.equal(Grads([nan]).fingerprint(), Grads([nan.clone()]).fingerprint())


def test_given_gradients_take_their_parameters_dtype_and_are_no_integers() -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield Grads([torch.ones_like(p, dtype=torch.float32) for p in self.net.parameters()])

    net = module(step)
    trainer().step(net, [data(7, 3)])
    assert torch.equal(net.net.weight, linear(3, 2).weight - 0.1)

    def integers(self: Any, x: Tensor) -> Iterator[Any]:
        yield Grads([torch.ones_like(p, dtype=torch.int64) for p in self.net.parameters()])

    with pytest.raises(TypeError, match=r"gradient 0 .*int64.*floating-point"):
        trainer().step(module(integers), [data(7, 3)])


def test_there_are_as_many_evaluations_as_these_tests_take_for_granted() -> None:
    calls: list[int] = []

    def step(self: Any, x: Tensor) -> Any:
        def loss() -> Tensor:
            calls.append(1)
            return self.net(x).square().mean()

        return loss

    fitted(step)
    assert len(calls) == CALLS
