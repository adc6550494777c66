"""What local variables hold, wherever it is in them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn

from composefit import Mean
from composefit.explain.keeping import added_up, kept

FLOAT = 4


@dataclass
class Box:
    inside: list[Tensor]


def stopped(step: Iterator[Any]) -> GeneratorType[Any, Any, Any]:
    next(step)
    assert isinstance(step, GeneratorType)
    return step


def test_containers_objects_and_losses_are_looked_into() -> None:
    def step() -> Iterator[int]:
        in_list = [torch.zeros(1), (torch.zeros(2),)]
        in_dict = {"a": {"b": torch.zeros(3)}}
        in_object = Box([torch.zeros(4)])
        distribution = torch.distributions.Exponential(torch.ones(5))
        loss = Mean(torch.zeros(()), 3)
        number, text, function = 1, "two", len
        yield 0
        del in_list, in_dict, in_object, distribution, loss, number, text, function

    assert added_up(kept(stopped(step()), None)) == {
        "in_list": 3 * FLOAT,
        "in_dict": 3 * FLOAT,
        "in_object": 4 * FLOAT,
        "distribution": 5 * FLOAT,
        "loss": FLOAT,
    }


def test_parameters_modules_and_parts_of_the_batch_do_not_count() -> None:
    batch = (torch.zeros(6, 2), {"y": torch.zeros(6)})
    net = nn.Linear(2, 2)

    def step(self: nn.Module, batch: Any) -> Iterator[int]:
        x, half, weight, layer = batch[0], batch[1]["y"][:3], self.weight, self
        mine = x + 1
        yield 0
        del x, half, weight, layer, mine

    assert added_up(kept(stopped(step(net, batch)), batch)) == {"mine": 12 * FLOAT}


def test_frames_of_helpers_count_as_well() -> None:
    def inner() -> Generator[int, None, None]:
        deep = torch.zeros(2)
        yield 0
        del deep

    def outer() -> Generator[int, None, None]:
        high = torch.zeros(1)
        yield from inner()
        del high

    assert added_up(kept(stopped(outer()), None)) == {"high": FLOAT, "deep": 2 * FLOAT}


def test_one_tensor_under_two_names_counts_for_the_first() -> None:
    def step() -> Iterator[int]:
        first = torch.zeros(4)
        second = first
        halves = first.chunk(2)  # views, but other tensors
        yield 0
        del first, second, halves

    assert added_up(kept(stopped(step()), None)) == {"first": 4 * FLOAT, "halves": 4 * FLOAT}


def test_a_step_that_has_returned_keeps_nothing() -> None:
    assert kept(None, torch.ones(2)) == []
