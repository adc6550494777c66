"""Evaluations and checkpoints of several ranks: joined, agreed, and written once."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import CatMetric, SumMetric

from composefit import LoopModule, SingleDevice, Trainer, checkpoint, snapshot
from composefit.callbacks import Callback, EarlyStopping, ModelCheckpoint, PredictionWriter
from composefit.data import Batches, Rows
from composefit.loggers import CSVLogger
from composefit.loggers.silent import Silent
from composefit.loops import EvaluateLoop, Loop
from composefit.replicas import RankMetrics
from tests.callbacks.fake import SteppedTrainer
from tests.ranks.fake import ranks


class Spared:
    """A driver of one rank, which takes `Rows` and hands over no shard where there are none."""

    def __init__(self, driver: Any) -> None:
        vars(self)["driver"] = driver

    def __getattr__(self, name: str) -> Any:
        return getattr(self.driver, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.driver, name, value)

    def step(self, batches: list[Any], *where: int) -> list[Any]:
        (batch,) = batches
        if not isinstance(batch, Rows):
            return self.driver.step(batches, *where)
        shards = [] if batch.spare else self.driver.step([batch.batch], *where)
        if len(shards) == 1:  # which a rank's driver knows
            shards[0].known_samples = len(batch.batch)
        return shards  # type: ignore[no-any-return]


class RankTrainer(Trainer):
    """A trainer that is a rank of a fake world, for all but the steps themselves."""

    def __init__(self, world: Any, root: Path, **settings: Any) -> None:
        given: dict[str, Any] = {
            "strategy": SingleDevice("cpu"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": False,
            "seed": 3,
            **settings,
        }
        self.fake = world
        super().__init__(default_root_dir=root, **given)

    @property
    def world(self) -> Any:
        return self.fake

    def driver(self, *arguments: Any) -> Any:
        return Spared(super().driver(*arguments))

    def _batches(self, group: int, loader: Any, name: str, *settings: Any) -> Batches:
        return Batches(loader, name, *settings)


class Net(LoopModule):
    """Logs, counts and returns its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.total, self.all = SumMetric(), CatMetric()
        self.at_end: list[float] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_step(self, x: Tensor) -> Tensor:
        self.total.update(x)
        self.log("loss", x.mean(), on_epoch=True)
        return self.weight * 0.0

    def validation_step(self, x: Tensor) -> Any:
        self.all.update(x)
        self.log("mean", x.mean())
        self.log("all", self.all)
        self.total.update(x)
        return {"x": x * 2, "loss": x.mean()}

    def predict_step(self, x: Tensor) -> Tensor:
        return x + 1

    def on_validation_epoch_end(self) -> None:
        self.at_end.append(self.total.compute().item())


class Sum(Net):
    def validation_step(self, x: Tensor) -> Any:
        self.total.update(x)
        self.log("mean", x.mean())
        return {"x": x * 2, "loss": x.mean()}


#: Two batches of the world's, the second of one sample; as each rank of two gets them.
LOADED = [
    [Rows(torch.tensor([1.0, 2.0, 3.0]), (3, 2)), Rows(torch.tensor([10.0]), (1, 0))],
    [Rows(torch.tensor([4.0, 5.0]), (3, 2)), Rows(torch.tensor([4.0]), (1, 0), spare=True)],
]
SAMPLES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 10.0], dtype=torch.float64)


def with_metrics(trainer: RankTrainer, module: Any) -> RankMetrics:
    found = RankMetrics(trainer.world, module)
    trainer.rank_metrics = found
    return found


# -- evaluation -----------------------------------------------------------------------------------


def test_an_evaluation_is_of_all_ranks_samples(tmp_path: Path) -> None:
    def on_rank(world: Any) -> Any:
        module, trainer = Sum(), RankTrainer(world, tmp_path, log_every_n_steps=1)
        (found,) = trainer.validate(module, LOADED[world.rank], verbose=False)
        (again,) = trainer.validate(module, LOADED[world.rank], verbose=False)
        assert found == again
        return found["mean"], module.at_end, module.total.compute().item()

    total = SAMPLES.sum().item()
    assert ranks(2, on_rank) == [(SAMPLES.mean().item(), [total, 2 * total], 2 * total)] * 2


