"""A wrapper for each test, closed after it; and what the tests look at."""

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from composefit.data_parallel import DataParallel

Parallel = Callable[..., DataParallel]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def parallel() -> Iterator[Parallel]:
    """Makes wrappers."""
    made: list[DataParallel] = []

    def make(module: nn.Module, threads: int = 2, **more: object) -> DataParallel:
        made.append(DataParallel(module, threads, **more))
        return made[-1]

    yield make
    for each in made:
        each.close()


class Seen(nn.Module):
    """An identity that notes the threads of its forwards and backwards, and how many."""

    def __init__(self) -> None:
        super().__init__()
        # In an object of their own: of a list, each shard has a copy, which comes back after the
        # forward, and what a backward appends later does not.
        self.notes = SimpleNamespace(forwards=[], backwards=[])

    @property
    def forwards(self) -> list[str]:
        return self.notes.forwards

    @property
    def backwards(self) -> list[str]:
        return self.notes.backwards

    def forward(self, x: Tensor) -> Tensor:
        self.forwards.append(threading.current_thread().name)
        return _Seen.apply(x, self.backwards)


class _Seen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, backwards):
        ctx.backwards = backwards
        return x.clone()

    @staticmethod
    def backward(ctx, cotangent):
        ctx.backwards.append(threading.current_thread().name)
        return cotangent, None


def lanes() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "composefit-lane" in thread.name]
