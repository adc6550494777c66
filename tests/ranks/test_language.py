"""`Grads` and losses as functions on ranks: what each rank has of its own must not matter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS

from composefit import FullySharded, Grads, SingleDevice
from tests.ranks.pool import RankPool
from tests.ranks.test_steps import Net, data, strategy, trainer

# Functions that run in ranks are sent there whole, so they build what they need themselves.


class Remembering(nn.Module):
    """Its forward sets an attribute, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = x.detach().mean(1, keepdim=True)
        result: Tensor = self.layer(x)
        return result


def by_lbfgs(by: Any) -> float:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        self.part(x)
        yield lambda: ((self.part.layer(x) - self.part.hidden) ** 2).mean() + self.layer(x).mean()

    module = Net(step, part=Remembering())
    module.configure_optimizers = lambda: LBFGS(module.parameters(), lr=0.05, max_iter=4)
    trainer(by).fit(module, data())
    return float(module.part.layer.weight.detach().sum())


def test_a_function_sees_what_the_forward_before_it_has_set(two_ranks: RankPool) -> None:
    found = two_ranks.run(lambda: by_lbfgs(strategy()))
    assert found == pytest.approx([by_lbfgs(SingleDevice("cpu"))] * 2, rel=1e-10)


def given(gradients: Any, sharded: bool = False, **arguments: Any) -> Any:
    """The weight after an update with these gradients."""

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield Grads([gradients(p) for p in self.parameters()])

    module = Net(step)
    by = FullySharded(accelerator="cpu", timeout=30, policy=1) if sharded else strategy()
    trainer(by, **arguments).fit(module, data())
    weight: Any = module.layer.weight.detach()
    return getattr(weight, "full_tensor", lambda: weight)()


def test_gradients_in_another_order_on_each_rank_are_an_error(two_ranks: RankPool) -> None:
    def permuted(p: Tensor) -> Tensor:
        from torch import distributed

        return torch.arange(float(p.numel())).roll(distributed.get_rank()).view(p.shape)

    for one in two_ranks.outcomes(lambda: given(permuted)):
        assert "different Grads for 'optimizer'" in one.text


def test_gradients_that_are_not_finite_are_told_as_such(two_ranks: RankPool) -> None:
    def nan(p: Tensor) -> Tensor:
        return torch.full(p.shape, float("nan"))

    for one in two_ranks.outcomes(lambda: given(nan)):
        assert "is not finite: gradients given" in one.text
    for weight in two_ranks.run(lambda: given(nan, on_nonfinite="skip")):
        assert weight.isfinite().all()


def test_gradients_made_of_sharded_parameters_are_whole_again(two_ranks: RankPool) -> None:
    def ones(p: Tensor) -> Tensor:
        return torch.ones_like(p)

    expected = Net(lambda self, x: None).layer.weight.detach() - 0.1
    for weight in two_ranks.run(lambda: given(ones, sharded=True)):
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=0)
