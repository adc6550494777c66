"""What surrounds a run: nothing of it is left afterwards, however it ended."""

import gc
import signal
import threading
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from composefit import Callback, DataModule, LoopModule, SingleDevice, ThreadDataParallel, Trainer
from composefit.loggers import CSVLogger, Logger
from composefit.profilers import Profiler, SimpleProfiler
from tests.lockstep.steps import data, linear, same, trainer

BATCHES = [data(6, 3, seed=i) for i in range(3)]

PLACES = [
    *["prepare_data", "setup", "configure_model", "train_dataloader", "val_dataloader"],
    *["configure_optimizers", "on_fit_start", "on_sanity_check_start", "on_train_start"],
    *["fetch", "training_step", "backward", "optimizer_step", "lr_scheduler_step"],
    *["validation_step", "on_validation_epoch_end", "on_train_epoch_end", "on_fit_end"],
    *["log_metrics", "teardown", "finalize"],
]


class Fault:
    """Raises at one place, once."""

    def __init__(self, place: str, error: type[BaseException] = KeyError) -> None:
        self.place = place
        self.error = error

    def at(self, place: str) -> None:
        if place == self.place:
            self.place = ""
            raise self.error("mine")


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: Fault) -> Tensor:
        ctx.fault = fault
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.fault.at("backward")
        return grads[0], None


class Net(LoopModule):
    """Fails where it is told to."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.fault = fault
        self.net = nn.Sequential(linear(3, 3), nn.Dropout(0.5))

    def prepare_data(self) -> None:
        self.fault.at("prepare_data")

    def configure_model(self) -> None:
        self.fault.at("configure_model")

    def configure_optimizers(self) -> Any:
        self.fault.at("configure_optimizers")
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def training_step(self, x: Tensor) -> Tensor:
        self.fault.at("training_step")
        loss: Tensor = _Backward.apply(self.net(x), self.fault).square().mean()
        self.log("loss", loss)
        return loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:  # type: ignore[override]
        self.fault.at("optimizer_step")
        optimizer.step(closure)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.fault.at("lr_scheduler_step")
        scheduler.step()

    def validation_step(self, x: Tensor) -> None:
        self.fault.at("validation_step")
        self.log("val", self.net(x).mean())

    def test_step(self, x: Tensor) -> None:
        self.fault.at("test_step")

    def predict_step(self, x: Tensor) -> Any:
        self.fault.at("predict_step")
        return self.net(x)


class Failing(Callback):
    """Fails in the hook it is told to."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault


def _hook(name: str) -> Any:
    return lambda self, trainer, module: self.fault.at(name)


for _name in PLACES:
    if _name.startswith("on_") or _name in ("setup", "teardown"):
        setattr(Failing, _name, _hook(_name))


class Rows(DataModule):
    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def train_dataloader(self) -> Any:
        self.fault.at("train_dataloader")
        return self

    def val_dataloader(self) -> Any:
        self.fault.at("val_dataloader")
        return BATCHES[:1]

    def __len__(self) -> int:
        return len(BATCHES)

    def __iter__(self) -> Any:
        yield BATCHES[0]
        self.fault.at("fetch")
        yield from BATCHES[1:]


class Writing(Logger):
    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.ends: list[str] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.fault.at("log_metrics")

    def finalize(self, status: str) -> None:
        self.ends.append(status)
        self.fault.at("finalize")


