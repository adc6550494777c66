import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

from composefit.optimizers import NamedOptimizer, OptimizerConfig, Schedule, read_optimizers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(2, 3)
        self.critic = nn.Linear(3, 1)


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def critic(net: Net) -> Optimizer:
    return SGD(net.critic.parameters(), lr=0.1)


@pytest.fixture
def generator(net: Net) -> Optimizer:
    return SGD(net.generator.parameters(), lr=0.1)


def outline(read: dict[str, NamedOptimizer]) -> dict[str, tuple[Optimizer, list[Any]]]:
    """What was read, without the defaults."""
    return {
        name: (one.optimizer, [schedule.scheduler for schedule in one.schedulers])
        for name, one in read.items()
    }


# -- forms -----------------------------------------------------------------------------------------


def test_one_optimizer_is_named_optimizer(net: Net) -> None:
    both = SGD(net.parameters(), lr=0.1)
    read = read_optimizers(both, net)
    assert outline(read) == {"optimizer": (both, [])}
    assert read["optimizer"] == NamedOptimizer("optimizer", both)


@pytest.mark.parametrize("container", [list, tuple])
def test_a_list_of_one_is_named_optimizer(net: Net, container: type) -> None:
    both = SGD(net.parameters(), lr=0.1)
    assert outline(read_optimizers(container([both]), net)) == {"optimizer": (both, [])}


@pytest.mark.parametrize("container", [list, tuple])
def test_a_list_of_several_is_numbered(
    net: Net, critic: Optimizer, generator: Optimizer, container: type
) -> None:
    read = read_optimizers(container([critic, generator]), net)
    assert outline(read) == {"0": (critic, []), "1": (generator, [])}
    assert [one.name for one in read.values()] == ["0", "1"]


def test_a_dict_keeps_its_names_and_their_order(
    net: Net, critic: Optimizer, generator: Optimizer
) -> None:
    read = read_optimizers({"generator": generator, "critic": critic}, net)
    assert list(read) == ["generator", "critic"]
    assert read["critic"].optimizer is critic
    assert read["critic"].name == "critic"


ENTRIES: dict[str, Callable[[Optimizer, Any], Any]] = {
    "config": lambda optimizer, scheduler: OptimizerConfig(optimizer, scheduler),
    "pair": lambda optimizer, scheduler: (optimizer, scheduler),
    "pair_with_dict": lambda optimizer, scheduler: (optimizer, {"scheduler": scheduler}),
    "dict": lambda optimizer, scheduler: {"optimizer": optimizer, "lr_scheduler": scheduler},
    "dict_of_dict": lambda optimizer, scheduler: {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler},
    },
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_an_entry_with_a_scheduler_reads_the_same_alone_named_and_in_a_list(
    net: Net, critic: Optimizer, generator: Optimizer, entry: Callable[[Optimizer, Any], Any]
) -> None:
    both = SGD(net.parameters(), lr=0.1)
    step = StepLR(both, 1)
    assert outline(read_optimizers(entry(both, step), net)) == {"optimizer": (both, [step])}

    one, two = StepLR(critic, 1), StepLR(generator, 2)
    named = {"critic": entry(critic, one), "generator": entry(generator, two)}
    assert outline(read_optimizers(named, net)) == {
        "critic": (critic, [one]),
        "generator": (generator, [two]),
    }
    for container in (list, tuple):
        listed = container([entry(critic, one), entry(generator, two)])
        assert outline(read_optimizers(listed, net)) == {
            "0": (critic, [one]),
            "1": (generator, [two]),
        }


def test_a_dict_with_the_key_optimizer_is_one_optimizer_with_its_scheduler(net: Net) -> None:
    both = SGD(net.parameters(), lr=0.1)
    settings = {"interval": "step", "frequency": 3, "strict": False, "name": "rate"}
    step = StepLR(both, 1)
    read = read_optimizers(
        {"optimizer": both, "lr_scheduler": {"scheduler": step, **settings}}, net
    )
    assert read == {
        "optimizer": NamedOptimizer(
            "optimizer", both, [Schedule(step, "step", 3, None, strict=False, name="rate")]
        )
    }


