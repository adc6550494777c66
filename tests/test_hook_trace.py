"""The whole trace of a run's hooks, and that what has begun ends, whatever goes wrong."""

import signal
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.optim import SGD

from composefit import Callback, DataModule, LoopModule, Strategy, Trainer
from composefit.module_hooks import ModuleHooks
from tests.lockstep.steps import data, every_strategy, linear, trainer

# Who is called with what. `both`: the callback, and then the module. Batch hooks are told with the
# index of the batch, and of its loader; those of optimizers with whose it is, and the name.
TRACE = """
    module configure_callbacks
    data prepare_data
    module prepare_data
    data setup fit
    both setup fit
    module configure_model
    data val_dataloader
    data train_dataloader
    module configure_optimizers
    both on_fit_start
    callback on_sanity_check_start
{validation}
    callback on_sanity_check_end
    both on_train_start
{epoch}
{epoch}
    both on_train_end
    both on_fit_end
    both teardown fit
    data teardown fit

    module configure_callbacks
    data prepare_data
    module prepare_data
    data setup validate
    both setup validate
    module configure_model
    data val_dataloader
{validation}
    both teardown validate
    data teardown validate

    module configure_callbacks
    data prepare_data
    module prepare_data
    data setup test
    both setup test
    module configure_model
    data test_dataloader
    both on_test_start
    both on_test_epoch_start
    both on_test_batch_start 0 0
    module test_step 0 0
    both on_test_batch_end 0 0
    both on_test_epoch_end
    both on_test_end
    both teardown test
    data teardown test

    module configure_callbacks
    data prepare_data
    module prepare_data
    data setup predict
    both setup predict
    module configure_model
    data predict_dataloader
    both on_predict_start
    both on_predict_epoch_start
    both on_predict_batch_start 0 0
    module predict_step 0 0
    both on_predict_batch_end 0 0
    both on_predict_epoch_end
    both on_predict_end
    both teardown predict
    data teardown predict
"""

# Three loader batches, two of them in a step.
EPOCH = """
    both on_train_epoch_start
    both on_train_batch_start 0
    both on_train_batch_start 1
    module training_step 0
    module training_step 1
{updates}
    both on_train_batch_end 0
    both on_train_batch_end 1
    both on_train_batch_start 2
    module training_step 2
{updates}
    both on_train_batch_end 2
{validation}
    both on_train_epoch_end
"""

UPDATE = """
    both on_after_backward
    both on_before_optimizer_step {name} {name}
    module optimizer_step {name}
    both on_before_zero_grad {name}
    both on_after_optimizer_step {name} {name}
"""

# Two loaders: one of two batches, one of one.
VALIDATION = """
    both on_validation_start
    both on_validation_epoch_start
    both on_validation_batch_start 0 0
    module validation_step 0 0
    both on_validation_batch_end 0 0
    both on_validation_batch_start 1 0
    module validation_step 1 0
    both on_validation_batch_end 1 0
    both on_validation_batch_start 0 1
    module validation_step 0 1
    both on_validation_batch_end 0 1
    both on_validation_epoch_end
    both on_validation_end
"""


def expected(names: list[str]) -> list[str]:
    """The trace as lines, for optimizers of these names."""
    updates = "".join(UPDATE.format(name=name) for name in names)
    epoch = EPOCH.format(updates=updates, validation=VALIDATION)
    found = []
    for line in TRACE.format(epoch=epoch, validation=VALIDATION).split("\n"):
        who, _, what = line.strip().partition(" ")
        found += [f"{one} {what}" for one in ("callback", "module") if who == "both"]
        found += [f"{who} {what}"] if who not in ("both", "") else []
    return found