@pytest.mark.parametrize("several", [False, True])
def test_outputs_are_joined_in_the_order_of_the_samples(tmp_path: Path, several: bool) -> None:
    class Hearing(Callback):
        def __init__(self) -> None:
            self.heard: list[Any] = []

        def on_validation_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Tensor, batch_idx: int, n: int
        ) -> None:
            assert isinstance(batch, Tensor)
            self.heard.append((outputs["x"].tolist(), outputs["loss"].item()))

    def on_rank(world: Any) -> Any:
        hearing = Hearing()
        trainer = RankTrainer(world, tmp_path, callbacks=hearing)
        module, loader = Sum(), LOADED[world.rank]
        trainer.validate(module, {"a": loader, "b": loader} if several else loader)
        return hearing.heard

    expected = [([2.0, 4.0, 6.0, 8.0, 10.0], 3.0), ([20.0], 10.0)]
    assert ranks(2, on_rank) == [expected * (1 + several)] * 2


def test_nothing_is_sent_for_outputs_that_nobody_hears(tmp_path: Path) -> None:
    def on_rank(world: Any) -> list[str]:
        module, trainer = Sum(), RankTrainer(world, tmp_path)
        trainer.validate(module, LOADED[world.rank])
        return world.places

    for places in ranks(2, on_rank):
        assert "what an evaluation step returned" not in places


@pytest.mark.parametrize("shards", [1, 2])
def test_predictions_are_whole_on_every_rank(tmp_path: Path, shards: int) -> None:
    def on_rank(world: Any) -> Any:
        writer = PredictionWriter(tmp_path / "out", "batch_and_epoch")
        trainer = RankTrainer(
            world, tmp_path, callbacks=writer, strategy=SingleDevice("cpu", shards=shards)
        )
        places = []
        write = writer.write_on_batch_end
        writer.write_on_batch_end = lambda *of: (places.append(of[3]), write(*of))  # type: ignore[method-assign,assignment]
        found = trainer.predict(Net(), LOADED[world.rank])
        assert found is not None
        return [one.tolist() for one in found], places

    expected = [[2.0, 3.0, 4.0, 5.0, 6.0], [11.0]]
    (first, places), (second, none) = ranks(2, on_rank)
    assert first == second == expected
    assert places == [[0, 1, 2, 3, 4], [5]] and none == []  # rank 0 writes
    written = torch.load(tmp_path / "out" / "predictions.pt", weights_only=True)["predictions"]
    assert [one.tolist() for one in written] == expected


@pytest.mark.parametrize("number", [float, torch.tensor])
def test_a_number_of_several_shards_is_the_mean_over_the_samples(number: Any) -> None:
    class Loss(LoopModule):
        def predict_step(self, x: Tensor) -> Any:
            return {"loss": number(x.mean().item()), "of": "x"}

    found = []
    for shards in (1, 2, 3):
        trainer = RankTrainer(None, Path(), strategy=SingleDevice("cpu", shards=shards))
        (one,) = trainer.predict(Loss(), [torch.arange(7.0) ** 2])  # type: ignore[misc]
        assert type(one["loss"]) is type(number(0.0)) and one["of"] == "x"
        found.append(float(one["loss"]))
    assert found == pytest.approx([(torch.arange(7.0) ** 2).mean().item()] * 3, rel=1e-6)


def test_a_sanity_check_leaves_no_metric_changed_on_any_rank(tmp_path: Path) -> None:
    def on_rank(world: Any) -> float:
        module, trainer = Sum(), RankTrainer(world, tmp_path)
        module.total.update(7.0)
        with with_metrics(trainer, module) as metrics:
            trainer._attach(module)
            with trainer.evaluation.sanity_check(-1):
                loop = EvaluateLoop(LOADED[world.rank])
                loop.run(trainer, module)
            metrics.part()
            module.total.update(1.0 + world.rank)
            metrics.join()
        return module.total.compute().item()

    assert ranks(2, on_rank) == [10.0, 10.0]


