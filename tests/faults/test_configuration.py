"""F1 to F9: what is wrong before anything was trained."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau

from composefit import (
    Callback,
    LoopModule,
    OptimizerConfig,
    SingleDevice,
    ThreadDataParallel,
    Trainer,
)
from tests.faults.conftest import Tells
from tests.faults.fault import surfaces
from tests.lockstep.steps import data, linear, module, trainer, weights


def mean(self: Any, x: Tensor) -> Tensor:
    return self.net(x).mean()


def test_f1_unknown_argument(tells: Tells) -> None:
    words = ("no argument 'acumulate_grad_batches'", "did you mean 'accumulate_grad_batches'?")
    with surfaces(TypeError, *words) as found:
        Trainer(acumulate_grad_batches=2)
    tells(found)
    with surfaces(TypeError, "no argument 'gpus'", "write accelerator='gpu'"):
        Trainer(gpus=2)
    with surfaces(TypeError, "no argument 'zzz'", "known are strategy, accelerator, devices"):
        Trainer(zzz=2)


def test_f2_unknown_strategy_or_precision(tells: Tells) -> None:
    words = ("'dpp'", "'auto'", "'single'", "'threads'", "ThreadDataParallel(")
    with surfaces(ValueError, *words) as found:
        Trainer(strategy="dpp")
    tells(found)
    with surfaces(TypeError, "got 4", "a Strategy or a name"):
        Trainer(strategy=4)  # type: ignore[arg-type]
    with surfaces(TypeError, "write ThreadDataParallel() with parentheses"):
        Trainer(strategy=ThreadDataParallel)  # type: ignore[arg-type]
    with surfaces(ValueError, "'fp8'", "'32'", "'bf16-mixed'", "'16-mixed'"):
        Trainer(precision="fp8")


@pytest.mark.parametrize(
    ("kind", "argument", "value", "expected"),
    [
        (ValueError, "accumulate_grad_batches", 0, "at least 1"),
        (TypeError, "accumulate_grad_batches", 1.5, "a whole number"),
        (ValueError, "gradient_clip_val", -1, "above 0 (None for no clipping)"),
        (ValueError, "gradient_clip_val", 0, "above 0 (None for no clipping)"),
        (ValueError, "gradient_clip_val", float("nan"), "above 0 (None for no clipping)"),
        (TypeError, "gradient_clip_val", "1", "a number"),
        (ValueError, "gradient_clip_algorithm", "max", "'norm' or 'value'"),
        (TypeError, "max_epochs", "3", "a whole number"),
        (TypeError, "max_epochs", True, "a whole number"),
        (ValueError, "max_epochs", -2, "at least 0"),
        (TypeError, "max_steps", 1.5, "a whole number"),
        (ValueError, "microbatch_size", 0, "at least 1"),
        (ValueError, "limit_train_batches", 1.5, "a fraction must be above 0 and at most 1.0"),
        (ValueError, "limit_val_batches", -1, "at least 0 batches"),
        (ValueError, "log_every_n_steps", 0, "at least 1"),
        (ValueError, "seed", -1, "at least 0"),
        (ValueError, "on_nonfinite", "stop", "'raise', 'skip' or 'ignore'"),
        (ValueError, "deterministic", "wanr", "True, False or 'warn'"),
        (TypeError, "enable_progress_bar", "no", "True or False"),
        (TypeError, "enable_model_summary", 0, "True or False"),
        (TypeError, "enable_checkpointing", "last", "True or False"),
        (TypeError, "logger", 3, "True, False or loggers"),
        (TypeError, "default_root_dir", 3, "a path"),
    ],
)
def test_f3_impossible_value(
    kind: type[Exception], argument: str, value: object, expected: str
) -> None:
    with surfaces(kind, argument, f"got {value!r}", expected):
        Trainer(**{argument: value})


def test_f3_what_is_silent_elsewhere(tells: Tells) -> None:
    with surfaces(ValueError, "accumulate_grad_batches") as none:
        Trainer(accumulate_grad_batches=0)
    with surfaces(ValueError, "gradient_clip_val") as negative:
        Trainer(gradient_clip_val=-1)
    with surfaces(TypeError, "max_epochs") as text:
        Trainer(max_epochs="3")  # type: ignore[arg-type]
    tells(none, "and", negative, "and", text)


def test_f3_impossible_number_of_shards() -> None:
    with surfaces(ValueError, "ThreadDataParallel(threads=...)", "a positive number, got 0"):
        ThreadDataParallel(0)
    with surfaces(ValueError, "SingleDevice(shards=...)", "a positive number, got -1"):
        SingleDevice("cpu", shards=-1)


class Counter(Callback):
    """A callback."""


def test_f4_no_callback(tells: Tells) -> None:
    with surfaces(TypeError, "callbacks[1]", "a composefit.Callback, got str 'early'") as found:
        Trainer(callbacks=[Counter(), "early"])  # type: ignore[list-item]
    tells(found)
    with surfaces(TypeError, "callbacks[0]", "write Counter() with parentheses"):
        Trainer(callbacks=[Counter])  # type: ignore[list-item]
    with surfaces(TypeError, "callbacks must be Callbacks, got int 3"):
        Trainer(callbacks=3)  # type: ignore[arg-type]


class Bare(LoopModule):
    """Nothing but a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = linear(3, 1)


class Stepped(Bare):
    """Does not say how it is optimized."""

    def training_step(self, x: Tensor) -> Tensor:
        return self.net(x).mean()


