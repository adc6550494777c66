"""Rules 4 and 10: one shard's run through the step, from its first effect to its end."""

import inspect
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import composefit
from composefit import Mean, SingleDevice, Strategy, Sum, ThreadDataParallel, Trainer
from tests.lockstep.steps import (
    data,
    every_strategy,
    linear,
    module,
    several_shards,
    trainer,
    weights,
)

# -- what a step may be ----------------------------------------------------------------------------


def _returned(self: Any, x: Tensor) -> Tensor:
    return self.net(x).square().mean()


def _in_a_dict(self: Any, x: Tensor) -> dict[str, Any]:
    return {"loss": self.net(x).square().mean()}


def _yielded(self: Any, x: Tensor) -> Iterator[Any]:
    yield self.net(x).square().mean()


def _named(self: Any, x: Tensor) -> Iterator[Any]:
    yield {"net": self.net(x).square().mean()}


def _returned_by_a_generator(self: Any, x: Tensor) -> Any:
    yield Sum(x.sum())
    return self.net(x).square().mean()


def _with_index(self: Any, x: Tensor, batch_idx: int) -> Tensor:
    assert batch_idx == 7
    return self.net(x).square().mean()


def _with_all(self: Any, *everything: Any) -> Tensor:
    x, batch_idx = everything
    assert batch_idx == 7
    return self.net(x).square().mean()


def _through_helpers(self: Any, x: Tensor) -> Any:
    def inner() -> Any:
        (reduced,) = (yield {"net": self.net(x).square().mean()}).values()
        return reduced

    def outer() -> Any:
        return (yield from inner())

    reduced = yield from outer()
    assert isinstance(reduced, Tensor)


def _a_token_mean(self: Any, x: Tensor) -> Any:
    squares = self.net(x).square()
    return Mean(squares.sum(), squares.numel())


@every_strategy
@pytest.mark.parametrize(
    "step",
    [
        _returned,
        _in_a_dict,
        _yielded,
        _named,
        _returned_by_a_generator,
        _with_index,
        _with_all,
        _through_helpers,
        _a_token_mean,
    ],
)
def test_all_ways_to_hand_over_a_loss_mean_the_same(
    step: Callable[..., Any], strategy: Callable[[], Strategy]
) -> None:
    net, x, expected = module(step), data(7, 3), linear(3, 2)
    loss = expected(x).square().mean()
    found = torch.autograd.grad(loss, list(expected.parameters()))
    outputs = trainer(strategy()).step(net, [x], 7)
    assert outputs.keys() == {"loss"} and not outputs["loss"].requires_grad
    torch.testing.assert_close(outputs["loss"], loss.detach(), rtol=1e-12, atol=1e-12)
    for p, q, g in zip(net.parameters(), expected.parameters(), found, strict=True):
        torch.testing.assert_close(p, q - 0.1 * g, rtol=1e-12, atol=1e-12)


@every_strategy
def test_the_reduced_losses_come_back_to_every_shard(strategy: Callable[[], Strategy]) -> None:
    seen: list[Any] = []

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        found = yield {"a": self.a(x).square().mean(), "b": self.b(x).square().mean()}
        seen.append({name: loss.item() for name, loss in found.items()})
        assert not any(loss.requires_grad for loss in found.values())

    net, x = module(step, a=linear(3, 2), b=linear(3, 2, seed=1)), data(7, 3)
    expected = {name: layer(x).square().mean().item() for name, layer in net.named_children()}
    trainer(strategy()).step(net, [x])
    assert seen
    for found in seen:
        assert found == pytest.approx(expected, rel=1e-12)


@every_strategy
@pytest.mark.parametrize("value", [3, 0.5, "loss", [1], object()])
@pytest.mark.parametrize("how", ["returned", "yielded", "returned by a generator"])
def test_any_other_value_is_an_error(
    how: str, value: object, strategy: Callable[[], Strategy]
) -> None:
    def returned(self: Any, x: Tensor) -> Any:
        return value

    def yielded(self: Any, x: Tensor) -> Any:
        yield value

    def by_generator(self: Any, x: Tensor) -> Any:
        yield self.net(x).mean()
        return value

    step = {"returned": returned, "yielded": yielded}.get(how, by_generator)
    with pytest.raises(
        TypeError, match=f"{how.split()[0]} {type(value).__name__}.*expected a loss"
    ):
        trainer(strategy()).step(module(step), [data(6, 3)])