def test_an_evaluation_that_fails_leaves_no_metric_changed_on_any_rank(tmp_path: Path) -> None:
    class Failing(Sum):
        def validation_step(self, x: Tensor) -> Any:
            super().validation_step(x)
            raise ValueError("in a step")

    def on_rank(world: Any) -> float:
        module, trainer = Failing(), RankTrainer(world, tmp_path)
        module.total.update(7.0)
        with with_metrics(trainer, module) as metrics:
            trainer._attach(module)
            with pytest.raises(ValueError, match="in a step"):
                EvaluateLoop(LOADED[world.rank]).run(trainer, module)
            metrics.part()
            module.total.update(1.0 + world.rank)
            metrics.join()
        return module.total.compute().item()

    assert ranks(2, on_rank) == [10.0, 10.0]


def test_a_metric_that_several_loaders_share_is_of_each_by_itself(tmp_path: Path) -> None:
    class Counting(Net):
        def validation_step(self, x: Tensor) -> None:
            self.total.update(x)
            self.log("total", self.total)

        def on_validation_epoch_end(self) -> None:
            pass

    def on_rank(world: Any) -> Any:
        module, trainer = Counting(), RankTrainer(world, tmp_path)
        found = trainer.validate(module, {n: LOADED[world.rank] for n in "ab"}, verbose=False)
        return [value for one in found for value in one.values()]

    assert ranks(2, on_rank) == [[SAMPLES.sum().item()] * 2] * 2


# -- checkpoints ----------------------------------------------------------------------------------


class Steps(Loop):
    """So many steps over a loader; a loader's place is in its state."""

    def __init__(self, batches: Any, steps: int) -> None:
        self.batches, self.steps = Batches(batches, "train", None, 9), steps

    def run(self, trainer: Any, module: Any) -> None:
        for number, batch in enumerate(self.batches.epoch(0), 1):
            if trainer.rank_metrics is not None:  # the strategy is none of ranks, so nobody has
                trainer.rank_metrics.part()
            trainer.step(module, [batch])
            self.batches.mark()
            if number == self.steps:
                break

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state["batches"])


def stepped(world: Any, root: Path, batches: Any, steps: int, path: Any = None) -> RankTrainer:
    module, trainer = Net(), RankTrainer(world, root, log_every_n_steps=1000)
    trainer.run(Steps(batches, steps), module, path)
    return trainer


def rows(rank: int, size: int) -> list[Tensor]:
    """A rank's rows of four batches of six samples."""
    return [torch.arange(6.0 * i, 6.0 * i + 6).chunk(size)[rank] for i in range(4)]


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(
    tmp_path: Path, before: int, after: int
) -> None:
    def world_of(world: Any, size: int) -> Any:
        return world if size > 1 else None

    def first(world: Any) -> None:
        trainer = stepped(world_of(world, before), tmp_path, rows(world.rank, before), 2)
        state = snapshot.take(trainer)
        assert state["metrics"]["total"]["states"]["sum_value"] == sum(range(12))
        snapshot.write(trainer, tmp_path / "x.ckpt", state)

    def then(world: Any) -> tuple[float, float]:
        own = world_of(world, after)
        trainer = stepped(own, tmp_path, rows(world.rank, after), 2, tmp_path / "x.ckpt")
        if own is not None:
            trainer.logs.exchange(own, trainer.rank_metrics, whole=True)
        trainer.logs.end_epoch()
        assert isinstance(trainer.module, Net)
        return trainer.logs.all_values()["loss_epoch"], trainer.module.total.compute().item()

    ranks(before, first)
    assert ranks(after, then) == [(23 / 2, float(sum(range(24))))] * after


