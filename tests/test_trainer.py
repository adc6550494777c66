"""The trainer as a whole: what its arguments do, from `fit` to the weights and files."""

import csv
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from composefit import (
    Callback,
    DataModule,
    LoopModule,
    Mean,
    OptimizerConfig,
    SingleDevice,
    Strategy,
    ThreadDataParallel,
    Trainer,
    Update,
)
from composefit.callbacks import ModelCheckpoint, ModelSummary, ProgressBar
from composefit.images import Image
from composefit.loggers import CSVLogger, Logger, TensorBoardLogger
from tests.faults.fault import two
from tests.lockstep.steps import (
    STRATEGIES,
    data,
    every_strategy,
    linear,
    module,
    same,
    several_shards,
    trainer,
    weights,
)

Make = Callable[[], Strategy]


def squares(self: Any, x: Tensor) -> Tensor:
    return self.net(x).square().mean()


def gan(self: Any, x: Tensor) -> Any:
    yield {"a": self.a(x).square().mean()}
    yield {"b": self.b(x).square().mean()}


def net_with(
    configure: Callable[..., Any], step: Callable[..., Any] = squares, **parts: Any
) -> Any:
    """A module with this step and `configure_optimizers`."""
    net = module(step, **parts)
    type(net).configure_optimizers = configure
    return net


BATCHES = [data(4, 3, seed=i) for i in range(6)]


# -- configure_optimizers, end to end ------------------------------------------------------------


def sgd(net: nn.Module) -> SGD:
    return SGD(net.parameters(), lr=0.1)


def halved(optimizer: SGD) -> lr_scheduler.StepLR:
    return lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def one(form: str) -> Callable[[Any], Any]:
    def configure(self: Any) -> Any:
        optimizer = sgd(self.net)
        return {
            "optimizer": optimizer,
            "list": [optimizer],
            "dict": {"net": optimizer},
            "pair": (optimizer, halved(optimizer)),
            "two lists": ([optimizer], [halved(optimizer)]),
            "lightning": {"optimizer": optimizer, "lr_scheduler": halved(optimizer)},
            "config": OptimizerConfig(optimizer, halved(optimizer)),
            "steps": OptimizerConfig(optimizer, halved(optimizer), interval="step", frequency=2),
        }[form]

    return configure


@pytest.mark.parametrize(
    ("form", "rates"),
    [
        ("optimizer", [0.1] * 6),
        ("list", [0.1] * 6),
        ("dict", [0.1] * 6),
        ("pair", [0.1] * 3 + [0.05] * 3),
        ("two lists", [0.1] * 3 + [0.05] * 3),
        ("lightning", [0.1] * 3 + [0.05] * 3),
        ("config", [0.1] * 3 + [0.05] * 3),
        ("steps", [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]),
    ],
)
def test_every_form_trains_as_the_plain_loop(form: str, rates: list[float]) -> None:
    net, other = net_with(one(form)), module(squares)
    batches = BATCHES[:3]
    trainer(max_epochs=2).fit(net, batches)
    for rate, batch in zip(rates, batches * 2, strict=True):
        other.zero_grad()
        squares(other, batch).backward()
        SGD(other.parameters(), lr=rate).step()
    assert same(net, other)


@every_strategy
def test_a_schedulers_steps_are_its_own_optimizers_updates(strategy: Make) -> None:
    def configure(self: Any) -> Any:
        a, b = sgd(self.a), sgd(self.b)
        return {
            "a": OptimizerConfig(a, halved(a), interval="step"),
            "b": OptimizerConfig(b, halved(b), interval="step"),
        }

    def step(self: Any, x: Tensor) -> Any:
        for _ in range(2):
            yield {"a": self.a(x).square().mean()}
        if self.global_step % 3 == 0:  # in the others b is not updated
            yield {"b": self.b(x).square().mean()}

    net = net_with(configure, step, **two())
    run = trainer(strategy())
    run.fit(net, BATCHES)
    assert run.updates == {"a": 12, "b": 2}
    rates = [run.optimizers[name].optimizer.param_groups[0]["lr"] for name in "ab"]
    assert rates == [0.1 * 0.5**12, 0.1 * 0.5**2]


def test_updates_that_are_skipped_do_not_step_schedulers() -> None:
    def configure(self: Any) -> Any:
        optimizer = sgd(self.net)
        return OptimizerConfig(optimizer, halved(optimizer), interval="step")

    net = net_with(configure, lambda self, x: self.net(x).sum() / (self.global_step != 1))
    run = trainer(on_nonfinite="skip")
    run.fit(net, BATCHES[:3])
    assert run.updates == {"optimizer": 2}
    assert run.optimizers["optimizer"].optimizer.param_groups[0]["lr"] == 0.025


def test_epochs_and_frequency() -> None:
    def configure(self: Any) -> Any:
        optimizer = sgd(self.net)
        return OptimizerConfig(optimizer, halved(optimizer), frequency=2)

    seen: list[float] = []

    class Rates(Callback):
        saves_state = True  # after the schedulers

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            seen.append(trainer.optimizers["optimizer"].optimizer.param_groups[0]["lr"])

    trainer(max_epochs=5, callbacks=Rates()).fit(net_with(configure), BATCHES[:2])
    assert seen == [0.1, 0.05, 0.05, 0.025, 0.025]


