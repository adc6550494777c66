from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composefit import SingleDevice, Strategy, ThreadDataParallel
from composefit.precision import LossScale, Precision
from tests.lockstep.steps import every_strategy, module, trainer


@pytest.mark.parametrize("name", ["16", "fp16", "bf16", "half", 33, True, None])
def test_an_unknown_precision_lists_the_known_ones(name: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown precision .*'32'.*'64'.*'bf16-mixed'"):
        Precision.of(name)


def test_a_number_is_its_name() -> None:
    assert Precision.of(32) == Precision.of("32")
    assert Precision.of(64).dtype is torch.float64
    assert Precision.of(Precision.of("16-mixed")).scales_losses
    assert not Precision.of("bf16-mixed").scales_losses


@every_strategy
@pytest.mark.parametrize(
    ("precision", "weights", "inputs", "outputs"),
    [
        ("32", torch.float32, torch.float32, torch.float32),
        ("64", torch.float64, torch.float64, torch.float64),
        ("bf16-true", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("bf16-mixed", torch.float32, torch.float32, torch.bfloat16),
        ("16-mixed", torch.float32, torch.float32, torch.float16),
    ],
)
def test_what_dtype_everything_has(
    precision: str,
    weights: torch.dtype,
    inputs: torch.dtype,
    outputs: torch.dtype,
    strategy: Callable[[], Strategy],
) -> None:
    seen: set[tuple[torch.dtype, ...]] = set()

    def step(self: Any, batch: tuple[Tensor, Tensor]) -> Iterator[Any]:
        x, labels = batch
        for _ in range(2):
            out = self.net(x)
            seen.add((self.net.weight.dtype, x.dtype, out.dtype, labels.dtype))
            assert self.random.normal(len(x)).dtype == weights
            yield {"net": out.float().square().mean()}

    net = module(step, net=nn.Linear(3, 2))
    net.register_buffer("mean", torch.zeros(2))
    net.register_buffer("count", torch.zeros(2, dtype=torch.int64))
    run = trainer(strategy(), precision=precision)
    run.step(net, [(torch.ones(6, 3), torch.arange(6))])
    assert seen == {(weights, inputs, outputs, torch.int64)}
    assert net.mean.dtype is weights and net.count.dtype is torch.int64
    assert not torch.is_autocast_enabled("cpu")


def test_validation_runs_in_the_precision_too() -> None:
    seen: list[torch.dtype] = []
    net = module(lambda self, x: None, net=nn.Linear(3, 2))
    type(net).validation_step = lambda self, x: seen.append(self.net(x).dtype)
    for strategy in (SingleDevice("cpu"), ThreadDataParallel(2)):
        trainer(strategy, precision="bf16-mixed").validate(net, [torch.ones(4, 3)])
    assert seen == [torch.bfloat16] * 3


def test_mixed_precision_in_threads_is_that_of_shards_in_turn() -> None:
    nets = []
    for strategy in (SingleDevice("cpu", 3), ThreadDataParallel(3)):
        torch.manual_seed(0)
        net = module(
            lambda self, x: self.net(x).float().square().mean(),
            net=nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)),
        )
        batches = [torch.linspace(-1, 1, 21).view(7, 3) * i for i in range(4)]
        trainer(strategy, precision="bf16-mixed").fit(net, batches)
        nets.append(net)
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


# -- the loss scale, against torch's ---------------------------------------------------------------


def test_a_loss_scale_grows_and_backs_off_as_grad_scaler_does() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    options: dict[str, Any] = {"init_scale": 2.0**10, "growth_interval": 3}
    scaler = torch.amp.GradScaler("cpu", **options)
    scale = LossScale(torch.device("cpu"), **options)
    history = [0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    for found in history:
        scaler.scale(parameter.sum())  # the scaler is lazy
        parameter.grad = torch.full((2,), float("inf") if found else 1.0)
        scaler.step(optimizer)
        scaler.update()
        scale.adapt(torch.tensor(float(found)))
        assert scale.value.item() == scaler.get_scale()
        assert scale.tracker.item() == scaler.state_dict()["_growth_tracker"]


def test_its_state_is_grad_scalers() -> None:
    scale = LossScale(torch.device("cpu"), init_scale=8.0)
    scale.adapt(torch.tensor(0.0))
    state = scale.state_dict()
    theirs = torch.amp.GradScaler("cpu")
    assert state.items() <= {**theirs.state_dict(), "scale": 8.0, "_growth_tracker": 1}.items()
    other = LossScale(torch.device("cpu"))
    other.load_state_dict(state)
    assert other.state_dict() == state


@pytest.mark.parametrize("value", [2.0**16, 3.0, 7.0, 1e-3])
def test_its_inverse_is_rounded_once(value: float) -> None:
    scale = LossScale(torch.device("cpu"), init_scale=value)
    exact = 1.0 / scale.value.double().item()
    assert scale.inverse().item() == torch.tensor(exact, dtype=torch.float32).item()
