"""F19 to F28c: steps that cannot mean what they say."""

import gc
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from composefit import (
    Callback,
    Gather,
    LoopModule,
    Mean,
    Once,
    SingleDevice,
    Strategy,
    ThreadDataParallel,
)
from tests.faults.conftest import Tells
from tests.faults.fault import strikes, surfaces, trains_again, two
from tests.faults.table import message
from tests.lockstep.steps import (
    F64,
    data,
    every_strategy,
    linear,
    module,
    several_shards,
    trainer,
    weights,
)

Make = Callable[[], Strategy]


def one() -> dict[str, nn.Module]:
    return {"net": linear(3, 1)}


# -- F19 to F21: what is no loss -----------------------------------------------------------------


@every_strategy
def test_f19_loss_not_scalar(strategy: Make, tells: Tells) -> None:
    def returned(self: Any, x: Tensor) -> Any:
        return self.net(x).square()

    def yielded(self: Any, x: Tensor) -> Any:
        yield {"a": self.a(x).square()}

    def mean(self: Any, x: Tensor) -> Any:
        yield {"a": Mean(self.a(x).square(), len(x))}

    words = ("must be a 0-dim tensor", "got shape (", ", 1)", "call .mean()", "Mean(total, weight)")
    strikes(strategy, returned, ValueError, "the loss", *words, children=one())
    line = 'yield {"a": self.a(x).square()}'
    found = strikes(strategy, yielded, ValueError, "the loss of 'a'", *words, line=line)
    if strategy().lanes == 1:  # of other shards the shape is another
        tells(found)
    line = 'yield {"a": Mean(self.a(x).square(), len(x))}'
    strikes(strategy, mean, ValueError, "Mean's total", *words, line=line)


@every_strategy
def test_f20_loss_without_a_path_to_its_parameters(strategy: Make, tells: Tells) -> None:
    def others(self: Any, x: Tensor) -> Any:
        yield {"a": self.b(x).square().mean()}

    def without_grad(self: Any, x: Tensor) -> Any:
        with torch.no_grad():
            loss = self.a(x).square().mean()
        yield {"a": loss}

    def detached(self: Any, x: Tensor) -> Any:
        return self.net(x).square().mean().detach()

    words = ("reaches none of its optimizer's parameters", "detached", "no_grad()", "Compute it in")
    line = 'yield {"a": self.b(x).square().mean()}'
    tells(strikes(strategy, others, RuntimeError, "the loss of 'a'", *words, line=line))
    strikes(
        strategy, without_grad, RuntimeError, "the loss of 'a'", *words, line='yield {"a": loss}'
    )
    strikes(strategy, detached, RuntimeError, "the loss of 'net'", *words, children=one())


