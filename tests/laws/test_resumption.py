"""Law 3: stopped at any step and resumed is bitwise the same as never stopped."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset
from torchmetrics import CatMetric, MeanMetric

from composefit import (
    Callback,
    Gather,
    LoopModule,
    Once,
    OptimizerConfig,
    SingleDevice,
    Step,
    Strategy,
    ThreadDataParallel,
    Trainer,
)
from composefit.callbacks import EMA, EarlyStopping, ModelCheckpoint
from composefit.testing import assert_resumable

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "one shard": lambda: SingleDevice("cpu"),
    "3 shards": lambda: SingleDevice("cpu", shards=3),
    "2 threads": lambda: ThreadDataParallel(2),
}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)

SAMPLES, SIZE = 14, 4  # the last of four batches is ragged


# -- data ------------------------------------------------------------------------------------------


class Augmented(Dataset[Tensor]):
    """Drawn from by all global generators, in whichever process it is loaded."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.x = torch.randn(samples, 4)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        noise = torch.randn(4) + np.random.randn() + random.random()
        return self.x[i] + 0.1 * noise.float()


LOADERS: dict[str, Callable[[], Any]] = {
    "list": lambda: list(torch.randn(SAMPLES, 4).split(SIZE)),
    "shuffled": lambda: DataLoader(Augmented(), SIZE, shuffle=True),
    "2 workers": lambda: DataLoader(Augmented(), SIZE, shuffle=True, num_workers=2),
}


def validation() -> Any:
    return [torch.randn(6, 4), torch.randn(3, 4)]


# -- recipes ---------------------------------------------------------------------------------------


class GAN(LoopModule):
    """Dropout, BatchNorm, draws, and a scheduler of each kind."""

    samples_per_group = 2  # for BatchNorm

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 4)
        )
        self.critic = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 1))

    def configure_optimizers(self) -> dict[str, OptimizerConfig]:
        generator = Adam(self.generator.parameters(), lr=1e-2)
        critic = SGD(self.critic.parameters(), lr=1e-2, momentum=0.9)
        plateau = ReduceLROnPlateau(critic, factor=0.5, patience=0, threshold=10.0)
        return {
            "critic": OptimizerConfig(critic, plateau, monitor="critic"),
            "generator": OptimizerConfig(
                generator, ExponentialLR(generator, 0.97), interval="step"
            ),
        }

    def training_step(self, real: Tensor) -> Step:
        fake = self.generator(self.random.normal(len(real), 3))
        fake = fake + 0.01 * torch.randn_like(fake)
        loss = F.softplus(self.critic(fake)).mean() + F.softplus(-self.critic(real)).mean()
        self.log("critic", loss, on_step=True, on_epoch=True)
        yield {"critic": loss}
        loss = F.softplus(-self.critic(self.generator(self.random.normal(len(real), 3)))).mean()
        self.log("generator", loss, on_step=False, on_epoch=True)
        yield {"generator": loss}

    def validation_step(self, real: Tensor) -> None:
        self.log("val", F.softplus(-self.critic(real)).mean())


class Epochs(GAN):
    """Schedulers by epoch, one cycle over all steps, and the generator updated now and then."""

    def configure_optimizers(self) -> dict[str, OptimizerConfig]:
        critic = SGD(self.critic.parameters(), lr=1e-2)
        generator = Adam(self.generator.parameters(), lr=1e-2)
        cycle = OneCycleLR(critic, max_lr=0.1, total_steps=40)
        return {
            "critic": OptimizerConfig(critic, cycle, interval="step"),
            "generator": OptimizerConfig(generator, StepLR(generator, 1, gamma=0.7)),
        }

    def training_step(self, real: Tensor) -> Step:
        z = self.random.normal(len(real), 3)
        for _ in range(2):
            yield {"critic": self.critic(self.generator(z)).mean() - self.critic(real).mean()}
        if self.global_step % 2 == 0 or self.random.shared.uniform().item() < 0.5:
            yield {"generator": -self.critic(self.generator(z)).mean()}


class Contrastive(LoopModule):
    """Gather for the loss, and Once for a queue of past keys."""

    queue: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.register_buffer("queue", torch.zeros(8, 3))

    def configure_optimizers(self) -> SGD:
        return SGD(self.encoder.parameters(), lr=0.1, momentum=0.9)

    def training_step(self, x: Tensor) -> Step:
        own = F.normalize(self.encoder(F.dropout(x, 0.3)), dim=1)
        other = F.normalize(self.encoder(F.dropout(x, 0.3)), dim=1)
        everything, offset = yield from Gather(other)
        scores = own @ torch.cat([everything, self.queue]).T / 0.2
        yield F.cross_entropy(scores, torch.arange(len(x)) + offset)
        yield from Once(self.enqueue, other)

    def enqueue(self, keys: Tensor) -> None:
        self.queue.copy_(torch.cat([keys, self.queue])[: len(self.queue)])

    def validation_step(self, x: Tensor) -> None:
        self.log("val", self.encoder(x).mean())


