"""What effects accept, agree on and give back; their gradients are tests/lockstep's."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from composefit import (
    Effect,
    Gather,
    Gradient,
    Grads,
    Mean,
    Once,
    Strategy,
    Sum,
    Update,
)
from composefit.effects import Reduce, reduced_loss, shares
from composefit.losses import SUMMED
from tests.lockstep.steps import data, every_strategy, linear, module, several_shards, trainer

X = torch.ones(3, 2)
P = torch.nn.Parameter(torch.ones(2))
FROZEN = torch.nn.Parameter(torch.ones(2), requires_grad=False)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Gather(3), TypeError, "Gather expects a tensor or a tuple of tensors, got int"),
        (
            lambda: Gather((X, "y")),
            TypeError,
            "Gather expects a tensor or a tuple of tensors, got str",
        ),
        (lambda: Gather(()), ValueError, "at least one tensor"),
        (lambda: Gather(X.sum()), ValueError, r"got a 0-dim tensor: yield Mean\(total, weight\)"),
        (lambda: Once(X), TypeError, "expects a function and its tensors.*called already"),
        (lambda: Once(print, 3), TypeError, "tensors with rows in dimension 0.*got int"),
        (lambda: Once(print, X.sum()), TypeError, "got a 0-dim tensor"),
        (lambda: Update(X), TypeError, r"Update expects \{name: loss, ...\}, got a tensor"),
        (lambda: Update({}), ValueError, "at least one"),
        (lambda: Update({"a": X}), ValueError, r"the loss of 'a' .*shape \(3, 2\).*\.mean\(\)"),
        (lambda: Update({"a": 0.5}), TypeError, r"the loss of 'a'.*\.item\(\)"),
        (lambda: Gradient(X, P), TypeError, r"Gradient expects \{key: loss, ...\} and wrt="),
        (lambda: Gradient({}, P), ValueError, "at least one {key: loss}"),
        (lambda: Gradient({"a": X}, P), ValueError, r"the loss of 'a' must be a 0-dim tensor"),
        (lambda: Gradient({"a": X.sum()}, []), ValueError, "at least one parameter, got none"),
        (lambda: Gradient({"a": X.sum()}, [X]), TypeError, r"torch\.autograd\.grad\("),
        (lambda: Gradient({"a": X.sum()}, 3), TypeError, r"wrt=module\.parameters\(\)"),
        (lambda: Gradient({"a": X.sum()}, FROZEN), ValueError, "requires no gradient .*frozen"),
        (lambda: Grads(X), TypeError, "a list with a gradient for each parameter, got a tensor"),
        (lambda: Grads([3.0]), TypeError, "tensors, or None for a parameter .* got float"),
        (lambda: Grads([None, None]), ValueError, "no gradient at all"),
        (lambda: Grads([X], loss=X), ValueError, r"the loss of Grads must be a 0-dim tensor"),
    ],
)
def test_what_an_effect_cannot_be_made_of_raises(
    make: Callable[[], object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make()


def test_an_effect_is_its_own_generator() -> None:
    def step() -> Iterator[Any]:
        everything, offset = yield from Gather(X)
        assert everything is X and offset == 2

    generator = step()
    effect = next(generator)
    assert isinstance(effect, Gather)
    with pytest.raises(StopIteration):
        generator.send((X, 2))


def test_effects_that_agree_and_that_do_not() -> None:
    assert Gather(X).agreement() == Gather(torch.ones(7, 2)).agreement()
    assert Gather(X).agreement() != Gather((X,)).agreement()
    assert Gather(X).agreement() != Gather(X.double()).agreement()
    assert Once(print, X).agreement() == Once(print, X[:1]).agreement()
    assert Once(print, X).agreement() != Once(len, X).agreement()
    assert Once(print, X).agreement() != Once(print, X, rows=True).agreement()
    assert Update({"a": X.sum()}).agreement() != Update({"b": X.sum()}).agreement()
    assert Update({"a": X.sum()}).agreement() != Update({"a": X.sum()}, True).agreement()
    assert Reduce(Sum(1)).agreement() != Reduce(Sum(1) + Sum(2)).agreement()


@pytest.mark.parametrize(
    ("effect", "text"),
    [
        (Gather((X, X[0])), "Gather((3, 2), (2,))"),
        (Once(print, X), "Once(print)"),
        (Update({"a": X.sum(), "b": X.sum()}), "{'a': loss, 'b': loss}"),
        (Reduce(Mean(6, 3)), "Mean(6, 3)"),
    ],
)
def test_an_effect_says_what_it_is(effect: Effect[Any], text: str) -> None:
    assert repr(effect) == text


def test_shares_are_fractions_of_what_all_shards_hold() -> None:
    assert shares([None, None], [3, 5]) == [(3.0, 8), (5.0, 8)]
    assert shares([None], [3]) == [(1.0, 1.0)]
    assert shares([SUMMED, SUMMED], [3, 5]) == [(1.0, 1.0)] * 2
    assert shares([2, 6.0], [3, 5]) == [(1.0, 8.0)] * 2
    assert [float(d) for _, d in shares([torch.tensor(2), torch.tensor(0)], [1, 1])] == [2.0, 2.0]
    with pytest.raises(ValueError, match="a mean over nothing"):
        shares([torch.tensor(0), 0], [1, 1])


def test_a_reduced_loss_is_the_sum_of_its_terms_each_over_its_own_denominator() -> None:
    first, second = Mean(6, 3) + Sum(1.5), Mean(2, 1) + Sum(0.5)
    columns = list(zip(first.terms, second.terms, strict=True))
    fractions = [shares([term.weight for term in column], [1, 1]) for column in columns]
    assert reduced_loss(columns, fractions) == (6 + 2) / (3 + 1) + 2


# -- in a step -------------------------------------------------------------------------------------


@every_strategy
def test_a_gather_gives_all_rows_in_sample_order_and_ones_own_offset(
    strategy: Callable[[], Strategy],
) -> None:
    offsets: list[int] = []

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        (rows, twice, labels), offset = yield Gather((x, x.repeat(2, 1), x[:, 0].long()))
        assert torch.equal(rows, whole)
        assert torch.equal(rows[offset : offset + len(x)], x)
        assert twice.shape == (14, 3) and labels.shape == (7,)
        offsets.append(offset)
        yield {"net": self.net(x).mean()}

    whole = data(7, 3)
    trainer(strategy()).step(module(step), [whole])
    assert sorted(offsets) in ([0], [0, 3, 5])


@every_strategy
def test_what_one_shard_writes_into_gathered_rows_is_its_own(
    strategy: Callable[[], Strategy],
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        h, _ = yield from Gather(self.net(x))
        loss = (h.square() * h.detach()).sum()
        yield Sum(1.0)
        yield {"net": Sum(loss / len(h))}

    run = trainer(strategy())
    run.step(module(step), [data(6, 3)])
    assert run.updates == {"net": 1}


@every_strategy
def test_a_bare_mean_or_sum_only_reduces(strategy: Callable[[], Strategy]) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        mean = yield Mean(x.sum(), x.numel())
        total = yield from Sum(x.sum())
        torch.testing.assert_close(mean, whole.mean(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(total, whole.sum(), rtol=1e-12, atol=1e-12)
        assert not mean.requires_grad
        of_samples = yield Sum(0 * x.sum()) + x.mean()
        torch.testing.assert_close(of_samples, whole.mean(), rtol=1e-12, atol=1e-12)

    net, whole = module(step), data(7, 3)
    before = net.net.weight.clone()
    run = trainer(strategy())
    run.step(net, [whole])
    assert run.updates == {"net": 0} and torch.equal(net.net.weight, before)


@every_strategy
def test_a_returned_mean_updates(strategy: Callable[[], Strategy]) -> None:
    run = trainer(strategy())
    run.step(module(lambda self, x: Mean(self.net(x).sum(), 2 * len(x))), [data(7, 3)])
    assert run.updates == {"net": 1}


@every_strategy
def test_once_gets_detached_rows_in_sample_order_and_gives_each_shard_its_own(
    strategy: Callable[[], Strategy],
) -> None:
    calls: list[int] = []

    def function(rows: Tensor, other: Tensor) -> dict[str, Tensor]:
        assert torch.equal(rows, whole) and torch.equal(other, -whole)
        assert not rows.requires_grad and not torch.is_grad_enabled()
        calls.append(len(rows))
        return {"sum": rows + 1, "index": torch.arange(len(rows))}

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        x = x.clone().requires_grad_()
        own = yield from Once(function, x, -x, rows=True)
        assert torch.equal(own["sum"], x + 1) and len(own["index"]) == len(x)
        count = yield from Once(lambda rows: len(rows), x)
        assert count == 7
        yield {"net": self.net(x).mean()}

    whole = data(7, 3)
    trainer(strategy()).step(module(step), [whole])
    assert calls == [7]


@every_strategy
def test_once_without_tensors_hands_out_rows_by_samples(strategy: Callable[[], Strategy]) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        rows = yield from Once(lambda: whole * 2, rows=True)
        assert torch.equal(rows, 2 * x)
        yield {"net": self.net(x).mean()}

    whole = data(7, 3)
    trainer(strategy()).step(module(step), [whole])


@every_strategy
def test_an_effect_of_ones_own_is_a_class_with_a_combine(strategy: Callable[[], Strategy]) -> None:
    # The driver knows no effect by name.
    class Largest(Effect[float]):
        def __init__(self, value: float) -> None:
            self.value = value

        def combine(self, barrier: Any, effects: Any) -> list[float]:
            return [max(effect.value for effect in effects)] * len(effects)

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        assert (yield from Largest(x.max().item())) == whole.max().item()
        yield {"net": self.net(x).mean()}

    whole = data(7, 3)
    trainer(strategy()).step(module(step, net=linear(3, 2)), [whole])


# -- what a shard must not hand over by the back door ----------------------------------------------


@several_shards
@pytest.mark.parametrize("kind", ["closure", "default", "partial"])
def test_once_refuses_a_function_around_a_tensor_of_its_shard(
    kind: str, strategy: Callable[[], Strategy]
) -> None:
    # Only one shard's would be used.
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        mean = x.mean()
        functions: dict[str, Callable[..., Any]] = {
            "closure": lambda: mean * 2,
            "default": lambda value=mean: value * 2,
            "partial": partial(torch.mul, mean, 2),
        }
        yield from Once(functions[kind])
        yield {"net": self.net(x).mean()}

    with pytest.raises(RuntimeError, match=r"hand the tensor over, `Once\(function, tensor\)`"):
        trainer(strategy()).step(module(step), [data(7, 3)])


@every_strategy
def test_a_stop_iteration_in_once_is_no_end(strategy: Callable[[], Strategy]) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield from Once(lambda: next(iter(())))
        yield {"net": self.net(x).mean()}

    with pytest.raises(RuntimeError, match="StopIteration"):
        trainer(strategy()).step(module(step), [data(7, 3)])


@several_shards
def test_each_shard_may_write_to_the_results_it_gets(strategy: Callable[[], Strategy]) -> None:
    seen: list[float] = []

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        mean = yield Mean(x.detach().sum(), x.numel())
        mean *= 2
        losses = yield {"net": self.net(x).mean() * 0 + mean}
        losses["net"] += 1
        seen.append(losses["net"].item())

    batch = data(7, 3)
    trainer(strategy()).step(module(step), [batch])
    assert seen == pytest.approx([2 * batch.mean().item() + 1] * len(seen), rel=1e-12)


@several_shards
@pytest.mark.parametrize("first", [True, False])
def test_terms_of_a_loss_must_be_of_the_same_kinds_in_all_shards(
    first: bool, strategy: Callable[[], Strategy]
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        loss = self.net(x).sum()
        swapped = bool(x[0, 0] == batch[0, 0]) is first
        yield {"net": Mean(loss, 7) + Sum(loss) if swapped else Sum(loss) + Mean(loss, 7)}

    batch = data(7, 3)
    with pytest.raises(RuntimeError, match="disagree"):
        trainer(strategy()).step(module(step), [batch])


def test_counts_of_a_narrow_type_do_not_overflow() -> None:
    weights = [Mean(torch.tensor(1.0), torch.tensor(100, dtype=torch.uint8)) for _ in range(3)]
    assert sum(mean.terms[0].weight for mean in weights) == 300
    flags = [Mean(torch.tensor(1.0), torch.tensor(True)) for _ in range(3)]
    assert sum(mean.terms[0].weight for mean in flags) == 3
