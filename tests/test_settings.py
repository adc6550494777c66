"""Settings of torch's for a run: as asked for within it, and as before after it."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from composefit.settings import torch_settings
from tests.lockstep.steps import data, every_strategy, module, trainer

BATCH = data(4, 3)


def now() -> dict[str, Any]:
    """Every setting that a trainer's arguments change."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "anomaly": torch.is_anomaly_enabled(),
        "check_nan": torch.is_anomaly_check_nan_enabled(),
    }


OFF = {
    "deterministic": False,
    "warn_only": False,
    "benchmark": False,
    "anomaly": False,
    "check_nan": True,
}

SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"deterministic": False, "benchmark": False, "detect_anomaly": False}, {}),
    ({"deterministic": True}, {"deterministic": True}),
    ({"deterministic": "warn"}, {"deterministic": True, "warn_only": True}),
    ({"benchmark": True}, {"benchmark": True}),
    ({"detect_anomaly": True}, {"anomaly": True}),
]


@pytest.mark.parametrize(("options", "changed"), SETTINGS)
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_each_holds_within_a_run_of_any_kind_alone(
    stage: str, options: dict[str, Any], changed: dict[str, Any]
) -> None:
    seen: list[Any] = []

    def step(self: Any, x: Tensor) -> Tensor:
        seen.append(now())
        return self.net(x).square().mean()

    net: Any = module(step)
    kind = type(net)
    kind.validation_step = kind.test_step = kind.predict_step = step
    run = trainer(**options)
    assert now() == OFF
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of anomaly detection
        getattr(run, stage)(net, [BATCH])
    assert seen == [{**OFF, **changed}]
    assert now() == OFF


@pytest.mark.parametrize("where", ["step", "setup"])
@every_strategy
def test_a_run_that_fails_puts_them_back(strategy: Any, where: str) -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        raise KeyError("mine")

    net: Any = module(step)
    if where == "setup":
        type(net).setup = step
    run = trainer(strategy(), deterministic=True, benchmark=True, detect_anomaly=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(KeyError, match="mine"):
            run.fit(net, [BATCH])
    assert now() == OFF


def test_what_was_on_before_is_on_afterwards() -> None:
    before = {
        "deterministic": True,
        "warn_only": True,
        "benchmark": True,
        "anomaly": True,
        "check_nan": False,
    }
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = True
        torch.autograd.set_detect_anomaly(True, check_nan=False)
        assert now() == before
        with torch_settings(False, None, False):
            assert now() == before  # nothing was asked for
        with torch_settings(True, False, True):
            assert now() == {**before, "warn_only": False, "benchmark": False, "check_nan": True}
        assert now() == before
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        torch.autograd.set_detect_anomaly(False, check_nan=True)


def test_deterministic_algorithms_refuse_what_has_none_and_warn_where_that_is_asked() -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        # put_ without accumulation has no deterministic form, on any device.
        out = self.net(x)
        torch.zeros(4).put_(torch.tensor([0]), torch.ones(1), accumulate=False)
        return out.square().mean()

    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        trainer(deterministic=True).fit(module(step), [BATCH])
    with pytest.warns(UserWarning, match="does not have a deterministic implementation"):
        trainer(deterministic="warn").fit(module(step), [BATCH])
    trainer().fit(module(step), [BATCH])


@every_strategy
def test_anomaly_detection_names_the_line_of_the_forward(strategy: Any) -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        return (self.net(x).square().sum() * 0).sqrt()  # the gradient of a root at 0: NaN

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match=r"returned nan values in its 0th output"):
            trainer(strategy(), detect_anomaly=True).fit(module(step), [BATCH])
    assert any("the gradient of a root at 0" in str(one.message) for one in told)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"deterministic": "yes"}, "deterministic must be True, False or 'warn', got 'yes'"),
        ({"benchmark": "yes"}, "benchmark must be True or False, got 'yes'"),
        ({"detect_anomaly": 1}, "detect_anomaly must be True or False, got 1"),
        ({"inference_mode": None}, "inference_mode must be True or False, got None"),
    ],
)
def test_values_that_cannot_be_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        trainer(**options)
