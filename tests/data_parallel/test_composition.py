"""Law 1: the wrapper changes nothing but where the samples are computed."""

import pytest
import torch
from torch import nn

from composefit.data_parallel import DataParallel
from composefit.strategies import SingleDevice
from tests.data_parallel.loops import LOOPS, Loop, difference, parameters, plain


@pytest.mark.parametrize("threads", [2, 3, 4])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_loop_ends_where_the_plain_one_does(loop: Loop, threads: int) -> None:
    wrapped: list[DataParallel] = []

    def wrap(module: nn.Module) -> nn.Module:
        wrapped.append(DataParallel(module, threads))
        return wrapped[-1]

    found = parameters(loop(wrap))
    for each in wrapped:
        each.close()
    assert difference(found, parameters(loop(plain))) <= 1e-10


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_loops_move_their_parameters(loop: Loop) -> None:
    start: list[torch.Tensor] = []

    def wrap(module: nn.Module) -> nn.Module:
        start.extend(parameters([module]))
        return module

    assert difference(start, parameters(loop(wrap))) > 1e-3


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_threads_are_bitwise_equal_to_shards_one_after_another(loop: Loop) -> None:
    threads = parameters(loop(lambda module: DataParallel(module, 3)))
    shards = SingleDevice("cpu", shards=3)
    assert all(
        map(
            torch.equal,
            threads,
            parameters(loop(lambda module: DataParallel(module, strategy=shards))),
        )
    )