class Measured(LoopModule):
    """Logs in every way there is, and lets what was logged change the training."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.mean, self.all, self.val = MeanMetric(), CatMetric(), MeanMetric()

    def configure_optimizers(self) -> OptimizerConfig:
        sgd = SGD(self.parameters(), lr=0.1)
        return OptimizerConfig(sgd, ReduceLROnPlateau(sgd, patience=0), monitor="metric")

    def training_step(self, x: Tensor) -> Tensor:
        errors = self.net(x).square()
        self.mean.update(errors.detach().flatten())
        self.all.update(errors.detach().flatten())
        self.log("metric", self.mean, on_step=True, on_epoch=True)
        for reduce in ("mean", "sum", "min", "max", torch.median):
            name = reduce if isinstance(reduce, str) else "median"
            self.log(name, errors.max(), on_step=True, on_epoch=True, reduce_fx=reduce)
        self.log("weighted", errors.sum(), batch_size=3, on_epoch=True)
        return errors.mean()

    def on_train_epoch_end(self) -> None:
        self.log("largest", self.all.compute().max())
        self.all.reset()

    def validation_step(self, x: Tensor) -> None:
        errors = self.net(x).square()
        self.val.update(errors.flatten())
        self.log("val", self.val)
        self.log("val_mean", errors.mean())
        self.log("val_min", errors.min(), reduce_fx="min")


class Drawing(Contrastive):
    """Draws from all global generators in hooks."""

    def on_train_batch_start(self, batch: Tensor) -> None:
        batch += 0.1 * torch.randn_like(batch)

    def on_before_optimizer_step(self) -> None:
        for group in self.trainer.optimizers["optimizer"].optimizer.param_groups:
            group["lr"] = 0.1 + 0.01 * random.random() + 0.01 * np.random.rand()

    def on_train_epoch_end(self) -> None:
        self.queue.normal_()

    def on_validation_start(self) -> None:
        self.log("drawn", torch.rand(()))

    def on_validation_end(self) -> None:
        self.log("drawn at the end", random.random())


class Counting(Callback):
    """Has a state that changes the training."""

    def __init__(self) -> None:
        self.count = 0

    def on_after_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.count += 1
        optimizer.param_groups[0]["weight_decay"] = 0.001 * self.count

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.count += 10
        self.log("count", float(self.count))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def watched() -> list[Callback]:
    return [
        EMA(decay=0.9),
        Counting(),
        EarlyStopping("val", patience=3, min_delta=10.0),  # after 4 validations of 2 steps each
        ModelCheckpoint(monitor="val", save_top_k=2),
    ]


#: module -> arguments of the trainer
RECIPES: dict[str, tuple[Callable[[], LoopModule], dict[str, Any]]] = {
    "GAN": (GAN, {}),
    "GAN, averaged and watched": (GAN, {"callbacks": watched}),
    "GAN in float16": (GAN, {"precision": "16-mixed"}),
    "GAN, clipped, in bfloat16": (GAN, {"precision": "bf16-mixed", "gradient_clip_val": 0.1}),
    "several critic steps": (Epochs, {"callbacks": lambda: [Counting()]}),
    "micro-batches": (Contrastive, {"microbatch_size": 3}),
    "Gather and Once": (Contrastive, {}),
    "logs": (Measured, {}),
    "draws in hooks": (Drawing, {"callbacks": lambda: [EMA(decay=0.5, use_buffers=True)]}),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES)

# -- the grid --------------------------------------------------------------------------------------


def stopped(recipe: str, strategy: str, loader: str = "shuffled", **how: Any) -> int:
    make, arguments = RECIPES[recipe]
    settings = {"log_every_n_steps": 1, "val_check_interval": 2, **arguments, **how}
    return assert_resumable(
        make, LOADERS[loader], [STRATEGIES[strategy]()], val_loader=validation, **settings
    )


@every_strategy
@every_recipe
def test_stopped_in_the_middle_of_an_epoch(recipe: str, strategy: str) -> None:
    assert stopped(recipe, strategy, stops=[2], via=["exception"]) == 1


@pytest.mark.parametrize("via", ["exception", "signal", "max_steps", "should_stop"])
@every_strategy
def test_each_way_to_stop(via: str, strategy: str) -> None:
    # After the first step, between two epochs, and in the middle of the second.
    found = stopped("GAN, averaged and watched", strategy, stops=[1, 4, 6], via=[via], max_epochs=3)
    assert found == 3


@every_strategy
@pytest.mark.parametrize("recipe", ["GAN, averaged and watched", "logs", "draws in hooks"])
def test_stopped_during_a_validation(recipe: str, strategy: str) -> None:
    # In mid-epoch, and at the end of an epoch.
    assert stopped(recipe, strategy, stops=[2, 4], via=["validation"], max_epochs=2) == 2


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_with_windows(loader: str, accumulate: int) -> None:
    stops = [1, 4] if accumulate == 1 else [1, 2]  # in mid-epoch, and between epochs
    found = stopped(
        "GAN, averaged and watched",
        "2 threads",
        loader,
        accumulate=[accumulate],
        stops=stops,
        via=["exception", "signal"],
    )
    assert found == 4


def test_stopped_twice() -> None:
    twice = [(1, 3), (2, 4), (4, 6)]
    assert stopped("GAN", "3 shards", stops=twice, via=["exception", "max_steps"]) == 6


def test_the_end_of_a_run_that_was_stopped_before_its_last_hooks() -> None:
    assert stopped("GAN", "one shard", stops=[8], via=["exception", "signal"]) == 2


def sampled() -> Iterator[Any]:
    """Each recipe under one strategy in every run of the tests, all of them with `make laws`."""
    for i, recipe in enumerate(RECIPES):
        for j, strategy in enumerate(STRATEGIES):
            for accumulate in (1, 2):
                sample = (i - j) % len(STRATEGIES) == 0 and accumulate == 1 + i % 2
                marks = () if sample else pytest.mark.full
                yield pytest.param(recipe, strategy, accumulate, marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "strategy", "accumulate"), list(sampled()))
def test_every_step_by_every_way(recipe: str, strategy: str, accumulate: int) -> None:
    ways = ["exception", "signal", "max_steps", "should_stop", "validation"]
    interval = 2 if accumulate == 1 else 1.0
    how: dict[str, Any] = {"accumulate": [accumulate], "val_check_interval": interval}
    assert stopped(recipe, strategy, via=ways, **how) > 10


# -- other ways to stop ----------------------------------------------------------------------------


class Batches:
    """A list of batches which fails, or is sent a signal, when it is told to."""

    def __init__(self) -> None:
        self.batches = list(torch.randn(18, 4).split(3))
        self.fault: Callable[[], None] | None = None
        self.wait = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for batch in self.batches:
            if self.fault is not None:
                self.wait -= 1
                if self.wait < 0:
                    fault, self.fault = self.fault, None
                    fault()
            yield batch


def fails() -> None:
    raise OSError("the disk is gone")


def terminated() -> None:
    signal.raise_signal(signal.SIGTERM)


class Arms(Callback):
    """After a step, lets the loader's fetch after the next `wait` do this."""

    def __init__(self, step: int, fault: Callable[[], None], wait: int) -> None:
        self.step, self.fault, self.wait = step, fault, wait

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            loader = trainer.fit_loop.train.batches.loader
            loader.fault, loader.wait = self.fault, self.wait