class Trace:
    """Notes calls, one line each."""

    def __init__(self, fails: str = "") -> None:
        self.lines: list[str] = []
        self.failed: list[bool] = []
        self.fails = fails

    def note(self, who: str, name: str, run: Any, *arguments: Any) -> None:
        """Note a call, and whether the run has failed by then; fail where that is wanted."""
        rest = [_told(one, run) for one in arguments]
        self.lines.append(" ".join([who, name, *filter(None, rest)]))
        self.failed.append(run is not None and run.exception is not None)
        if self.lines[-1] == self.fails:
            self.fails = ""
            raise KeyError("mine")

    def named(self, *parts: str) -> list[str]:
        """The lines with one of these in them."""
        return [line for line in self.lines if any(part in line for part in parts)]


def _told(argument: Any, run: Any) -> str:
    if isinstance(argument, int | str):
        return str(argument)
    names = {id(one.optimizer): name for name, one in run.optimizers.items()}
    found: str = names.get(id(argument), "")
    return found


HOOKS = [name for name in vars(ModuleHooks) if name.startswith("on_")]
HOOKS = [name for name in HOOKS if "checkpoint" not in name]
ONLY_CALLBACKS = [
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_interrupted",
    "on_exception",
]


class Watcher(Callback):
    """A callback with all hooks."""

    def __init__(self, trace: Trace, name: str = "callback") -> None:
        self.trace = trace
        self.name = name


class Net(LoopModule):
    """A module with all hooks, and layers with an optimizer each that are updated in turn."""

    def __init__(self, trace: Trace, names: list[str]) -> None:
        super().__init__()
        self.trace = trace
        self.layers = nn.ModuleDict({name: linear(3, 3) for name in names})

    def _note(self, name: str, *arguments: Any) -> None:
        self.trace.note("module", name, self.trainer, *arguments)

    def configure_optimizers(self) -> Any:
        self._note("configure_optimizers")
        return {name: SGD(layer.parameters(), lr=0.1) for name, layer in self.layers.items()}

    def training_step(self, x: Tensor, batch_idx: int) -> Any:
        self._note("training_step", batch_idx)
        for name, layer in self.layers.items():
            yield {name: layer(x).square().mean()}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:  # type: ignore[override]
        self._note("optimizer_step", optimizer)
        optimizer.step(closure)

    def validation_step(self, x: Tensor, batch_idx: int, dataloader_idx: int) -> None:
        self._note("validation_step", batch_idx, dataloader_idx)

    def test_step(self, x: Tensor, batch_idx: int, dataloader_idx: int) -> None:
        self._note("test_step", batch_idx, dataloader_idx)

    def predict_step(self, x: Tensor, batch_idx: int, dataloader_idx: int) -> None:
        self._note("predict_step", batch_idx, dataloader_idx)

    def configure_callbacks(self) -> list[Callback]:
        self._note("configure_callbacks")
        return []

    def prepare_data(self) -> None:
        self._note("prepare_data")

    def configure_model(self) -> None:
        self._note("configure_model")

    def setup(self, stage: str) -> None:
        self._note("setup", stage)

    def teardown(self, stage: str) -> None:
        self._note("teardown", stage)


