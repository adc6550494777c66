import argparse
import copy
import dataclasses
import functools
import inspect
import pickle
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from composefit.hyperparameters import Hyperparameters, build, collect


class Saves:
    """What a LoopModule does with the two functions."""

    hparams: Hyperparameters

    def save(self, *names: Any, ignore: str | Sequence[str] = ()) -> None:
        frame = inspect.currentframe()
        assert frame is not None and frame.f_back is not None
        self.hparams = collect(frame.f_back, self, names, ignore)


class Base(Saves):
    def __init__(self, width: int, depth: int = 2, *, act: str = "relu") -> None:
        self.save()
        self.init = (width, depth, act)


# -- collecting ------------------------------------------------------------------------------------


def test_arguments_are_kept_with_defaults_and_keyword_only_ones_and_without_self() -> None:
    assert dict(Base(3).hparams) == {"width": 3, "depth": 2, "act": "relu"}
    assert dict(Base(width=3, act="elu").hparams) == {"width": 3, "depth": 2, "act": "elu"}


def test_a_base_class_that_saves_keeps_the_subclasses_arguments_too() -> None:
    class Middle(Base):
        def __init__(self, width: int, heads: int = 4) -> None:
            super().__init__(width * 2)

    class Child(Middle):
        def __init__(self, hidden: int, heads: int) -> None:
            super().__init__(hidden + 1, heads=heads)

    assert dict(Child(5, 8).hparams) == {
        "width": 6,  # Middle's, whose __init__ is further out than Base's
        "depth": 2,
        "act": "relu",
        "heads": 8,
        "hidden": 5,
    }


def test_an_init_of_another_object_on_the_stack_does_not_count() -> None:
    class Outer:
        def __init__(self, secret: int) -> None:
            self.net = Base(1)

    assert "secret" not in Outer(7).net.hparams