@every_strategy
def test_f20_frozen_parameters(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Any:
        self.a.requires_grad_(self.global_step < 0)
        yield {"a": self.a(x).square().mean()}

    children = two()
    words = ("the loss of 'a' reaches none", "all of them frozen (requires_grad=False)")
    net = module(step, **children)
    before = weights(net)
    with surfaces(RuntimeError, *words):
        trainer(strategy()).step(net, [data(6, 3)])
    assert all(map(torch.equal, weights(net), before))


@every_strategy
def test_f21_loss_of_another_type(strategy: Make) -> None:
    def number(self: Any, x: Tensor) -> Any:
        return self.net(x).mean().item()

    def text(self: Any, x: Tensor) -> Any:
        return "loss"

    def pair(self: Any, x: Tensor) -> Any:
        return self.net(x).mean(), x

    def nothing(self: Any, x: Tensor) -> Any:
        yield

    def keys(self: Any, x: Tensor) -> Any:
        yield from {"a": self.a(x).mean()}

    def inner(self: Any, x: Tensor) -> Any:
        yield {"a": self.a(x).mean().item()}

    expected = ("expected a loss (0-dim tensor, Mean, Sum), {name: loss} or an effect",)
    item = "was .item() called on the loss?"
    for step, got, hint in (
        (number, "returned float ", item),
        (text, "returned str 'loss'", ""),
        (pair, "returned tuple (tensor(", ""),
    ):
        strikes(strategy, step, TypeError, got, hint, *expected, children=one())
    words = ("yielded None", "to skip a step, `return`")
    strikes(strategy, nothing, TypeError, *words, *expected, line="yield")
    words = ("yielded str 'a'", "`yield from` a dict hands over its keys, write `yield`")
    line = 'yield from {"a": self.a(x).mean()}'
    strikes(strategy, keys, TypeError, *words, *expected, line=line)
    words = ("the loss of 'a' must be a 0-dim tensor, Mean or Sum, got float ", item)
    strikes(strategy, inner, TypeError, *words, line='yield {"a": self.a(x).mean().item()}')


@every_strategy
def test_f21_loss_of_an_unknown_optimizer(strategy: Make, tells: Tells) -> None:
    def unknown(self: Any, x: Tensor) -> Any:
        yield {"aa": self.a(x).mean()}

    def bare(self: Any, x: Tensor) -> Any:
        yield self.a(x).mean()

    def empty(self: Any, x: Tensor) -> Any:
        yield {}

    def returned(self: Any, x: Tensor) -> Any:
        return {"a": self.a(x).mean(), "c": self.b(x).mean()}

    words = ("there is no optimizer 'aa'", "['a', 'b']", "did you mean 'a'?")
    tells(strikes(strategy, unknown, ValueError, *words, line='yield {"aa": self.a(x).mean()}'))
    words = ("a bare loss needs one optimizer, there are 2", "`yield {name: loss}`", "['a', 'b']")
    strikes(strategy, bare, ValueError, *words, line="yield self.a(x).mean()")
    words = ("at least one {name: loss}, got an empty dict",)
    strikes(strategy, empty, ValueError, *words, line="yield {}")
    words = ("there is no optimizer 'c'", "['a', 'b']")
    strikes(strategy, returned, ValueError, *words)


# -- F22: numbers that are none ------------------------------------------------------------------


@every_strategy
def test_f22_nan_or_infinity(strategy: Make, tells: Tells) -> None:
    def returned(self: Any, x: Tensor) -> Any:
        return self.net(x).mean() * float("nan")

    def loss_alone(self: Any, x: Tensor) -> Any:
        yield {"a": self.a(x).mean() + float("inf")}

    def gradient_alone(self: Any, x: Tensor) -> Any:
        yield {"a": (self.a(x) * 0).sqrt().mean()}  # 0, of slope inf times 0

    def second(self: Any, x: Tensor) -> Any:
        yield {"a": self.a(x).mean(), "b": self.b(x).mean() * float("inf")}

    advice = ("No weight was changed", "gradient_clip_val=...", 'on_nonfinite="skip"')
    words = (
        "the update of 'net' in step 0 is not finite: loss nan",
        "gradient of net.weight (2 of 2",
    )
    tells(strikes(strategy, returned, FloatingPointError, *words, *advice, children=one()))
    words = ("the update of 'a' in step 0 is not finite: loss inf. No",)
    line = 'yield {"a": self.a(x).mean() + float("inf")}'
    strikes(strategy, loss_alone, FloatingPointError, *words, *advice, line=line)
    words = (
        "the update of 'a' in step 0 is not finite: loss 0, first in the gradient of a.weight",
    )
    line = 'yield {"a": (self.a(x) * 0).sqrt().mean()}  # 0, of slope inf times 0'
    strikes(strategy, gradient_alone, FloatingPointError, *words, *advice, line=line)
    words = (
        "the update of 'b' in step 0 is not finite",
        "gradient of b.weight (2 of 2 parameters)",
    )
    line = 'yield {"a": self.a(x).mean(), "b": self.b(x).mean() * float("inf")}'
    strikes(strategy, second, FloatingPointError, *words, *advice, line=line)


@every_strategy
def test_f22_nan_in_one_shard_is_enough(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Any:
        return self.net(x).square().mean()

    net, run = module(step), trainer(strategy())
    spoiled = data(6, 3)
    spoiled[5] = float("nan")
    with surfaces(FloatingPointError, "the update of 'net' in step 1 is not finite") as found:
        run.fit(net, [data(6, 3), spoiled])
    assert "step 1, batch 1, last effect a loss" in found.notes
    assert "updates done before it: net: 1" in found.notes
    trains_again(run, net, strategy, data(6, 3))


@every_strategy
def test_f22_skip_and_ignore(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Any:
        return self.net(x).square().mean()

    spoiled, x = data(6, 3) * float("inf"), data(6, 3)
    net, other = module(step), module(step)
    run = trainer(strategy(), on_nonfinite="skip")
    run.fit(net, [x, spoiled, x])
    assert run.updates == {"net": 2} and run.global_step == 3
    trainer(strategy()).fit(other, [x, x])
    assert all(map(torch.equal, weights(net), weights(other)))
    with pytest.warns(UserWarning, match=r"none of the 2 steps.*were not finite \(2 times\)"):
        run.fit(net, [spoiled, spoiled])
    assert all(map(torch.equal, weights(net), weights(other)))
    run = trainer(strategy(), on_nonfinite="ignore")
    run.fit(net, [spoiled])
    assert run.updates == {"net": 1}
    assert all(p.isnan().all() for p in weights(net))


@every_strategy
def test_f22_fp16_infinity_lowers_the_scale(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Any:
        before.append(weights(self)[0])
        return self.net(x).float().mean() * 1000  # times the first scale: not within float16

    before: list[Tensor] = []
    net = module(step, net=nn.Linear(3, 1))
    run = trainer(strategy(), precision="16-mixed")
    run.fit(net, [data(6, 3).float()] * 12)
    assert run.global_step == 12 and 0 < run.updates["net"] < 12
    skipped = 12 - run.updates["net"]
    shards = len(before) // 12
    start = before[0]
    assert all(torch.equal(weight, start) for weight in before[: (skipped + 1) * shards])
    assert not torch.equal(before[(skipped + 1) * shards], start)
    assert all(p.isfinite().all() for p in weights(net))


# -- F23, F24: updates that never come -----------------------------------------------------------


@every_strategy
def test_f23_optimizer_that_is_never_updated(strategy: Make, tells: Tells) -> None:
    def step(self: Any, x: Tensor) -> Any:
        yield {"a": self.a(x).mean()}

    message = r"optimizer 'b' was never updated in epoch 0: no step yielded \{'b': loss\}"
    with pytest.warns(UserWarning, match=message) as caught:
        trainer(strategy()).fit(module(step, **two()), [data(6, 3)] * 2)
    assert len(caught) == 1
    tells(caught[0].message)


@every_strategy
def test_f24_skipped_steps(strategy: Make) -> None:
    def none(self: Any, x: Tensor) -> Any:
        return None

    def early(self: Any, x: Tensor) -> Any:
        if len(x):
            return
        yield self.net(x).mean()

    def sometimes(self: Any, x: Tensor) -> Any:
        return None if self.global_step % 2 else self.net(x).mean()

    for step in (none, early):
        net, run = module(step), trainer(strategy())
        before = weights(net)
        with pytest.warns(UserWarning, match="none of the 2 steps of epoch 0 updated anything"):
            run.fit(net, [data(6, 3)] * 2)
        assert run.global_step == 2 and run.updates == {"net": 0}
        assert all(map(torch.equal, weights(net), before))
    run = trainer(strategy())
    run.fit(module(sometimes), [data(6, 3)] * 4)  # and no warning
    assert run.global_step == 4 and run.updates == {"net": 2}


def with_helper(step: Callable[..., Any]) -> Any:
    """A module with a method that is a generator."""

    def helper(self: Any, x: Tensor) -> Any:
        yield {"a": self.a(x).mean()}

    net = module(step, **two())
    return type("Helped", (type(net),), {"helper": helper})(two(), net.make)


@every_strategy
def test_f24_generator_that_nobody_runs(strategy: Make, tells: Tells) -> None:
    def yielded(self: Any, x: Tensor) -> Any:
        yield self.helper(x)

    def dropped(self: Any, x: Tensor) -> Any:
        self.helper(x)
        yield {"b": self.b(x).mean()}

    advice = "write `yield from self.helper(...)`"
    words = ("yielded a generator, which does nothing by itself", advice)
    net = with_helper(yielded)
    strikes(strategy, yielded, TypeError, *words, line="yield self.helper(x)", net=net)
    words = ("helper() is a generator and does nothing when called", advice)
    net = with_helper(dropped)
    line = 'yield {"b": self.b(x).mean()}'
    found = strikes(strategy, dropped, RuntimeError, *words, line=line, net=net)
    tells("the steps are skipped, and a whole epoch of them warns; the helper:", found)


@every_strategy
def test_f24_helper_that_an_earlier_fault_left_behind_is_not_told_of_again(strategy: Make) -> None:
    def yielded(self: Any, x: Tensor) -> Any:
        yield self.helper(x)

    def sound(self: Any, x: Tensor) -> Any:
        kept.clear()
        gc.collect()
        yield {"a": self.a(x).mean(), "b": self.b(x).mean()}

    net, run = with_helper(yielded), trainer(strategy())
    kept: list[BaseException] = []
    with surfaces(TypeError, "yielded a generator") as found:
        run.step(net, [data(6, 3)])
    kept.append(found.error)  # whose traceback holds the helper
    del found.error
    type(net).training_step = sound
    run.step(net, [data(6, 3)])
    assert run.updates == {"a": 1, "b": 1}


# -- F25: shards that disagree -------------------------------------------------------------------


@several_shards
def test_f25_shards_that_disagree(strategy: Make, tells: Tells) -> None:
    def names(self: Any, x: Tensor) -> Any:
        yield {"a" if x[0, 0] == 0 else "b": self.a(x).mean() + self.b(x).mean()}

    def kinds(self: Any, x: Tensor) -> Any:
        yield Mean(x.sum(), 3) if x[0, 0] == 0 else Gather(x)

    def counts(self: Any, x: Tensor) -> Any:
        yield {"a": self.a(x).mean()}
        if x[0, 0] == 0:
            yield {"a": self.a(x).mean()}

    def returns(self: Any, x: Tensor) -> Any:
        return None if x[0, 0] == 0 else self.net(x).mean()

    def once(self: Any, x: Tensor) -> Any:
        yield {"a": self.a(x).mean()}

    rows = torch.arange(6, dtype=F64)[:, None].expand(6, 3).contiguous()
    advice = ("the shards of this step disagree", "same effects", "value = yield Mean(", "shared")
    words = ("yielded {'a': loss}", "yielded {'b': loss}")
    line = 'yield {"a" if x[0, 0] == 0 else "b": self.a(x).mean() + self.b(x).mean()}'
    tells(strikes(strategy, names, RuntimeError, *advice, *words, line=line, batch=rows))
    words = ("yielded Mean(", "yielded Gather((2, 3))")
    line = "yield Mean(x.sum(), 3) if x[0, 0] == 0 else Gather(x)"
    strikes(strategy, kinds, RuntimeError, *advice, *words, line=line, batch=rows)
    words = ("yielded {'a': loss}", "ended", "updates done before it: a: 1, b: 0")
    line = 'yield {"a": self.a(x).mean()}'
    found = strikes(
        strategy, counts, RuntimeError, *advice, *words, line=line, done=once, batch=rows
    )
    first = counts.__code__.co_firstlineno
    assert f"shard 0 ({__file__}:{first + 3}): yielded" in found.text
    words = ("ended", "returned a loss")
    strikes(strategy, returns, RuntimeError, *advice, *words, children=one(), batch=rows)


# -- F26, F27: exceptions of the user's own ------------------------------------------------------


@every_strategy
def test_f26_stop_iteration(strategy: Make, tells: Tells) -> None:
    def returned(self: Any, x: Tensor) -> Any:
        next(iter(()))
        return self.net(x).mean()

    def yielded(self: Any, x: Tensor) -> Any:
        yield {"a": self.a(x).mean()}
        next(iter(()))

    def once(self: Any, x: Tensor) -> Any:
        yield {"a": self.a(x).mean()}

    words = (
        "training_step raised StopIteration",
        "end training in silence",
        "next(iterator, default)",
    )
    line = "next(iter(()))"
    found = strikes(strategy, returned, RuntimeError, *words, line=line, children=one())
    assert isinstance(found.error.__cause__, StopIteration)
    tells(found)
    found = strikes(strategy, yielded, RuntimeError, *words, line=line, done=once)
    assert isinstance(found.error.__cause__, StopIteration)


@every_strategy
def test_f27_exception_in_one_shard(strategy: Make, tells: Tells) -> None:
    closed: list[int] = []

    def step(self: Any, x: Tensor) -> Any:
        try:
            yield {"a": self.a(x).square().mean()}
            if 5.0 in x[:, 0]:
                raise KeyError("mine")
            yield {"b": self.b(x).square().mean()}
        finally:
            closed.append(threading.get_ident())

    def once(self: Any, x: Tensor) -> Any:
        yield {"a": self.a(x).square().mean()}

    rows = torch.arange(6, dtype=F64)[:, None].expand(6, 3).contiguous()
    shards = 1 if strategy().lanes == 1 else 3
    last = f"shard {shards - 1} (lane {shards - 1}, thread "
    words = ("'mine'", last, "last effect {'a': loss}", "updates done before it: a: 1, b: 0")
    found = strikes(
        strategy, step, KeyError, *words, line='raise KeyError("mine")', done=once, batch=rows
    )
    assert len(closed) == shards
    threaded = isinstance(strategy(), ThreadDataParallel)
    assert ("thread composefit-lane-2" in found.notes) is threaded
    assert len(set(closed)) == (3 if threaded else 1)
    if threaded:
        tells("the error itself, at its line, with the note", message(found.note("shard 2")))


@every_strategy
def test_f27_state_after_it_is_that_of_the_last_completed_update(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Any:
        yield {"a": self.a(x).square().mean()}
        if self.global_step == faulty:
            raise KeyError("mine")
        yield {"b": self.b(x).square().mean()}

    def momentum(parameters: Any) -> SGD:
        return SGD(parameters, lr=0.1, momentum=0.9)

    nets, runs = [], []
    for faulty in (2, 3):
        net, run = module(step, momentum, **two()), trainer(strategy())
        with surfaces(KeyError, f"step {faulty}, batch {faulty}", f"a: {faulty + 1}, b: {faulty}"):
            run.fit(net, [data(6, 3)] * 5)
        nets.append(net)
        runs.append(run)
    assert runs[0].global_step == 2 and runs[0].updates == {"a": 3, "b": 2}
    # Three steps of a and two of b, momentum included: what a loop makes of it.
    expected = module(step, momentum, **two())
    optimizers = expected.configure_optimizers()
    for name in ("a", "b", "a", "b", "a"):
        loss = getattr(expected, name)(data(6, 3)).square().mean()
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()
    for p, q in zip(weights(nets[0]), weights(expected), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    trains_again(runs[0], nets[0], strategy, data(6, 3))


@several_shards
def test_f27_exception_while_shards_are_closed_does_not_hide_the_first(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Any:
        yield {"a": self.a(x).mean()}
        if x[0, 0] == 0:
            raise KeyError("mine")
        try:
            yield {"b": self.b(x).mean()}
        finally:
            raise OSError("closing")

    def once(self: Any, x: Tensor) -> Any:
        yield {"a": self.a(x).mean()}

    rows = torch.arange(6, dtype=F64)[:, None].expand(6, 3).contiguous()
    words = ("'mine'", "closing shard 1 raised OSError('closing')", "closing shard 2 raised")
    line = 'raise KeyError("mine")'
    strikes(strategy, step, KeyError, *words, line=line, done=once, batch=rows)


@every_strategy
def test_f27_interrupt_at_a_barrier_is_not_hidden_by_what_closing_raises(strategy: Make) -> None:
    class Interrupting(Callback):
        def on_before_optimizer_step(self) -> None:
            raise KeyboardInterrupt

    def step(self: Any, x: Tensor) -> Any:
        try:
            yield self.net(x).mean()
        finally:
            raise OSError("closing")

    net = module(step)
    before = weights(net)
    words = ("last effect a loss", "closing shard 0 raised OSError('closing')")
    with surfaces(KeyboardInterrupt, *words):
        trainer(strategy(), callbacks=Interrupting()).fit(net, [data(6, 3)])
    assert all(map(torch.equal, weights(net), before))
    assert all(p.grad is None for p in net.parameters())


@several_shards
def test_f27_error_of_a_backward_after_a_gather_is_at_the_users_line(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Any:
        everything, _ = yield from Gather(self.a(x))
        yield {"a": everything.square().mean()}
        yield {"a": everything.square().sum()}

    def once(self: Any, x: Tensor) -> Any:
        everything, _ = yield from Gather(self.a(x))
        yield {"a": everything.square().mean()}

    line = 'yield {"a": everything.square().sum()}'
    words = (
        "the update of 'a'",
        f"{__file__}:{step.__code__.co_firstlineno + 2}",
        "retain_graph=True",
    )
    strikes(strategy, step, RuntimeError, *words, line=line, done=once)


# -- F28 to F28c: what must not be left behind ---------------------------------------------------


class Queued(LoopModule):
    """Has a buffer that is no running statistic, and a list."""

    def __init__(self, step: Callable[..., Any]) -> None:
        super().__init__()
        type(self).training_step = step  # type: ignore[method-assign]
        self.net = linear(3, 1)
        self.queue: Tensor
        self.register_buffer("queue", torch.zeros(3, dtype=F64))
        self.outputs: list[int] = []
        self.seen = 0

    def configure_optimizers(self) -> Any:
        return {"net": SGD(self.net.parameters(), lr=0.1)}

    def enqueue(self, x: Tensor) -> None:
        self.queue.copy_(x.sum(0))
        self.seen += len(x)


@several_shards
def test_f28_attribute_set_in_a_step(strategy: Make, tells: Tells) -> None:
    def counted(self: Any, x: Tensor) -> Any:
        self.seen += 1
        return self.net(x).mean()

    def replaced(self: Any, x: Tensor) -> Any:
        yield Mean(x.sum(), 1)
        self.queue = x[0]

    def deleted(self: Any, x: Tensor) -> Any:
        del self.outputs
        return self.net(x).mean()

    found = []
    for step, words, line in (
        (counted, ("self.seen = ...", "a local variable"), "self.seen += 1"),
        (replaced, ("self.queue = ...", "a local variable"), "self.queue = x[0]"),
        (deleted, ("del self.outputs", "would be lost"), "del self.outputs"),
    ):
        net = Queued(step)
        advice = ("in several shards", "`yield from Once(self.method")
        found.append(strikes(strategy, step, RuntimeError, *words, *advice, line=line, net=net))
        assert net.seen == 0 and net.outputs == [] and not net.queue.any()
    tells(found[0])


@several_shards
def test_f28_buffer_written_in_a_step(strategy: Make) -> None:
    def returned(self: Any, x: Tensor) -> Any:
        self.queue.copy_(x[0])
        return self.net(x).mean()

    def yielded(self: Any, x: Tensor) -> Any:
        self.queue.data += x.sum(0)
        yield {"net": self.net(x).mean()}

    for step, line in ((returned, ""), (yielded, 'yield {"net": self.net(x).mean()}')):
        net = Queued(step)
        words = ("buffer 'queue'", "`yield from Once(self.method", "running_statistics")
        strikes(strategy, step, RuntimeError, *words, line=line, net=net)
        assert not net.queue.any()


@every_strategy
def test_f28_once_writes_attributes_and_buffers(strategy: Make) -> None:
    def step(self: Any, x: Tensor) -> Any:
        yield from Once(self.enqueue, x)
        yield {"net": self.net(x).mean()}

    net, x = Queued(step), data(6, 3)
    trainer(strategy()).fit(net, [x])
    assert net.seen == 6
    assert torch.equal(net.queue, x.sum(0))


@every_strategy
def test_f28_outputs_appended_in_an_evaluation_step(strategy: Make) -> None:
    def evaluated(self: Any, x: Tensor) -> None:
        self.outputs.append(len(x))

    net = Queued(lambda self, x: self.net(x).mean())
    Queued.validation_step = evaluated  # type: ignore[method-assign]
    trainer(strategy()).fit(net, [data(6, 3)], [data(6, 3), data(5, 3)])
    assert sum(net.outputs) == 11
    assert len(net.outputs) == 2 * strategy().lanes


def classes(rows: int, columns: int = 4) -> Tensor:
    """Targets of which the first is to be ignored."""
    return torch.arange(rows) % columns


MEANS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "ignored targets": (
        lambda scores, y: F.cross_entropy(scores, y, ignore_index=0),
        r"the 1 of 2 targets that are not ignored",
    ),
    "class weights": (
        lambda scores, y: F.nll_loss(scores.log_softmax(1), y, torch.arange(1, 5, dtype=F64)),
        r"class weights",
    ),
    "smoothed, in a sum, of maps": (
        lambda scores, y: (
            scores.mean()
            + F.cross_entropy(
                scores[:, :, None, None], y[:, None, None], ignore_index=0, label_smoothing=0.1
            )
            * 2
        ),
        r"the 1 of 2 targets that are not ignored",
    ),
}


@several_shards
@pytest.mark.parametrize("name", MEANS)
def test_f28b_mean_over_something_else_warns_once(name: str, strategy: Make, tells: Tells) -> None:
    loss, message = MEANS[name]

    def step(self: Any, batch: Any) -> Any:
        x, y = batch
        return loss(self.net(x), y)

    batch = [data(6, 3), classes(6)]
    with pytest.warns(UserWarning, match=message) as caught:
        trainer(strategy()).fit(module(step, net=linear(3, 4)), [batch] * 3)
    assert len(caught) == 1
    text = str(caught[0].message)
    if name == "ignored targets":
        tells(caught[0].message)
    assert "with 3 shards" in text and "Mean.of(loss, weight)" in text
    assert (caught[0].filename, caught[0].lineno) == (__file__, step.__code__.co_firstlineno)


SOUND: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "nothing ignored": lambda scores, y: F.cross_entropy(scores, y),
    "a Mean": lambda scores, y: Mean.of(F.cross_entropy(scores, y, ignore_index=0), (y != 0).sum()),
    "a sum": lambda scores, y: F.cross_entropy(scores, y, ignore_index=0, reduction="sum") / len(y),
    "detached": lambda scores, y: (
        scores.mean() + F.cross_entropy(scores, y, ignore_index=0).detach()
    ),
}


@several_shards
@pytest.mark.parametrize("name", SOUND)
def test_f28b_means_over_samples_do_not_warn(name: str, strategy: Make) -> None:
    def step(self: Any, batch: Any) -> Any:
        x, y = batch
        yield {"net": SOUND[name](self.net(x), y)}

    run = trainer(strategy())
    run.fit(module(step, net=linear(3, 4)), [[data(6, 3), classes(6)]])
    assert run.updates == {"net": 1}


def test_f28b_one_shard_is_the_whole_batch() -> None:
    def step(self: Any, batch: Any) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x), y, ignore_index=0)

    trainer().fit(module(step, net=linear(3, 4)), [[data(6, 3), classes(6)]])


@several_shards
def test_f28b_only_the_first_step_is_looked_at(strategy: Make) -> None:
    def step(self: Any, batch: Any) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x), y, ignore_index=0)

    run = trainer(strategy())
    run.fit(
        module(step, net=linear(3, 4)),
        [[data(6, 3), classes(6) // 4 + 1], [data(6, 3), classes(6)]],
    )
    assert run.updates == {"net": 2}


@every_strategy
def test_f28c_mode_left_open_across_a_yield(strategy: Make, tells: Tells) -> None:
    def no_grad(self: Any, x: Tensor) -> Any:
        with torch.no_grad():
            total = yield from Mean(x.sum(), len(x))
        yield {"a": self.a(x).mean() * total}

    def autocast(self: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            yield {"a": self.a(x).mean()}

    def device(self: Any, x: Tensor) -> Any:
        with torch.device("meta"):
            yield {"a": self.a(x).mean()}

    def inference(self: Any, x: Tensor) -> Any:
        with torch.inference_mode():
            yield from Gather(x)

    advice = ("a mode was left changed at a yield", "close the `with` before the yield")
    words = ("grad mode is False and was True",)
    line = "total = yield from Mean(x.sum(), len(x))"
    tells(strikes(strategy, no_grad, RuntimeError, *advice, *words, line=line))
    words = ("autocast is ", "torch.bfloat16", "was False")
    strikes(strategy, autocast, RuntimeError, *advice, *words, line='yield {"a": self.a(x).mean()}')
    words = ("with torch.device(...)", "is 1 and was 0")
    strikes(strategy, device, RuntimeError, *advice, *words, line='yield {"a": self.a(x).mean()}')
    words = ("inference mode is True and was False",)
    strikes(strategy, inference, RuntimeError, *advice, *words, line="yield from Gather(x)")


def test_global_generators_in_concurrent_shards() -> None:
    def of_python(self: Any, x: Tensor) -> Any:
        return self.net(x).mean() * random.random()

    def of_numpy(self: Any, x: Tensor) -> Any:
        yield self.net(x).mean() * np.random.rand()

    words = ("Python's `random` or NumPy's global generator", "self.random.uniform(n, ...)")
    threads: Make = lambda: ThreadDataParallel(3)  # noqa: E731
    strikes(threads, of_python, RuntimeError, *words, children=one())
    line = "yield self.net(x).mean() * np.random.rand()"
    strikes(threads, of_numpy, RuntimeError, *words, line=line, children=one())
    run = trainer(SingleDevice("cpu", shards=3))
    run.step(module(of_python), [data(6, 3)])  # one after another: no harm