def test_a_scheduler_of_none_is_no_scheduler(net: Net) -> None:
    both = SGD(net.parameters(), lr=0.1)
    for form in ((both, None), {"optimizer": both, "lr_scheduler": None}, OptimizerConfig(both)):
        assert outline(read_optimizers(form, net)) == {"optimizer": (both, [])}


@pytest.mark.parametrize("container", [list, tuple])
def test_two_lists_match_schedulers_to_the_optimizers_they_were_made_with(
    net: Net, critic: Optimizer, generator: Optimizer, container: type
) -> None:
    of_critic, of_generator = StepLR(critic, 1), StepLR(generator, 1)
    swapped = [of_generator, {"scheduler": of_critic, "interval": "step"}]
    read = read_optimizers(container([[critic, generator], swapped]), net)
    assert outline(read) == {"0": (critic, [of_critic]), "1": (generator, [of_generator])}
    assert read["0"].schedulers[0].interval == "step"
    assert read["1"].schedulers[0].interval == "epoch"


def test_two_lists_may_give_one_optimizer_several_schedulers_or_none(
    net: Net, critic: Optimizer, generator: Optimizer
) -> None:
    first, second = StepLR(critic, 1), ExponentialLR(critic, 0.9)
    read = read_optimizers(([critic, generator], [first, second]), net)
    assert outline(read) == {"0": (critic, [first, second]), "1": (generator, [])}
    assert outline(read_optimizers(([critic, generator], []), net))["0"] == (critic, [])


def test_two_lists_of_one_are_named_optimizer(net: Net) -> None:
    both = SGD(net.parameters(), lr=0.1)
    step = StepLR(both, 1)
    for schedulers in ([step], step, {"scheduler": step}):
        read = read_optimizers(([both], schedulers), net)
        assert outline(read) == {"optimizer": (both, [step])}


def test_a_config_hands_on_all_of_its_settings(net: Net) -> None:
    both = SGD(net.parameters(), lr=0.1)
    plateau = ReduceLROnPlateau(both)
    config = OptimizerConfig(both, plateau, "step", 2, "val_loss", 0.5, "value")
    (one,) = read_optimizers({"critic": config}, net).values()
    assert one == NamedOptimizer(
        "critic", both, [Schedule(plateau, "step", 2, "val_loss")], 0.5, "value"
    )


def test_a_schedulers_monitor_may_stand_beside_the_optimizer(net: Net) -> None:
    both = SGD(net.parameters(), lr=0.1)
    plateau = ReduceLROnPlateau(both)
    form = {"optimizer": both, "lr_scheduler": plateau, "monitor": "val_loss"}
    assert read_optimizers(form, net)["optimizer"].schedulers[0].monitor == "val_loss"
    inner = {"scheduler": plateau, "monitor": "inner"}
    form = {"optimizer": both, "lr_scheduler": inner, "monitor": "outer"}
    assert read_optimizers(form, net)["optimizer"].schedulers[0].monitor == "inner"


def test_the_users_dicts_are_left_as_they_were(net: Net) -> None:
    both = SGD(net.parameters(), lr=0.1)
    inner = {"scheduler": StepLR(both, 1), "interval": "step"}
    outer = {"optimizer": both, "lr_scheduler": inner}
    before = dict(outer), dict(inner)
    read_optimizers(outer, net)
    assert (outer, inner) == before


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [None, {}, [], (), ([], [])])
def test_nothing_returned_is_an_error_that_shows_what_to_return(net: Net, empty: object) -> None:
    with pytest.raises(ValueError, match=r"expected one optimizer, a dict of named ones"):
        read_optimizers(empty, net)


@pytest.mark.parametrize("wrong", ["sgd", 3, nn.Linear(1, 1), lambda: None, {"sgd"}])
def test_something_that_is_no_optimizer_is_a_type_error(net: Net, wrong: object) -> None:
    with pytest.raises(TypeError, match="expected an optimizer, got"):
        read_optimizers(wrong, net)
    with pytest.raises(TypeError, match="expected an optimizer, got"):
        read_optimizers([wrong, wrong], net)