def test_rank_zero_alone_writes_and_nobody_goes_on_before_the_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: list[int] = []
    save = checkpoint.save

    def slow(path: Any, state: Any) -> None:
        writers.append(threading.get_ident())
        assert not Path(path).exists()
        threading.Event().wait(0.1)
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", slow)

    def on_rank(world: Any) -> int:
        snapshot.write(RankTrainer(world, tmp_path), tmp_path / "x.ckpt", {"x": world.rank})
        assert checkpoint.load(tmp_path / "x.ckpt") == {"x": 0}
        return threading.get_ident()

    first, *_ = ranks(3, on_rank)
    assert writers == [first]


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ({"x": 1}, OSError, "No space left"),
        ({"x": object()}, TypeError, "a safe load does not read"),
    ],
)
def test_all_ranks_raise_where_rank_zero_could_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Any, error: Any, words: str
) -> None:
    if error is OSError:

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(checkpoint, "save", full)

    def on_rank(world: Any) -> Any:
        with pytest.raises(error, match=words) as caught:
            snapshot.write(RankTrainer(world, tmp_path), tmp_path / "x.ckpt", state)
        return getattr(caught.value, "errno", None), "(on rank 0)" in _notes(caught.value)

    number = errno.ENOSPC if error is OSError else None
    assert ranks(3, on_rank) == [(number, False), (number, True), (number, True)]


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def test_an_error_that_cannot_be_told_is_told_in_words(tmp_path: Path) -> None:
    class Local(Exception):
        pass

    def fails() -> None:
        raise Local("in vain")

    def on_rank(world: Any) -> str:
        with pytest.raises(Exception, match="in vain") as caught:
            snapshot._on_first(world, "something", fails)
        return type(caught.value).__name__

    assert ranks(2, on_rank) == ["Local", "RuntimeError"]


def test_which_checkpoint_is_meant_is_what_rank_zero_sees(tmp_path: Path) -> None:
    """A file system may show it to others later, or never; then these say so."""

    def on_rank(world: Any) -> Any:
        folder = tmp_path / ("there" if world.rank == 0 else "empty")
        trainer = RankTrainer(world, folder, callbacks=ModelCheckpoint(), enable_checkpointing=True)
        if world.rank == 0:
            state = {"composefit_checkpoint": checkpoint.FORMAT, "global_step": 7}
            checkpoint.save(folder / "last.ckpt", state)
        found = snapshot.read(trainer, "auto")
        assert found is not None
        return found[0], found[1]["global_step"]

    assert ranks(2, on_rank) == [(tmp_path / "there" / "last.ckpt", 7)] * 2


def test_no_checkpoint_is_an_error_on_all_ranks_or_on_none(tmp_path: Path) -> None:
    def on_rank(world: Any) -> None:
        trainer = RankTrainer(world, tmp_path)
        assert snapshot.read(trainer, None) is None and not world.places
        assert snapshot.read(trainer, "auto") is None
        with pytest.raises(FileNotFoundError, match="ckpt_path='auto'"):
            snapshot.read(trainer, "last")

    ranks(2, on_rank)


def test_ranks_that_read_different_files_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = threading.local()

    def load(path: Any) -> Any:
        return {"composefit_checkpoint": checkpoint.FORMAT, "global_step": local.step}

    monkeypatch.setattr(checkpoint, "load", load)

    def on_rank(world: Any) -> None:
        local.step = 5 + world.rank
        with pytest.raises(RuntimeError, match=r"different files.*\[5\.0, 6\.0\]"):
            snapshot.read(RankTrainer(world, tmp_path), tmp_path / "x.ckpt")

    ranks(2, on_rank)


def test_generators_are_each_ranks_own_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    local = threading.local()
    draws = snapshot.global_states()
    monkeypatch.setattr(snapshot, "global_states", lambda: {**draws, "torch": local.state})
    taken: dict[int, Tensor] = {}
    lock = threading.Lock()

    def take_back(state: dict[str, Any]) -> None:
        with lock:
            taken[local.rank] = state["torch"]

    monkeypatch.setattr(snapshot, "restore_global_states", take_back)

    def save(world: Any, alike: bool) -> Any:
        local.state = torch.tensor([0 if alike else world.rank])
        return {**snapshot._of_ranks(world, None), "seed": 1, "global_step": 2}

    def load(world: Any, state: Any) -> None:
        local.rank = world.rank
        snapshot._restore_generators(world, state)

    same, *_ = ranks(2, lambda world: save(world, True))
    own, *_ = ranks(2, lambda world: save(world, False))
    assert "random_of_ranks" not in same and len(own["random_of_ranks"]) == 2
    ranks(2, lambda world: load(world, own))
    assert {rank: state.item() for rank, state in taken.items()} == {0: 0, 1: 1}
    taken.clear()
    seeds: list[int] = []
    monkeypatch.setattr(snapshot.torch, "manual_seed", seeds.append)
    ranks(4, lambda world: load(world, own))
    assert len(set(seeds)) == 2  # those that were not there have draws of their own
    seeds.clear()
    taken.clear()
    ranks(3, lambda world: load(world, same))
    assert not seeds and all(state.item() == 0 for state in taken.values())