class Numbers(DataModule):
    """A data module with all methods."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def _note(self, name: str, *arguments: Any) -> None:
        self.trace.note("data", name, self.trainer, *arguments)

    def prepare_data(self) -> None:
        self._note("prepare_data")

    def setup(self, stage: str) -> None:
        self._note("setup", stage)

    def teardown(self, stage: str) -> None:
        self._note("teardown", stage)

    def train_dataloader(self) -> Any:
        self._note("train_dataloader")
        return [data(4, 3)] * 3

    def val_dataloader(self) -> Any:
        self._note("val_dataloader")
        return {"long": [data(4, 3)] * 2, "short": [data(2, 3)]}

    def test_dataloader(self) -> Any:
        self._note("test_dataloader")
        return [data(4, 3)]

    def predict_dataloader(self) -> Any:
        self._note("predict_dataloader")
        return [data(4, 3)]


def _in_callback(name: str) -> Callable[..., None]:
    def hook(self: Watcher, trainer: Any, module: Any, *arguments: Any) -> None:
        self.trace.note(self.name, name, trainer, *arguments)

    return hook


def _in_module(name: str) -> Callable[..., None]:
    def hook(self: Net, *arguments: Any) -> None:
        self._note(name, *arguments)

    return hook


for _name in HOOKS:
    setattr(Net, _name, _in_module(_name))
for _name in (*HOOKS, *ONLY_CALLBACKS, "setup", "teardown"):
    setattr(Watcher, _name, _in_callback(_name))


@pytest.mark.parametrize("names", [["net"], ["a", "b"]], ids=["one optimizer", "two optimizers"])
def test_the_whole_trace_of_a_fit_a_validation_a_test_and_a_prediction(names: list[str]) -> None:
    trace = Trace()
    net, numbers = Net(trace, names), Numbers(trace)
    run = trainer(
        callbacks=Watcher(trace), max_epochs=2, accumulate_grad_batches=2, num_sanity_val_steps=-1
    )
    run.fit(net, datamodule=numbers)
    run.validate(net, datamodule=numbers)
    run.test(net, datamodule=numbers)
    run.predict(net, datamodule=numbers)
    assert trace.lines == expected(names)
    assert not any(trace.failed)


STEPS = ("training_step", "validation_step", "test_step", "predict_step")


@every_strategy
def test_the_trace_is_the_same_under_every_strategy(strategy: Callable[[], Strategy]) -> None:
    trace = Trace()

    class Untold(Net):
        """Its steps run once for each shard, which depends on the strategy."""

        def training_step(self, x: Tensor) -> Tensor:  # type: ignore[override]
            loss: Tensor = self.layers["a"](x).square().mean()
            return loss

    for name in STEPS[1:]:
        setattr(Untold, name, lambda self, *_: None)
    run = trainer(
        strategy(),
        callbacks=Watcher(trace),
        max_epochs=2,
        accumulate_grad_batches=2,
        num_sanity_val_steps=-1,
    )
    net, numbers = Untold(trace, ["a"]), Numbers(trace)
    for stage in ("fit", "validate", "test", "predict"):
        getattr(run, stage)(net, datamodule=numbers)
    assert trace.lines == [
        line for line in expected(["a"]) if not any(f" {name} " in line for name in STEPS)
    ]


# -- begin and end are paired --------------------------------------------------------------------

PAIRS = {
    f"on_{name}_start": f"on_{name}_end"
    for name in [
        *["fit", "sanity_check", "train", "train_epoch", "train_batch"],
        *["validation", "validation_epoch", "validation_batch"],
    ]
} | {"setup": "teardown"}
WATCHERS = ("callback", "module", "saver")


class Saver(Watcher):
    """A callback whose hooks run after all others."""

    saves_state = True


def watched(trace: Trace, **options: Any) -> tuple[Trainer, Net, Numbers]:
    """A trainer, a module and data that note in this trace."""
    run = trainer(
        callbacks=[Saver(trace, "saver"), Watcher(trace)],
        accumulate_grad_batches=2,
        **{"num_sanity_val_steps": 1, **options},
    )
    return run, Net(trace, ["a", "b"]), Numbers(trace)


def lines_of_a_fit() -> list[str]:
    """Each line of the trace of an ordinary fit once, but for those before the run."""
    trace = Trace()
    run, net, numbers = watched(trace)
    run.fit(net, datamodule=numbers)
    return list(dict.fromkeys(trace.lines[1:]))


def refuse_unpaired(trace: Trace, fault: str = "") -> None:
    """Every begin hook that was called has its end hook after it, inner pairs first.

    Nothing ends that has not begun, but where one of its begin hooks fails: it then ends for all.
    """
    failed = fault.split(maxsplit=1)[1] if fault else ""
    for who in WATCHERS:
        open_ones: list[str] = []
        for line in trace.lines:
            owner, name, *rest = line.split()
            end = " ".join([PAIRS.get(name, name), *rest])
            if owner != who:
                continue
            if name in PAIRS:
                open_ones.append(end)
            elif name in PAIRS.values():
                begin = " ".join([next(a for a, b in PAIRS.items() if b == name), *rest])
                excused = begin == failed or name == "teardown"  # which comes in any case
                assert end in open_ones or excused, f"{who} never began what {line} ends"
                if end not in open_ones:
                    continue
                # All batches of a window are open at once.
                within = open_ones[open_ones.index(end) + 1 :]
                assert all("train_batch" in one and "train_batch" in end for one in within), line
                open_ones.remove(end)
        assert not open_ones, f"{who} waits for {open_ones}"


@pytest.mark.parametrize("line", lines_of_a_fit())
def test_what_has_begun_ends_wherever_a_fit_fails(line: str) -> None:
    trace = Trace(fails=line)
    run, net, numbers = watched(trace)
    with pytest.raises(KeyError, match="mine"):
        run.fit(net, datamodule=numbers)
    refuse_unpaired(trace, line)
    # From the fault on, and only from there, the hooks know of it.
    at = trace.lines.index(line)
    assert not any(trace.failed[: at + 1])
    assert all(trace.failed[at + 1 :])
    assert run.exception is None
    if "teardown" not in line:
        assert [one for one in trace.lines if "on_exception" in one] == [
            "callback on_exception",
            "saver on_exception",
        ]
    torn = ["callback teardown fit", "module teardown fit", "saver teardown fit"]
    assert trace.lines[-4:] == [*torn, "data teardown fit"]
    # The same objects once more: as if nothing had happened.
    whole = Trace()
    fresh, net_, numbers_ = watched(whole)
    fresh.fit(net_, datamodule=numbers_)
    trace.lines.clear()
    run.fit(net, datamodule=numbers)
    assert trace.lines == whole.lines


def fails_at(line: str, **options: Any) -> list[str]:
    """What follows a fault there: the callback's lines alone."""
    trace = Trace(fails=line)
    run, net, numbers = watched(trace, **options)
    with pytest.raises(KeyError, match="mine"):
        run.fit(net, datamodule=numbers)
    after = trace.lines[trace.lines.index(line) + 1 :]
    return [one.removeprefix("callback ") for one in after if one.startswith("callback")]