def test_the_error_in_an_entry_names_the_optimizer(net: Net, critic: Optimizer) -> None:
    with pytest.raises(TypeError) as caught:
        read_optimizers({"critic": critic, "generator": "adam"}, net)
    assert caught.value.__notes__ == ["in configure_optimizers, for the optimizer 'generator'"]


def test_a_class_in_place_of_an_optimizer_says_how_to_make_one(net: Net) -> None:
    with pytest.raises(TypeError, match=r"the class Adam: write Adam\(self.parameters\(\), lr"):
        read_optimizers(Adam, net)


def test_names_that_are_not_text_are_refused(net: Net, critic: Optimizer) -> None:
    with pytest.raises(TypeError, match=r"named by str, got 0: write '0'"):
        read_optimizers({0: critic}, net)
    with pytest.raises(ValueError, match="empty"):
        read_optimizers({"": critic}, net)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lr_schedular", "did you mean 'lr_scheduler'"),
        ("gradient_clip_val", r"OptimizerConfig\(optimizer, gradient_clip_val=...\) takes it"),
        ("zzz", "known: optimizer, lr_scheduler, monitor"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(net: Net, key: str, hint: str) -> None:
    both = SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=rf"unknown key '{key}'.*{hint}"):
        read_optimizers({"optimizer": both, key: 1}, net)


def test_an_unknown_key_of_a_schedulers_dict_is_named_with_the_nearest_one(net: Net) -> None:
    both = SGD(net.parameters(), lr=0.1)
    form = {"optimizer": both, "lr_scheduler": {"scheduler": StepLR(both, 1), "intervall": "step"}}
    with pytest.raises(ValueError, match="unknown key 'intervall': did you mean 'interval'"):
        read_optimizers(form, net)
    with pytest.raises(ValueError, match="needs the key 'scheduler'"):
        read_optimizers({"optimizer": both, "lr_scheduler": {"interval": "step"}}, net)


def test_a_second_optimizer_beside_the_key_optimizer_says_to_rename(
    net: Net, critic: Optimizer, generator: Optimizer
) -> None:
    with pytest.raises(ValueError, match="choose another name than 'optimizer'"):
        read_optimizers({"optimizer": generator, "critic": critic}, net)


def test_a_scheduler_without_its_optimizer_is_refused(
    net: Net, critic: Optimizer, generator: Optimizer
) -> None:
    step = StepLR(critic, 1)
    for form in (step, [critic, step], {"critic": step}, {"critic": {"scheduler": step}}):
        with pytest.raises(
            ValueError, match=r"OptimizerConfig\(optimizer, scheduler\)|'optimizer'"
        ):
            read_optimizers(form, net)
    with pytest.raises(ValueError, match="without its optimizer"):
        read_optimizers({"critic": critic, "lr_scheduler": step}, net)
    with pytest.raises(ValueError, match="return that optimizer too"):
        read_optimizers(([generator], [step]), net)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_scheduler_made_with_another_optimizer_is_refused(
    net: Net, critic: Optimizer, generator: Optimizer, entry: Callable[[Optimizer, Any], Any]
) -> None:
    with pytest.raises(ValueError, match="made with another optimizer"):
        read_optimizers({"generator": entry(generator, StepLR(critic, 1))}, net)


def test_a_plateau_without_a_monitor_says_what_to_write(net: Net) -> None:
    both = SGD(net.parameters(), lr=0.1)
    plateau = ReduceLROnPlateau(both)
    forms: list[Any] = [
        (both, plateau),
        ([both], [plateau]),
        {"optimizer": both, "lr_scheduler": plateau},
        {"optimizer": both, "lr_scheduler": {"scheduler": plateau}},
    ]
    for form in forms:
        with pytest.raises(ValueError, match=r"monitor='val_loss'.*'monitor': 'val_loss'"):
            read_optimizers(form, net)
    with pytest.raises(ValueError, match=r"monitor='val_loss'"):
        OptimizerConfig(both, plateau)


