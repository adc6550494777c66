from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composefit import LoopModule, Mean, Strategy, Sum
from tests.lockstep.steps import data, every_strategy, module, trainer

LOSS = torch.tensor(1.0)


class Plain(LoopModule):
    pass


def test_a_trainer_that_is_a_module_is_not_registered() -> None:
    net = Plain()
    net.trainer = nn.Linear(1, 1)  # type: ignore[assignment]
    assert list(net.children()) == [] and net.state_dict() == {}


@pytest.mark.parametrize("what", ["random", "log", "log_dict"])
def test_what_belongs_in_a_step_says_so_outside(what: str) -> None:
    net = Plain()
    with pytest.raises(RuntimeError, match="belongs in a step"):
        if what == "random":
            net.random.normal(3)
        elif what == "log":
            net.log("loss", 1.0)
        else:
            net.log_dict({"loss": 1.0})


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda net: net.optimizers(), r"yield \{\"name\": loss\}"),
        (lambda net: net.manual_backward(LOSS), r"yield \{\"name\": loss\}"),
        (lambda net: net.toggle_optimizer(None), "not needed"),
        (lambda net: net.untoggle_optimizer(None), "not needed"),
        (lambda net: setattr(net, "automatic_optimization", False), r"yield \{\"name\": loss\}"),
    ],
)
def test_lightnings_manual_optimization_raises_with_what_to_write(
    use: Callable[[LoopModule], Any], words: str
) -> None:
    with pytest.raises(RuntimeError, match=words):
        use(Plain())


def test_device_and_dtype_are_those_of_the_parameters() -> None:
    net = Plain()
    assert net.device == torch.device("cpu") and net.dtype is torch.float32
    net.layer = nn.Linear(1, 1, dtype=torch.float64)
    assert net.dtype is torch.float64
    assert net.global_step == 0 and net.current_epoch == 0


# -- logging ---------------------------------------------------------------------------------------


@every_strategy
def test_logged_values_are_reduced_to_one_by_samples_or_their_own_weight(
    strategy: Callable[[], Strategy],
) -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        loss = self.net(x).square().mean()
        self.log("loss", loss)
        self.log("rows", float(len(x)))
        self.log_dict({"tokens": Mean(x[:, 0].sum(), 2 * len(x)), "sum": Sum(x.sum())})
        self.log("weighted", x[0, 0], batch_size=1 if x[0, 0] == 0 else 3)
        return loss

    net, x = module(step), data(7, 3)
    x[:, 0] = torch.arange(7)
    expected = net.net(x).square().mean().item()
    run = trainer(strategy())
    run.step(net, [x])
    found = run.logged_metrics
    several = run.strategy.lanes > 1
    assert found["loss"] == pytest.approx(expected, rel=1e-12)
    assert found["rows"] == pytest.approx((9 + 4 + 4) / 7 if several else 7)
    assert found["tokens"] == pytest.approx(21 / 14)
    assert found["sum"] == pytest.approx(x.sum().item(), rel=1e-12)
    assert found["weighted"] == pytest.approx((0 + 3 * 3 + 5 * 3) / 7 if several else 0)


def test_a_logged_tensor_with_dimensions_raises_with_its_name() -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        self.log("out", self.net(x))
        return self.net(x).mean()

    with pytest.raises(ValueError, match=r"self\.log\('out', \.\.\.\).*shape \(6, 2\)"):
        trainer().step(module(step), [data(6, 3)])


@every_strategy
def test_global_step_counts_steps_in_every_shard(strategy: Callable[[], Strategy]) -> None:
    seen: list[tuple[int, int]] = []

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        seen.append((self.current_epoch, self.global_step))
        for _ in range(2):
            yield {"net": self.net(x).mean()}

    trainer(strategy(), max_epochs=2).fit(module(step), [data(6, 3)] * 2)
    assert sorted(set(seen)) == [(0, 0), (0, 1), (1, 2), (1, 3)]
