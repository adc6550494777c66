"""Rules 2 and 4: stale graphs, used-up graphs, modes left open, and one cache for all threads."""

import copy
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import SGD, Adam
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from composefit import Callback, SingleDevice, Strategy, ThreadDataParallel, Update
from tests.lockstep.steps import (
    data,
    every_strategy,
    linear,
    module,
    several_shards,
    trainer,
)


def pair(step: Callable[..., Any], **options: Any) -> Any:
    return module(step, a=linear(3, 3), b=linear(3, 2, seed=1), **options)


# -- rule 2: graphs that are too old, or used up ---------------------------------------------------


@every_strategy
def test_a_graph_used_up_by_an_update_names_the_yield(strategy: Callable[[], Strategy]) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        scores = self.b(self.a(x)).exp()
        yield {"a": scores.mean()}
        yield {"b": scores.mean()}

    line = step.__code__.co_firstlineno + 2
    with pytest.raises(RuntimeError, match="used up") as caught:
        trainer(strategy()).step(pair(step), [data(6, 3)])
    assert f"the update of 'a' ({__file__}:{line})" in str(caught.value)
    assert "retain_graph=True" in str(caught.value)


@every_strategy
def test_a_retained_graph_serves_two_updates(strategy: Callable[[], Strategy]) -> None:
    # `a` last in the graph: its step changes no weight that the backward of `b` needs.
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        scores = self.a(self.b(x)).exp()
        yield Update({"b": -scores.mean()}, retain_graph=True)
        yield {"a": scores.mean()}

    net, x = module(step, a=linear(2, 2), b=linear(3, 2, seed=1)), data(7, 3)
    expected = copy.deepcopy(net)
    scores = expected.a(expected.b(x)).exp()
    grads = [
        torch.autograd.grad(sign * scores.mean(), list(layer.parameters()), retain_graph=True)
        for sign, layer in ((-1, expected.b), (1, expected.a))
    ]
    with torch.no_grad():
        for layer, found in zip((expected.b, expected.a), grads, strict=True):
            for p, g in zip(layer.parameters(), found, strict=True):
                p -= 0.1 * g
    trainer(strategy()).step(net, [x])
    torch.testing.assert_close(net.state_dict(), expected.state_dict(), rtol=1e-12, atol=1e-12)


@every_strategy
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_checkpointed_weights_updated_since_raise(
    fused: bool, strategy: Callable[[], Strategy]
) -> None:
    # The recomputation would run with the new weights, and autograd could not tell.
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        old = checkpoint(self.b, self.a(x).tanh(), use_reentrant=False).square().mean()
        yield {"b": self.b(self.a(x).detach()).square().mean()}
        yield {"a": old}

    net = pair(step, make=lambda p: Adam(p, lr=0.1, fused=fused))
    line = step.__code__.co_firstlineno + 2
    with pytest.raises(RuntimeError, match="has changed since") as caught:
        trainer(strategy()).step(net, [data(6, 3)])
    assert f"'b' ({__file__}:{line})" in str(caught.value)


@every_strategy
def test_checkpointed_weights_are_watched_after_a_validation_too(
    strategy: Callable[[], Strategy],
) -> None:
    # The validation's driver has a guard of its own, which must not stay in the way.
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        if self.current_epoch == 0:
            yield {"a": self.a(x).mean(), "b": self.b(x).mean()}
            return
        old = checkpoint(self.b, self.a(x).tanh(), use_reentrant=False).square().mean()
        yield {"b": self.b(self.a(x).detach()).square().mean()}
        yield {"a": old}

    net = pair(step)
    type(net).validation_step = lambda self, x: self.log("value", self.a(x).mean())
    batches = [data(6, 3)]
    with pytest.raises(RuntimeError, match="has changed since"):
        trainer(strategy(), max_epochs=2).fit(net, batches, batches)


