"""`strategy.gradient` under law 1: hand-written loops that end where the plain ones do."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from composefit.losses import Mean, Sum
from composefit.strategies import SingleDevice, Strategy, ThreadDataParallel
from tests.data_parallel import loops
from tests.data_parallel.loops import PAD, difference, double, parameters, plain

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "single": lambda: SingleDevice("cpu"),
    "3 shards": lambda: SingleDevice("cpu", shards=3),
    "2 threads": lambda: ThreadDataParallel(2),
    "3 threads": lambda: ThreadDataParallel(3),
    "4 threads": lambda: ThreadDataParallel(4),
}


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest) -> Iterator[Strategy]:
    with STRATEGIES[request.param]() as strategy:
        yield strategy


@pytest.fixture
def threads() -> Iterator[Strategy]:
    with ThreadDataParallel(2) as strategy:
        yield strategy


def step(optimizer: torch.optim.Optimizer, gradients: list[Tensor | None]) -> None:
    (group,) = optimizer.param_groups
    for parameter, gradient in zip(group["params"], gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


def classifier(strategy: Strategy) -> list[nn.Module]:
    net = double(loops.Conv)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for batch in loops.images():
        _, gradients = strategy.gradient(
            lambda net, b: F.cross_entropy(net(b[0]), b[1]), net, batch
        )
        step(optimizer, gradients)
    return [net]


def lstm(strategy: Strategy) -> list[nn.Module]:
    net = double(loops.Tagger)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for tokens in loops.sentences():
        _, gradients = strategy.gradient(
            lambda net, tokens: loops.tag_loss(net(tokens), tokens), net, tokens
        )
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
    return [net]


def token_mean(net: Any, tokens: Tensor) -> Mean:
    inputs = tokens[:, :-1]
    total = loops.token_loss(net(inputs, padding=inputs == PAD), tokens)
    return Mean(total, (tokens[:, 1:] != PAD).sum())


def transformer(strategy: Strategy, loss_fn: Callable[..., Any] = token_mean) -> list[nn.Module]:
    net = double(loops.Transformer)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for tokens in loops.sentences():
        step(optimizer, strategy.gradient(loss_fn, net, tokens)[1])
    return [net]


def gan(strategy: Strategy) -> list[nn.Module]:
    nets = nn.ModuleDict({"make": double(loops.generator), "judge": double(loops.critic, seed=2)})
    make, judge = (torch.optim.SGD(net.parameters(), lr=0.1) for net in nets.values())

    def judge_loss(nets: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        z, real = batch
        fake = nets["make"](z)
        return F.softplus(-nets["judge"](real)).mean() + F.softplus(nets["judge"](fake)).mean()

    def make_loss(nets: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.softplus(-nets["judge"](nets["make"](batch[0]))).mean()

    for batch in loops.noise():
        step(judge, strategy.gradient(judge_loss, nets, batch, nets["judge"].parameters())[1])
        step(make, strategy.gradient(make_loss, nets, batch, nets["make"].parameters())[1])
    return list(nets.values())


@pytest.mark.parametrize("loop", [classifier, lstm, transformer, gan], ids=lambda f: f.__name__)
def test_loop_ends_where_the_plain_one_does(
    strategy: Strategy, loop: Callable[[Strategy], list[nn.Module]]
) -> None:
    expected = parameters(getattr(loops, loop.__name__)(plain))
    assert difference(parameters(loop(strategy)), expected) <= 1e-10


def test_a_token_mean_as_a_plain_loss_misses_the_bound(threads: Strategy) -> None:
    """The control: a loss that is a mean over something else than samples, and does not say so."""

    def wrong(net: Any, tokens: Tensor) -> Tensor:
        (term,) = token_mean(net, tokens).terms
        return term.total / term.weight

    found = parameters(transformer(threads, wrong))
    assert difference(found, parameters(loops.transformer(plain))) > 1e-3


def test_the_loss_is_that_of_the_whole_batch(strategy: Strategy) -> None:
    net, x = nn.Linear(3, 1).double(), torch.randn(7, 3, dtype=torch.float64)
    mean, _ = strategy.gradient(lambda net, x: net(x).square().mean(), net, x)
    total, found = strategy.gradient(lambda net, x: Sum(net(x).square().sum()), net, x)
    expected = net(x).square().sum()
    torch.testing.assert_close((mean * 7, total), (expected.detach(),) * 2)
    assert not (mean.requires_grad or total.requires_grad)
    torch.testing.assert_close(found[0], torch.autograd.grad(expected, net.weight)[0])


def test_gradients_come_for_the_parameters_asked_for(strategy: Strategy) -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 1), "c": nn.Linear(2, 1)})
    wanted = [net["c"].weight, net["a"].bias]
    _, found = strategy.gradient(
        lambda net, x: net["b"](net["a"](x)).mean(), net, torch.randn(6, 2), wanted
    )
    assert found[0] is None
    torch.testing.assert_close(found[1], net["b"].weight[0].detach())
    assert all(p.grad is None for p in net.parameters())


def test_frozen_parameters_are_left_out(threads: Strategy) -> None:
    net = nn.Linear(2, 1)
    net.bias.requires_grad_(False)
    _, found = threads.gradient(lambda net, x: net(x).mean(), net, torch.ones(4, 2))
    assert len(found) == 1


def test_gradients_are_aligned_with_the_parameters_given_frozen_or_not(strategy: Strategy) -> None:
    net = nn.Linear(2, 1)
    net.weight.requires_grad_(False)
    _, found = strategy.gradient(
        lambda net, x: net(x).mean(), net, torch.ones(6, 2), [net.weight, net.bias]
    )
    assert found == [None, torch.ones(1)]


def test_one_tensor_as_parameters_is_an_error(threads: Strategy) -> None:
    net = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"got one tensor: write parameters=\[p\]"):
        threads.gradient(lambda net, x: net(x).mean(), net, torch.ones(4, 2), net.weight)


def test_both_threads_run_forward_and_backward(threads: Strategy) -> None:
    from tests.data_parallel.conftest import Seen

    net = nn.Sequential(nn.Linear(2, 2), seen := Seen())
    threads.gradient(lambda net, x: net(x).mean(), net, torch.randn(4, 2))
    assert set(seen.forwards) == set(seen.backwards) == {"MainThread", "composefit-lane-1"}


def test_without_a_session_it_opens_one_for_the_call() -> None:
    strategy, net = ThreadDataParallel(2), nn.Linear(2, 1)
    for _ in range(2):
        _, found = strategy.gradient(lambda net, x: net(x).mean(), net, torch.ones(4, 2))
        torch.testing.assert_close(found[0], torch.ones(1, 2))


def test_running_statistics_come_back_to_the_module(threads: Strategy) -> None:
    net = nn.BatchNorm1d(2, momentum=1.0).double()
    x = torch.randn(5, 2, dtype=torch.float64)
    threads.gradient(lambda net, x: net(x).mean(), net, x)
    torch.testing.assert_close(net.running_mean, x.mean(0))


def test_dropout_differs_from_call_to_call(threads: Strategy) -> None:
    net, x = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 1, bias=False)), torch.ones(4, 50)
    first, second = (threads.gradient(lambda net, x: net(x).mean(), net, x)[1][0] for _ in range(2))
    assert not torch.equal(first, second)


def test_an_error_is_the_users_own_and_the_strategy_works_on(threads: Strategy) -> None:
    net, x = nn.Linear(2, 1), torch.ones(4, 2)

    def fails(net: Any, x: Tensor) -> Tensor:
        raise KeyError("my own")

    with pytest.raises(KeyError, match="my own") as found:
        threads.gradient(fails, net, x)
    assert "shard 0" in found.value.__notes__[0]
    _, gradients = threads.gradient(lambda net, x: net(x).mean(), net, x)
    torch.testing.assert_close(gradients[0], torch.ones(1, 2))


def test_a_loss_that_is_no_scalar_is_an_error(threads: Strategy) -> None:
    with pytest.raises(ValueError, match=r"must be a 0-dim tensor, got shape \(2, 1\)"):
        threads.gradient(lambda net, x: net(x), nn.Linear(2, 1), torch.ones(4, 2))


def test_a_module_that_is_gone_is_not_mistaken_for_another(threads: Strategy) -> None:
    for i in range(20):
        net = nn.Linear(2, 1 + i % 2)
        _, found = threads.gradient(lambda net, x: net(x).sum(), net, torch.ones(4, 2))
        assert found[0].shape == net.weight.shape


def test_the_default_generator_goes_on_by_one_draw_whatever_the_shards_draw(
    strategy: Strategy,
) -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1))
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    strategy.gradient(lambda net, x: net(x).mean(), net, torch.ones(4, 2))
    assert torch.equal(torch.get_rng_state(), expected)


def test_the_default_generator_stays_where_it_was_if_no_shard_draws(strategy: Strategy) -> None:
    net, state = nn.Linear(2, 1), torch.get_rng_state()
    strategy.gradient(lambda net, x: net(x).mean(), net, torch.ones(4, 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_manual_seed_repeats_what_the_shards_draw(strategy: Strategy) -> None:
    net, x = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 1, bias=False)), torch.ones(6, 50)
    found = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        found.append(strategy.gradient(lambda net, x: net(x).mean(), net, x)[1][0])
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    torch.manual_seed(0)
    (fresh,) = STRATEGIES["2 threads"]().gradient(lambda net, x: net(x).mean(), net, x)[1]
    if strategy.lanes == 2:  # nor does it matter what the strategy has done before
        assert torch.equal(fresh, found[0])


# -- used where it is in use -----------------------------------------------------------------------


def test_a_gradient_within_that_of_the_same_module_is_an_error(strategy: Strategy) -> None:
    net, x = nn.Linear(2, 1), torch.ones(6, 2)

    def within(replica: Any, shard: Tensor) -> Tensor:
        strategy.gradient(lambda net, x: net(x).mean(), net, x)
        return replica(shard).mean()

    with pytest.raises(RuntimeError, match=r"already running.*use another strategy object"):
        strategy.gradient(within, net, x)
    _, found = strategy.gradient(lambda net, x: net(x).mean(), net, x)
    torch.testing.assert_close(found[0], torch.ones(1, 2))


def test_lanes_in_use_are_refused_to_another_module(threads: Strategy) -> None:
    net, other, x = nn.Linear(2, 1), nn.Linear(2, 1), torch.ones(6, 2)

    def within(replica: Any, shard: Tensor) -> Tensor:
        threads.gradient(lambda net, x: net(x).mean(), other, x)
        return replica(shard).mean()

    with pytest.raises(RuntimeError, match=r"already running.*use another strategy object"):
        threads.gradient(within, net, x)
    _, found = threads.gradient(lambda net, x: net(x).mean(), net, x)
    torch.testing.assert_close(found[0], torch.ones(1, 2))