def test_a_monitor_that_would_have_no_effect_is_refused(net: Net) -> None:
    both = SGD(net.parameters(), lr=0.1)
    makers: list[Callable[[Optimizer], Any]] = [
        lambda o: StepLR(o, 1),
        lambda o: SWALR(o, 0.01),
        lambda o: OneCycleLR(o, 0.1, 10),
        lambda o: CosineAnnealingWarmRestarts(o, 10),
        lambda o: ChainedScheduler([StepLR(o, 1), ExponentialLR(o, 0.9)]),
        lambda o: SequentialLR(o, [StepLR(o, 1), ExponentialLR(o, 0.9)], [3]),
    ]
    for make in makers:
        with pytest.raises(ValueError, match="takes no metric: leave monitor='val_loss' out"):
            OptimizerConfig(both, make(both), monitor="val_loss")
    with pytest.raises(ValueError, match="there is none"):
        OptimizerConfig(both, monitor="val_loss")
    with pytest.raises(ValueError, match="give lr_scheduler too"):
        read_optimizers({"optimizer": both, "monitor": "val_loss"}, net)


def test_a_scheduler_of_ones_own_may_be_given_a_metric(net: Net) -> None:
    class Own(StepLR):
        def step(self, metric: Any = None) -> None:
            super().step()

    class Duck:
        def step(self, metric: float) -> None: ...
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    both = SGD(net.parameters(), lr=0.1)
    for scheduler in (Own(both, 1), Duck()):
        read = read_optimizers(OptimizerConfig(both, scheduler, monitor="val_loss"), net)
        assert read["optimizer"].schedulers[0].monitor == "val_loss"


def test_the_same_optimizer_or_scheduler_twice_is_refused(
    net: Net, critic: Optimizer, generator: Optimizer
) -> None:
    with pytest.raises(ValueError, match="the same optimizer, SGD, was returned twice"):
        read_optimizers({"critic": critic, "generator": critic}, net)
    step = StepLR(critic, 1)
    with pytest.raises(ValueError, match="the same scheduler, StepLR, was returned twice"):
        read_optimizers(([critic, generator], [step, step]), net)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"interval": "batch"}, ValueError, "'epoch' or 'step', got 'batch'"),
        ({"frequency": 0}, ValueError, "at least 1, got 0"),
        ({"frequency": 1.5}, TypeError, "an int, got 1.5"),
        ({"frequency": True}, TypeError, "an int, got True"),
        ({"monitor": 3}, TypeError, "a str, got 3"),
    ],
)
def test_a_wrong_scheduler_setting_is_refused_in_a_config_and_in_a_dict(
    net: Net, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    both = SGD(net.parameters(), lr=0.1)
    step = StepLR(both, 1)
    with pytest.raises(error, match=message):
        OptimizerConfig(both, step, **settings)
    with pytest.raises(error, match=message):
        read_optimizers({"optimizer": both, "lr_scheduler": {"scheduler": step, **settings}}, net)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"gradient_clip_val": -1}, ValueError, "above 0 .*got -1"),
        ({"gradient_clip_val": 0.0}, ValueError, "above 0 .*got 0.0"),
        ({"gradient_clip_val": math.nan}, ValueError, "above 0 .*got nan"),
        ({"gradient_clip_val": "1"}, TypeError, "a number, got '1'"),
        ({"gradient_clip_val": True}, TypeError, "a number, got True"),
        ({"gradient_clip_algorithm": "l2"}, ValueError, "'norm' or 'value', got 'l2'"),
        ({"lr_scheduler": 3}, TypeError, "expected a learning-rate scheduler, got 3"),
        ({"lr_scheduler": StepLR}, TypeError, "got the class StepLR"),
        ({"interval": "step"}, ValueError, "give lr_scheduler="),
    ],
)
def test_a_wrong_config_is_refused_when_it_is_made(
    critic: Optimizer, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        OptimizerConfig(critic, **settings)


def test_a_config_of_something_else_than_an_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="expected an optimizer, got 'sgd'"):
        OptimizerConfig("sgd")  # type: ignore[arg-type]