class PerRankBatches(Batches):
    """Whose place is a rank's own, as that of a `PerRank` loader."""

    def __init__(self, rank: int) -> None:
        super().__init__([1, 2], "train")
        self.mine, self.got = {"rank": rank}, None

    def rank_state(self) -> Any:
        return self.mine

    def load_rank_states(self, states: Any) -> None:
        self.got = states


class Nested(Loop):
    def __init__(self, batches: Batches) -> None:
        self.inner = Steps([1], 1)
        self.inner.batches = batches
        self.other = Batches([1], "other")

    def run(self, trainer: Any, module: Any) -> None:
        raise NotImplementedError


def test_the_places_of_ranks_in_their_own_data_are_kept() -> None:
    def on_rank(world: Any) -> Any:
        loop = Nested(PerRankBatches(world.rank))
        return snapshot._of_ranks(world, loop)["loaders_of_ranks"]

    assert ranks(2, on_rank) == [{"inner.batches": [{"rank": 0}, {"rank": 1}]}] * 2


# -- callbacks ------------------------------------------------------------------------------------


class Writing(SteppedTrainer):
    """Only rank 0 writes, as a trainer's `save_checkpoint` has it; logs meet by their mean."""

    def __init__(self, root: Path, *callbacks: Callback, **given: Any) -> None:
        super().__init__(root, *callbacks, **given)
        self.rank_metrics = None
        self.logs = SimpleNamespace(exchange=self._exchange)
        self.evaluation = SimpleNamespace(logs=SimpleNamespace(exchange=lambda *_: None))

    def _exchange(self, world: Any, _: Any) -> None:
        everyone = world.gather("logs", self.callback_metrics)
        for name in self.callback_metrics:
            self.callback_metrics[name] = torch.stack([one[name] for one in everyone]).mean()

    def save_checkpoint(self, path: Any, *how: Any, **more: Any) -> None:
        if self.is_global_zero:
            super().save_checkpoint(path, *how, **more)
        self.world.barrier("a checkpoint")


def test_names_of_checkpoints_are_as_rank_zero_finds_them(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "best.ckpt").touch()  # somebody else's, that other ranks do not see

    def on_rank(world: Any) -> Any:
        callback = ModelCheckpoint(filename="best", monitor="x", save_top_k=1)
        root = tmp_path / str(world.rank)
        trainer = Writing(root, callback, world=world, is_global_zero=world.rank == 0)
        trainer.begin()
        trainer.epoch(x=1.0)
        trainer.epoch(x=0.5)
        return callback.best_model_path, list(callback.best_k_models), callback.last_model_path

    first, second = ranks(2, on_rank)
    assert first == second
    assert Path(first[0]).parent == tmp_path / "0" and first[0].endswith("best-v1.ckpt")


def test_ranks_judge_by_what_all_have_logged(tmp_path: Path) -> None:
    """Each by its own value would go its own way: one saves, and waits in vain."""
    own = [[1.0, 3.0, 5.0], [9.0, 4.0, 5.0]]  # the second is better for one, and for all

    def on_rank(world: Any) -> Any:
        callback = ModelCheckpoint(
            tmp_path, filename="{step}", monitor="x", every_n_train_steps=1, save_last=False
        )
        stopping = EarlyStopping("x", patience=1, check_on_train_epoch_end=True)
        given = {"world": world, "is_global_zero": world.rank == 0}
        trainer = Writing(tmp_path, stopping, callback, **given)
        trainer.begin()
        stops = []
        for value in own[world.rank]:
            trainer.step(x=value)
            trainer.log(x=value)
            trainer.end_epoch()
            stops.append(trainer.should_stop)
        return Path(callback.best_model_path).name, stops

    assert ranks(2, on_rank) == [("step=2.ckpt", [False, False, True])] * 2


