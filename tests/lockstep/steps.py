"""What tests of the driver share: modules made of a step, quiet trainers, strategies."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from composefit import LoopModule, SingleDevice, Strategy, ThreadDataParallel, Trainer

F64 = torch.float64

#: How a batch may be cut: not at all, over time, over lanes, over threads.
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "one shard": lambda: SingleDevice("cpu"),
    "three shards": lambda: SingleDevice("cpu", shards=3),
    "three threads": lambda: ThreadDataParallel(3),
}

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
several_shards = pytest.mark.parametrize(
    "strategy", list(STRATEGIES.values())[1:], ids=list(STRATEGIES)[1:]
)


class Net(LoopModule):
    """Its children by name, each with an optimizer of its name."""

    def __init__(self, children: Mapping[str, nn.Module], make: Callable[..., Optimizer]) -> None:
        super().__init__()
        self.make = make
        for name, child in children.items():
            self.add_module(name, child)

    def configure_optimizers(self) -> dict[str, Any]:
        return {
            name: self.make(child.parameters())
            for name, child in self.named_children()
            if any(p.requires_grad for p in child.parameters())
        }


def module(
    step: Callable[..., Any],
    make: Callable[..., Optimizer] = lambda parameters: SGD(parameters, lr=0.1),
    **children: nn.Module,
) -> Any:
    """A module with this training step and these children; without any, one linear layer `net`."""
    children = children or {"net": linear(3, 2)}
    return type("Stepped", (Net,), {"training_step": step})(children, make)


def linear(inputs: int, outputs: int, seed: int = 0, bias: bool = True) -> nn.Linear:
    """A float64 layer, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(inputs, outputs, bias=bias, dtype=F64)


def data(*shape: int, seed: int = 1) -> Tensor:
    """Normal float64 numbers."""
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def trainer(strategy: Strategy | None = None, **options: Any) -> Trainer:
    """A trainer that prints and writes nothing."""
    return Trainer(
        strategy=strategy or SingleDevice("cpu"),
        **{"max_epochs": 1, "seed": 0, "num_sanity_val_steps": 0, **options},
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )


def weights(net: nn.Module) -> list[Tensor]:
    """A copy of its parameters."""
    return [p.detach().clone() for p in net.parameters()]


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules have bitwise equal parameters and buffers."""
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())