def test_an_infinite_clip_value_is_allowed_and_changes_no_gradient(critic: Optimizer) -> None:
    limit = OptimizerConfig(critic, gradient_clip_val=math.inf).gradient_clip_val
    assert limit is not None
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    nn.utils.clip_grad_norm_([parameter], limit)
    assert parameter.grad.tolist() == [3.0, 4.0]


# -- parameters ------------------------------------------------------------------------------------


def test_one_parameter_twice_in_one_optimizer_is_refused_by_name(net: Net) -> None:
    repeated = [net.critic.bias, *net.critic.parameters()]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = SGD(repeated, lr=0.1)
    with pytest.raises(ValueError, match=r"critic\.bias is twice in the optimizer 'critic'"):
        read_optimizers({"critic": optimizer}, net)


def test_one_parameter_in_two_groups_is_refused_by_name(net: Net, critic: Optimizer) -> None:
    # torch refuses it in add_param_group, but not in a list that is changed by hand.
    critic.param_groups.append({**critic.param_groups[0], "params": [net.critic.weight]})
    with pytest.raises(ValueError, match=r"critic\.weight is twice in the optimizer 'optimizer'"):
        read_optimizers(critic, net)


def test_a_repeated_parameter_of_another_module_is_refused_by_its_shape(net: Net) -> None:
    foreign = nn.Parameter(torch.zeros(5, 2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = SGD([foreign, foreign], lr=0.1)
    with pytest.raises(ValueError, match=r"shape \(5, 2\), none of the module's"):
        read_optimizers([SGD(net.parameters(), lr=0.1), optimizer], net)


def test_one_parameter_in_two_optimizers_is_allowed(net: Net, critic: Optimizer) -> None:
    both = SGD(net.parameters(), lr=0.1)
    read = read_optimizers({"critic": critic, "both": both}, net)
    assert read["critic"].parameters()[0] is read["both"].parameters()[2]


def test_a_parameter_that_is_not_the_modules_is_allowed(net: Net) -> None:
    foreign = nn.Parameter(torch.zeros(2))
    read = read_optimizers(SGD([*net.parameters(), foreign], lr=0.1), net)
    assert read["optimizer"].parameters()[-1] is foreign


def test_trainable_parameters_in_no_optimizer_are_one_warning_by_name(
    net: Net, critic: Optimizer
) -> None:
    net.generator.bias.requires_grad_(False)
    with pytest.warns(UserWarning) as caught:
        read_optimizers(critic, net)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "generator.weight" in message
    assert "(1)" in message
    assert "generator.bias" not in message
    assert "critic" not in message


def test_the_warning_lists_ten_names_and_counts_the_rest() -> None:
    net = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(14)])
    with pytest.warns(UserWarning) as caught:
        read_optimizers(SGD([net[0]], lr=0.1), net)
    assert "(13): 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 3 more." in str(caught[0].message)


def test_frozen_parameters_in_no_optimizer_are_no_warning(net: Net, critic: Optimizer) -> None:
    net.generator.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_optimizers(critic, net)


def test_parameters_are_the_trainable_ones_read_anew(net: Net) -> None:
    net.generator.requires_grad_(False)
    named = read_optimizers(SGD(net.parameters(), lr=0.1), net)["optimizer"]
    weight, bias = net.critic.weight, net.critic.bias

    def ids() -> list[int]:
        return [id(parameter) for parameter in named.parameters()]

    assert ids() == [id(weight), id(bias)]
    net.generator.bias.requires_grad_(True)
    assert ids() == [id(net.generator.bias), id(weight), id(bias)]
    late = nn.Parameter(torch.zeros(1))
    named.optimizer.add_param_group({"params": [late]})
    assert ids() == [id(net.generator.bias), id(weight), id(bias), id(late)]


# -- when a scheduler steps ------------------------------------------------------------------------


def test_a_schedule_is_due_at_every_frequency_th_end_of_an_interval(critic: Optimizer) -> None:
    schedule = Schedule(StepLR(critic, 1), frequency=3)
    assert [count for count in range(10) if schedule.due(count)] == [3, 6, 9]
    assert [count for count in range(4) if Schedule(StepLR(critic, 1)).due(count)] == [1, 2, 3]