# -- ends ------------------------------------------------------------------------------------------


def _nothing(self: Any, x: Tensor) -> None:
    return None


def _ends_at_once(self: Any, x: Tensor) -> Iterator[Any]:
    if self.global_step >= 0:
        return
    yield self.net(x).mean()


def _none_in_a_dict(self: Any, x: Tensor) -> Any:
    return {"loss": None}


@every_strategy
@pytest.mark.parametrize("step", [_nothing, _ends_at_once, _none_in_a_dict])
def test_a_step_without_an_update_is_a_skipped_step(
    step: Callable[..., Any], strategy: Callable[[], Strategy]
) -> None:
    net = module(step)
    before = weights(net)
    run = trainer(strategy())
    assert run.step(net, [data(6, 3)]) == {}
    assert run.global_step == 1 and run.updates == {"net": 0}
    assert all(map(torch.equal, weights(net), before))


@every_strategy
def test_a_whole_epoch_of_skipped_steps_warns(strategy: Callable[[], Strategy]) -> None:
    with pytest.warns(UserWarning, match="none of the 3 steps of epoch 0 updated anything"):
        trainer(strategy()).fit(module(_nothing), [data(6, 3)] * 3)


def _next_at_the_end(self: Any, x: Tensor) -> Any:
    next(iter(()))
    return self.net(x).mean()


def _next_in_a_generator(self: Any, x: Tensor) -> Iterator[Any]:
    yield self.net(x).mean()
    next(iter(()))


@every_strategy
@pytest.mark.parametrize("step", [_next_at_the_end, _next_in_a_generator])
def test_a_stray_stop_iteration_does_not_end_training_in_silence(
    step: Callable[..., Any], strategy: Callable[[], Strategy]
) -> None:
    with pytest.raises(RuntimeError, match="raised StopIteration") as caught:
        trainer(strategy()).fit(module(step), [data(6, 3)] * 3)
    assert isinstance(caught.value.__cause__, StopIteration)
    lines = traceback.extract_tb(caught.value.__cause__.__traceback__)
    assert lines[-1].line == "next(iter(()))"


# -- generators that nobody runs -------------------------------------------------------------------


def with_helper(step: Callable[..., Any]) -> Any:
    net = module(step)

    def helper(self: Any, x: Tensor) -> Any:
        yield {"net": self.net(x).square().mean()}
        return "done"

    return type("WithHelper", (type(net),), {"helper": helper})({"net": linear(3, 2)}, net.make)


def _helper_yielded(self: Any, x: Tensor) -> Iterator[Any]:
    yield self.helper(x)


def _helper_dropped(self: Any, x: Tensor) -> Iterator[Any]:
    self.helper(x)
    yield self.net(x).mean()


def _helper_dropped_by_a_plain_step(self: Any, x: Tensor) -> Tensor:
    self.helper(x)
    return self.net(x).mean()


@every_strategy
@pytest.mark.parametrize(
    "step", [_helper_yielded, _helper_dropped, _helper_dropped_by_a_plain_step]
)
def test_a_helper_that_nobody_runs_is_an_error(
    step: Callable[..., Any], strategy: Callable[[], Strategy]
) -> None:
    net = with_helper(step)
    before = weights(net)
    with pytest.raises((TypeError, RuntimeError), match=r"yield from self\.helper\(\.\.\.\)"):
        trainer(strategy()).step(net, [data(6, 3)])
    assert all(map(torch.equal, weights(net), before))


def _a_generator_yielded(self: Any, x: Tensor) -> Iterator[Any]:
    yield (loss for loss in [self.net(x).mean()])


@every_strategy
def test_a_generator_yielded_is_an_error(strategy: Callable[[], Strategy]) -> None:
    with pytest.raises(TypeError, match=r"yielded a generator.*`yield from"):
        trainer(strategy()).step(module(_a_generator_yielded), [data(6, 3)])


