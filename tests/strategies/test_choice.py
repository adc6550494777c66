"""Words for strategies, accelerators and devices."""

from typing import Any

import pytest
import torch

from composefit import MultiGPU, SingleDevice, Strategy, ThreadDataParallel, Trainer
from composefit.strategies import choose


@pytest.mark.parametrize(
    ("name", "kind"),
    [("auto", SingleDevice), ("single", SingleDevice), ("threads", ThreadDataParallel)],
)
def test_a_name_stands_for_a_strategy(name: str, kind: type) -> None:
    assert type(choose(name)) is kind


def test_a_strategy_is_taken_as_it_is() -> None:
    strategy = SingleDevice("cpu", shards=2)
    assert choose(strategy) is strategy


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'dpp'.*'auto', 'single', 'threads'"):
        choose("dpp")


def test_a_class_without_parentheses_is_told_so() -> None:
    with pytest.raises(TypeError, match=r"write ThreadDataParallel\(\) with parentheses"):
        choose(ThreadDataParallel)
    with pytest.raises(TypeError, match="a Strategy or a name, got 3"):
        choose(3)


# -- on a CPU ------------------------------------------------------------------------------------


def told(strategy: Strategy) -> tuple[str, str, int]:
    """Kind, device and lanes."""
    return type(strategy).__name__, str(strategy.device), strategy.lanes


ONE = ("SingleDevice", "cpu", 1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("auto", "cpu"), ONE),
        (("auto", "cpu", 1), ONE),
        (("auto", "cpu", "1"), ONE),
        (("auto", "cpu", "auto"), ONE),
        (("single", "cpu", 1), ONE),
        (("auto", "cpu", 3), ("ThreadDataParallel", "cpu", 3)),
        (("auto", "cpu", "3"), ("ThreadDataParallel", "cpu", 3)),
        (("auto", "cpu", [0, 1]), ("ThreadDataParallel", "cpu", 2)),
        (("threads", "cpu", 3), ("ThreadDataParallel", "cpu", 3)),
        (("threads", "auto", 2), ("ThreadDataParallel", "cpu", 2)),
        (("threads", "cpu", 1), ("ThreadDataParallel", "cpu", 1)),
    ],
)
def test_several_cpus_are_threads(
    arguments: tuple[Any, ...], expected: tuple[str, str, int]
) -> None:
    assert told(choose(*arguments)) == expected
    assert told(Trainer(**dict(zip(NAMES, arguments, strict=False)), logger=False).strategy) == (
        expected
    )


NAMES = ("strategy", "accelerator", "devices")


@pytest.mark.parametrize("devices", ["auto", -1, "-1"])
def test_threads_without_a_number_are_the_cores_there_are(devices: Any) -> None:
    assert choose("threads", "cpu", devices).lanes == ThreadDataParallel().lanes


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("ddp_spawn",), ValueError, r"unknown strategy 'ddp_spawn': choose one of 'auto'.*pass a"),
        ((None,), TypeError, "a Strategy or a name, got None"),
        (("auto", "tpu"), ValueError, r"unknown accelerator 'tpu': choose one of 'auto', 'cpu'"),
        (("auto", None), ValueError, "unknown accelerator None"),
        (("auto", "cpu", 0), ValueError, "'auto', -1, a number from 1, or a list, got 0"),
        (("auto", "cpu", -2), ValueError, "got -2"),
        (("auto", "cpu", True), ValueError, "got True"),
        (("auto", "cpu", 1.5), ValueError, "got 1.5"),
        (("auto", "cpu", "two"), ValueError, "got 'two'"),
        (("auto", "cpu", []), ValueError, "a number from 1, or a list"),
        (
            ("single", "auto", 3),
            ValueError,
            r"'single' is one device, got devices=3|one \w+ device can be used",
        ),
        (
            ("single", "cpu", 2),
            ValueError,
            "'single' is one device, got devices=2: write 'threads'",
        ),
        ((SingleDevice("cpu"), "cpu"), ValueError, "SingleDevice says itself where it runs"),
        ((SingleDevice("cpu"), "auto", 2), ValueError, "leave accelerator and devices out"),
    ],
)
def test_words_that_mean_nothing_are_refused_with_what_to_write(
    arguments: tuple[Any, ...], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        choose(*arguments)
    with pytest.raises(error, match=match):
        Trainer(**dict(zip(NAMES, arguments, strict=False)))


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "mps"])
def test_a_device_that_is_not_here_is_refused(
    accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch)
    with pytest.raises(ValueError, match=rf"accelerator='{accelerator}', and this machine has non"):
        choose("auto", accelerator)


# -- on a machine with GPUs, which is made up ----------------------------------------------------


def machine(monkeypatch: pytest.MonkeyPatch, cuda: int = 0, mps: bool = False) -> None:
    """So many CUDA devices, and whether there is Apple's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("arguments", "device"),
    [
        (("auto", "gpu"), "cuda"),
        (("auto", "cuda"), "cuda"),
        (("single", "gpu"), "cuda"),
        (("auto", "gpu", 1), "cuda"),
        (("auto", "gpu", "auto"), "cuda"),
        (("auto", "gpu", -1), "cuda"),
        (("auto", "gpu", [0]), "cuda:0"),
        (("auto", "cpu"), "cpu"),
        (("threads", "auto", 2), "cpu"),
    ],
)
def test_one_gpu_is_named_by_words(
    arguments: tuple[Any, ...], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, cuda=1)
    assert str(choose(*arguments).device) == device


def test_apples_gpu_is_taken_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, mps=True)
    assert str(choose("auto", "gpu").device) == "mps"
    assert str(choose("auto", "mps", 1).device) == "mps"


def test_a_list_of_one_picks_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=4)
    assert str(choose("auto", "gpu", [3]).device) == "cuda:3"


@pytest.mark.parametrize("devices", [2, "2", [0, 1], -1, "-1"])
def test_several_gpus_get_a_process_each(devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=2)
    found = choose("auto", "gpu", devices)
    assert isinstance(found, MultiGPU)
    assert found.processes_to_launch() == 2


def test_threads_on_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=1)
    with pytest.raises(ValueError, match="'threads' runs on a CPU: leave accelerator='gpu' out"):
        choose("threads", "gpu")