@every_strategy
def test_checkpointing_others_weights_than_those_updated_is_exact(
    strategy: Callable[[], Strategy],
) -> None:
    def make_step(run: Callable[..., Tensor]) -> Callable[..., Iterator[Any]]:
        def step(self: Any, x: Tensor) -> Iterator[Any]:
            h = run(self.a, x)
            for _ in range(2):
                yield {"b": self.b(h.detach()).square().mean()}
            yield {"a": h.square().mean()}

        return step

    nets = [
        pair(make_step(run))
        for run in (
            lambda f, x: f(x).tanh(),
            lambda f, x: checkpoint(lambda x: f(x).tanh(), x, use_reentrant=False),
        )
    ]
    for net in nets:
        run = trainer(strategy())
        run.step(net, [data(6, 3)])
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


@every_strategy
def test_reentrant_checkpointing_is_refused(strategy: Callable[[], Strategy]) -> None:
    net = pair(lambda self, x: {"loss": checkpoint(self.a, x, use_reentrant=True).mean()})
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        trainer(strategy()).step(net, [data(6, 3).requires_grad_()])


def test_errors_of_autograd_with_another_cause_stay_as_they_are() -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        h = self.net(x).exp()
        h2 = h * h
        h.add_(1.0)
        return h2.mean()

    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        trainer().step(module(step), [data(6, 3)])
    assert "update of" not in str(caught.value)


# -- rule 4: modes ---------------------------------------------------------------------------------


class _Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


MODES: dict[str, tuple[str, Callable[[], AbstractContextManager[object]]]] = {
    "no_grad": ("grad mode is False and was True", torch.no_grad),
    "inference_mode": ("inference mode", torch.inference_mode),
    "autocast": (
        r"autocast is \(True, torch.bfloat16\)",
        lambda: torch.autocast("cpu", torch.bfloat16),
    ),
    "device": ("function modes", lambda: torch.device("cpu")),
    "function mode": ("function modes", _Function),
    "dispatch mode": ("dispatch modes", _Dispatch),
}


@every_strategy
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_left_open_across_a_yield_raises_at_the_yield(
    mode: str, strategy: Callable[[], Strategy]
) -> None:
    words, context = MODES[mode]

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        loss = self.net(x).mean()
        with context():
            yield {"net": loss}

    net = module(step)
    before = net.net.weight.clone()
    with pytest.raises(RuntimeError, match=words) as caught:
        trainer(strategy()).step(net, [data(6, 3)])
    lines = [
        frame.lineno for frame in traceback.extract_tb(caught.tb) if frame.filename == __file__
    ]
    assert lines[-1] == step.__code__.co_firstlineno + 3
    assert "close the `with` before the yield" in str(caught.value)
    assert torch.equal(net.net.weight, before)


@every_strategy
def test_a_mode_closed_before_the_yield_is_fine(strategy: Callable[[], Strategy]) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        for _ in range(2):
            with torch.no_grad(), torch.device("cpu"):
                target = self.net(x) + 1
            yield {"net": (self.net(x) - target).square().mean()}

    run = trainer(strategy())
    run.step(module(step), [data(6, 3)])
    assert run.updates == {"net": 2}


@every_strategy
def test_grad_mode_left_off_by_a_step_that_returns_raises(strategy: Callable[[], Strategy]) -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        loss = self.net(x).mean()
        torch.set_grad_enabled(False)
        return loss

    with pytest.raises(RuntimeError, match="grad mode is False and was True"):
        trainer(strategy()).step(module(step), [data(6, 3)])
    assert torch.is_grad_enabled()


@every_strategy
def test_steps_have_gradients_wherever_they_are_called_from(
    strategy: Callable[[], Strategy],
) -> None:
    net = module(lambda self, x: self.net(x).square().mean())
    run = trainer(strategy())
    with torch.no_grad():
        run.step(net, [data(6, 3)])
        assert not torch.is_grad_enabled()
    assert run.updates == {"net": 1}
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode\(\): leave it"):
        run.step(net, [data(6, 3)])


@every_strategy
def test_validation_has_none_in_any_shard(strategy: Callable[[], Strategy]) -> None:
    seen: list[bool] = []
    net = module(lambda self, x: None)

    def validation_step(self: Any, x: Tensor) -> None:
        seen.append(torch.is_grad_enabled() or self.net(x).requires_grad)

    type(net).validation_step = validation_step
    trainer(strategy()).validate(net, [data(6, 3)])
    assert seen and not any(seen)