def around() -> dict[str, Any]:
    """What a run could leave behind in its process."""
    return {
        "threads": set(threading.enumerate()),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "torch threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def runner(fault: Fault, threads: bool) -> tuple[Any, Writing]:
    run = trainer(
        ThreadDataParallel(2) if threads else SingleDevice("cpu"),
        callbacks=Failing(fault),
        max_epochs=2,
        num_sanity_val_steps=1,
        log_every_n_steps=1,
        deterministic=True,
    )
    writing = Writing(fault)
    run.loggers = [writing]
    return run, writing


@pytest.mark.parametrize("threads", [False, True], ids=["one device", "threads"])
@pytest.mark.parametrize("place", PLACES)
def test_after_a_fault_anywhere_nothing_is_left_and_a_fit_is_as_with_a_new_trainer(
    place: str, threads: bool
) -> None:
    before = around()
    fault = Fault(place)
    net, other = Net(fault), Net(Fault(""))
    run, writing = runner(fault, threads)
    with pytest.raises(KeyError, match="mine"):
        run.fit(net, datamodule=Rows(fault))
    assert around() == before
    assert (run.stage, run.run_in_progress, run.exception) == (None, None, None)
    assert not run.sanity_checking
    assert all(p.grad is None for p in net.parameters())
    assert len(writing.ends) == 1
    assert writing.ends == ["finished" if place in ("teardown", "finalize") else "failed"]

    other.load_state_dict(net.state_dict())
    run.fit(net, datamodule=Rows(fault))
    fresh, _ = runner(Fault(""), threads)
    fresh.fit(other, datamodule=Rows(Fault("")))
    assert same(net, other)
    assert run.global_step == fresh.global_step == 6
    assert {k: v.item() for k, v in run.callback_metrics.items()} == {
        k: v.item() for k, v in fresh.callback_metrics.items()
    }
    assert around() == before


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("threads", [False, True], ids=["one device", "threads"])
def test_after_a_failed_evaluation_too(stage: str, threads: bool) -> None:
    before = around()
    fault = Fault({"validate": "validation_step"}.get(stage, f"{stage}_step"))
    net = Net(fault)
    modes = [part.training for part in net.modules()]
    run, writing = runner(fault, threads)
    with pytest.raises(KeyError, match="mine"):
        getattr(run, stage)(net, BATCHES)
    assert around() == before
    assert [part.training for part in net.modules()] == modes
    assert (run.stage, writing.ends) == (None, ["failed"])
    getattr(run, stage)(net, BATCHES)
    assert writing.ends == ["failed", "finished"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_no_exception_ends_a_run_the_same_way(error: type[BaseException]) -> None:
    before = around()
    fault = Fault("training_step", error)
    run, writing = runner(fault, threads=False)
    with pytest.raises(error):
        run.fit(Net(fault), datamodule=Rows(fault))
    assert around() == before
    assert writing.ends == ["failed"]


def test_the_trainer_does_not_keep_a_failed_steps_tensors_alive() -> None:
    class Big:
        pass

    kept: list[Any] = []

    class Own(Net):
        def training_step(self, x: Tensor) -> Tensor:
            big = Big()
            kept.append(weakref.ref(big))
            raise KeyError("mine")

    run = trainer()
    with pytest.raises(KeyError, match="mine"):
        run.fit(Own(Fault("")), BATCHES)
    gc.collect()
    assert kept[0]() is None


def test_what_is_torn_down_in_which_order_and_with_whom() -> None:
    order: list[str] = []

    class Told(Callback):
        def teardown(self, trainer: Any, module: Any, stage: str) -> None:
            order.append(f"callback {stage}, {trainer.stage}")

    class Own(Net):
        def teardown(self, stage: str) -> None:
            order.append(f"module {stage}")

    class Data(Rows):
        def teardown(self, stage: str) -> None:
            order.append(f"data {stage}")

    class Ending(Writing):
        def finalize(self, status: str) -> None:
            order.append(f"logger {status}")

    run = trainer(callbacks=Told())
    run.loggers = [Ending(Fault(""))]
    run.fit(Own(Fault("")), datamodule=Data(Fault("")))
    assert order == ["callback fit, fit", "module fit", "data fit", "logger finished"]


# -- profilers -----------------------------------------------------------------------------------


class Noting(Profiler):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def start(self) -> None:
        self.told.append("start")

    def stop(self) -> None:
        self.told.append("stop")

    def step(self) -> None:
        self.told.append("step")

    def span(self, name: str) -> Any:
        self.told.append(name)
        return nullcontext()

    def summary(self) -> str:
        return "the summary"


def test_a_profiler_is_told_of_the_parts_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    mine = Noting()
    run = trainer(profiler=mine)
    run.fit(Net(Fault("")), BATCHES[:2], BATCHES[:1])
    fetched = ["fetch", "step", "step"]
    assert mine.told == ["start", *fetched, *fetched, "fetch", "validation", "stop"]
    assert capsys.readouterr().out.strip() == "the summary"


@pytest.mark.parametrize(
    ("kind", "says"),
    [("simple", "validation"), ("advanced", "-- validation"), ("pytorch", "aten::addmm")],
)
def test_each_profiler_by_name_prints_where_the_time_went(
    kind: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = trainer(profiler=kind, default_root_dir=tmp_path / "root", max_epochs=2)
    run.fit(Net(Fault("")), BATCHES, BATCHES[:1])
    assert says in capsys.readouterr().out
    traces = [path.relative_to(tmp_path / "root") for path in tmp_path.rglob("*.json")]
    assert len(traces) == (kind == "pytorch")


def test_a_failed_run_is_profiled_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    fault = Fault("training_step")
    run = trainer(profiler=SimpleProfiler())
    with pytest.raises(KeyError, match="mine"):
        run.fit(Net(fault), BATCHES)
    assert "fetch" in capsys.readouterr().out
    run.fit(Net(fault), BATCHES)


# -- where files go, and what comes along --------------------------------------------------------


def test_files_go_into_the_root_folder_and_only_there(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    run = Trainer(strategy="single", max_epochs=1, default_root_dir=root, log_every_n_steps=1)
    run.fit(Net(Fault("")), BATCHES)
    run.report()
    top = {path.name for path in tmp_path.iterdir()}
    assert top == {"a"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"b"}
    assert (root / "report.html").exists()
    assert list(root.rglob("last.ckpt"))
    assert list(root.rglob("*.csv"))


def test_what_is_switched_off_does_not_come_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(default_root_dir=tmp_path / "root")
    run.fit(Net(Fault("")), BATCHES, BATCHES)
    assert run.callbacks == []
    assert run.loggers == []
    assert list(tmp_path.iterdir()) == []
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


# -- a second fit --------------------------------------------------------------------------------


def test_a_second_fit_starts_afresh_and_keeps_only_what_callbacks_keep(tmp_path: Path) -> None:
    class Counting(Callback):
        """Decides itself: one count is of this fit, the other of all."""

        def __init__(self) -> None:
            self.steps = self.all_steps = 0
            self.known: list[set[str]] = []

        def on_fit_start(self, trainer: Any, module: Any) -> None:
            self.steps = 0
            self.known.append(set(trainer.callback_metrics) | set(trainer.progress_bar_metrics))
            assert (trainer.global_step, trainer.current_epoch) == (0, 0)
            assert trainer.updates == {"optimizer": 0}
            assert not trainer.should_stop
            assert trainer.samples_seen == 0

        def on_train_batch_end(self, trainer: Any, module: Any) -> None:  # type: ignore[override]
            self.steps += 1
            self.all_steps += 1

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.should_stop = True

    counting = Counting()
    run = trainer(callbacks=counting, max_epochs=3)
    run.loggers = [CSVLogger(tmp_path)]
    net = Net(Fault(""))
    for _ in range(2):
        run.fit(net, BATCHES, BATCHES)
    assert (counting.steps, counting.all_steps) == (3, 6)
    assert counting.known == [set(), set()]
    assert (run.global_step, run.current_epoch) == (3, 1)
    assert run.optimizers["optimizer"].optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_another_module_starts_afresh_and_the_first_one_can_go_on(tmp_path: Path) -> None:
    first, second, alone = Net(Fault("")), Net(Fault("")), Net(Fault(""))
    run = trainer(max_epochs=2)
    run.fit(first, BATCHES)
    run.save_checkpoint(tmp_path / "first.ckpt")
    run.fit(second, BATCHES)
    assert same(first, second)  # the same seed, the same draws
    run = trainer(max_epochs=4)
    run.fit(first, BATCHES, ckpt_path=tmp_path / "first.ckpt")
    trainer(max_epochs=4).fit(alone, BATCHES)
    assert same(first, alone)
    assert (run.global_step, run.current_epoch) == (12, 4)


@pytest.mark.parametrize("training", [True, False])
def test_modes_after_a_fit_are_those_of_training_with_frozen_parts_as_they_were(
    training: bool,
) -> None:
    net = Net(Fault(""))
    net.net.append(nn.Dropout(0.5).eval())
    if not training:
        net.eval()  # asks for all of it: a fit turns all of it back
    trainer().fit(net, BATCHES, BATCHES)
    assert net.training
    assert net.net[1].training
    assert net.net[2].training is (not training)
