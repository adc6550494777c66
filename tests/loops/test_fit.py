"""Epochs, their validation, and the order of everything."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from composefit import Callback, OptimizerConfig
from composefit.loops import FitLoop, TrainEpochLoop
from tests.faults.fault import two
from tests.lockstep.steps import data, every_strategy, module, same, trainer, weights

HOOKS = [
    "setup",
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_after_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "on_exception",
    "teardown",
]


def tracing(trace: list[str], who: str = "") -> Callback:
    """A callback with all hooks; updates are told with the name of their optimizer."""

    def hook(name: str) -> Any:
        def call(self: Any, trainer: Any, module: Any, *rest: Any) -> None:
            suffix = f" {rest[-1]}" if "optimizer" in name or "batch" in name else ""
            trace.append(who + name.removeprefix("on_") + suffix)

        return call

    return type("Tracing", (Callback,), {name: hook(name) for name in HOOKS})()


def squares(self: Any, x: Tensor) -> Tensor:
    return self.net(x).square().mean()


def gan(self: Any, x: Tensor) -> Any:
    yield {"a": self.a(x).square().mean()}
    yield {"b": self.b(x).square().mean()}


START = ["setup", "fit_start", "train_start"]
END = ["train_end", "fit_end", "teardown"]
UPDATE = ["before_optimizer_step net", "after_optimizer_step net"]
VALIDATION = [
    "validation_start",
    "validation_epoch_start",
    *["validation_batch_start 0", "validation_batch_end 0"],  # of loader 0
    *["validation_batch_start 0", "validation_batch_end 0"],
    "validation_epoch_end",
    "validation_end",
]


def test_hooks_run_in_lightnings_order() -> None:
    trace: list[str] = []
    net = module(squares)
    type(net).validation_step = lambda self, x: None
    run = trainer(callbacks=tracing(trace), max_epochs=2)
    run.fit(net, [data(4, 3)] * 2, [data(4, 3)] * 2)
    epoch = [
        "train_epoch_start",
        *["train_batch_start 0", *UPDATE, "train_batch_end 0"],
        *["train_batch_start 1", *UPDATE, "train_batch_end 1"],
        *VALIDATION,
        "train_epoch_end",
    ]
    assert trace == [*START, *epoch, *epoch, *END]


@every_strategy
def test_hooks_with_several_optimizers_and_accumulation(strategy: Any) -> None:
    trace: list[str] = []
    run = trainer(strategy(), callbacks=tracing(trace), accumulate_grad_batches=2)
    run.fit(module(gan, **two()), [data(4, 3)] * 3)
    updates = [f"{when}_optimizer_step {name}" for name in "ab" for when in ("before", "after")]
    assert trace == [
        *START,
        "train_epoch_start",
        *["train_batch_start 0", "train_batch_start 1", *updates],
        *["train_batch_end 0", "train_batch_end 1"],
        *["train_batch_start 2", *updates, "train_batch_end 2"],
        "train_epoch_end",
        *END,
    ]


def test_simultaneous_updates_have_their_hooks_one_after_another() -> None:
    trace: list[str] = []

    def step(self: Any, x: Tensor) -> Any:
        yield {"b": self.b(x).mean(), "a": self.a(x).mean()}

    trainer(callbacks=tracing(trace)).fit(module(step, **two()), [data(4, 3)])
    assert [name for name in trace if "optimizer" in name] == [
        *["before_optimizer_step b", "after_optimizer_step b"],
        *["before_optimizer_step a", "after_optimizer_step a"],
    ]


def test_the_modules_own_hooks_run_after_the_callbacks() -> None:
    trace: list[str] = []
    net = module(squares)
    for name in HOOKS[1:-2]:
        setattr(net, name, lambda *rest, name=name: trace.append("own " + name.removeprefix("on_")))
    type(net).validation_step = lambda self, x: None
    trainer(callbacks=tracing(trace)).fit(net, [data(4, 3)], [data(4, 3)])
    theirs = [name.split()[0] for name in trace if not name.startswith("own ")]
    own = [name.removeprefix("own ") for name in trace if name.startswith("own ")]
    assert own == theirs[1:-1]  # but for setup and teardown
    assert all(
        b == f"own {a.split()[0]}" for a, b in zip(trace[1:-1:2], trace[2:-1:2], strict=True)
    )


def test_a_failed_step_is_told_and_torn_down() -> None:
    trace: list[str] = []

    def step(self: Any, x: Tensor) -> Tensor:
        if self.global_step == 1:
            raise KeyError("mine")
        return squares(self, x)

    run = trainer(callbacks=tracing(trace))
    with pytest.raises(KeyError, match="mine"):
        run.fit(module(step), [data(4, 3)] * 3)
    assert trace == [
        *START,
        "train_epoch_start",
        *["train_batch_start 0", *UPDATE, "train_batch_end 0"],
        # Callbacks hear of it before anything else happens; then what has begun ends.
        *["train_batch_start 1", "exception", "train_batch_end 1", "train_epoch_end"],
        *END,
    ]


def test_epochs_are_counted() -> None:
    seen: list[tuple[int, int]] = []

    def step(self: Any, x: Tensor) -> Tensor:
        seen.append((self.current_epoch, self.global_step))
        return squares(self, x)

    run = trainer(max_epochs=3)
    run.fit(module(step), [data(4, 3)] * 2)
    assert seen == [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5)]
    assert (run.current_epoch, run.global_step, run.updates) == (3, 6, {"net": 6})


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ({"max_epochs": 0}, 0, 0),
        ({"max_epochs": -1, "max_steps": 7}, 7, 3),  # within the fourth
        ({"max_epochs": None, "max_steps": 7}, 7, 3),
        ({"max_epochs": 3, "max_steps": 5}, 5, 2),
        ({"max_epochs": 3, "max_steps": 4}, 4, 2),  # steps end with the epoch: no empty one follows
        ({"max_epochs": 2, "max_steps": 9}, 4, 2),
    ],
)
def test_a_fit_ends_with_its_epochs_or_its_steps(
    options: dict[str, Any], steps: int, epochs: int
) -> None:
    trace: list[str] = []
    run = trainer(callbacks=tracing(trace), **options)
    run.fit(module(squares), [data(4, 3)] * 2)
    assert (run.global_step, run.current_epoch) == (steps, epochs)
    begun = epochs + (steps % 2)
    assert trace.count("train_epoch_end") == trace.count("train_epoch_start") == begun
    assert trace[-3:] == END


def test_an_epoch_that_is_cut_short_is_validated_too() -> None:
    trace: list[str] = []
    net = module(squares)
    type(net).validation_step = lambda self, x: None
    trainer(callbacks=tracing(trace), max_steps=1).fit(net, [data(4, 3)] * 9, [data(4, 3)] * 2)
    assert trace[-12:] == [*VALIDATION, "train_epoch_end", *END]


def test_a_second_fit_has_new_counters_and_optimizers_and_keeps_the_weights() -> None:
    def configure(self: Any) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
        return OptimizerConfig(optimizer, StepLR(optimizer, 1, gamma=0.5))

    net, other = module(squares), module(squares)
    for one in (net, other):
        type(one).configure_optimizers = configure
    batches = [data(4, 3, seed=i) for i in range(3)]
    run = trainer(max_epochs=2)
    run.fit(net, batches)
    first = run.optimizers["optimizer"].optimizer
    between = weights(net)
    run.fit(net, batches)
    assert (run.global_step, run.current_epoch, run.updates) == (6, 2, {"optimizer": 6})
    second = run.optimizers["optimizer"].optimizer
    assert second is not first
    # Exactly what a new trainer makes of these weights: no momentum, no decayed rate is left.
    with torch.no_grad():
        for parameter, value in zip(other.parameters(), between, strict=True):
            parameter.copy_(value)
    trainer(max_epochs=2).fit(other, batches)
    assert same(net, other)
    assert not any(map(torch.equal, weights(net), between))


def test_its_state_is_the_epochs_done() -> None:
    run = trainer(max_epochs=2)
    batches = [data(4, 3)] * 2
    run.fit(module(squares), batches)
    assert run.fit_loop is not None
    state = run.fit_loop.state_dict()
    assert (state["train"]["epoch"], state["train"]["batch_idx"]) == (2, 0)
    other = FitLoop(TrainEpochLoop(batches), max_epochs=3)
    other.load_state_dict(state)
    assert other.epoch == 2
    assert other.limits.elapsed == state["seconds"] > 0
