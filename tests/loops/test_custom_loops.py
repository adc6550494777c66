"""Loops of one's own, and the package's put together differently."""

import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from composefit import Callback, Loop, LoopModule, Trainer
from composefit.loops import EvaluateLoop, FitLoop, Limits, PredictLoop, TrainEpochLoop
from tests.lockstep.steps import data, every_strategy, linear, module, same, trainer, weights


def mean_square(self: Any, x: Tensor) -> Tensor:
    return self.net(x).square().mean()


def loader(samples: int = 12, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(data(samples, 3), batch_size=batch_size, **options)  # type: ignore[arg-type]


class Repeat(Loop):
    """Trains on one batch again and again."""

    def __init__(self, batch: Tensor, times: int) -> None:
        self.batch, self.times, self.done = batch, times, 0

    def run(self, trainer: Trainer, module: LoopModule) -> list[float]:
        losses = []
        while self.done < self.times:
            losses.append(float(trainer.step(module, [self.batch])["loss"]))
            self.done += 1
            trainer.between_steps()
        return losses

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


class Twice(Loop):
    """Two loops, one after the other, that are its attributes."""

    def __init__(self, first: Loop, second: Loop) -> None:
        self.first, self.second = first, second

    def run(self, trainer: Trainer, module: LoopModule) -> tuple[Any, Any]:
        return self.first.run(trainer, module), self.second.run(trainer, module)


class StopAt(Callback):
    """Raises after so many updates, once."""

    def __init__(self, update: int, error: BaseException) -> None:
        self.update, self.error, self.count = update, error, 0

    def on_after_optimizer_step(self, trainer: Any, module: Any) -> None:
        self.count += 1
        if self.count == self.update:
            raise self.error


# -- running ---------------------------------------------------------------------------------------


@every_strategy
def test_a_loop_of_ones_own_trains_as_a_hand_written_one(strategy):
    net, batch = linear(3, 2), data(7, 3)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    expected = []
    for _ in range(5):
        loss = net(batch).square().mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        expected.append(loss.item())
    own, runner = module(mean_square), trainer(strategy())
    assert runner.run(Repeat(batch, 5), own) == pytest.approx(expected, rel=1e-12)
    for mine, theirs in zip(weights(own), net.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=0)
    assert (runner.global_step, runner.updates) == (5, {"net": 5})


def test_run_begins_anew_each_time_and_keeps_the_weights():
    own, runner = module(mean_square), trainer()
    first = runner.run(Repeat(data(4, 3), 2), own)
    second = runner.run(Repeat(data(4, 3), 2), own)
    assert runner.global_step == 2
    assert second[0] < first[1] < first[0]


def test_the_same_loops_by_hand_are_fit():
    fitted, run = module(mean_square), module(mean_square)
    trainer(max_epochs=2).fit(fitted, loader(shuffle=True))
    trainer().run(FitLoop(TrainEpochLoop(loader(shuffle=True)), max_epochs=2), run)
    assert same(fitted, run)


def test_an_epoch_loop_runs_by_itself():
    own, runner, loop = module(mean_square), trainer(), TrainEpochLoop(loader())
    runner.run(loop, own)
    assert (loop.epoch, runner.global_step, runner.current_epoch) == (1, 3, 1)


def test_an_evaluation_or_a_prediction_runs_by_itself_without_optimizers():
    class Still(LoopModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = linear(3, 2)

        def validation_step(self, x: Tensor) -> None:
            self.log("mean", self.net(x).mean())

        def predict_step(self, x: Tensor) -> Tensor:
            return self.net(x)

    own, samples = Still(), data(12, 3)
    (found,) = trainer().run(EvaluateLoop(loader()), own)
    assert found == {"mean": pytest.approx(own.net(samples).mean().item(), rel=1e-12)}
    assert torch.equal(torch.cat(trainer().run(PredictLoop(loader()), own)), own.net(samples))


def test_what_is_no_loop_is_refused():
    with pytest.raises(TypeError, match=r"trainer\.run expects a Loop, got function"):
        trainer().run(lambda trainer, module: None, module(mean_square))


def test_a_loop_without_run_cannot_be_made():
    class Idle(Loop):
        pass

    with pytest.raises(TypeError, match="run"):
        Idle()


def test_a_loop_that_trains_needs_optimizers_before_any_work():
    class Bare(LoopModule):
        def prepare_data(self) -> None:
            raise AssertionError("work was done")

    with pytest.raises(TypeError, match="configure_optimizers"):
        trainer().run(Repeat(data(4, 3), 1), Bare())


def test_a_loop_cannot_be_run_from_within_a_run():
    class Nesting(Loop):
        def run(self, trainer: Trainer, module: LoopModule) -> None:
            trainer.run(Repeat(data(4, 3), 1), module)

    with pytest.raises(RuntimeError, match="running already"):
        trainer().run(Nesting(), module(mean_square))


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_setup_and_teardown_are_told_the_loops_stage(stage):
    told = []

    class Listening(Callback):
        def setup(self, trainer: Any, module: Any, stage: str) -> None:
            told.append(("setup", stage, trainer.stage))

        def teardown(self, trainer: Any, module: Any, stage: str) -> None:
            told.append(("teardown", stage, trainer.stage))

    kind = type("Staged", (Repeat,), {"stage": stage, "trains": True})
    trainer(callbacks=Listening()).run(kind(data(4, 3), 1), module(mean_square))
    assert told == [("setup", stage, stage), ("teardown", stage, stage)]


# -- swapping --------------------------------------------------------------------------------------


class EveryOther(TrainEpochLoop):
    """Leaves out every other batch."""

    def run(self, trainer: Trainer, module: LoopModule) -> None:
        for i, batch in enumerate(self.batches.epoch(self.epoch)):
            if i % 2 == 0:
                trainer.step(module, [batch], i)
            self.batch_idx = i + 1
            self.batches.mark()
            trainer.between_steps()
        trainer.end_epoch()
        self.epoch, self.batch_idx = self.epoch + 1, 0


def test_an_epoch_loop_of_ones_own_takes_its_place_in_a_fit():
    own, runner = module(mean_square), trainer()
    runner.run(FitLoop(EveryOther(loader(24)), max_epochs=2), own)
    by_hand = module(mean_square)
    trainer(max_epochs=2).fit(by_hand, list(data(24, 3).split(4))[::2])
    assert same(own, by_hand)
    assert (runner.global_step, runner.current_epoch) == (6, 2)


@pytest.mark.parametrize("limits", [Limits(max_steps=4), Limits(max_epochs=1)])
def test_the_limits_are_those_of_the_loop(limits):
    runner = trainer(max_epochs=100)
    runner.run(FitLoop(TrainEpochLoop(loader(24)), limits), module(mean_square))
    assert runner.global_step == (limits.max_steps or 6)


# -- state -----------------------------------------------------------------------------------------


def test_state_is_that_of_the_nested_loops_by_attribute():
    loop = Twice(Repeat(data(4, 3), 3), Twice(Repeat(data(4, 3), 1), Repeat(data(4, 3), 2)))
    trainer().run(loop, module(mean_square))
    state = loop.state_dict()
    assert state == {"first": {"done": 3}, "second": {"first": {"done": 1}, "second": {"done": 2}}}
    other = Twice(Repeat(data(4, 3), 3), Twice(Repeat(data(4, 3), 1), Repeat(data(4, 3), 2)))
    other.load_state_dict(state)
    assert other.state_dict() == state


@every_strategy
@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_nested_loop_goes_on_bitwise_where_it_was_stopped(strategy, stop, tmp_path):
    def dropping(self: Any, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.net(x), 0.4).square().mean()

    def make() -> tuple[Loop, Any]:
        loop = Twice(
            Repeat(data(6, 3, seed=2), 2),
            FitLoop(TrainEpochLoop(loader(12, 6, shuffle=True)), max_epochs=2),
        )
        adam = lambda parameters: torch.optim.Adam(parameters, lr=0.05)  # noqa: E731
        return loop, module(dropping, adam)

    loop, whole = make()
    trainer(strategy()).run(loop, whole)

    class Save(Callback):
        def on_after_optimizer_step(self, trainer: Any, module: Any) -> None:
            self.now = trainer.updates["net"] == stop

    save, (loop, own) = Save(), make()
    runner = trainer(strategy(), callbacks=save)
    look = runner.between_steps

    def between_steps() -> None:
        look()
        if save.now:
            runner.save_checkpoint(tmp_path / "state.ckpt")
            raise KeyboardInterrupt

    runner.between_steps = between_steps  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        runner.run(loop, own)
    assert not same(own, whole) or stop == 6

    loop, own = make()
    torch.manual_seed(123)
    trainer(strategy()).run(loop, own, ckpt_path=tmp_path / "state.ckpt")
    assert same(own, whole)


def test_another_kind_of_loop_does_not_go_on_from_a_checkpoint(tmp_path):
    own, runner = module(mean_square), trainer()
    runner.run(Repeat(data(4, 3), 1), own)
    runner.save_checkpoint(tmp_path / "state.ckpt")
    before = weights(own)
    with pytest.raises(ValueError, match="written by Repeat, and FitLoop is to go on"):
        runner.run(FitLoop(TrainEpochLoop(loader())), own, ckpt_path=tmp_path / "state.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(before, weights(own), strict=True))


# -- errors and the end ----------------------------------------------------------------------------


@every_strategy
def test_a_fault_in_a_loop_is_its_own_exception_and_the_trainer_can_be_used_again(strategy):
    class Faulty(Repeat):
        def run(self, trainer: Trainer, module: LoopModule) -> list[float]:
            super().run(trainer, module)
            raise LookupError("of the loop's own")

    own, runner = module(mean_square), trainer(strategy())
    with pytest.raises(LookupError, match=r"^of the loop's own$"):
        runner.run(Faulty(data(6, 3), 2), own)
    assert runner.stage is None
    assert len(runner.run(Repeat(data(6, 3), 2), own)) == 2


def test_callbacks_hear_of_a_fault_once_and_spans_of_the_loops_own_are_closed():
    heard = []

    class Listening(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            heard.append("start")

        def on_train_end(self, trainer: Any, module: Any) -> None:
            heard.append(("end", trainer.exception))

        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            heard.append(("exception", exception))

    class Spanned(Loop):
        def run(self, trainer: Trainer, module: LoopModule) -> None:
            with trainer.call.span("on_train_start", "on_train_end"):
                raise error

    error = LookupError("here")
    with pytest.raises(LookupError):
        trainer(callbacks=Listening()).run(Spanned(), module(mean_square))
    assert heard == ["start", ("exception", error), ("end", error)]


class Closing(Repeat):
    closed = 0

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("stop", [None, StopAt(2, RuntimeError("no"))])
def test_a_loop_and_those_nested_in_it_are_closed_once_however_the_run_ends(stop):
    loop = Twice(Closing(data(4, 3), 2), Closing(data(4, 3), 2))
    runner = trainer(callbacks=stop)
    if stop is None:
        runner.run(loop, module(mean_square))
    else:
        with pytest.raises(RuntimeError, match="no"):
            runner.run(loop, module(mean_square))
    assert (loop.first.closed, loop.second.closed) == (1, 1)  # type: ignore[attr-defined]


def test_workers_of_a_nested_loops_loader_end_with_the_run():
    loop = Twice(TrainEpochLoop(loader(num_workers=1)), Repeat(data(4, 3), 1))
    runner = trainer(callbacks=StopAt(1, RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        runner.run(loop, module(mean_square))
    assert multiprocessing.active_children() == []


@every_strategy
def test_restart_gives_new_counters_optimizers_and_draws_and_leaves_the_weights(strategy):
    def noisy(self: Any, x: Tensor) -> Tensor:
        drawn.append(self.random.shared.normal(1).item() if len(drawn) < 99 else 0)
        return self.net(x).square().mean()

    class Restarting(Loop):
        def run(self, trainer: Trainer, module: LoopModule) -> None:
            for _ in range(2):
                seen.append((trainer.global_step, dict(trainer.updates), trainer.logs))
                optimizers.append(trainer.optimizers["net"].optimizer)
                before = weights(module)
                trainer.step(module, [data(6, 3)])
                after = weights(module)
                trainer.restart(module)
                kept = zip(after, weights(module), strict=True)
                assert all(torch.equal(a, b) for a, b in kept)
                assert not torch.equal(before[0], after[0])

    drawn: list[float] = []
    seen: list[Any] = []
    optimizers: list[Any] = []
    trainer(strategy()).run(Restarting(), module(noisy))
    assert [each[:2] for each in seen] == [(0, {"net": 0})] * 2
    assert seen[0][2] is not seen[1][2] and optimizers[0] is not optimizers[1]
    assert len(set(drawn)) == 1