def plateau(monitor: str, interval: Any = "epoch") -> Callable[[Any], Any]:
    def configure(self: Any) -> Any:
        optimizer = sgd(self.net)
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return OptimizerConfig(optimizer, scheduler, interval=interval, monitor=monitor)

    return configure


@every_strategy
def test_plateaus_are_those_of_this_epochs_validation(strategy: Make) -> None:
    values = iter([5.0, 4.0, 4.5, 3.0, 3.5, 3.6])
    net = net_with(plateau("val_loss"))
    type(net).on_validation_epoch_start = lambda self: setattr(self, "value", next(values))
    type(net).validation_step = lambda self, x: self.log("val_loss", self.value)
    rates: list[float] = []

    class Rates(Callback):
        saves_state = True  # a scheduler that looks at a value steps before these

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            rates.append(trainer.optimizers["optimizer"].optimizer.param_groups[0]["lr"])

    trainer(strategy(), max_epochs=6, callbacks=Rates()).fit(net, BATCHES[:1], BATCHES[:1])
    assert rates == [0.1, 0.1, 0.05, 0.05, 0.025, 0.0125]


@every_strategy
def test_a_monitor_per_update_sees_what_its_own_step_logs(strategy: Make) -> None:
    values = [5.0, 6.0, 4.0, 7.0]

    def step(self: Any, x: Tensor) -> Tensor:
        loss = squares(self, x)
        self.log("loss", values[self.global_step])
        return loss

    net = net_with(plateau("loss", "step"), step)
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer: Any) -> None:  # type: ignore[override]
            rates.append(trainer.optimizers["optimizer"].optimizer.param_groups[0]["lr"])

    trainer(strategy(), callbacks=Rates()).fit(net, BATCHES[:4])
    assert rates == [0.1, 0.05, 0.05, 0.025]


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_monitor_that_is_never_logged_lists_what_is(interval: str) -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        self.log_dict({"train_loss": 1.0, "accuracy": 0.5})
        return squares(self, x)

    words = r"'optimizer' monitors 'val_loss', which was never logged.*\['accuracy', 'train_loss'\]"
    with pytest.raises(ValueError, match=words):
        trainer().fit(net_with(plateau("val_loss", interval), step), BATCHES[:2])


# -- clipping ------------------------------------------------------------------------------------


@every_strategy
def test_an_optimizers_clipping_overrides_the_trainers(strategy: Make) -> None:
    def configure(self: Any) -> Any:
        own = {
            "norm": {"gradient_clip_val": 0.02},
            "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
            "off": {"gradient_clip_val": math.inf},
            "trainers": {},
            "algorithm": {"gradient_clip_algorithm": "value"},
        }
        return {
            name: OptimizerConfig(sgd(child), **own[name]) for name, child in self.named_children()
        }

    def step(self: Any, x: Tensor) -> Any:
        for name, child in self.named_children():
            yield {name: child(x).square().mean()}

    names = ["norm", "value", "off", "trainers", "algorithm"]

    def parts() -> dict[str, nn.Module]:
        return {name: linear(3, 2, seed=i) for i, name in enumerate(names)}

    net, other = net_with(configure, step, **parts()), nn.ModuleDict(parts())
    run = trainer(strategy(), gradient_clip_val=0.05)
    run.fit(net, BATCHES)
    assert run.optimizers["off"].gradient_clip_val is None  # not even measured
    for batch in BATCHES:
        for name, child in other.items():
            child.zero_grad()
            child(batch).square().mean().backward()
            gradients = [p.grad for p in child.parameters()]
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            for g in gradients:  # written out, so that torch's own functions are checked too
                if name in ("norm", "trainers"):
                    g *= min(1.0, {"norm": 0.02, "trainers": 0.05}[name] / (norm + 1e-6))
                elif name in ("value", "algorithm"):
                    limit = {"value": 0.01, "algorithm": 0.05}[name]
                    g[g > limit], g[g < -limit] = limit, -limit
            sgd(child).step()
    theirs = dict(other.named_parameters())
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-11, atol=1e-13)
    moved = {name: child.weight - parts()[name].weight for name, child in other.items()}
    assert all(move.abs().max() > 1e-3 for move in moved.values())


# -- modes ---------------------------------------------------------------------------------------


def test_parts_in_evaluation_mode_stay_in_it() -> None:
    """A frozen teacher is not trained with dropout behind the user's back, as in Lightning."""
    seen: list[tuple[bool, bool]] = []

    def step(self: Any, x: Tensor) -> Tensor:
        seen.append((self.net.training, self.teacher.training))
        return squares(self, x)

    net = module(step, net=linear(3, 1), teacher=nn.Dropout().eval())
    trainer().fit(net, BATCHES[:1])
    net.eval()  # as a whole: then it is meant to train all the same
    trainer().fit(net, BATCHES[:1])
    assert seen == [(True, False), (True, True)]


# -- where samples are ---------------------------------------------------------------------------


def summed(self: Any, x: Tensor) -> Tensor:
    return self.net(x).square().mean()


def reference(batches: list[Tensor]) -> nn.Module:
    """The plain loop on whole batches."""
    other = module(squares)
    for batch in batches:
        other.zero_grad()
        squares(other, batch).backward()
        sgd(other).step()
    return other