@every_strategy
def test_a_helper_run_with_yield_from_does_its_part(strategy: Callable[[], Strategy]) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        for _ in range(2):
            assert (yield from self.helper(x)) == "done"

    def returning(self: Any, x: Tensor) -> Any:
        return self.helper(x)  # the step is then the helper

    run = trainer(strategy())
    run.step(with_helper(step), [data(6, 3)])
    assert run.updates == {"net": 2}
    with pytest.raises(TypeError, match="str 'done'"):
        run.step(with_helper(returning), [data(6, 3)])


# -- one worker for life, and an end for every shard -----------------------------------------------


class Closed:
    """Notes, per shard, the threads in which its code ran."""

    def __init__(self) -> None:
        self.threads: dict[float, list[int]] = {}
        self.finished: set[float] = set()

    def note(self, x: Tensor) -> float:
        key = x[0, 0].item()
        self.threads.setdefault(key, []).append(threading.get_ident())
        return key


def numbered(rows: int) -> Tensor:
    """Rows whose first number is their index."""
    x = data(rows, 3)
    x[:, 0] = torch.arange(rows)
    return x


@several_shards
def test_a_shard_keeps_its_worker_from_its_first_line_to_its_finally(
    strategy: Callable[[], Strategy],
) -> None:
    log = Closed()

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        try:
            for _ in range(4):
                log.note(x)
                yield {"net": self.net(x).square().mean()}
        finally:
            log.note(x)

    run = trainer(strategy(), accumulate_grad_batches=2)
    run.fit(module(step), [numbered(6)] * 4)
    assert len(log.threads) == 3
    assert all(len(threads) == 20 for threads in log.threads.values())
    assert all(len(set(threads)) == 1 for threads in log.threads.values())
    ids = {threads[0] for threads in log.threads.values()}
    assert len(ids) == (3 if isinstance(run.strategy, ThreadDataParallel) else 1)
    assert threading.get_ident() in ids


@several_shards
@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_when_one_shard_raises_the_others_are_closed_in_their_workers(
    error: type[BaseException], failing: int, strategy: Callable[[], Strategy]
) -> None:
    log = Closed()
    faulty = -1.0

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        key = log.note(x)
        try:
            yield {"net": self.net(x).square().mean()}
            if key == faulty:
                raise error("mine")
            yield {"net": self.net(x).square().mean()}
        finally:
            log.note(x)
            log.finished.add(key)

    net = module(step)
    run = trainer(strategy())
    with run.strategy:
        run.step(net, [numbered(6)])
        log.finished.clear()
        faulty = 2.0 * failing
        with pytest.raises(error, match="mine") as caught:
            run.step(net, [numbered(6)])
        assert log.finished == {0.0, 2.0, 4.0}
        assert all(len(set(threads)) == 1 for threads in log.threads.values())
        (note,) = caught.value.__notes__
        assert f"shard {failing} (lane {failing}, thread" in note
        assert "step 1, batch 0" in note
        assert "updates done before it: net: 3" in note
        last = traceback.extract_tb(caught.tb)[-1]
        assert (last.filename, last.line) == (__file__, 'raise error("mine")')
        assert all(p.grad is None for p in net.parameters())
        faulty = -1.0
        run.step(net, [numbered(6)])  # and on it goes
    assert run.updates == {"net": 5}


@every_strategy
def test_the_state_after_a_fault_is_that_of_the_last_completed_update(
    strategy: Callable[[], Strategy],
) -> None:
    def faulty(self: Any, x: Tensor) -> Iterator[Any]:
        yield {"a": self.a(x).square().mean()}
        yield {"b": self.b(x).square().mean()}
        raise ValueError("mine")

    def whole(self: Any, x: Tensor) -> Iterator[Any]:
        yield {"a": self.a(x).square().mean()}
        yield {"b": self.b(x).square().mean()}

    nets = [module(step, a=linear(3, 2), b=linear(3, 2, seed=1)) for step in (faulty, whole)]
    runs = [trainer(strategy()) for _ in nets]
    with pytest.raises(ValueError, match="mine") as caught:
        runs[0].step(nets[0], [data(6, 3)])
    assert "updates done before it: a: 1, b: 1" in caught.value.__notes__[0]
    runs[1].step(nets[1], [data(6, 3)])
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
    assert runs[0].updates == {"a": 1, "b": 1} and runs[0].global_step == 0