def test_a_helper_method_and_a_decorated_init_are_seen_through() -> None:
    def decorated(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def wrapper(*args: Any, **kwargs: Any) -> None:
            init(*args, **kwargs)

        return wrapper

    class Net(Saves):
        @decorated
        def __init__(self, width: int) -> None:
            self.begin()

        def begin(self) -> None:
            self.save()

    assert dict(Net(3).hparams) == {"width": 3}


def test_keyword_arguments_are_kept_one_by_one_and_positional_ones_as_a_tuple() -> None:
    class Net(Saves):
        def __init__(self, first: int, *sizes: int, **options: Any) -> None:
            self.save()

    assert dict(Net(1, 2, 3, bias=False).hparams) == {"first": 1, "sizes": (2, 3), "bias": False}
    assert dict(Net(1).hparams) == {"first": 1}


def test_an_init_whose_self_is_used_in_a_closure() -> None:
    class Net(Saves):
        def __init__(self, width: int) -> None:
            self.wide = lambda: (self, width)
            self.save()

    assert dict(Net(3).hparams) == {"width": 3}


def test_a_dataclass_saves_in_post_init() -> None:
    @dataclasses.dataclass
    class Net(Saves):
        width: int
        depth: int = 2

        def __post_init__(self) -> None:
            self.save()

    assert dict(Net(3).hparams) == {"width": 3, "depth": 2}


def test_only_the_named_arguments() -> None:
    class Net(Saves):
        def __init__(self, a: int, b: int, c: int) -> None:
            self.save("a", "c")

    assert dict(Net(1, 2, 3).hparams) == {"a": 1, "c": 3}


@pytest.mark.parametrize("ignore", ["net", ["net"], ("net", "no argument")])
def test_ignored_arguments_are_left_out(ignore: Any) -> None:
    class Net(Saves):
        def __init__(self, net: nn.Module, lr: float) -> None:
            self.save(ignore=ignore)

    assert dict(Net(nn.Linear(1, 1), 0.1).hparams) == {"lr": 0.1}


@dataclasses.dataclass
class Config:
    lr: float = 0.1
    width: int = 4


CONFIGS = [
    {"lr": 0.1, "width": 4},
    Config(),
    SimpleNamespace(lr=0.1, width=4),
    argparse.Namespace(lr=0.1, width=4),
    Hyperparameters(lr=0.1, width=4),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_the_items_of_a_whole_configuration(config: Any) -> None:
    class Net(Saves):
        def __init__(self, config: Any, depth: int = 2) -> None:
            self.save(config, ignore="width")

    found = Net(config).hparams
    assert dict(found) == {"lr": 0.1}
    assert found.given_as == "config"


def test_a_dict_that_is_no_argument_may_be_saved_anywhere() -> None:
    class Net(Saves):
        def later(self) -> None:
            self.save({"lr": 0.1})

    net = Net()
    net.later()
    assert dict(net.hparams) == {"lr": 0.1} and net.hparams.given_as is None


def test_mutable_arguments_are_copied_and_networks_are_not() -> None:
    class Net(Saves):
        def __init__(self, **kwargs: Any) -> None:
            self.save()

    given: dict[str, Any] = {
        "sizes": [1, 2],
        "nested": {"betas": ([0.9], 0.99)},
        "weights": torch.ones(2),
        "array": np.ones(2),
    }
    net = nn.Linear(1, 1)
    kept = Net(**given, net=net, act=torch.relu).hparams
    given["sizes"].append(3)
    given["nested"]["betas"][0].append(1.0)
    given["weights"].zero_()
    given["array"][:] = 0
    assert kept.sizes == [1, 2] and kept.nested == {"betas": ([0.9], 0.99)}
    assert kept.weights.tolist() == kept.array.tolist() == [1, 1]
    assert kept.net is net and kept.act is torch.relu


def test_outside_of_init_there_is_nothing_to_keep() -> None:
    with pytest.raises(RuntimeError, match=r"arguments of Saves.__init__, and belongs in there"):
        Saves().save()


def test_a_name_that_is_no_argument() -> None:
    class Net(Saves):
        def __init__(self, width: int, depth: int) -> None:
            self.save("widht")

    with pytest.raises(ValueError, match=r"no such argument; did you mean 'width'\?"):
        Net(1, 2)


@pytest.mark.parametrize(
    ("names", "ignore", "message"),
    [
        ((3,), (), "namespace or dataclass instance, got int"),
        ((Config,), (), "dataclass instance, got type"),
        (({}, {}), (), "or one dict, namespace or dataclass; got dict, dict"),
        (("width", {}), (), "got str, dict"),
        (({1: 2},), (), "name must be a str, got 1"),
        ((), (1,), r"expects names, got \(1,\)"),
    ],
)
def test_what_is_no_name_and_no_configuration(names: Any, ignore: Any, message: str) -> None:
    class Net(Saves):
        def __init__(self, width: int) -> None:
            self.save(*names, ignore=ignore)

    with pytest.raises(TypeError, match=message):
        Net(1)


# -- the dict --------------------------------------------------------------------------------------


def test_attributes_are_items() -> None:
    hparams = Hyperparameters(lr=0.1)
    hparams.width = 3
    hparams.lr = 0.2
    assert dict(hparams) == {"lr": 0.2, "width": 3} and hparams.width == 3
    del hparams.width
    assert dict(hparams) == {"lr": 0.2} and not hasattr(hparams, "width")
    with pytest.raises(AttributeError, match="did you mean 'lr'"):
        del hparams.lrr
    with pytest.raises(AttributeError, match="there are none"):
        _ = Hyperparameters().lr


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))]
)
def test_copies_and_pickles_stay_what_they_are(again: Callable[[Any], Any]) -> None:
    hparams = Hyperparameters(lr=0.1)
    hparams.given_as = "config"
    found = again(hparams)
    assert type(found) is Hyperparameters
    assert dict(found) == {"lr": 0.1} and found.given_as == "config"


def test_merging_takes_the_others_values() -> None:
    hparams = Hyperparameters(lr=0.1, width=3)
    other = Hyperparameters(lr=0.2)
    other.given_as = "config"
    hparams.merge(other)
    assert dict(hparams) == {"lr": 0.2, "width": 3} and hparams.given_as == "config"


# -- building --------------------------------------------------------------------------------------


class Records:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.got = args, kwargs