def assert_close(net: nn.Module, other: nn.Module) -> None:
    theirs = other.state_dict()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-11, atol=1e-13)


@every_strategy
@pytest.mark.parametrize("how", [{}, {"accumulate_grad_batches": 2}, {"microbatch_size": 2}])
def test_samples_may_be_in_another_dimension(strategy: Make, how: dict[str, Any]) -> None:
    sizes: list[torch.Size] = []

    def step(self: Any, x: Tensor) -> Tensor:
        sizes.append(x.shape)
        return squares(self, x)

    net = module(step)
    net.batch_dim = 1
    batches = [data(4, 5, 3, seed=i) for i in range(4)]
    trainer(strategy(), **how).fit(net, batches)
    window = how.get("accumulate_grad_batches", 1)
    joined = [torch.cat(batches[i : i + window], dim=1) for i in range(0, 4, window)]
    assert_close(net, reference(joined))
    assert {size[0] for size in sizes} == {4}
    assert sum(size[1] for size in sizes) == 20


@several_shards
def test_shards_are_cut_at_multiples_of_a_group(strategy: Make) -> None:
    sizes: list[int] = []

    def step(self: Any, x: Tensor) -> Tensor:
        sizes.append(len(x))
        pairs = self.net(x).unflatten(0, (-1, 2))  # two samples belong together
        return (pairs[:, 0] - pairs[:, 1]).square().mean()

    net, other = module(step), module(step)
    net.samples_per_group = 2
    batches = [data(10, 3, seed=i) for i in range(3)]
    trainer(strategy()).fit(net, batches)
    assert all(size % 2 == 0 for size in sizes) and len(sizes) == 9
    trainer().fit(other, batches)
    assert_close(net, other)


