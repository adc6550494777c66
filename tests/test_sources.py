"""Where loaders come from: the call, a data module, the module; and what several of them are."""

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from composefit import DataModule, LoopModule
from composefit.sources import Sources
from tests.lockstep.steps import data, module, trainer

BATCHES = [data(4, 3)]
STAGES = ("train", "val", "test", "predict")


class Own(LoopModule):
    """A module with loaders of its own; each is the name of its stage."""

    def train_dataloader(self) -> Any:
        return "the module's train"

    def val_dataloader(self) -> Any:
        return "the module's val"


class Data(DataModule):
    def train_dataloader(self) -> Any:
        return "the data module's train"


def test_the_call_comes_first_then_the_data_module_or_without_one_the_module() -> None:
    given = Sources.of(Own(), None, train=BATCHES, val=None)
    assert given.loader("train") is BATCHES
    assert given.loader("val") == "the module's val"
    assert not given.given_directly

    own = Sources.of(Own(), None, train=None, val=None)
    assert (own.loader("train"), own.loader("val")) == ("the module's train", "the module's val")

    # As in Lightning, a data module speaks for all stages.
    of_data = Sources.of(Own(), Data(), train=None, val=None)
    assert of_data.loader("train") == "the data module's train"
    assert not of_data.has("val")
    assert of_data.loader("val") is None


def test_a_data_module_may_stand_in_the_loaders_place() -> None:
    data_module = Data()
    found = Sources.of(Own(), None, train=data_module, val=None)
    assert found.datamodule is data_module
    assert found.loader("train") == "the data module's train"


def test_a_data_module_with_a_length_of_zero_is_one_all_the_same() -> None:
    class Sized(Data):
        def __len__(self) -> int:
            return 0

    assert Sources.of(Own(), Sized(), train=None).loader("train") == "the data module's train"


def test_a_loader_that_was_set_on_the_object_counts() -> None:
    one = module(lambda self, x: x)
    assert not Sources.of(one, None, train=None).has("train")
    one.train_dataloader = lambda: BATCHES
    assert Sources.of(one, None, train=None).loader("train") is BATCHES


def test_a_method_is_asked_anew_each_time() -> None:
    asked: list[int] = []

    class Counting(Own):
        def train_dataloader(self) -> Any:
            asked.append(len(asked))
            return BATCHES

    sources = Sources.of(Counting(), None, train=None)
    assert asked == []
    for _ in range(2):
        sources.loader("train")
    assert asked == [0, 1]


def test_loaders_given_directly_need_nobody_to_set_them_up() -> None:
    assert Sources.of(module(lambda self, x: x), None, train=BATCHES, val=None).given_directly
    assert Sources.of(Own(), None, train=BATCHES, val=BATCHES).given_directly
    assert not Sources.of(Own(), None, train=BATCHES, val=None).given_directly


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("datamodule", "given", "match"),
    [
        (Data(), {"train": Data()}, "two data modules were given"),
        (Data(), {"train": BATCHES}, "loaders and a data module were given"),
        (None, {"train": Data(), "val": BATCHES}, "loaders and a data module were given"),
        (BATCHES, {"train": None}, "must be a composefit.DataModule, got list"),
        (Data, {"train": None}, "must be a composefit.DataModule, got type"),
    ],
)
def test_two_that_contradict_each_other_are_refused(
    datamodule: Any, given: dict[str, Any], match: str
) -> None:
    with pytest.raises(TypeError, match=match):
        Sources.of(Own(), datamodule, **given)


@pytest.mark.parametrize(
    "hook", ["transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer"]
)
def test_hooks_around_a_transfer_that_nobody_calls_are_refused(hook: str) -> None:
    kind = type("Own", (Data,), {hook: lambda self, batch, *_: batch})
    with pytest.raises(TypeError, match=rf"Own\.{hook} is no hook that is called: do it in the"):
        Sources.of(Own(), kind(), train=None)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_without_a_loader_a_run_says_what_to_write(stage: str) -> None:
    net = module(lambda self, x: x)
    for name in ("validation_step", "test_step"):
        setattr(type(net), name, lambda self, x: None)
    name = {"fit": "train", "validate": "val"}.get(stage, stage)
    with pytest.raises(TypeError, match=rf"trainer\.{stage} needs a loader: .*{name}_dataloader"):
        getattr(trainer(), stage)(net)


# -- several loaders -----------------------------------------------------------------------------


class Stream:
    """An iterable of batches that is neither list nor DataLoader."""

    def __iter__(self) -> Any:
        return iter(BATCHES)


LOADER = DataLoader([1, 2])
STREAM = Stream()


@pytest.mark.parametrize(
    ("given", "number"),
    [
        (LOADER, 1),
        (STREAM, 1),
        ([LOADER], 1),
        ([LOADER, STREAM], 2),
        ((LOADER, LOADER, LOADER), 3),
        ({"a": LOADER, "b": BATCHES}, 2),
        (OrderedDict(a=BATCHES), 1),
        # Batches, whatever they are: one loader.
        (BATCHES, 1),
        ([data(2), data(3)], 1),
        ([(data(2), data(2)), (data(3), data(3))], 1),
        ([{"x": data(2)}, {"x": data(2)}], 1),
        ([["a", "b"], ["c"]], 1),
        (["a", "b"], 1),
        ([np.ones(3), np.ones(3)], 1),
        ([1, 2], 1),
        ([LOADER, data(2)], 1),
    ],
)
def test_several_loaders_are_told_from_several_batches(given: Any, number: int) -> None:
    found = Sources.of(Own(), None, val=given).loaders("val")
    assert len(found) == number
    if number == 1 and not isinstance(given, OrderedDict) and given not in ([LOADER],):
        assert found[0] is given


def test_a_fit_takes_a_data_modules_loaders_after_its_setup() -> None:
    order: list[str] = []

    class Late(DataModule):
        def setup(self, stage: str) -> None:
            order.append(stage)
            self.rows = BATCHES * 3

        def train_dataloader(self) -> Any:
            return self.rows

    def step(self: Any, x: Tensor) -> Tensor:
        loss: Tensor = self.net(x).square().mean()
        return loss

    run = trainer()
    late = Late()
    run.fit(module(step), late)
    assert (run.global_step, order, late.trainer) == (3, ["fit"], run)
    assert run.datamodule is late
    assert torch.equal(late.rows[0], BATCHES[0])
