"""`Gradient` and `Grads`: gradients as values, over all shards."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from composefit import Gather, Gradient, Grads, Mean, SingleDevice, Strategy, ThreadDataParallel
from tests.lockstep.steps import data, every_strategy, linear, module, several_shards, trainer

Make = Callable[[], Strategy]


def run(step: Callable[..., Any], strategy: Strategy | None = None, **options: Any) -> Any:
    """Train one step on seven samples: the trainer and the module."""
    children = options.pop("children", {})
    fitter, net = trainer(strategy, **options), module(step, **children)
    fitter.step(net, [data(7, 3)])
    return fitter, net


# -- Gradient --------------------------------------------------------------------------------------


@every_strategy
def test_gradients_are_those_of_the_full_batch_and_nothing_steps(strategy: Make) -> None:
    found: list[Any] = []

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        y = self.net(x)
        losses = {"square": y.square().mean(), "tokens": Mean(y.abs().sum(), y.numel())}
        found.append((yield from Gradient(losses, wrt=self.net.parameters())))

    fitter, net = run(step, strategy())
    x, same = data(7, 3), linear(3, 2)
    for gradients in found:
        for key, loss in (("square", same(x).square().mean()), ("tokens", same(x).abs().mean())):
            expected = torch.autograd.grad(loss, list(same.parameters()))
            for got, wanted in zip(gradients[key], expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-15)
                assert not got.requires_grad
    assert fitter.updates == {"net": 0}
    assert all(p.grad is None for p in net.parameters())


@several_shards
def test_what_one_shard_writes_into_its_gradients_no_other_sees(strategy: Make) -> None:
    sums: list[float] = []

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        found = yield from Gradient({"a": self.net(x).mean()}, wrt=self.net.weight)
        (gradient,) = found["a"]
        gradient.fill_(1.0)
        yield Mean(torch.zeros((), dtype=x.dtype), 1)
        sums.append(gradient.sum().item())
        gradient.fill_(5.0)

    run(step, strategy())
    assert sums == [6.0] * 3


@every_strategy
def test_the_graph_stays_for_an_update_through_it(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        loss = self.net(x).square().mean()
        yield from Gradient({"a": loss}, wrt="net")
        yield {"net": loss}

    fitter, _ = run(step, strategy())
    assert fitter.updates == {"net": 1}


@every_strategy
def test_gradients_go_back_through_a_gather(strategy: Make) -> None:
    found: list[Tensor] = []

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        h = self.net(x)
        everything, _ = yield from Gather(h)
        loss = (h @ everything.T).square().mean()
        found.append((yield from Gradient({"a": loss}, wrt=self.net.weight))["a"][0])

    run(step, strategy())
    same = linear(3, 2)
    h = same(data(7, 3))
    (expected,) = torch.autograd.grad((h @ h.T).square().mean(), same.weight)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-14)


@every_strategy
def test_a_parameter_that_no_shard_reaches_has_none(strategy: Make) -> None:
    found: list[Any] = []

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        loss = self.a(x).mean()
        wrt = [self.b.weight, self.a.weight]
        found.append((yield from Gradient({"a": loss}, wrt=wrt))["a"])

    run(step, strategy(), children={"a": linear(3, 2), "b": linear(3, 2)})
    assert all(one[0] is None and one[1] is not None for one in found)


@every_strategy
def test_a_loss_that_reaches_none_of_them_is_an_error(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield from Gradient({"a": self.net(x.detach()).detach().mean()}, wrt="net")

    with pytest.raises(ValueError, match="'a' given to Gradient reaches none of the 2 parameters"):
        run(step, strategy())


@every_strategy
def test_gradients_come_unscaled_under_float16(strategy: Make) -> None:
    found: list[Tensor] = []

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        loss = self.net(x).mean()
        both = yield from Gradient({"net": loss, "other": loss}, wrt=self.net.weight)
        found.append(torch.stack([both["net"][0], both["other"][0]]))

    net = module(step, net=nn.Linear(3, 2))
    fitter = trainer(strategy(), precision="16-mixed")
    x = data(7, 3).float()
    for _ in range(4):  # the scale that it begins with may be too large, as for an update
        fitter.step(net, [x])
    expected = (x.mean(0) / 2).expand(2, 2, 3)
    torch.testing.assert_close(found[-1], expected, rtol=0, atol=2e-3)


@several_shards
def test_shards_that_ask_for_other_gradients_are_an_error(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        key = "a" if len(x) == 3 else "b"
        yield from Gradient({key: self.net(x).mean()}, wrt="net")

    with pytest.raises(RuntimeError, match=r"disagree.*\n.*Gradient\('a'\)(.|\n)*Gradient\('b'\)"):
        run(step, strategy())


def test_an_unknown_optimizer_is_named() -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield from Gradient({"a": self.net(x).mean()}, wrt="nett")

    with pytest.raises(ValueError, match=r"no optimizer 'nett'.*did you mean 'net'"):
        run(step)


def test_a_returned_gradient_is_refused() -> None:
    def step(self: Any, x: Tensor) -> Any:
        return Gradient({"a": self.net(x).mean()}, wrt=self.net.weight)

    with pytest.raises(TypeError, match=r"returned Gradient\(\.\.\.\), whose result nobody"):
        run(step)


# -- Grads -----------------------------------------------------------------------------------------


@every_strategy
def test_given_gradients_step_the_optimizer_and_stay_what_they_are(strategy: Make) -> None:
    kept: list[tuple[list[Tensor], Any]] = []

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        given = [torch.ones_like(p) for p in self.net.parameters()]
        back = yield {"net": Grads(given, loss=self.net(x).sum() * 0 + len(x))}
        kept.append((given, back))

    _, net = run(step, strategy(), gradient_clip_val=0.1)
    before = linear(3, 2)
    for now, was in zip(net.net.parameters(), before.parameters(), strict=True):
        moved = was - 0.1 * 0.1 / math.sqrt(8)  # eight numbers, clipped to a norm of 0.1
        torch.testing.assert_close(now, moved, rtol=1e-5, atol=0)
    for given, back in kept:
        assert all((gradient == 1).all() for gradient in given)
        assert back.keys() == {"net"}
    sizes = [len(x) for x in data(7, 3).tensor_split(3)] if len(kept) > 1 else [7]
    mean = sum(n * n for n in sizes) / 7
    assert kept[0][1]["net"].item() == pytest.approx(mean)


@every_strategy
def test_without_a_loss_there_is_none_in_what_comes_back(strategy: Make) -> None:
    back: list[Any] = []

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        ones = [torch.ones_like(p) for p in self.a.parameters()]
        back.append((yield {"a": Grads(ones), "b": self.b(x).mean()}))

    fitter, _ = run(step, strategy(), children={"a": linear(3, 2), "b": linear(3, 2)})
    assert all(one.keys() == {"b"} for one in back)
    assert fitter.updates == {"a": 1, "b": 1}


def test_bare_grads_update_the_one_optimizer() -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        assert (yield Grads([torch.ones_like(self.net.weight), None])) is None

    _, net = run(step)
    same = linear(3, 2)
    assert torch.equal(net.net.weight, same.weight - 0.1)
    assert torch.equal(net.net.bias, same.bias)


@several_shards
def test_gradients_that_differ_between_shards_are_an_error(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield Grads([x.mean() * torch.ones_like(p) for p in self.net.parameters()])

    with pytest.raises(RuntimeError, match="different Grads for 'net'"):
        run(step, strategy())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda net: [torch.ones(2, 3)], "holds 1 gradients, and the optimizer has 2"),
        (lambda net: [torch.ones(3, 2), None], r"gradient 0 .* shape \(3, 2\), its parameter"),
    ],
)
def test_gradients_that_do_not_fit_are_an_error_at_the_yield(
    given: Callable[[Any], Any], words: str
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield {"net": Grads(given(self.net))}

    with pytest.raises(ValueError, match=words) as raised:
        run(step)
    assert any(entry.name == "step" for entry in raised.traceback)


@every_strategy
def test_given_gradients_that_are_not_finite_change_nothing(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield Grads([torch.full_like(p, math.nan) for p in self.net.parameters()])

    fitter, net = trainer(strategy()), module(step)
    with pytest.raises(FloatingPointError, match=r"not finite: gradients given, first in .*weight"):
        fitter.step(net, [data(7, 3)])
    assert torch.equal(net.net.weight, linear(3, 2).weight)


def test_given_gradients_are_not_divided_by_the_loss_scale() -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield Grads([torch.ones_like(p) for p in self.net.parameters()])

    net = nn.Linear(3, 2)
    before = net.weight.detach().clone()
    trainer(precision="16-mixed").step(module(step, net=net), [data(7, 3).float()])
    torch.testing.assert_close(net.weight, before - 0.1)


def test_infinite_given_gradients_lower_the_loss_scale_and_are_left_out() -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield Grads([torch.full_like(p, math.inf) for p in self.net.parameters()])

    net = nn.Linear(3, 2)
    before = net.weight.detach().clone()
    fitter = trainer(precision="16-mixed")
    fitter.step(module(step, net=net), [data(7, 3).float()])
    assert torch.equal(net.weight, before)
    assert fitter.updates == {"net": 0}


# -- both, in the words of their papers ------------------------------------------------------------


def test_lookahead_of_two_steps_by_one_optimizer() -> None:
    """Extragradient: the gradient half a step ahead, applied where one stood."""

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        here = yield from Gradient({"a": self.net(x).square().mean()}, wrt="net")
        yield Grads(here["a"])
        ahead = yield from Gradient({"a": self.net(x).square().mean()}, wrt="net")
        yield Grads([b - a for a, b in zip(here["a"], ahead["a"], strict=True)])

    for strategy in (SingleDevice("cpu"), SingleDevice("cpu", shards=3), ThreadDataParallel(2)):
        _, net = run(step, strategy)
        same = linear(3, 2)
        ahead = linear(3, 2)
        optimizer = SGD(ahead.parameters(), lr=0.1)
        ahead(data(7, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ahead(data(7, 3)).square().mean().backward()
        for now, was, there in zip(
            net.net.parameters(), same.parameters(), ahead.parameters(), strict=True
        ):
            torch.testing.assert_close(now, was - 0.1 * there.grad, rtol=1e-12, atol=1e-14)