@pytest.mark.parametrize("cut", [{}, {"microbatch_size": 1}], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("error", [ValueError, FloatingPointError])
@every_strategy
def test_nothing_of_a_failed_step_is_in_the_next(
    error: type[Exception], cut: dict[str, Any], strategy: Callable[[], Strategy]
) -> None:
    # At the fault some shards have taken their gradients, or all have and none was used.
    faulty = True

    def step(self: Any, x: Tensor) -> Iterator[Any]:
        if faulty and error is ValueError and x[-1, 0] == 5:
            raise ValueError("mine")
        yield {"net": self.net(x).square().mean() * (float("nan") if faulty else 1.0)}

    nets = [module(step) for _ in range(2)]
    runs = [trainer(strategy(), **cut) for _ in nets]
    with pytest.raises(error):
        runs[0].step(nets[0], [numbered(6)])
    faulty = False
    for net, run in zip(nets, runs, strict=True):
        run.step(net, [numbered(6)])
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
    assert all(p.isfinite().all() for p in nets[0].parameters())


@several_shards
def test_errors_of_several_shards_are_one_error_with_a_note_of_the_rest(
    strategy: Callable[[], Strategy],
) -> None:
    def step(self: Any, x: Tensor) -> Tensor:
        raise ValueError(f"mine, at row {x[0, 0].item():.0f}")

    run = trainer(strategy())
    with pytest.raises(ValueError, match="mine, at row 0") as caught:
        run.step(module(step), [numbered(6)])
    if isinstance(run.strategy, ThreadDataParallel):
        notes = "\n".join(caught.value.__notes__)
        assert "shard 1 raised ValueError('mine, at row 2') as well" in notes
        assert "shard 2 raised ValueError('mine, at row 4') as well" in notes


@every_strategy
def test_an_error_thrown_in_at_a_yield_may_not_be_swallowed(
    strategy: Callable[[], Strategy],
) -> None:
    def step(self: Any, x: Tensor) -> Iterator[Any]:
        try:
            yield {"unknown": self.net(x).mean()}
        except ValueError:
            yield {"net": self.net(x).mean()}

    net = module(step)
    before = weights(net)
    with pytest.raises(ValueError, match="there is no optimizer 'unknown'"):
        trainer(strategy()).step(net, [data(6, 3)])
    assert all(map(torch.equal, weights(net), before))


# -- what a shard's random draws are ---------------------------------------------------------------


@every_strategy
def test_a_steps_own_draws_leave_the_default_generator_alone(
    strategy: Callable[[], Strategy],
) -> None:
    # Else the order of samples, which the loader draws from it, would depend on the strategy.
    draws: dict[int, list[Tensor]] = {0: [], 1: []}

    def step(self: Any, x: Tensor) -> Tensor:
        draws[self.global_step].append(torch.rand(2))
        return self.net(x).mean()

    net, run = module(step), trainer(strategy())
    run.step(net, [data(6, 3)])
    state = torch.get_rng_state()
    run.step(net, [data(6, 3)])
    assert torch.equal(torch.get_rng_state(), state)
    drawn = draws[0] + draws[1]
    assert len({tuple(d.tolist()) for d in drawn}) == len(drawn)


# -- distance from fit to the user's code ----------------------------------------------------------


def test_at_most_six_frames_lie_between_fit_and_the_step() -> None:
    ours = Path(composefit.__file__).parent
    frames: list[str] = []

    def step(self: Any, x: Tensor) -> Tensor:
        frames[:] = [
            frame.function
            for frame in inspect.stack()[1:]
            if Path(frame.filename).is_relative_to(ours)
        ]
        return self.net(x).mean()

    trainer(SingleDevice("cpu")).fit(module(step), [data(6, 3)])
    assert frames[-1] == Trainer.fit.__name__ and len(frames) <= 6, frames