class Optimized(Bare):
    """Does not say what a step is."""

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


RUNS: list[Callable[[Trainer, Any], Any]] = [
    lambda run, net: run.fit(net, [data(6, 3)]),
    lambda run, net: run.step(net, [data(6, 3)]),
]


@pytest.mark.parametrize("start", RUNS, ids=["fit", "step"])
def test_f5_missing_method(start: Callable[[Trainer, Any], Any], tells: Tells) -> None:
    example = (
        "def training_step(self, batch):\n        x, y = batch\n        return F.cross_entropy("
    )
    with surfaces(TypeError, "Optimized defines no training_step; write", example) as found:
        start(trainer(), Optimized())
    tells(found)
    example = "def configure_optimizers(self):\n        return torch.optim.Adam(self.parameters()"
    with surfaces(TypeError, "Stepped defines no configure_optimizers; write", example):
        start(trainer(), Stepped())
    with surfaces(TypeError, "expected a LoopModule, got Linear", "composefit.LoopModule"):
        start(trainer(), nn.Linear(3, 1))


def test_f5_missing_validation_step() -> None:
    example = 'def validation_step(self, batch):\n        x, y = batch\n        self.log("val_loss"'
    with surfaces(TypeError, "Stepped defines no validation_step; write", example):
        trainer().validate(Stepped(), [data(6, 3)])
    net = module(mean)
    with surfaces(TypeError, "defines no validation_step; write", example):
        trainer().fit(net, [data(6, 3)], [data(6, 3)])


def test_f6_no_super_init(tells: Tells) -> None:
    class Early(Optimized):
        def __init__(self, value: Any) -> None:
            self.net = value

    for value in (linear(3, 1), nn.Parameter(torch.zeros(1))):
        with surfaces(TypeError, "before super().__init__()", "first in Early.__init__") as found:
            Early(value)
        assert found.line == "self.net = value"
    Early.training_step = mean  # type: ignore[method-assign]
    with surfaces(TypeError, "Early.__init__ must begin with super().__init__()") as found:
        trainer().fit(Early(3), [data(6, 3)])
    tells(found)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_f7_parameter_twice_in_one_optimizer(tells: Tells) -> None:
    class Twice(Stepped):
        def configure_optimizers(self) -> Any:
            return {"all": SGD([*self.parameters(), self.net.weight], lr=0.1)}

    net = Twice()
    before = weights(net)
    words = ("net.weight is twice in the optimizer 'all'", "each parameter once")
    with surfaces(ValueError, *words) as found:
        trainer().fit(net, [data(6, 3)])
    tells(found)
    assert all(map(torch.equal, weights(net), before))


def test_f7_parameter_in_two_optimizers_is_allowed() -> None:
    class Shared(Bare):
        def configure_optimizers(self) -> Any:
            return {name: SGD(self.parameters(), lr=0.1) for name in ("a", "b")}

        def training_step(self, x: Tensor) -> Any:
            yield {"a": self.net(x).mean()}
            yield {"b": self.net(x).mean()}

    net, x = Shared(), data(6, 3)
    expected = net.net.weight.detach() - 2 * 0.1 * x.mean(0)  # the gradient of a linear loss
    trainer().fit(net, [x])
    torch.testing.assert_close(net.net.weight.detach(), expected, rtol=1e-12, atol=0)


def test_f8_parameters_in_no_optimizer(tells: Tells) -> None:
    class Forgetful(Stepped):
        def __init__(self) -> None:
            super().__init__()
            self.head = linear(2, 1)
            self.teacher = linear(2, 1).requires_grad_(False)  # meant so

        def configure_optimizers(self) -> Any:
            return SGD(self.net.parameters(), lr=0.1)

    with pytest.warns(UserWarning, match="in no optimizer") as caught:
        trainer().fit(Forgetful(), [data(6, 3)])
    (warning,) = caught
    assert "(2): head.weight, head.bias. " in str(warning.message)
    assert "requires_grad_(False)" in str(warning.message)
    tells(warning.message)


class Watching(Stepped):
    """Its scheduler monitors a metric that is logged under another name."""

    strict = True

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        schedule = {
            "scheduler": ReduceLROnPlateau(optimizer),
            "monitor": "val_los",
            "strict": self.strict,
        }
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def validation_step(self, x: Tensor) -> None:
        self.log("val_loss", self.net(x).mean())


def test_f9_monitored_metric_is_never_logged(tells: Tells) -> None:
    words = ("optimizer 'optimizer' monitors 'val_los'", "never logged", "logged are ['val_loss']")
    with surfaces(ValueError, *words) as found:
        trainer(max_epochs=3).fit(Watching(), [data(6, 3)], [data(6, 3)])
    tells(found)


def test_f9_lenient_monitor_warns() -> None:
    net = Watching()
    net.strict = False
    with pytest.warns(UserWarning, match=r"'val_los', which was never logged.*\['val_loss'\]"):
        trainer().fit(net, [data(6, 3)], [data(6, 3)])


def test_f9_optimizer_configs_monitor_too() -> None:
    def configured(self: Any) -> OptimizerConfig:
        optimizer = SGD(self.parameters(), lr=0.1)
        return OptimizerConfig(optimizer, ReduceLROnPlateau(optimizer), monitor="val_los")

    net = module(mean)
    type(net).configure_optimizers = configured
    with surfaces(ValueError, "'val_los', which was never logged"):
        trainer().fit(net, [data(6, 3)])
