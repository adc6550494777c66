import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composefit import SingleDevice, ThreadDataParallel
from composefit.strategies.single_device import best_device
from tests.lockstep.steps import data, module, same, trainer


@pytest.mark.parametrize("shards", [0, -1, 1.5, "2", True])
def test_a_number_of_shards_that_cannot_be_raises(shards: Any) -> None:
    with pytest.raises(ValueError, match=f"expects a positive number, got {shards!r}"):
        SingleDevice("cpu", shards=shards)


def test_auto_is_an_accelerator_if_there_is_one() -> None:
    assert SingleDevice().device == best_device()
    if not torch.accelerator.is_available():
        assert SingleDevice().device == torch.device("cpu")


def test_it_says_how_a_batch_is_cut() -> None:
    assert SingleDevice("cpu").describe(32) == "32 on cpu"
    assert SingleDevice("cpu", 3).describe(32) == "32 = 3 shards x 11 on cpu"


def test_tasks_run_in_order_in_the_calling_thread() -> None:
    ran: list[tuple[int, int]] = []
    SingleDevice("cpu", 3).run(
        [lambda i=i: ran.append((i, threading.get_ident())) for i in range(3)]
    )
    assert ran == [(i, threading.get_ident()) for i in range(3)]


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x + torch.randn_like(x))


@pytest.mark.parametrize("shards", [2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"microbatch_size": 2}, {"accumulate_grad_batches": 2}])
def test_n_shards_are_bitwise_n_threads(shards: int, options: dict[str, Any]) -> None:
    nets = []
    for strategy in (SingleDevice("cpu", shards), ThreadDataParallel(shards)):
        net = module(lambda self, x: self.net(x).square().mean(), net=Mixed())
        net.samples_per_group = 2  # BatchNorm wants two
        batches = [data(8, 3, seed=s).float() for s in range(4)]
        trainer(strategy, **options).fit(net, batches)
        nets.append(net)
    assert same(*nets) and not same(nets[0].net, Mixed())