def test_a_file_that_only_another_rank_sees_changes_no_name(tmp_path: Path) -> None:
    def on_rank(world: Any) -> str:
        callback = ModelCheckpoint(tmp_path, filename="best", monitor="x")
        trainer = Writing(tmp_path, callback, world=world, is_global_zero=world.rank == 0)
        trainer.begin()
        if world.rank:
            callback._free_path = lambda *_: "elsewhere"  # type: ignore[method-assign]
        trainer.epoch(x=1.0)
        return callback.best_model_path

    assert ranks(2, on_rank) == [str(tmp_path / "best.ckpt")] * 2


def test_checkpoints_that_are_still_there_are_as_rank_zero_finds_them(tmp_path: Path) -> None:
    def on_rank(world: Any) -> Any:
        callback = ModelCheckpoint(tmp_path, filename="{step}", monitor="x", save_top_k=2)
        trainer = Writing(tmp_path, callback, world=world, is_global_zero=world.rank == 0)
        trainer.begin()
        trainer.epoch(x=1.0)
        state = callback.state_dict()
        again = ModelCheckpoint(tmp_path, filename="{step}", monitor="x", save_top_k=2)
        trainer = Writing(tmp_path, again, world=world, is_global_zero=world.rank == 0)
        trainer.call("setup", "fit")
        if world.rank == 0:  # the file system shows it to rank 0 alone
            again.load_state_dict(state)
        trainer.begin_fold()
        return list(again.best_k_models)

    first, second = ranks(2, on_rank)
    assert first == second and len(first) == 1


def test_all_ranks_save_by_the_clock_that_they_share(tmp_path: Path) -> None:
    def on_rank(world: Any) -> list[str]:
        callback = ModelCheckpoint(tmp_path, filename="{step}", train_time_interval=1)
        trainer = Writing(tmp_path, callback, world=world, is_global_zero=world.rank == 0)
        trainer.clock = lambda: 25.0 * trainer.global_step
        trainer.begin()
        for _ in range(6):
            trainer.step()
        return [place for place in world.places if place == "a checkpoint"]

    first, second = ranks(2, on_rank)
    assert first == second and len(first) == 4  # two files, and last.ckpt twice


def test_without_the_other_ranks_nothing_is_saved_and_the_error_says_what_there_is(
    tmp_path: Path,
) -> None:
    def on_rank(world: Any) -> str:
        callback = ModelCheckpoint(tmp_path)
        trainer = Writing(tmp_path, callback, world=world, is_global_zero=world.rank == 0)
        trainer.begin()
        trainer.epoch()
        trainer.step()
        world.closed = True
        error = RuntimeError("on one rank")
        sent = len(world.places)
        trainer.exception = error
        trainer.call("on_exception", error)
        assert len(world.places) == sent
        return _notes(error)[0]

    for note in ranks(2, on_rank):
        assert f"the last one is {tmp_path / 'last.ckpt'}" in note


def test_ranks_that_end_at_the_same_place_save(tmp_path: Path) -> None:
    def on_rank(world: Any) -> list[str]:
        callback = ModelCheckpoint(tmp_path)
        trainer = Writing(tmp_path, callback, world=world, is_global_zero=world.rank == 0)
        trainer.begin()
        trainer.step()
        trainer.fail(SystemExit(143))
        return trainer.saved

    assert ranks(2, on_rank) == [["last.ckpt"], []]


# -- loggers --------------------------------------------------------------------------------------


def test_a_silent_logger_takes_everything_and_writes_nothing(tmp_path: Path) -> None:
    own = CSVLogger(tmp_path, "run")
    silent = Silent(own)
    silent.log_metrics({"x": 1.0}, 1)
    silent.log_hyperparams({"a": 1})
    silent.experiment.add_figure("x", figure=None).more[0]("y").attribute = 3
    with silent.experiment.run() as run:
        run["x"] = 1
    silent.flush()
    silent.finalize("finished")
    assert not list(tmp_path.iterdir())
    assert silent.log_dir == own.log_dir and silent.flush_every == own.flush_every
    assert silent.state_dict() == {}