class StepFails(Callback):
    """Sends the module's next step an exception before its first update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        module.faulty = trainer.global_step == self.step


class HookFails(Callback):
    """Raises when the next step begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            fails()


class Faulty(GAN):
    faulty = False

    def training_step(self, real: Tensor) -> Step:
        if self.faulty:
            fails()
        yield from super().training_step(real)


def loader_fails(step: int) -> Callback:
    return Arms(step, fails, wait=0)


def signal_within_a_window(step: int) -> Callback:
    return Arms(step - 1, terminated, wait=1)


@every_strategy
@pytest.mark.parametrize("via", [loader_fails, signal_within_a_window, StepFails, HookFails])
def test_stopped_elsewhere(via: Callable[[int], Callback], strategy: str) -> None:
    found = assert_resumable(
        Faulty,
        Batches,
        [STRATEGIES[strategy]()],
        accumulate=[2],
        stops=[2, 3, 5],  # at 3, the loader's end is what comes next
        via=[via],
        callbacks=lambda: [EMA(decay=0.9)],
    )
    assert found == 3 if via is not loader_fails else found >= 2


# -- checkpoints that are taken in hooks -----------------------------------------------------------


class Takes(Callback):
    """Takes a checkpoint in a hook, at its n-th call."""

    saves_state = True  # after everybody else's hooks of this name

    def __init__(self, path: Path, hook: str, number: int) -> None:
        self.path, self.left = path, number
        setattr(self, hook, self.take)

    def take(self, trainer: Any, module: Any) -> None:
        if trainer.sanity_checking:
            return
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