@several_shards
def test_a_module_may_count_and_cut_its_own_batches(strategy: Make) -> None:
    """A batch that torch knows nothing of: sentences of any length, cut by sentence."""
    cuts: list[int] = []

    class Own(LoopModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = linear(3, 2)

        def configure_optimizers(self) -> Any:
            return sgd(self.net)

        def batch_size(self, batch: Any) -> int:
            return len(batch["sentences"])

        def scatter_batch(self, batch: Any, n: int) -> list[Any]:
            cuts.append(n)
            rows = batch["sentences"]
            return [{"sentences": rows[i::n]} for i in range(min(n, len(rows)))]

        def training_step(self, batch: Any) -> Tensor:
            means = torch.stack([self.net(row).square().mean() for row in batch["sentences"]])
            return means.mean()

    batches = [{"sentences": [data(n, 3, seed=n + i) for n in (1, 4, 2, 3, 5)]} for i in range(3)]
    net, other = Own(), Own()
    trainer(strategy()).fit(net, batches)
    trainer().fit(other, batches)
    assert cuts == [3, 3, 3]
    assert_close(net, other)
    assert not same(net, Own())


@every_strategy
def test_several_loaders_are_cut_each_by_itself(strategy: Make) -> None:
    sizes: list[tuple[int, int]] = []

    def step(self: Any, batch: Any) -> Tensor:
        a, b = batch["labelled"], batch["unlabelled"]
        sizes.append((len(a), len(b)))
        return squares(self, a) + 0 * self.net(b).sum()

    net = module(step)
    labelled = [data(7, 3, seed=i) for i in range(3)]
    unlabelled = DataLoader(TensorDataset(data(36, 3)), batch_size=12, collate_fn=_rows)
    trainer(strategy()).fit(net, {"labelled": labelled, "unlabelled": unlabelled})
    assert sum(a for a, _ in sizes) == 21 and sum(b for _, b in sizes) == 36
    assert_close(net, reference(labelled))


def _rows(rows: list[Any]) -> Tensor:
    return torch.stack([row for (row,) in rows])


class Counting(LoopModule):
    """Counts how often it is asked for the size of a batch."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.net = linear(3, 2)
        self.fails, self.asked = fails, 0

    def configure_optimizers(self) -> Any:
        return sgd(self.net)

    def batch_size(self, batch: Tensor) -> int:
        self.asked += 1
        if self.fails:
            raise KeyError("no size")
        return len(batch)

    def training_step(self, x: Tensor) -> Tensor:
        return squares(self, x)

    def validation_step(self, x: Tensor) -> Tensor:
        return squares(self, x)


def test_one_shard_asks_for_no_size() -> None:
    net = Counting(fails=True)
    run = trainer(max_epochs=2)
    run.fit(net, BATCHES, BATCHES)
    assert net.asked == 0
    assert run.samples_seen is None


@several_shards
def test_several_shards_ask_once_a_batch(strategy: Make) -> None:
    net = Counting()
    run = trainer(strategy(), max_epochs=2)
    run.fit(net, BATCHES)
    assert net.asked == 2 * len(BATCHES)
    assert run.samples_seen == 2 * sum(map(len, BATCHES))


def test_a_progress_bar_asks_once_and_takes_no_for_an_answer() -> None:
    for fails, seen in ((False, 24), (True, None)):
        net = Counting(fails)
        run = Trainer(
            strategy="single",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        run.fit(net, BATCHES)
        assert net.asked == 1
        assert run.samples_seen == seen


# -- precision -----------------------------------------------------------------------------------


class Single(LoopModule):
    """A float32 classifier that notes the dtypes it meets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Linear(3, 4)
        self.dtypes: set[Any] = set()

    def configure_optimizers(self) -> Any:
        return sgd(self.net)

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        out = self.net(x)
        self.dtypes.update((x.dtype, self.net.weight.dtype, out.dtype))
        return F.cross_entropy(out, y)


def labelled(dtype: torch.dtype = torch.float32) -> list[Any]:
    return [(data(8, 3, seed=i).float().to(dtype), torch.arange(8) % 4) for i in range(4)]


@every_strategy
@pytest.mark.parametrize(
    ("precision", "dtypes", "parameters"),
    [
        ("32", {torch.float32}, torch.float32),
        (32, {torch.float32}, torch.float32),
        ("64", {torch.float64}, torch.float64),
        ("bf16-true", {torch.bfloat16}, torch.bfloat16),
        ("bf16-mixed", {torch.float32, torch.bfloat16}, torch.float32),
        ("16-mixed", {torch.float32, torch.float16}, torch.float32),
    ],
)
def test_precision_through_fit(
    strategy: Make, precision: Any, dtypes: set[torch.dtype], parameters: torch.dtype
) -> None:
    net, other = Single(), Single().double()
    run = trainer(strategy(), precision=precision)
    run.fit(net, labelled())
    assert net.dtypes == dtypes
    assert {p.dtype for p in net.parameters()} == {parameters}
    assert run.updates == {"optimizer": 4}
    for x, y in labelled(torch.float64):
        other.zero_grad()
        F.cross_entropy(other.net(x), y).backward()
        sgd(other.net).step()
    bound = {"32": 1e-6, "64": 1e-14}.get(str(precision), 3e-3)
    assert (net.net.weight.double() - other.net.weight).abs().max() < bound
    assert (other.net.weight - Single().net.weight).abs().max() > 10 * 3e-3


# -- files ---------------------------------------------------------------------------------------


def files(folder: Path, **options: Any) -> Trainer:
    options = {"max_epochs": 2, "log_every_n_steps": 2, "seed": 0, **options}
    return Trainer(
        strategy="single",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_the_csv_has_a_row_for_every_nth_step_and_every_epoch(tmp_path: Path) -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        self.log("number", float(self.global_step))
        self.log("mean", float(self.global_step), on_step=False, on_epoch=True)
        return squares(self, x)

    net = module(step)
    type(net).validation_step = lambda self, x: self.log("val", float(self.global_step))
    files(tmp_path).fit(net, BATCHES[:3], BATCHES[:1])
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert rows == [
        {"step": "2", "epoch": "0", "number": "1.0"},
        {"step": "3", "epoch": "0", "val": "3.0"},
        {"step": "3", "epoch": "0", "mean": "1.0"},
        {"step": "4", "epoch": "1", "number": "3.0"},
        {"step": "6", "epoch": "1", "number": "5.0"},
        {"step": "6", "epoch": "1", "val": "6.0"},
        {"step": "6", "epoch": "1", "mean": "4.0"},
    ]


def test_the_last_checkpoint_holds_the_whole_state(tmp_path: Path) -> None:
    def configure(self: Any) -> Any:
        a = SGD(self.a.parameters(), lr=0.1, momentum=0.9)
        b = Adam(self.b.parameters(), lr=0.1)
        return {"a": OptimizerConfig(a, lr_scheduler.StepLR(a, 1, gamma=0.5)), "b": b}

    class Counter(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"count": 3}

    net = net_with(configure, gan, **two())
    # The file is written after everybody else's end of the epoch, the module's own included.
    type(net).on_train_epoch_end = lambda self: self.a.bias.data.fill_(self.current_epoch + 7.0)
    run = files(tmp_path, callbacks=Counter(), logger=False)
    run.fit(net, BATCHES[:3])
    found = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(torch.equal(v, net.state_dict()[n]) for n, v in found["state_dict"].items())
    assert found["state_dict"]["a.bias"].item() == 8.0
    assert set(found["optimizers"]) == {"a", "b"}
    momentum = run.optimizers["a"].optimizer.state[net.a.weight]["momentum_buffer"]
    assert torch.equal(found["optimizers"]["a"]["state"][0]["momentum_buffer"], momentum)
    assert found["optimizers"]["a"]["param_groups"][0]["lr"] == 0.025
    assert found["optimizers"]["b"]["state"][0]["step"].item() == 6
    assert [s["state"]["last_epoch"] for s in found["schedulers"]["a"]] == [2]
    assert found["schedulers"]["b"] == []
    assert (found["global_step"], found["updates"]) == (6, {"a": 6, "b": 6})
    loop = found["loop"]
    assert (loop["class"], loop["train"]["epoch"], loop["train"]["batch_idx"]) == ("FitLoop", 2, 0)
    assert found["callbacks"][
        "test_the_last_checkpoint_holds_the_whole_state.<locals>.Counter"
    ] == {"count": 3}


def test_a_checkpoint_in_mid_run_is_written_after_the_modules_hook(tmp_path: Path) -> None:
    net = module(squares)
    type(net).on_train_epoch_end = lambda self: self.net.bias.data.fill_(7.0)
    seen: list[float] = []

    class Next(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch:
                found = torch.load(tmp_path / "last.ckpt", weights_only=True)
                seen.append(found["state_dict"]["net.bias"][0].item())

    files(tmp_path, callbacks=Next(), logger=False).fit(net, BATCHES[:3])
    assert seen == [7.0]


def test_there_is_nothing_to_save_before_training(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="call fit first"):
        files(tmp_path).save_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("kind", [ProgressBar, ModelSummary, ModelCheckpoint])
def test_a_trainer_adds_no_second_one_of_a_users_callback(kind: type[Callback]) -> None:
    class Derived(kind):  # type: ignore[misc, valid-type]
        pass

    for own in (kind(), Derived()):
        callbacks = Trainer(callbacks=own).callbacks
        assert [one for one in callbacks if isinstance(one, kind)] == [own]
        assert len(callbacks) == 3
    assert [type(one) for one in Trainer().callbacks] == [
        ModelSummary,
        ProgressBar,
        ModelCheckpoint,
    ]
    off = Trainer(
        callbacks=own,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    assert off.callbacks == [own]


# -- loggers -------------------------------------------------------------------------------------


class Keeping(Logger):
    """A logger with a run of its own somewhere, as W&B has: what happened to it, in order."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.calls: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append(step)

    def flush(self) -> None:
        self.calls.append("flush")

    def finalize(self, status: str) -> None:
        self.calls.append(status)

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self.calls.append(params)

    def state_dict(self) -> dict[str, Any]:
        self.calls.append("state")
        return {"id": self.id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.id = state["id"]
        self.calls.append(state)


class StopAfter(Callback):
    """Saves after one step, and fails after a later one."""

    def __init__(self, saves: int, fails: int) -> None:
        self.saves, self.fails = saves, fails

    def on_train_batch_end(self, trainer: Any, module: Any) -> None:  # type: ignore[override]
        if trainer.global_step == self.saves:
            trainer.save_checkpoint(trainer.default_root_dir / "mid.ckpt")
        if trainer.global_step == self.fails:
            raise KeyError("stopped")


def numbered(self: Any, x: Tensor) -> Tensor:
    self.log("number", float(self.global_step))
    self.log("mean", float(self.global_step), on_step=False, on_epoch=True)
    return squares(self, x)


def measured() -> Any:
    net = module(numbered)
    type(net).validation_step = lambda self, x: self.log("val", float(self.global_step))
    return net


def test_loggers_are_flushed_before_a_checkpoint_and_told_the_end(tmp_path: Path) -> None:
    first, second = Keeping("a"), Keeping("b")
    run = files(tmp_path, logger=[first, second], max_epochs=1)
    run.fit(module(numbered), BATCHES[:3])
    # Steps 2 and 3 (the epoch's means), and then the last checkpoint.
    assert first.calls == second.calls == [2, 3, "flush", "state", "finished"]


def test_loggers_are_told_of_a_failure_also_of_one_of_them(tmp_path: Path) -> None:
    class Full(Keeping):
        def finalize(self, status: str) -> None:
            super().finalize(status)
            raise OSError("the disk is full")

    loggers = [Full("a"), Keeping("b")]
    run = files(tmp_path, logger=loggers, callbacks=StopAfter(0, 2), enable_checkpointing=False)
    with pytest.raises(KeyError, match="stopped") as caught:
        run.fit(module(numbered), BATCHES)
    assert [one.calls for one in loggers] == [[2, "failed"], [2, "failed"]]
    assert "the disk is full" in "".join(caught.value.__notes__)


def test_a_loggers_state_comes_back_before_its_first_row(tmp_path: Path) -> None:
    """The id of its run, say: the resumed run goes on with the same curves."""
    stopped = files(
        tmp_path,
        logger=[Keeping("first"), Keeping("second")],
        callbacks=StopAfter(3, 5),
        enable_checkpointing=False,
    )
    with pytest.raises(KeyError, match="stopped"):
        stopped.fit(module(numbered), BATCHES[:3])
    kept = torch.load(tmp_path / "mid.ckpt", weights_only=True)["loggers"]
    assert [(one["step"], one["id"]) for one in kept] == [(3, "first"), (3, "second")]
    loggers = [Keeping("new"), Keeping("new")]
    resumed = files(tmp_path, logger=loggers, enable_checkpointing=False)
    resumed.fit(module(numbered), BATCHES[:3], ckpt_path=tmp_path / "mid.ckpt")
    assert [one.id for one in loggers] == ["first", "second"]
    for one in loggers:
        (state, *steps, status) = one.calls
        assert state["step"] == 3
        assert steps == [3, 4, 6, 6]  # the first epoch's end, two rows, the second epoch's end
        assert status == "finished"


def test_hyperparameters_of_module_and_data_come_together(tmp_path: Path) -> None:
    class Data(DataModule):
        def __init__(self, folder: str = "there", lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return BATCHES[:2]

    class Net(LoopModule):
        def __init__(self, lr: float = 0.1, width: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = linear(3, width)

        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=self.hparams.lr)

        training_step = squares

    logger = Keeping("a")
    files(tmp_path, logger=logger, enable_checkpointing=False).fit(Net(), datamodule=Data())
    assert logger.calls[0] == {"lr": 0.1, "width": 3, "folder": "there"}
    run = files(tmp_path, logger=logger, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"\['lr'\] of module and data module .* different values"):
        run.fit(Net(), datamodule=Data(lr=0.5))


STEPS_LOGGED = [2, 4, 6, 8, 10, 12]


def table(folder: Path, name: str) -> list[tuple[int, float]]:
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == sorted(int(row["step"]) for row in rows)
    return [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]


def events(folder: Path, name: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def long_ago(folder: Path) -> None:
    """TensorBoard orders files by the second in their names, in which a test has written two."""
    for file in folder.glob("events.out.tfevents.*"):
        *before, _, host, pid, number = file.name.rsplit(".", 4)
        file.rename(folder / ".".join([*before, "1000000000", host, pid, number]))


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize("fails", [5, 9], ids=["same epoch", "next epoch"])
@several_shards
def test_a_resumed_run_continues_its_curves(
    tmp_path: Path, kind: type[Logger], fails: int, strategy: Make
) -> None:
    """One axis that never goes back: rows from after the checkpoint are there once."""
    if kind is TensorBoardLogger:
        pytest.importorskip("tensorboard")
    logs = tmp_path / "logs"
    options: dict[str, Any] = {"enable_checkpointing": False, "max_epochs": 3}
    net = measured()
    stopped = files(tmp_path, logger=kind(logs), callbacks=StopAfter(3, fails), **options)
    with pytest.raises(KeyError, match="stopped"):
        stopped.fit(net, BATCHES[:4], BATCHES[:1])
    long_ago(logs)
    resumed = files(tmp_path, logger=kind(logs), **options)
    resumed.fit(measured(), BATCHES[:4], BATCHES[:1], ckpt_path=tmp_path / "mid.ckpt")
    read = table if kind is CSVLogger else events
    assert read(logs, "number") == [(step, step - 1.0) for step in STEPS_LOGGED]
    assert read(logs, "val") == [(4, 4.0), (8, 8.0), (12, 12.0)]
    assert read(logs, "mean") == [(4, 1.5), (8, 5.5), (12, 9.5)]


KILLED = """
import os, sys
from pathlib import Path
from composefit import Callback
from composefit.loggers import CSVLogger, TensorBoardLogger
from tests.test_trainer import BATCHES, files, measured

folder = Path(sys.argv[1])

class Kill(Callback):
    def on_train_batch_end(self, trainer, module):
        if trainer.global_step == 6:
            trainer.save_checkpoint(folder / "mid.ckpt")
        if trainer.global_step == 11:
            os._exit(9)

files(folder, logger=[CSVLogger(folder / "csv"), TensorBoardLogger(folder / "tb")],
      callbacks=Kill(), enable_checkpointing=False, max_epochs=3,
).fit(measured(), BATCHES[:4], BATCHES[:1])
"""


def test_a_killed_run_has_lost_nothing_from_before_its_checkpoint(tmp_path: Path) -> None:
    """What loggers hold in memory is written before the checkpoint is."""
    pytest.importorskip("tensorboard")
    root = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, [root, root / "src"]))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment)
    assert done.returncode == 9
    assert [step for step, _ in table(tmp_path / "csv", "number")] == [2, 4, 6]
    long_ago(tmp_path / "tb")
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    resumed = files(tmp_path, logger=loggers, enable_checkpointing=False, max_epochs=3)
    resumed.fit(measured(), BATCHES[:4], BATCHES[:1], ckpt_path=tmp_path / "mid.ckpt")
    for read, folder in ((table, "csv"), (events, "tb")):
        assert read(tmp_path / folder, "number") == [(step, step - 1.0) for step in STEPS_LOGGED]
        assert read(tmp_path / folder, "mean") == [(4, 1.5), (8, 5.5), (12, 9.5)]


def test_a_picture_is_a_file_of_every_logger(tmp_path: Path) -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        self.log("first row", Image(x[:1].abs() / 4, caption="of the batch"))
        return squares(self, x)

    pytest.importorskip("tensorboard")
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    run = files(tmp_path, logger=loggers, enable_checkpointing=False, max_epochs=1)
    run.fit(module(step), BATCHES[:4])
    images = tmp_path / "csv" / "images"
    assert sorted(path.name for path in images.iterdir()) == [
        "first%20row-2.png",
        "first%20row-4.png",
    ]
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(tmp_path / "tb")).Reload().Images("first row")
    assert [event.step for event in found] == [2, 4]
    expected = Image(BATCHES[3][:1].abs() / 4, caption="of the batch")
    assert (images / "first%20row-4.png").read_bytes() == expected.png()
    assert [one.png for one in run.history.pictures["first row"]][-1] == expected.png()


# -- reproducibility -----------------------------------------------------------------------------


def dropped(self: Any, x: Tensor) -> Tensor:
    noise = self.random.normal(len(x), 3, dtype=torch.float64)
    return F.dropout(self.net(x + noise), 0.5).square().mean()


@every_strategy
def test_the_same_seed_gives_the_same_run(strategy: Make) -> None:
    def run(seed: int | None, ambient: int) -> nn.Module:
        torch.manual_seed(ambient)
        net = module(dropped)
        loader = DataLoader(data(12, 3), batch_size=4, shuffle=True)  # type: ignore[arg-type]
        trainer(strategy(), seed=seed, max_epochs=2).fit(net, loader)
        return net

    assert same(run(1, 2), run(1, 3))
    assert not same(run(1, 2), run(2, 2))
    assert same(run(None, 2), run(None, 2))
    assert not same(run(None, 2), run(None, 3))


def test_the_order_of_samples_does_not_depend_on_the_strategy() -> None:
    """What a step draws must not move the generator that shuffles."""
    orders = []
    for strategy in STRATEGIES.values():
        seen: list[Tensor] = []

        class Order(Callback):
            def on_train_batch_start(self, trainer: Any, module: Any, batch: Any) -> None:  # type: ignore[override]
                seen.append(batch.clone())  # noqa: B023

        loader = DataLoader(data(12, 3), batch_size=4, shuffle=True)  # type: ignore[arg-type]
        trainer(strategy(), seed=5, max_epochs=3, callbacks=Order()).fit(module(dropped), loader)
        orders.append(torch.stack(seen))
    assert torch.equal(orders[0], orders[1]) and torch.equal(orders[0], orders[2])
    assert len({tuple(batch[:, 0].tolist()) for batch in orders[0]}) == 9  # it did shuffle


@pytest.mark.parametrize("before", [False, True])
def test_deterministic_algorithms_are_for_the_run(before: bool) -> None:
    seen: list[bool] = []

    def step(self: Any, x: Tensor) -> Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        if len(seen) > 1:
            raise KeyError
        return squares(self, x)

    try:
        torch.use_deterministic_algorithms(before, warn_only=before)
        with pytest.raises(KeyError):
            trainer(deterministic=True).fit(module(step), BATCHES)
        assert seen == [True, True]
        assert torch.are_deterministic_algorithms_enabled() is before
        assert torch.is_deterministic_algorithms_warn_only_enabled() is before
    finally:
        torch.use_deterministic_algorithms(False)


# -- step by step --------------------------------------------------------------------------------


@every_strategy
def test_steps_by_hand_are_those_of_a_fit(strategy: Make) -> None:
    def configure(self: Any) -> Any:
        return SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    net, other = net_with(configure, dropped), net_with(configure, dropped)
    run = trainer(strategy())
    for i, batch in enumerate(BATCHES):
        losses = run.step(net, [batch], i)
        assert set(losses) == {"loss"} and losses["loss"].dim() == 0
    trainer(strategy()).fit(other, BATCHES)
    assert same(net, other)
    assert (run.global_step, run.updates) == (6, {"optimizer": 6})


def test_a_validation_between_steps_by_hand_changes_nothing() -> None:
    def configure(self: Any) -> Any:
        return SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    net, other = net_with(configure), net_with(configure)
    for one_of_them in (net, other):
        type(one_of_them).validation_step = lambda self, x: self.log("val", squares(self, x))
    run, plain = trainer(), trainer()
    for i, batch in enumerate(BATCHES):
        run.step(net, [batch], i)
        plain.step(other, [batch], i)
        assert set(run.validate(net, BATCHES[:2])[0]) == {"val"}
    assert same(net, other)
    assert (run.global_step, run.updates) == (6, {"optimizer": 6})


def test_steps_go_on_after_a_fit_and_begin_anew_with_another_module() -> None:
    net, other = module(squares), module(squares)
    run = trainer()
    run.fit(net, BATCHES[:2])
    run.step(net, BATCHES[:1])
    assert (run.global_step, run.updates) == (3, {"net": 3})
    run.step(other, BATCHES[:1])
    assert (run.global_step, run.updates) == (1, {"net": 1})


@pytest.mark.parametrize("batches", [data(4, 3), (data(4, 3), data(4, 3)), {"x": 1}])
def test_a_batch_in_place_of_a_list_of_batches_is_refused(batches: Any) -> None:
    with pytest.raises(TypeError, match=r"a list of loader batches.*step\(module, \[batch\]\)"):
        trainer().step(module(squares), batches)


def test_an_empty_list_of_batches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one loader batch.*step\(module, \[batch\]\)"):
        trainer().step(module(squares), [])


def test_the_module_belongs_to_the_trainer_that_steps() -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        seen.append(self.global_step)
        return squares(self, x)

    seen: list[int] = []
    net, a, b = module(step), trainer(), trainer()
    for run in (a, a, b, a, b):
        run.step(net, BATCHES[:1])
    assert seen == [0, 1, 0, 2, 1] and net.trainer is b


def test_a_dict_is_returned_for_its_loss_alone() -> None:
    net, other = module(squares), module(lambda self, x: {"loss": squares(self, x), "size": len(x)})
    trainer().step(net, BATCHES[:1])
    trainer().step(other, BATCHES[:1])
    assert same(net, other)
    wrong = module(lambda self, x: {"loss": squares(self, x), "net": squares(self, x)})
    with pytest.raises(ValueError, match=r"'net' is the optimizer: write {'net': loss} alone"):
        trainer().step(wrong, BATCHES[:1])


@pytest.mark.parametrize("heard", [False, True])
def test_what_validation_returns_is_joined_only_for_who_hears_it(heard: bool) -> None:
    class Hears(Callback):
        def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any) -> None:
            raise AssertionError("nothing can be joined here")

    net = module(squares)
    type(net).validation_step = lambda self, x: self.log("val", squares(self, x)) or object()
    run = trainer(SingleDevice("cpu", shards=2), callbacks=[Hears()] if heard else [])
    if heard:
        with pytest.raises(TypeError):
            run.validate(net, BATCHES)
    else:
        assert set(run.validate(net, BATCHES)[0]) == {"val"}


@every_strategy
def test_what_steps_append_is_in_the_order_of_the_samples(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Any:
        self.outputs.extend(x.unbind())
        mean = yield Mean(x.sum(), len(x))
        self.features["mean"] = mean
        yield Update({"net": self.net(x).square().mean() * self.features["mean"]})
        self.outputs.append(None)

    net = module(step)
    net.outputs, net.features = [], {}
    trainer(strategy()).fit(net, BATCHES)
    rows = torch.stack([row for row in net.outputs if row is not None])
    assert torch.equal(rows, torch.cat(BATCHES))


# -- what goes wrong -----------------------------------------------------------------------------


class Bad(Callback):
    """Fails at the end, after whatever else has failed."""

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        raise ValueError("in on_exception")

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        raise ValueError("in teardown")


class Good(Callback):
    """Must be told whatever others do."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self.told.append(f"exception {exception!r}")

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        self.told.append(f"teardown {stage}")


class Ends(Logger):
    def __init__(self) -> None:
        self.ends: list[str] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...

    def finalize(self, status: str) -> None:
        self.ends.append(status)


def run_with(good: Good, ends: Ends, *callbacks: Callback) -> Trainer:
    return Trainer(
        strategy="single",
        max_epochs=1,
        callbacks=[*callbacks, good],
        logger=ends,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def test_errors_while_winding_up_do_not_hide_the_users() -> None:
    good, ends = Good(), Ends()

    def step(self: Any, x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        run_with(good, ends, Bad()).fit(module(step), BATCHES)
    notes = "\n".join(caught.value.__notes__)
    assert "ValueError('in on_exception') was raised as well" in notes
    assert "ValueError('in teardown') was raised as well" in notes
    assert good.told == ["exception KeyError('mine')", "teardown fit"]
    assert ends.ends == ["failed"]


def test_an_error_in_teardown_comes_after_everything_is_torn_down() -> None:
    good, ends = Good(), Ends()
    with pytest.raises(ValueError, match="in teardown"):
        run_with(good, ends, Bad()).fit(module(squares), BATCHES)
    assert good.told == ["teardown fit"]
    assert ends.ends == ["finished"]


@pytest.mark.parametrize("where", ["setup", "on_fit_start", "on_train_epoch_end", "on_fit_end"])
@every_strategy
def test_a_trainer_can_be_used_again_after_an_error_anywhere(where: str, strategy: Make) -> None:
    class Once(Callback):
        failed = False

        def __getattribute__(self, name: str) -> Any:
            if name == where and not Once.failed:
                Once.failed = True
                raise KeyError(where)
            return super().__getattribute__(name)

    setattr(Once, where, lambda self: None)
    net, other = module(dropped), module(dropped)
    run = trainer(strategy(), callbacks=Once())
    with pytest.raises(KeyError, match=where):
        run.fit(net, BATCHES)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    run.fit(net, BATCHES)
    other.load_state_dict(state)
    trainer(strategy()).fit(other, BATCHES)
    assert same(net, other)
    assert run.global_step == 6


@pytest.mark.parametrize("call", ["fit", "validate"])
def test_a_run_within_a_run_is_refused(call: str) -> None:
    net = module(squares)
    type(net).validation_step = squares

    class Nested(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            getattr(trainer, call)(module, BATCHES)

    with pytest.raises(RuntimeError, match=f"running already: {call} cannot be called from"):
        trainer(callbacks=Nested()).fit(net, BATCHES)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((BATCHES, None), None),
        ((3,), TypeError),
        ((BATCHES, 3), TypeError),
        ((BATCHES, BATCHES), TypeError),  # there is no validation_step
        (([DataLoader([1])],), TypeError),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(arguments: Any, error: Any) -> None:
    worked: list[str] = []

    def configure(self: Any) -> Any:
        worked.append("configured")
        return sgd(self.net)

    class Told(Callback):
        def setup(self, trainer: Any, module: Any, stage: str) -> None:
            worked.append("set up")

    run = trainer(callbacks=Told())
    if error is None:
        run.fit(net_with(configure), *arguments)
        assert worked == ["set up", "configured"]
        return
    with pytest.raises(error):
        run.fit(net_with(configure), *arguments)
    assert worked == []


def test_an_exception_leaves_no_thread_and_no_context() -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        yield {"net": squares(self, x)}
        raise KeyError

    net = module(step)
    with pytest.raises(KeyError):
        trainer(ThreadDataParallel(2)).fit(net, BATCHES)
    with pytest.raises(RuntimeError, match="none is running"):
        net.log("x", 1.0)


def test_a_bare_strategy_name_is_enough() -> None:
    assert type(Trainer(strategy="threads").strategy) is ThreadDataParallel
    assert type(Trainer().strategy) is SingleDevice
    assert weights(module(squares))
