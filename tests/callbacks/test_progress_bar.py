import io
import math
import re
import signal
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from composefit import Callback, Loop, LoopModule, Trainer
from composefit.callbacks import ProgressBar
from composefit.callbacks.progress_view import Row, View, rendered
from composefit.loops import FitLoop, TrainEpochLoop
from tests.callbacks.conftest import FakeTrainer as _FakeTrainer


class FakeTrainer(_FakeTrainer):
    """One whose loop has the trainer's own limits, and whose logs are empty."""

    exception: BaseException | None = None
    sanity_checking = False

    def __init__(self, **attributes: Any) -> None:
        self.logs = SimpleNamespace(bar_values=dict)
        self.train = SimpleNamespace(batch_idx=0)
        super().__init__(**attributes)

    @property
    def fit_loop(self) -> Any:
        self.train.batches = SimpleNamespace(number=self.num_training_batches)
        limits = SimpleNamespace(max_epochs=self.max_epochs, max_steps=self.max_steps, max_time=0)
        return SimpleNamespace(limits=limits, train=self.train)

    @property
    def num_evaluation_batches(self) -> list[float]:
        return [self.num_val_batches]


@pytest.fixture
def make_trainer() -> type[FakeTrainer]:
    return FakeTrainer


def fit(
    trainer: Any,
    bar: ProgressBar,
    clock: Any,
    seconds: float = 1.0,
    samples: int = 10,
    validation_seconds: float | None = None,
    fail_at: int | None = None,
) -> None:
    """The hooks of a fit, in the trainer's order; ``seconds`` a batch of ``samples``."""
    bar.setup(trainer, None, "fit")
    try:
        bar.on_fit_start(trainer, None)
        bar.on_train_start(trainer, None)
        for epoch in range(trainer.max_epochs or 1):
            trainer.current_epoch = epoch
            bar.on_train_epoch_start(trainer, None)
            for batch_idx in range(trainer.num_training_batches):
                bar.on_train_batch_start(trainer, None, None, batch_idx)
                clock.now += seconds
                trainer.global_step += 1
                if trainer.global_step == fail_at:
                    raise RuntimeError("the step failed")
                if trainer.samples_seen is not None:
                    trainer.samples_seen += samples
                trainer.train.batch_idx = batch_idx + 1
                bar.on_train_batch_end(trainer, None, None, None, batch_idx)
            if validation_seconds is not None:
                validate(trainer, bar, clock, validation_seconds)
            bar.on_train_epoch_end(trainer, None)
            trainer.current_epoch = epoch + 1
        bar.on_train_end(trainer, None)
        bar.on_fit_end(trainer, None)
    except BaseException as exception:
        bar.on_exception(trainer, None, exception)
        raise
    finally:
        bar.teardown(trainer, None, "fit")