ENDS = ["on_train_epoch_end", "on_train_end", "on_fit_end", "teardown fit"]


@pytest.mark.parametrize(
    "line", ["module training_step 0", "module optimizer_step b", "callback on_after_backward"]
)
def test_after_a_failed_step_callbacks_hear_of_it_before_anything_ends(line: str) -> None:
    ends = ["on_train_batch_end 0", "on_train_batch_end 1", *ENDS]
    assert fails_at(line) == ["on_exception", *ends]


def test_after_a_failed_validation_it_ends_before_callbacks_hear_of_it() -> None:
    ends = ["on_validation_batch_end 1 0", "on_validation_epoch_end", "on_validation_end"]
    line = "module validation_step 1 0"
    assert fails_at(line, num_sanity_val_steps=0) == [*ends, "on_exception", *ENDS]
    sanity = ["on_sanity_check_end", "on_fit_end", "teardown fit"]
    assert fails_at(line, num_sanity_val_steps=2) == [*ends, "on_exception", *sanity]


def test_a_loader_that_fails_ends_the_epoch_it_was_asked_in() -> None:
    class Failing:
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Any:
            yield data(4, 3)
            yield data(4, 3)
            raise OSError("disk")

    for stage, ends in {
        "train": ["on_exception", *ENDS],
        "val": ["on_validation_epoch_end", "on_validation_end", "on_exception", *ENDS],
    }.items():
        trace = Trace()
        run, net, _ = watched(trace, num_sanity_val_steps=0)
        loaders = [Failing(), None] if stage == "train" else [[data(4, 3)], Failing()]
        with pytest.raises(OSError, match="disk"):
            run.fit(net, *loaders)
        refuse_unpaired(trace)
        own = [line for line in trace.lines if line.startswith("callback")]
        assert own[-len(ends) :] == [f"callback {end}" for end in ends]


