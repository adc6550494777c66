"""The examples of hand-written loops: the same training however many shards there are."""

import runpy
from pathlib import Path

import pytest
import torch

from composefit import SingleDevice, ThreadDataParallel

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [("gan_by_hand", SingleDevice("cpu"), ThreadDataParallel(2)), ("gan_wrapper", 1, 2)],
)
def test_example_trains_the_same_on_two_threads(name: str, one: object, two: object) -> None:
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    torch.set_default_dtype(torch.float64)
    start, expected, found = main(one, steps=0), main(one, steps=20), main(two, steps=20)
    assert abs(found - expected) < 1e-10
    assert abs(found - start) > 1e-3


def test_both_examples_train_the_same_networks() -> None:
    """They differ in when the fake is made: before the critic's update or after."""
    mains = [
        runpy.run_path(str(EXAMPLES / f"{n}.py"))["main"] for n in ("gan_by_hand", "gan_wrapper")
    ]
    assert abs(mains[0](SingleDevice("cpu"), steps=1) - mains[1](1, steps=1)) < 1e-6
