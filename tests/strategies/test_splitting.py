"""Gradients and optimizers split over lanes: bitwise what one lane does."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import StepLR

from composefit import ThreadDataParallel
from composefit.strategies import splitting, thread_data_parallel
from composefit.strategies.splitting import SplitOptimizer, add_split, flat_chunks
from tests.lockstep.steps import module, same, trainer


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it be worthwhile for a handful of numbers."""
    monkeypatch.setattr(splitting, "WORTHWHILE", 1)
    monkeypatch.setattr(thread_data_parallel, "WORTHWHILE", 1)


def run(tasks: Sequence[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(tasks)) as pool:
        for future in [pool.submit(task) for task in tasks]:
            future.result()


SHAPES = {
    "empty": torch.zeros(0),
    "one number": torch.ones(1),
    "less than a lane": torch.randn(10),
    "matrix": torch.randn(37, 11),
    "channels_last": torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
def test_chunks_hold_every_number_once_as_views(shape: str, lanes: int) -> None:
    tensor = SHAPES[shape].clone()
    chunks = flat_chunks(tensor, lanes)
    assert len(chunks) == lanes and sum(len(c) for c in chunks) == tensor.numel()
    for chunk in chunks:
        chunk.add_(1)
    assert torch.equal(tensor, SHAPES[shape] + 1)
    offsets = [c.storage_offset() - tensor.storage_offset() for c in chunks if len(c)]
    assert all(offset % 64 == 0 for offset in offsets)


@pytest.mark.parametrize("lanes", [2, 3])
def test_a_split_sum_is_bitwise_the_sum(lanes: int) -> None:
    targets = [tensor.clone() for tensor in SHAPES.values()]
    summands = [torch.randn_like(tensor) for tensor in targets]
    expected = [a + b for a, b in zip(targets, summands, strict=True)]
    add_split(targets, summands, lanes, run)
    assert all(map(torch.equal, targets, expected))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.out = nn.Linear(5, 7)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x).mean((2, 3)))


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=0.1),
    "fused adam": lambda p: Adam(p, lr=0.1, fused=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: Adagrad(p, lr=0.1),
}


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_split_optimizer_is_bitwise_the_optimizer(kind: str) -> None:
    nets = [Net(), Net()]
    whole, ours = (OPTIMIZERS[kind](net.parameters()) for net in nets)
    split = SplitOptimizer(ours, 3)
    done = []
    for number in range(5):
        for net in nets:
            torch.manual_seed(number)
            net.zero_grad()
            net(torch.randn(4, 3, 6, 6)).square().mean().backward()
        for optimizer in (whole, ours):
            optimizer.param_groups[0]["lr"] = 0.1 / (number + 1)  # as a scheduler does
        whole.step()
        assert SplitOptimizer.suits(ours)
        done.append(split.step(run))
        if not done[-1]:
            ours.step()
        if number == 3:  # new tensors in place of the old ones
            for optimizer in (whole, ours):
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert sum(done) >= 3
    assert same(*nets)
    states = [optimizer.state_dict()["state"] for optimizer in (whole, ours)]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        for name, value in state.items():
            other = states[1][key][name]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("change", ["data", "step"])
def test_a_split_optimizer_follows_what_is_changed_between_steps(change: str) -> None:
    nets = [Net(), Net()]
    whole, ours = (Adam(net.parameters(), lr=0.1) for net in nets)
    split = SplitOptimizer(ours, 3)
    done = []
    for number in range(5):
        for net, optimizer in zip(nets, (whole, ours), strict=True):
            torch.manual_seed(number)
            net.zero_grad()
            net(torch.randn(4, 3, 6, 6)).square().mean().backward()
            if number >= 2 and change == "data":
                for p in net.parameters():
                    p.data = p.data.clamp(-0.05, 0.05)
            if number == 3 and change == "step":
                for state in optimizer.state.values():
                    state["step"].fill_(0)
        whole.step()
        done.append(split.step(run))
        if not done[-1]:
            ours.step()
    assert done == [False] + [True] * 4
    assert same(*nets)


@pytest.mark.usefixtures("_small")
def test_what_does_not_suit_is_left_whole() -> None:
    class Own(Adam):
        pass

    net = Net()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    assert SplitOptimizer.suits(Adam(net.parameters()))
    assert not SplitOptimizer.suits(Own(net.parameters()))
    assert not SplitOptimizer.suits(LBFGS(net.parameters()))
    hooked = Adam(net.parameters())
    hooked.register_step_pre_hook(lambda *_: None)
    assert not SplitOptimizer.suits(hooked)
    scheduled = Adam(net.parameters())
    StepLR(scheduled, 1)
    assert SplitOptimizer.suits(scheduled)
    patched = Adam(net.parameters())
    patched.step = lambda closure=None: None  # type: ignore[method-assign, assignment]
    assert not SplitOptimizer.suits(patched)
    net.out.weight.grad = torch.ones(7, 5).to_sparse()
    assert not SplitOptimizer.suits(Adam(net.parameters()))


def test_small_optimizers_are_not_split() -> None:
    net = Net()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    assert not SplitOptimizer.suits(Adam(net.parameters()))


@pytest.mark.usefixtures("_small")
def test_training_split_is_bitwise_training_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    nets, splits = [], []
    step = SplitOptimizer.step
    monkeypatch.setattr(
        SplitOptimizer, "step", lambda self, run: splits.append(step(self, run)) or splits[-1]
    )
    x = torch.randn(8, 3, 6, 6)
    for _ in range(2):
        net = module(
            lambda self, x: self.net(x).square().mean(), lambda p: Adam(p, lr=0.1), net=Net()
        )
        trainer(ThreadDataParallel(3), gradient_clip_val=0.5).fit(net, [x] * 4)
        nets.append(net)
        monkeypatch.setattr(splitting, "WORTHWHILE", 10**9)
        monkeypatch.setattr(thread_data_parallel, "WORTHWHILE", 10**9)
    assert splits == [False, True, True, True]
    assert same(*nets)


@pytest.mark.usefixtures("_small")
def test_an_error_in_one_lanes_step_comes_out() -> None:
    net = Net()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer = SGD(net.parameters(), lr=0.1)
    split = SplitOptimizer(optimizer, 2)

    def failing(tasks: Sequence[Callable[[], None]]) -> None:
        for stand_in in split._stand_ins[1:]:
            stand_in.param_groups[0]["lr"] = "no number"
        run(tasks)

    with pytest.raises((TypeError, RuntimeError, ValueError)):
        split.step(failing)
    assert all(chunk.grad is None for _, chunks in split._chunks for chunk in chunks)