def validate(trainer: Any, bar: ProgressBar, clock: Any, seconds: float, loaders: int = 1) -> None:
    bar.on_validation_start(trainer, None)
    for loader_idx in range(loaders):
        for batch_idx in range(trainer.num_val_batches // loaders):
            clock.now += seconds
            bar.on_validation_batch_end(trainer, None, None, None, batch_idx, loader_idx)
    bar.on_validation_end(trainer, None)


def written(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def shown(console: Console) -> str:
    """What a terminal was sent, without its control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written(console))


# -- without a terminal


def test_without_a_terminal_there_is_one_plain_line_per_epoch(make_trainer, clock, pipe):
    trainer = make_trainer(metrics=lambda: {"critic": 0.69, "generator": -12.3456})
    fit(trainer, ProgressBar(console=pipe), clock)
    assert written(pipe) == (
        "epoch 1/2  4/4  10.0 samples/s  0:04 left  critic 0.6900  generator -12.35\n"
        "epoch 2/2  4/4  10.0 samples/s  in 0:08  critic 0.6900  generator -12.35\n"
    )


def test_a_long_epoch_writes_a_line_every_ten_seconds(make_trainer, clock, pipe):
    trainer = make_trainer(max_epochs=1, num_training_batches=45)
    fit(trainer, ProgressBar(console=pipe), clock)
    counts = re.findall(r"(\d+)/45", written(pipe))
    assert counts == ["11", "21", "31", "41", "45"]  # the first batch starts the clock


def test_a_plain_line_is_not_broken_at_the_width_of_the_console(make_trainer, clock, pipe):
    metrics = {f"a_rather_long_metric_{i}": 0.5 for i in range(20)}
    fit(make_trainer(max_epochs=1, metrics=lambda: metrics), ProgressBar(console=pipe), clock)
    assert len(written(pipe).splitlines()) == 1


def test_long_validation_is_counted_over_all_loaders(make_trainer, clock, pipe):
    trainer = make_trainer(max_epochs=1, num_val_batches=6)
    bar = ProgressBar(console=pipe)
    bar.on_train_start(trainer, None)
    validate(trainer, bar, clock, seconds=10.0, loaders=2)
    assert re.findall(r"validate (\d)/6", written(pipe)) == ["1", "2", "3", "4", "5", "6"]


# -- figures


def test_speed_leaves_validation_out(make_trainer, clock, pipe):
    trainer = make_trainer(max_epochs=3)
    fit(trainer, ProgressBar(console=pipe), clock, validation_seconds=500.0)
    # ten samples a second, though nearly all of the time went into validation
    assert set(re.findall(r"([\d.,]+) samples/s", written(pipe))) == {"10.0"}


def test_speed_is_that_of_the_latest_drawings_not_of_the_start(make_trainer, clock, pipe):
    trainer = make_trainer(max_epochs=100, num_training_batches=10)
    bar = ProgressBar(console=pipe)
    bar.on_train_start(trainer, None)
    clock.now += 3600.0  # compiling
    for trainer.current_epoch in range(100):
        bar.on_train_epoch_start(trainer, None)
        clock.now += 1.0
        trainer.samples_seen += 5000
        trainer.train.batch_idx = 10
        bar.on_train_batch_end(trainer, None, None, None, 9)
        bar.on_train_epoch_end(trainer, None)
    assert "5,000 samples/s" in written(pipe).splitlines()[-1]


def test_batches_are_counted_where_samples_are_not(make_trainer, clock, pipe):
    fit(make_trainer(max_epochs=1, samples_seen=None), ProgressBar(console=pipe), clock, 0.5)
    assert "2.0 batches/s" in written(pipe)


def test_time_left_is_that_of_the_whole_fit_validation_included(make_trainer, clock, pipe):
    trainer = make_trainer(max_epochs=4)
    fit(trainer, ProgressBar(console=pipe), clock, validation_seconds=8.0)
    lines = [
        line for line in written(pipe).splitlines() if "4/4" in line and "validate" not in line
    ]
    # Batches take 4 s an epoch, validation 16 s. Since the end of the first of 16 batches at 1 s,
    # 3, 7 and 11 were done in 19, 39 and 59 s, and 12, 8 and 4 are to come.
    assert [line.split("  ")[3] for line in lines[:3]] == ["1:16 left", "0:45 left", "0:21 left"]


def test_no_time_is_left_to_tell_in_the_last_validation(make_trainer, clock, pipe):
    fit(make_trainer(), ProgressBar(console=pipe), clock, validation_seconds=20.0)
    *_, first, second, end = [line for line in written(pipe).splitlines() if "epoch 2" in line]
    assert "validate 1/2" in first and "validate 2/2" in second
    assert not any(" left" in line or " in " in line for line in (first, second))
    assert " in 1:28" in end


def test_time_left_is_that_of_the_limit_that_comes_first(make_trainer, clock, pipe):
    trainer = make_trainer(max_epochs=100, max_steps=10, num_training_batches=4)
    bar = ProgressBar(console=pipe)
    bar.on_train_start(trainer, None)
    for trainer.current_epoch in range(2):
        for batch_idx in range(4):
            clock.now += 1.0
            trainer.global_step += 1
            trainer.train.batch_idx = batch_idx + 1
            bar.on_train_batch_end(trainer, None, None, None, batch_idx)
        bar.on_train_epoch_end(trainer, None)
    assert "0:02 left" in written(pipe).splitlines()[-1]


def test_time_left_of_a_resumed_fit_counts_what_this_fit_did(make_trainer, clock, pipe):
    trainer = make_trainer(max_epochs=10, current_epoch=5)
    bar = ProgressBar(console=pipe)
    bar.on_train_start(trainer, None)
    for trainer.current_epoch in (5, 6, 7):
        bar.on_train_epoch_start(trainer, None)
        clock.now += 60.0
        trainer.train.batch_idx = 4
        bar.on_train_batch_end(trainer, None, None, None, 3)
        bar.on_train_epoch_end(trainer, None)
    # a minute an epoch, two epochs to go; five free ones would make it 0:45 or less
    assert "2:00 left" in written(pipe).splitlines()[-1]


def test_hours_are_written_as_hours(make_trainer, clock, pipe):
    fit(make_trainer(max_epochs=1), ProgressBar(console=pipe), clock, seconds=1000.0)
    fit(make_trainer(max_epochs=3), ProgressBar(console=pipe), clock, seconds=1000.0)
    assert "in 3:20:00" in written(pipe)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_epochs": None, "max_steps": 300}, "epoch 1 7/300 steps"),
        ({"max_epochs": -1, "max_steps": 300}, "epoch 1 7/300 steps"),
        ({"num_training_batches": float("inf"), "max_steps": 300}, "epoch 1/2 7/300 steps"),
        ({"num_training_batches": float("inf")}, "epoch 1/2 3"),
        ({"max_epochs": None}, "epoch 1 3/4"),
    ],
)
def test_count_is_of_what_ends_the_epoch_or_else_the_fit(
    make_trainer, clock, pipe, limits, expected
):
    trainer = make_trainer(global_step=7, samples_seen=None, **limits)
    bar = ProgressBar(console=pipe)
    bar.on_train_start(trainer, None)
    clock.now += 10.0
    bar.on_train_batch_end(trainer, None, None, None, 1)
    clock.now += 10.0
    bar.on_train_batch_end(trainer, None, None, None, 2)
    assert " ".join(written(pipe).split()).startswith(f"{expected} 0.1 batches/s")


# -- in a terminal


def test_terminal_is_drawn_at_most_every_interval_and_metrics_asked_for_only_then(
    make_trainer, clock, terminal
):
    trainer = make_trainer(max_epochs=1, num_training_batches=1000)
    fit(trainer, ProgressBar(console=terminal), clock, seconds=0.001)
    # one second: at the start, at the end, and every 0.1 s in between
    assert 10 <= trainer.metric_requests <= 12


def test_drawing_takes_at_most_a_hundredth_of_the_time(make_trainer, clock, terminal):
    def slow() -> dict[str, float]:
        clock.now += 2.0
        return {"loss": 1.0}

    trainer = make_trainer(max_epochs=1, num_training_batches=1000, metrics=slow)
    fit(trainer, ProgressBar(console=terminal), clock, seconds=1.0)
    # 1000 s of training: a drawing of 2 s each 200 s, after the first, and the one at the end
    assert trainer.metric_requests <= 8


def test_a_slow_first_drawing_does_not_hold_up_the_others(make_trainer, clock, terminal):
    def slow_once() -> dict[str, float]:
        clock.now += 0.0 if trainer.metric_requests > 1 else 2.0
        return {}

    trainer = make_trainer(num_val_batches=10, metrics=slow_once)
    validate(trainer, ProgressBar(console=terminal), clock, seconds=1.0)
    assert trainer.metric_requests == 11


def test_terminal_shows_epoch_metrics_speed_and_total_time(make_trainer, clock, terminal):
    trainer = make_trainer(metrics=lambda: {"critic": 0.69, "generator": 2.0})
    fit(trainer, ProgressBar(console=terminal), clock, samples=1000)
    bar_line, metric_line = shown(terminal).splitlines()[-2:]
    assert re.fullmatch(r"epoch 2/2  ━+  4/4   1,000 samples/s    in 0:08", bar_line.strip("\r"))
    assert metric_line.split() == ["critic", "0.6900", "generator", "2.000"]


def test_validation_has_a_bar_of_its_own_while_it_runs(make_trainer, clock, terminal):
    trainer = make_trainer(max_epochs=1)
    fit(trainer, ProgressBar(console=terminal), clock, validation_seconds=1.0)
    drawings = shown(terminal).split("epoch 1/1")
    assert ["1/2" in d for d in drawings if "validate" in d] == [True, False]
    assert "validate" not in drawings[-1]


def test_validation_without_a_fit_shows_its_bar_and_its_metrics(make_trainer, clock, terminal):
    trainer = make_trainer(metrics=lambda: {"val_loss": 0.25})
    bar = ProgressBar(console=terminal)
    validate(trainer, bar, clock, seconds=1.0)
    bar.teardown(trainer, None, "validate")
    last = " ".join(shown(terminal).split("validate")[-1].split())
    assert re.fullmatch(r"━+ 2/2 1\.0 batches/s in 0:02 val_loss 0\.2500", last)
    assert "epoch" not in shown(terminal)


@pytest.mark.parametrize("width", [30, 50, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_no_metric_is_broken(width):
    metrics = {f"metric_{'x' * (i % 7)}_{i}": -1.234e-05 * 10**i for i in range(9)}
    view = View(
        metrics,
        Row("epoch 100/100", 99_999, 100_000),
        Row("validate", 5, 1_000),
        "123,456 samples/s",
        "12:34:56 left",
    )
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(rendered(view, width))
    lines = capture.get().splitlines()
    assert all(len(line) <= width for line in lines)
    assert sum("validate" in line or "epoch" in line for line in lines) == 2
    for name, value in metrics.items():
        assert sum(f"{name} {value:#.4g}".rstrip(".") in line for line in lines) == 1


def test_a_metric_wider_than_the_terminal_is_cut_not_wrapped():
    console = Console(width=30, color_system=None)
    with console.capture() as capture:
        console.print(rendered(View({"m" * 50: 1.0}, Row("epoch 1", 1, 2)), 30))
    assert len(capture.get().splitlines()) == 2


def test_a_metric_stays_in_its_column_whatever_the_values_before_it():
    columns = set()
    for value in (0.5, -0.5, 12345.6, -1.234e-05, float("nan")):
        console = Console(width=80, color_system=None)
        with console.capture() as capture:
            console.print(rendered(View({"a": value, "b": 1.0}, Row("epoch 1", 1, 2)), 80))
        columns.add(capture.get().splitlines()[1].index("b 1.000"))
    assert len(columns) == 1


def test_brackets_in_a_metric_name_are_no_markup(make_trainer, clock, terminal):
    trainer = make_trainer(metrics=lambda: {"loss[red]": 1.0})
    fit(trainer, ProgressBar(console=terminal), clock)
    assert "loss[red] 1.000" in shown(terminal)


# -- what stays behind


@pytest.mark.parametrize("fail_at", [None, 3])
def test_nothing_is_left_behind_by_a_fit_however_it_ends(make_trainer, clock, terminal, fail_at):
    streams, threads = (sys.stdout, sys.stderr), threading.enumerate()
    trainer = make_trainer()
    bar = ProgressBar(console=terminal)
    during: list[Any] = []
    trainer.metrics = lambda: during.append(threading.enumerate()) or {}
    if fail_at is None:
        fit(trainer, bar, clock)
    else:
        with pytest.raises(RuntimeError, match="the step failed"):
            fit(trainer, bar, clock, fail_at=fail_at)
    assert during
    assert all(threads == seen for seen in during)
    assert (sys.stdout, sys.stderr) == streams
    assert written(terminal).count("\x1b[?25l") == written(terminal).count("\x1b[?25h") == 1


def test_metrics_are_not_asked_for_after_an_exception(make_trainer, clock, terminal):
    trainer = make_trainer()
    bar = ProgressBar(console=terminal)
    bar.on_train_start(trainer, None)
    asked = trainer.metric_requests
    bar.on_exception(trainer, None, RuntimeError())
    bar.teardown(trainer, None, "fit")
    assert trainer.metric_requests == asked


def test_a_second_fit_gets_a_fresh_bar(make_trainer, clock, terminal):
    bar = ProgressBar(console=terminal)
    with pytest.raises(RuntimeError, match="the step failed"):
        fit(make_trainer(), bar, clock, seconds=7.0, fail_at=6)
    before = len(written(terminal))
    fit(make_trainer(), bar, clock, validation_seconds=1.0)
    second = written(terminal)[before:]
    fit(make_trainer(), ProgressBar(console=terminal), clock, validation_seconds=1.0)
    assert written(terminal)[before + len(second) :] == second


def test_other_ranks_show_nothing(make_trainer, clock, terminal):
    trainer = make_trainer(is_global_zero=False)
    fit(trainer, ProgressBar(console=terminal), clock, seconds=20.0, validation_seconds=20.0)
    assert written(terminal) == ""
    assert trainer.metric_requests == 0


@pytest.mark.parametrize("name", ["interval", "line_interval"])
def test_an_interval_that_is_not_positive_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0.*positive number of seconds"):
        ProgressBar(**{name: 0})


# -- in a real run


class GAN(LoopModule):
    """Two optimizers; what `log_as` names is logged, to be shown."""

    def __init__(self, log_as: str = "") -> None:
        super().__init__()
        self.generator, self.critic, self.log_as = nn.Linear(2, 2), nn.Linear(2, 1), log_as

    def configure_optimizers(self) -> Any:
        return {
            name: torch.optim.SGD(part.parameters(), lr=0.1)
            for name, part in (("critic", self.critic), ("generator", self.generator))
        }

    def training_step(self, real: torch.Tensor) -> Any:
        fake = self.generator(real)
        yield {"critic": (self.critic(fake) - self.critic(real)).mean()}
        if self.log_as:
            self.log(self.log_as, 7.0, prog_bar=True)
        if self.global_step % 2 == 0:
            yield {"generator": self.critic(fake).square().mean() + 100.0}

    def validation_step(self, real: torch.Tensor) -> None:
        self.log("score", self.critic(real).mean(), prog_bar=True)

    def test_step(self, real: torch.Tensor) -> None:
        self.validation_step(real)

    def predict_step(self, real: torch.Tensor) -> torch.Tensor:
        return real


BATCHES = [torch.ones(4, 2), torch.ones(4, 2), torch.ones(3, 2)]


class Raising(Callback):
    """Raises at one of its hooks."""

    def __init__(self, hook: str, error: BaseException) -> None:
        def fail(*_: Any) -> None:
            raise error

        setattr(self, hook, fail)


def make(bar: ProgressBar, *callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(
        callbacks=[bar, *callbacks],
        logger=False,
        enable_model_summary=False,
        **{"strategy": "single", "max_epochs": 2, "seed": 0, **settings},
    )


@pytest.fixture
def always_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes."""
    monkeypatch.setattr("composefit.callbacks.progress_bar._DRAWING_SHARE", math.inf)


def drawings(console: Console) -> list[list[str]]:
    """The lines of each drawing of a terminal."""
    views = re.split(r"\r\x1b\[2K(?:\x1b\[1A\x1b\[2K)*|\x1b\[\?25l", written(console))
    plain = (re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", view) for view in views)
    return [[line.rstrip() for line in view.splitlines() if line.strip()] for view in plain]


def test_losses_of_both_optimizers_are_shown_without_being_logged(terminal):
    make(ProgressBar(1e-9, console=terminal)).fit(GAN(), BATCHES, BATCHES)
    line = drawings(terminal)[-1][-1]
    assert re.search(r"critic -?\d.* generator 10\d\.\d +score -?\d", line)


def test_a_logged_metric_takes_the_place_of_the_loss_that_it_is_named_after(pipe):
    make(ProgressBar(console=pipe)).fit(GAN("train/critic_loss"), BATCHES)
    for line in written(pipe).splitlines():
        assert re.search(r"samples/s .* generator 10\d\.\d  train/critic_loss 7\.000$", line)
        assert "  critic " not in line


def test_a_resumed_epoch_begins_where_it_was_left(always_drawn, tmp_path, terminal, pipe):
    make(ProgressBar(console=pipe), max_steps=2, default_root_dir=tmp_path).fit(GAN(), BATCHES)
    bar = ProgressBar(1e-9, console=terminal)
    make(bar, default_root_dir=tmp_path).fit(GAN(), BATCHES, ckpt_path="last")
    first, second = drawings(terminal)[1:3]
    assert re.match(r"epoch 1/2 +━*╸?╺?━+ +2/3", first[0])
    assert re.match(r"epoch 1/2 +━+ +3/3", second[0])


def test_the_sanity_check_has_a_bar_whose_place_the_epoch_takes(always_drawn, terminal):
    make(ProgressBar(1e-9, console=terminal), max_epochs=1).fit(GAN(), BATCHES, BATCHES)
    labels = [view[0].split("  ")[0] for view in drawings(terminal) if view]
    assert labels[:4] == ["sanity check", "sanity check", "epoch 1/1", "epoch 1/1"]
    assert written(terminal).count("\x1b[?25l") == 1  # one display for all


def test_the_sanity_check_writes_no_line(pipe):
    make(ProgressBar(console=pipe), max_epochs=1).fit(GAN(), BATCHES, BATCHES)
    assert [line.split("  ")[0] for line in written(pipe).splitlines()] == ["epoch 1/1"]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_every_evaluation_has_a_bar_that_counts_all_loaders(always_drawn, stage, terminal, pipe):
    for console in (terminal, pipe):
        trainer = make(ProgressBar(1e-9, console=console))
        getattr(trainer, stage)(GAN(), {"a": BATCHES, "b": BATCHES[:2]})
    assert [view[0].split()[2] for view in drawings(terminal) if view] == [
        *(f"{done}/5" for done in (1, 2, 3, 4, 5, 5, 5))
    ]
    (line,) = written(pipe).splitlines()
    assert line.startswith(f"{stage}  5/5  ") and "  in 0:00" in line
    assert ("score/0 " in line and "score/1 " in line) is (stage != "predict")


def test_limits_and_lengths_are_those_of_the_loop_that_runs(pipe):
    loop = FitLoop(TrainEpochLoop(BATCHES), max_epochs=2)
    make(ProgressBar(console=pipe), max_epochs=1000).run(loop, GAN())
    labels = [line.split("  ")[:2] for line in written(pipe).splitlines()]
    assert labels == [["epoch 1/2", "3/3"], ["epoch 2/2", "3/3"]]


class OwnLoop(Loop):
    """Five steps, with the hooks of training and no epochs."""

    def run(self, trainer: Trainer, module: LoopModule) -> None:
        with trainer.call.span("on_train_start", "on_train_end"):
            for i in range(5):
                with trainer.call.batch_span("train", [BATCHES[0]], i) as span:
                    span.outputs = trainer.step(module, [BATCHES[0]], i)


@pytest.mark.parametrize(("limits", "count"), [({}, "5 steps"), ({"max_steps": 5}, "5/5 steps")])
def test_a_loop_without_epochs_shows_its_steps(terminal, limits, count):
    make(ProgressBar(1e-9, console=terminal), **limits).run(OwnLoop(), GAN())
    bar_line, metrics = drawings(terminal)[-1]
    assert bar_line.startswith("train ") and f" {count} " in bar_line
    assert metrics.split()[0] == "critic"


HOOKS = [
    "on_train_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_after_optimizer_step",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "teardown",
]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("hook", HOOKS)
def test_an_error_anywhere_leaves_the_terminal_as_it_was(terminal, hook, error):
    if hook == "teardown" and isinstance(error, KeyboardInterrupt):
        pytest.skip("the run is over")
    streams, threads = (sys.stdout, sys.stderr), threading.enumerate()
    bar = ProgressBar(1e-9, console=terminal)
    trainer = make(bar, Raising(hook, error), enable_checkpointing=False)
    with pytest.raises(type(error)):
        trainer.fit(GAN(), BATCHES, BATCHES)
    assert (sys.stdout, sys.stderr) == streams and threading.enumerate() == threads
    assert written(terminal).count("\x1b[?25l") == written(terminal).count("\x1b[?25h")
    before = len(written(terminal))
    trainer = make(bar, enable_checkpointing=False)  # and the next run is shown as ever
    trainer.fit(GAN(), BATCHES, BATCHES)
    assert "sanity check" in written(terminal)[before:]


def test_a_training_that_is_stopped_shows_where(terminal):
    # Where the tests run in the background, it is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any) -> None:
            if trainer.global_step == 2:
                signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            make(ProgressBar(1e9, console=terminal), Stop()).fit(GAN(), BATCHES)
    finally:
        signal.signal(signal.SIGINT, before)
    bar_line, _ = drawings(terminal)[-1]
    assert re.match(r"epoch 1/2 +━*╸?╺?━+ +2/3", bar_line)


@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_test_batch_end"])
def test_a_failed_evaluation_does_not_look_finished(pipe, hook):
    trainer = make(ProgressBar(console=pipe), Raising(hook, RuntimeError("no")))
    stage = "test" if "test" in hook else "validate"
    with pytest.raises(RuntimeError, match="no"):
        getattr(trainer, stage)(GAN(), BATCHES)
    assert written(pipe) == ""


class Gone(io.StringIO):
    """A terminal that is closed after a while."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.after -= 1
        if self.after < 0:
            raise OSError(5, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("kind", [{"force_terminal": True}, {"force_terminal": False}], ids=str)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_terminal_that_goes_away_does_not_end_the_training(kind, after):
    streams = sys.stdout, sys.stderr
    console = Console(file=Gone(after), width=80, _environ={"TERM": "xterm"}, **kind)
    trainer = make(ProgressBar(1e-9, 1e-9, console=console))
    with pytest.warns(UserWarning, match="progress bar cannot be shown.*Input/output error"):
        trainer.fit(GAN(), BATCHES, BATCHES)
    assert trainer.global_step == 6
    assert (sys.stdout, sys.stderr) == streams


def test_there_is_room_for_what_ctrl_c_echoes(terminal):
    make(ProgressBar(1e-9, console=terminal)).fit(GAN(), BATCHES, BATCHES)
    assert max(len(line) for view in drawings(terminal) for line in view) <= 78