@pytest.mark.parametrize(
    ("hook", "follows"),
    [
        # Obeyed at the end of the step, in the middle of an epoch ...
        ("on_before_optimizer_step", ["on_train_batch_end 1", "on_exception", *ENDS]),
        ("on_train_batch_start", ["on_train_batch_end 1", "on_exception", *ENDS]),
        # ... or after the batch of a validation, which then is put back first.
        (
            "on_validation_batch_start",
            [
                "on_validation_batch_end 0 0",
                *["on_validation_epoch_end", "on_validation_end"],
                *["on_exception", *ENDS],
            ],
        ),
    ],
)
@pytest.mark.parametrize(
    ("signum", "kind"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_ends_the_run_between_two_steps_in_pairs(
    hook: str, follows: list[str], signum: int, kind: type[BaseException]
) -> None:
    class Asking(Callback):
        exceptions: list[Any] = []  # noqa: RUF012

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.exceptions.append(trainer.exception)

    def ask(self: Callback, trainer: Any, module: Any) -> None:
        if not trainer.interrupted:
            signal.raise_signal(signum)

    setattr(Asking, hook, ask)
    trace = Trace()
    run, net, numbers = watched(trace, num_sanity_val_steps=0)
    asking = Asking()
    run.callbacks.append(asking)
    with pytest.raises(kind) as caught:
        run.fit(net, datamodule=numbers)
    assert getattr(caught.value, "code", 143) == 143
    refuse_unpaired(trace)
    own = [line.removeprefix("callback ") for line in trace.lines if line.startswith("callback")]
    assert own[-len(follows) :] == follows
    assert asking.exceptions == [caught.value]


def test_minus_one_leaves_out_the_rest_of_an_epoch_in_pairs() -> None:
    trace = Trace()
    run, net, numbers = watched(trace, max_epochs=2, num_sanity_val_steps=0)

    class Skip(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, i: int) -> Any:
            return -1 if (trainer.current_epoch, i) == (0, 2) else None

    run.callbacks.append(Skip())
    run.fit(net, datamodule=numbers)
    refuse_unpaired(trace)
    steps = [line for line in trace.lines if "training_step" in line]
    assert steps == [f"module training_step {i}" for i in (0, 1, 0, 1, 2)]
    # What was trained of it is validated, and the next epoch is whole.
    assert trace.lines.count("module on_validation_start") == 2
    assert (run.global_step, run.current_epoch) == (3, 2)


def test_minus_one_leaves_out_the_whole_step_that_the_batch_is_part_of() -> None:
    trace = Trace()
    run, net, numbers = watched(trace, num_sanity_val_steps=0)

    class Skip(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, i: int) -> Any:
            return -1 if i == 1 else None

    run.callbacks.append(Skip())
    run.fit(net, datamodule=numbers)
    refuse_unpaired(trace)
    own = [line for line in trace.lines if line.startswith("callback on_train_batch")]
    assert own == [
        f"callback on_train_batch_{when} {i}" for when in ("start", "end") for i in (0, 1)
    ]
    assert (run.global_step, run.current_epoch) == (0, 1)


def test_an_interrupted_epoch_is_told_before_it_ends_and_only_then() -> None:
    for options, told in ({"max_steps": 1}, 1), ({"max_steps": 2}, 0), ({"max_epochs": 1}, 0):
        trace = Trace()
        run, net, numbers = watched(trace, num_sanity_val_steps=0, **options)
        run.fit(net, datamodule=numbers)
        own = [line for line in trace.lines if line.startswith("callback on_train")]
        assert own.count("callback on_train_interrupted") == told
        if told:
            assert own[-3:] == [
                "callback on_train_interrupted",
                "callback on_train_epoch_end",
                "callback on_train_end",
            ]