def test_a_class_gets_the_arguments_it_takes() -> None:
    assert build(Base, {"width": 3, "act": "elu", "hidden": 7}, {}).init == (3, 2, "elu")


def test_overrides_take_precedence() -> None:
    assert build(Base, {"width": 3}, {"width": 4, "depth": 5}).init == (4, 5, "relu")


def test_a_class_with_keyword_arguments_gets_all() -> None:
    assert build(Records, {"a": 1, "b": 2}, {"b": 3}).got == ((), {"a": 1, "b": 3})


def test_what_was_collected_makes_the_same_object_again() -> None:
    class Net(Saves):
        def __init__(self, first: int, /, second: int = 2, *rest: int, last: int = 9, **more: int):
            self.save()
            self.init = (first, second, rest, last, more)

    for net in (Net(1), Net(1, 5), Net(1, 5, 6, 7), Net(1, second=8, last=3, x=4), Net(1, y=2)):
        assert build(Net, dict(net.hparams), {}).init == net.init


def test_a_subclass_makes_its_base_from_its_own_arguments() -> None:
    class Child(Base):
        def __init__(self, hidden: int) -> None:
            super().__init__(hidden * 2)

    assert build(Child, dict(Child(5).hparams), {}).init == (10, 2, "relu")


def test_positional_arguments_of_a_base_class_are_not_the_subclasses() -> None:
    class Sizes(Saves):
        def __init__(self, *sizes: int) -> None:
            self.save()
            self.init = sizes

    class Child(Sizes):
        def __init__(self, width: int, *sizes: int) -> None:
            super().__init__(width, width, *sizes)

    for child in (Child(3), Child(3, 4)):
        assert build(Child, dict(child.hparams), {}).init == child.init


def test_positional_arguments_behind_one_that_was_not_kept() -> None:
    class Net:
        def __init__(self, first: int, second: int = 2, *rest: int) -> None:
            self.init = (first, second, rest)

    assert build(Net, {"first": 1, "rest": (5, 6)}, {}).init == (1, 2, (5, 6))


def test_a_missing_argument_is_named_with_the_way_to_pass_it() -> None:
    class Net:
        def __init__(self, net: Any, lr: float, loss: Any) -> None: ...

    with pytest.raises(
        TypeError,
        match=r"__init__ needs 'net', 'loss', .*load_from_checkpoint\(path, net=..., loss=...\)",
    ):
        build(Net, {"lr": 0.1}, {})


def test_an_override_that_is_no_argument() -> None:
    with pytest.raises(TypeError, match=r"no argument 'widht'; did you mean 'width'\?"):
        build(Base, {"width": 3}, {"widht": 4})


def test_an_argument_that_a_subclass_works_out_itself_is_hinted_at() -> None:
    class Child(Base):
        def __init__(self, hidden: int, **options: Any) -> None:
            super().__init__(width=hidden * 2, **options)

    with pytest.raises(TypeError, match="multiple values for keyword argument 'width'") as raised:
        build(Child, dict(Child(5).hparams), {})
    assert "hyperparameters width, depth, act, hidden" in raised.value.__notes__[0]


def test_a_configuration_goes_back_to_the_argument_it_came_as() -> None:
    class Net(Saves):
        def __init__(self, net: Any, config: Any, depth: int = 2) -> None:
            self.save(config)
            self.init = (net, config.lr, config["width"], depth)

    kept = Net("first", Hyperparameters(lr=0.1, width=4)).hparams
    again = build(Net, dict(kept), {"net": "second", "lr": 0.2, "depth": 3}, kept.given_as)
    assert again.init == ("second", 0.2, 4, 3)
    whole = build(Net, dict(kept), {"net": "n", "config": Hyperparameters(lr=1, width=2)}, "config")
    assert whole.init == ("n", 1, 2, 2)


def test_a_whole_configuration_that_is_given_replaces_the_one_that_was_kept() -> None:
    class Net:
        def __init__(self, config: Any, **more: Any) -> None:
            self.init = (config, more)

    assert build(Net, {"lr": 0.1}, {"config": "another"}, "config").init == ("another", {})