@several_shards
@pytest.mark.parametrize("resumes", [1, 3])
def test_the_callers_modes_are_those_of_every_shard(
    resumes: int, strategy: Callable[[], Strategy]
) -> None:
    seen: set[tuple[Any, ...]] = set()
    threads: set[int] = set()

    class Counting(_Function):
        pass

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        for _ in range(resumes):
            modes = torch.overrides._get_current_function_mode_stack()
            counting = sum(isinstance(mode, Counting) for mode in modes)
            autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
            seen.add((counting, autocast, torch.empty(1).device.type))
            threads.add(threading.get_ident())
            yield {"net": self.net(x).float().square().mean()}

    run = trainer(strategy())
    run.step(module(step, net=nn.Linear(3, 2)), [torch.ones(6, 3)])
    assert seen == {(0, (False, torch.bfloat16), "cpu")}
    seen.clear()
    threads.clear()
    with Counting(), torch.autocast("cpu", torch.float16), torch.device("meta"):
        run.step(run.module, [torch.ones(6, 3, device="cpu")])
    assert seen == {(1, (True, torch.float16), "meta")}
    assert len(threads) == (3 if isinstance(run.strategy, ThreadDataParallel) else 1)


@every_strategy
def test_autocast_surrounds_every_resume_and_nothing_else(
    strategy: Callable[[], Strategy],
) -> None:
    dtypes: list[torch.dtype] = []
    between: list[bool] = []

    class Look(Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            between.append(torch.is_autocast_enabled("cpu"))

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        for _ in range(3):
            out = self.net(x)
            dtypes.append(out.dtype)
            yield {"net": out.float().square().mean()}

    net = module(step, net=nn.Linear(3, 2))
    trainer(strategy(), precision="bf16-mixed", callbacks=Look()).step(net, [torch.ones(6, 3)])
    assert set(dtypes) == {torch.bfloat16} and between == [False] * 3


def test_autocasts_cache_of_cast_weights_does_not_outlive_an_update() -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        for _ in range(2):
            yield {"net": self.net(x).float().square().mean()}

    net, x = module(step, net=nn.Linear(3, 2)), torch.ones(6, 3)
    expected = copy.deepcopy(net.net)
    optimizer = SGD(expected.parameters(), lr=0.1)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = expected(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trainer(precision="bf16-mixed").step(net, [x])
    assert all(map(torch.equal, net.net.parameters(), expected.parameters()))


# -- a cache that all threads share ----------------------------------------------------------------


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def _parametrized(cached: bool) -> Any:
    def step(self: Any, x: Tensor) -> Tensor:
        if not cached:
            return (self.net(x) + self.net(x)).square().mean()
        with parametrize.cached():
            return (self.net(x) + self.net(x)).square().mean()

    net = linear(3, 2)
    parametrize.register_parametrization(net, "weight", _Doubled())
    return module(step, net=net)


def test_parametrize_cached_is_refused_under_threads() -> None:
    cache = parametrize._cache
    with pytest.raises(RuntimeError, match=r"parametrize\.cached\(\).*SingleDevice\(shards=n\)"):
        trainer(ThreadDataParallel(2)).step(_parametrized(cached=True), [data(6, 3)])
    assert parametrize._cache is cache


@pytest.mark.parametrize("cached", [False, True])
def test_parametrizations_train_as_by_hand(cached: bool) -> None:
    net, x = _parametrized(cached), data(6, 3)
    expected = copy.deepcopy(net.net)
    optimizer = SGD(expected.parameters(), lr=0.1)
    (expected(x) * 2).square().mean().backward()
    optimizer.step()
    strategies: list[Strategy] = [SingleDevice("cpu", 3)]
    if not cached:
        strategies.append(ThreadDataParallel(3))
    for strategy in strategies:
        ours = copy.deepcopy(net)
        trainer(strategy).step(ours, [x])
        for p, q in zip(ours.net.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
