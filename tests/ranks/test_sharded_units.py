"""What is sharded together, and what stays whole."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import nn

from composefit import LoopModule
from composefit.strategies.sharding.units import choose_units


class Holder(LoopModule):
    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def names(module: nn.Module, units: Iterable[nn.Module]) -> list[str]:
    by_id = {id(part): name for name, part in module.named_modules()}
    return [by_id[id(unit)] for unit in units]


def whole(module: nn.Module, policy: object = 10_000) -> list[str]:
    units = choose_units(module, policy)  # type: ignore[arg-type]
    assert units is not None
    by_id = {id(p): name for name, p in module.named_parameters()}
    return [by_id[id(p)] for p in units.whole]


def chosen(module: nn.Module, policy: object) -> list[str]:
    units = choose_units(module, policy)  # type: ignore[arg-type]
    assert units is not None
    return names(module, units.modules)


def test_every_child_with_parameters_is_a_unit_and_the_module_never_is() -> None:
    module = Holder(generator=block(), critic=block(), loss=nn.MSELoss())
    assert chosen(module, 10_000) == ["generator", "critic"]


def test_lists_and_modules_of_steps_are_entered_and_no_units() -> None:
    inner = Holder(net=block())
    module = Holder(blocks=nn.ModuleList([block(), block()]), inner=inner)
    assert chosen(module, 10_000) == ["blocks.0", "blocks.1", "inner.net"]


def test_a_size_makes_units_within_children_inner_ones_first() -> None:
    module = Holder(net=nn.Sequential(block(), nn.ReLU(), nn.Linear(4, 2)))
    # A Linear has 20 parameters and a block of two 40.
    assert chosen(module, 21) == ["net.0", "net"]
    assert chosen(module, 20) == ["net.0.0", "net.0.2", "net"]
    assert chosen(module, 41) == ["net"]


def test_types_make_units_within_children() -> None:
    module = Holder(net=nn.Sequential(block(), nn.Linear(4, 2)))
    assert chosen(module, nn.Linear) == ["net.0.0", "net.0.2", "net.1"]  # nothing is left of net
    assert chosen(module, [nn.Conv2d]) == ["net"]


def test_modules_that_use_the_weights_of_those_within_are_not_entered() -> None:
    attention = nn.MultiheadAttention(4, 2)
    module = Holder(net=nn.Sequential(attention, nn.LSTM(4, 4)))
    assert chosen(module, 1) == ["net.0", "net.1"]


def test_a_parameter_of_two_units_or_of_none_stays_whole() -> None:
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    own = nn.Parameter(torch.zeros(2))
    module = Holder(a=a, b=b, own=own)
    assert whole(module) == ["own", "a.weight"]


def test_a_parameter_that_is_tied_within_one_unit_is_sharded() -> None:
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    net[1].weight = net[0].weight
    assert whole(Holder(net=net)) == []


def test_scalars_and_sparse_embeddings_stay_whole() -> None:
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3))
    net.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    assert whole(Holder(net=net)) == ["net.scale", "net.0.weight"]


def test_a_child_that_another_child_holds_stays_whole() -> None:
    encoder = nn.Linear(3, 3)
    actor = nn.Sequential(encoder, nn.Linear(3, 1))
    module = Holder(encoder=encoder, actor=actor)
    assert chosen(module, 10_000) == ["actor"]
    assert whole(module) == ["encoder.weight", "encoder.bias"]


def test_frozen_parameters_are_sharded() -> None:
    teacher = block().requires_grad_(False)
    assert chosen(Holder(teacher=teacher), 10_000) == ["teacher"]


class Choosing(Holder):
    answer: object = None

    def configure_sharding(self) -> object:
        return self.answer


def test_the_module_chooses_by_itself_where_no_policy_is_given() -> None:
    module = Choosing(net=nn.Sequential(block(), block()))
    module.__dict__["answer"] = [module.net, module.net[1]]
    assert chosen(module, None) == ["net.1", "net"]
    assert chosen(module, 10_000) == ["net"]
    module.__dict__["answer"] = NotImplemented
    assert chosen(module, None) == ["net"]
    module.__dict__["answer"] = None
    assert choose_units(module, None) is None


@pytest.mark.parametrize("what", ["module", "stranger", "list", "number", "word"])
def test_a_choice_that_cannot_be_a_unit_raises(what: str) -> None:
    module = Choosing(nets=nn.ModuleList([block()]))
    answers = {
        "module": [module],
        "stranger": [block()],
        "list": [module.nets],
        "number": 3,
        "word": ["nets"],
    }
    module.__dict__["answer"] = answers[what]
    with pytest.raises(ValueError, match="configure_sharding return"):
        choose_units(module, None)


def test_a_parameter_that_is_not_initialised_raises_by_name() -> None:
    with pytest.raises(ValueError, match=r"net\.weight is not initialised yet"):
        choose_units(Holder(net=nn.LazyLinear(3)), 10)