def fitted(strategy: Strategy, seed: int, callbacks: list[Callback], **how: Any) -> Any:
    ckpt_path = how.pop("ckpt_path", None)
    torch.manual_seed(0)
    loader, val_loader = LOADERS["shuffled"](), validation()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    module = GAN()
    trainer = Trainer(
        strategy=strategy,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, "val_check_interval": 2, "enable_checkpointing": False, **how},
    )
    trainer.fit(module, loader, val_loader, ckpt_path=ckpt_path)
    return trainer


def outcome(trainer: Any) -> list[Any]:
    tensors = [value.tolist() for value in trainer.module.state_dict().values()]
    states = [callback.state_dict() for callback in trainer.callbacks if type(callback) is Counting]
    return [tensors, trainer.known_values(), states, trainer.global_step, trainer.updates]


@every_strategy
@pytest.mark.parametrize(
    ("hook", "number"),
    [
        ("on_train_batch_start", 1),
        ("on_train_batch_start", 4),
        ("on_train_batch_end", 2),
        ("on_train_batch_end", 4),
        ("on_validation_end", 1),
        ("on_validation_end", 2),
        ("on_train_epoch_start", 2),
        ("on_train_epoch_end", 1),
    ],
)
def test_a_checkpoint_that_a_hook_takes_is_whole(
    hook: str, number: int, strategy: str, tmp_path: Path
) -> None:
    path = tmp_path / "taken.ckpt"
    whole = fitted(STRATEGIES[strategy](), 1, [Counting(), Takes(path, hook, number)])
    assert path.is_file()
    resumed = fitted(STRATEGIES[strategy](), 2, [Counting()], ckpt_path=path)
    assert outcome(resumed) == outcome(whole)


@every_strategy
def test_a_finished_run_goes_on_where_max_epochs_is_raised(strategy: str, tmp_path: Path) -> None:
    once: dict[str, Any] = {"val_check_interval": 1.0}
    root = {"default_root_dir": tmp_path, "enable_checkpointing": True, **once}
    whole = fitted(STRATEGIES[strategy](), 1, [Counting()], max_epochs=3, **once)
    fitted(STRATEGIES[strategy](), 1, [Counting()], max_epochs=1, **root)
    for epochs in (2, 3):
        last = {"max_epochs": epochs, "ckpt_path": "last", **root}
        resumed = fitted(STRATEGIES[strategy](), epochs + 7, [Counting()], **last)
    assert outcome(resumed) == outcome(whole)
    with pytest.warns(UserWarning, match="nothing is left to train: the state is that of epoch 3"):
        again = fitted(STRATEGIES[strategy](), 11, [Counting()], **last)
    assert outcome(again)[0] == outcome(whole)[0]


# -- within a step ---------------------------------------------------------------------------------


class Between(GAN):
    """Something happens between the first and the second update of the third step."""

    happens: Callable[[], None] | None = None

    def training_step(self, real: Tensor) -> Step:
        updates = super().training_step(real)
        yield next(updates)
        if self.happens is not None and self.global_step == 2:
            type(self).happens()
        yield from updates


@every_strategy
def test_a_fault_past_the_first_update_marks_the_checkpoint_and_resuming_warns(
    strategy: str, tmp_path: Path
) -> None:
    class Fails(Between):
        happens = staticmethod(fails)

    made: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    batches = list(torch.randn(16, 4).split(4))
    trainer = Trainer(strategy=STRATEGIES[strategy](), max_epochs=1, **made)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.fit(Fails(), batches)
    assert trainer.mid_step
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["mid_step"] and saved["global_step"] == 2
    assert saved["updates"] == {"critic": 3, "generator": 2}
    resumed = Trainer(strategy=STRATEGIES[strategy](), max_epochs=1, **made)
    with pytest.warns(UserWarning, match=r"last\.ckpt was written after step 2 failed between two"):
        resumed.fit(GAN(), batches, ckpt_path="last")
    assert resumed.updates == {"critic": 5, "generator": 4}
    assert not torch.load(tmp_path / "last.ckpt", weights_only=True)["mid_step"]


@every_strategy
def test_a_signal_between_two_updates_waits_for_the_end_of_the_step(
    strategy: str, tmp_path: Path
) -> None:
    class IsTerminated(Between):
        happens = staticmethod(terminated)

    trainer = Trainer(
        strategy=STRATEGIES[strategy](),
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(SystemExit) as caught:
        trainer.fit(IsTerminated(), list(torch.randn(16, 4).split(4)))
    assert caught.value.code == 143
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not saved["mid_step"] and saved["global_step"] == 3
    assert saved["updates"] == {"critic": 3, "generator": 3}
