"""The laws as functions: they pass what holds, and say precisely what does not."""

from __future__ import annotations

import itertools
import random
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from composefit import (
    Callback,
    Gather,
    LoopModule,
    Mean,
    SingleDevice,
    Step,
    ThreadDataParallel,
    Trainer,
    Update,
)
from composefit.effects import Reduce
from composefit.seeding import global_states, restore_global_states
from composefit.testing import (
    Recording,
    assert_deterministic,
    assert_resumable,
    assert_same_training,
    assert_user_error,
    run_step,
)

ONE = SingleDevice("cpu")
THREE = SingleDevice("cpu", shards=3)


def inputs(count: int = 3, n: int = 5) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(n, 2, generator=draws) for _ in range(count)]


class Scalar(LoopModule):
    """One number, from 1 down by 0.1 a step."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Tensor) -> Any:
        return self.w * 1.0

    def configure_optimizers(self) -> Any:
        return SGD([self.w], lr=0.1)


class Pair(LoopModule):
    """Two networks with an optimizer each."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 1), nn.Linear(2, 1)

    def training_step(self, batch: Tensor) -> Step:
        yield {"left": self.left(batch).square().mean()}
        yield {"right": self.right(batch).square().mean()}

    def configure_optimizers(self) -> dict[str, SGD]:
        return {
            "left": SGD(self.left.parameters(), lr=0.1),
            "right": SGD(self.right.parameters(), lr=0.1),
        }


# -- assert_same_training --------------------------------------------------------------------------


def test_same_training_passes_and_returns_the_largest_difference() -> None:
    strategies = [ONE, THREE, ThreadDataParallel(2)]
    found = assert_same_training(
        Pair, inputs(), strategies, accumulate=(1, 2), microbatch_sizes=(None, 1)
    )
    assert 0 < found < 1e-14


def test_single_precision_modules_are_compared_in_double() -> None:
    assert Pair().left.weight.dtype is torch.float32
    assert assert_same_training(Pair, inputs(), [THREE]) < 1e-14


def by_hand(lr: float) -> Any:
    def reference(module: Scalar, batches: list[Tensor]) -> Iterator[None]:
        for _ in batches:
            with torch.no_grad():
                module.w -= lr
            yield

    return reference


def test_difference_is_relative_to_the_reference() -> None:
    # After the first step 0.9 is compared with 0.8.
    with pytest.raises(AssertionError, match=r"after step 1 of 3: parameter 'w' .* by 1\.25e-01 "):
        assert_same_training(Scalar, inputs(), [ONE], by_hand(0.2))


def test_plain_function_as_reference_is_compared_after_the_last_step() -> None:
    def reference(module: Scalar, batches: list[Tensor]) -> None:
        with torch.no_grad():
            module.w -= 0.2 * len(batches)

    # 0.7 is compared with 0.4.
    with pytest.raises(AssertionError, match=r"after step 3 of 3: parameter 'w' .* by 7\.50e-01 "):
        assert_same_training(Scalar, inputs(), [ONE], reference)


def test_difference_names_optimizer_parameter_step_and_setting() -> None:
    class SumsLater(Pair):
        def training_step(self, batch: Tensor) -> Step:
            yield {"left": self.left(batch).square().mean()}
            right = self.right(batch).square()
            yield {"right": right.mean() if self.global_step < 2 else right.sum()}

    with pytest.raises(AssertionError) as caught:
        assert_same_training(
            SumsLater, inputs(4), [ThreadDataParallel(2)], accumulate=(2,), microbatch_sizes=(2,)
        )
    message = str(caught.value)
    assert "ThreadDataParallel (2 lanes), accumulate_grad_batches=2, microbatch_size=2" in message
    assert "from one device and one shard, first after step 3 of 4: parameter 'right." in message
    assert "(of optimizer 'right')" in message


def test_parameters_of_no_optimizer_are_compared() -> None:
    class Average(Scalar):
        def __init__(self) -> None:
            super().__init__()
            self.average = nn.Parameter(torch.ones(()), requires_grad=False)

        def on_after_optimizer_step(self) -> None:
            with torch.no_grad():
                self.average.lerp_(self.w, 0.5)

    with pytest.raises(AssertionError, match=r"parameter 'average' \(of no optimizer\)"):
        assert_same_training(Average, inputs(), [ONE], by_hand(0.1))


def test_batch_norm_is_found_without_a_reference() -> None:
    class Normalised(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))

    with pytest.raises(AssertionError, match=r"of optimizer 'left'\)"):
        assert_same_training(Normalised, inputs(n=6), [THREE])


@pytest.mark.parametrize("still", ["left", "right"])
def test_optimizer_that_hardly_moves_its_parameters_is_refused(still: str) -> None:
    class Still(Pair):
        def configure_optimizers(self) -> dict[str, SGD]:
            optimizers = super().configure_optimizers()
            optimizers[still].param_groups[0]["lr"] = 1e-6
            return optimizers

    with pytest.raises(AssertionError, match=rf"of optimizer '{still}' have moved by .*e-0\d of"):
        assert_same_training(Still, inputs(), [THREE])


def test_not_a_number_is_a_difference() -> None:
    def reference(module: Scalar, batches: list[Tensor]) -> None:
        with torch.no_grad():
            module.w.fill_(torch.nan)

    with pytest.raises(AssertionError, match="by nan of its size"):
        assert_same_training(Scalar, inputs(), [ONE], reference)


def test_parameter_whose_gradient_is_only_rounding_is_no_difference() -> None:
    class Shifted(LoopModule):
        """The softmax takes the shift out again: its gradient is zero, but for rounding."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 3)
            self.shift = nn.Parameter(torch.zeros(()))

        def training_step(self, batch: Tensor) -> Tensor:
            scores = self.layer(batch) + self.shift
            return F.cross_entropy(scores, (batch[:, 0] > 0).long())

        def configure_optimizers(self) -> SGD:
            return SGD(self.parameters(), lr=0.1)

    assert_same_training(Shifted, inputs(), [THREE])


def test_hooks_and_trainer_arguments_are_those_of_a_fit() -> None:
    class Started(Scalar):
        def on_train_start(self) -> None:
            self.started = True

        def training_step(self, batch: Tensor) -> Tensor:
            assert self.started
            return 100 * self.w

    # Clipped to 1, the gradient of 100 w is that of w.
    clipped = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}
    assert_same_training(Started, inputs(), [ONE], by_hand(0.1), **clipped)


def test_modules_that_are_not_built_alike_are_refused() -> None:
    count = itertools.count()

    class Counted(Scalar):
        def __init__(self) -> None:
            super().__init__()
            self.w.data += next(count)

    with pytest.raises(ValueError, match="must build the same weights each time, 'w' differs"):
        assert_same_training(Counted, inputs(), [ONE], by_hand(0.1))


def test_reference_with_another_number_of_steps_is_refused() -> None:
    def reference(module: Scalar, batches: list[Tensor]) -> Iterator[None]:
        yield

    with pytest.raises(ValueError, match="yielded 1 times for 3 batches"):
        assert_same_training(Scalar, inputs(), [ONE], reference)


def test_batch_of_fewer_samples_than_accumulated_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="into 5 loader batches only, accumulate asks for 6"):
        assert_same_training(Pair, inputs(n=5), [ONE], accumulate=(6,))


def test_laws_leave_torchs_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    assert_same_training(Pair, inputs(), [THREE])
    assert_deterministic(Pair, inputs(), THREE)
    assert torch.equal(torch.get_rng_state(), before)


# -- assert_deterministic --------------------------------------------------------------------------


def test_deterministic_passes_with_dropout_in_threads() -> None:
    class Dropped(Scalar):
        def training_step(self, batch: Tensor) -> Tensor:
            return (F.dropout(batch) * self.w).mean()

    assert_deterministic(Dropped, inputs(), ThreadDataParallel(3), runs=3)


def test_deterministic_names_the_run_and_what_differs() -> None:
    runs = itertools.count()

    class Clocked(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.factor = 1.0 if next(runs) < 2 else 1.0 + 1e-6

        def training_step(self, batch: Tensor) -> Step:
            yield {"left": self.factor * self.left(batch).square().mean()}
            yield {"right": self.right(batch).square().mean()}

    expected = r"run 3 of 4 under SingleDevice \(3 lanes\) .*: left.weight, left.bias\. "
    with pytest.raises(AssertionError, match=expected):
        assert_deterministic(Clocked, inputs(), THREE, runs=4)


def test_deterministic_compares_buffers_and_bits() -> None:
    runs = itertools.count()

    class Signed(Scalar):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("zero", torch.tensor(-0.0 if next(runs) else 0.0))

    with pytest.raises(AssertionError, match=r"run 2 of 3 .*: zero"):
        assert_deterministic(Signed, inputs(), ONE)


def test_deterministic_needs_two_runs() -> None:
    with pytest.raises(ValueError, match="expected 2 or more, got 1"):
        assert_deterministic(Scalar, inputs(), ONE, runs=1)


# -- assert_resumable ------------------------------------------------------------------------------


class Dropped(LoopModule):
    """Dropout, a shuffled loader, a value per epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor) -> Tensor:
        loss = self.layer(F.dropout(batch)).square().mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor) -> None:
        self.log("val", self.layer(batch).mean())

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1, momentum=0.9)


def shuffled() -> DataLoader[Tensor]:
    return DataLoader(torch.randn(10, 2), batch_size=4, shuffle=True)  # type: ignore[arg-type]


def test_resumable_counts_the_resumed_fits_that_it_compared() -> None:
    ways = ["exception", "signal", "max_steps", "should_stop", "validation"]
    found = assert_resumable(
        Dropped, shuffled, [ONE, THREE], val_loader=inputs, accumulate=(1, 2), via=ways
    )
    # 6 steps and 4, at the last of which limits and wishes stop nothing; validation ends epochs.
    assert found == 2 * ((6 + 6 + 5 + 5 + 2) + (4 + 4 + 3 + 3 + 2))


def test_resumable_stops_more_than_once_where_a_stop_is_a_tuple() -> None:
    assert assert_resumable(Dropped, shuffled, [ONE], stops=[(1, 3), 5], via=["exception"]) == 2


class Private(Dropped):
    """A number that is in no checkpoint."""

    count = 0

    def training_step(self, batch: Tensor) -> Tensor:
        return super().training_step(batch) * (1 + self.count)

    def on_train_batch_end(self) -> None:
        self.count += 1


def test_resumable_names_strategy_stop_and_what_differs() -> None:
    with pytest.raises(
        AssertionError,
        match=r"stopped after step 2 of 6 \(exception\), under SingleDevice \(3 lanes\), "
        r"accumulate_grad_batches=1: parameter or buffer 'layer\.weight', by up to \d",
    ):
        assert_resumable(Private, shuffled, [THREE], stops=[2], via=["exception"])


class Noted(Callback):
    """Counts the steps of this process."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}


def test_resumable_compares_callbacks_states() -> None:
    with pytest.raises(AssertionError, match=r"state of callback 'Noted'\['count'\] is 4 for 6"):
        assert_resumable(Dropped, shuffled, [ONE], stops=[2], callbacks=lambda: [Noted()])


class Logs(Noted):
    """Other values on the way, the same at the end."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        super().on_train_batch_end()
        # Written at the end of step 6, which is logged.
        self.log("count", float(self.count if trainer.global_step == 5 else 0))

    def state_dict(self) -> dict[str, Any]:
        return {}


def test_resumable_compares_what_loggers_got() -> None:
    with pytest.raises(AssertionError, match=r"\['count'\] is 3\.0 for 5\.0"):
        assert_resumable(
            Dropped, shuffled, [ONE], stops=[2], callbacks=lambda: [Logs()], log_every_n_steps=3
        )


def test_resumable_compares_schedulers_and_optimizers() -> None:
    class Warm(Dropped):
        def on_train_start(self) -> None:
            (one,) = self.trainer.optimizers.values()
            one.optimizer.param_groups[0]["dampening"] = 0.1 * self.global_step
            one.optimizer.param_groups[0]["lr"] = 0.0
            one.optimizer.param_groups[0]["momentum"] = 0.0

    with pytest.raises(
        AssertionError, match=r"optimizer 'optimizer'\['param_groups'\]\[0\]\['damp"
    ):
        assert_resumable(Warm, shuffled, [ONE], stops=[2], via=["exception"])


class Unseeded:
    """Another order in the third process, the one that resumes."""

    def __init__(self) -> None:
        self.batches = inputs(4)

    def __iter__(self) -> Iterator[Tensor]:
        Unseeded.made += 1
        order = self.batches if Unseeded.made < 3 else self.batches[::-1]
        return iter(order)

    def __len__(self) -> int:
        return len(self.batches)

    made = 0


def test_resumable_names_the_step_that_got_another_batch() -> None:
    Unseeded.made = 0
    with pytest.raises(AssertionError, match=r"step 2 got another batch\. Does the loader's order"):
        assert_resumable(Dropped, Unseeded, [ONE], stops=[1], via=["exception"], max_epochs=1)


def test_resumable_takes_a_callback_of_ones_own_as_a_way_to_stop() -> None:
    class Fails(Callback):
        def __init__(self, step: int) -> None:
            self.step = step

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == self.step:
                raise OSError("the disk is gone")

    assert assert_resumable(Dropped, shuffled, [ONE], stops=[1, 4], via=[Fails]) == 2


def test_resumable_passes_other_errors_on() -> None:
    class Faulty(Dropped):
        def on_train_end(self) -> None:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        assert_resumable(Faulty, shuffled, [ONE], via=["exception"])


def test_resumable_refuses_a_way_that_stops_nothing() -> None:
    with pytest.raises(AssertionError, match="'validation' has stopped no fit of 6 steps"):
        assert_resumable(Dropped, shuffled, [ONE], via=["validation"])
    with pytest.raises(ValueError, match=r"knows 'exception', 'signal', .*got 'kill'"):
        assert_resumable(Dropped, shuffled, [ONE], via=["kill"])


def test_resumable_needs_a_signal_that_a_run_takes_over() -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(ValueError, match="needs the main thread, and no handler of SIGTERM"):
            assert_resumable(Dropped, shuffled, [ONE], via=["signal"])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_resumable_leaves_the_global_generators_as_they_were() -> None:
    def draws() -> list[float]:
        return [torch.rand(()).item(), float(np.random.rand()), random.random()]

    before = global_states()
    expected = draws()
    restore_global_states(before)
    assert_resumable(Dropped, shuffled, [ONE], stops=[1], via=["exception"])
    assert draws() == expected


# -- assert_user_error -----------------------------------------------------------------------------


class Fragile(Pair):
    """Raises where a number is negative, which for these batches is in the last shard only."""

    def training_step(self, batch: Tensor) -> Step:
        self.before(batch)
        if (batch < 0).any():
            raise LookupError("a negative number")
        yield {"left": self.left(batch).square().mean()}
        yield {"right": self.right(batch).square().mean()}

    def before(self, batch: Tensor) -> None: ...


GOOD = torch.ones(6, 2)
BAD = torch.cat([torch.ones(5, 2), -torch.ones(1, 2)])
STRATEGIES = [ONE, THREE, ThreadDataParallel(3)]


def test_users_error_passes_where_law_5_holds() -> None:
    assert_user_error(Fragile, GOOD, BAD, LookupError, STRATEGIES)


def test_users_error_passes_after_an_update() -> None:
    class Late(Pair):
        def training_step(self, batch: Tensor) -> Step:
            yield {"left": self.left(batch).square().mean()}
            if (batch < 0).any():
                raise LookupError("a negative number")
            yield {"right": self.right(batch).square().mean()}

    assert_user_error(Late, GOOD, BAD, LookupError, STRATEGIES)


def test_users_error_that_does_not_come_is_reported() -> None:
    with pytest.raises(AssertionError, match=r"expected LookupError under .*, nothing was raised"):
        assert_user_error(Fragile, GOOD, GOOD, LookupError, STRATEGIES)


def test_users_error_of_another_type_is_reported() -> None:
    with pytest.raises(AssertionError, match=r"expected OSError under .*, got LookupError: a neg"):
        assert_user_error(Fragile, GOOD, BAD, OSError, STRATEGIES)


def test_error_that_the_package_raises_is_not_the_users() -> None:
    class Misnamed(Fragile):
        def training_step(self, batch: Tensor) -> Step:
            yield {"left" if (batch > 0).all() else "lift": self.left(batch).mean()}
            yield {"right": self.right(batch).mean()}

    with pytest.raises(AssertionError, match=r"goes on after the user's line, in .*driver\.py"):
        assert_user_error(Misnamed, GOOD, BAD, ValueError, [ONE])


def test_parameters_changed_by_a_faulty_step_are_reported() -> None:
    class Writes(Fragile):
        def before(self, batch: Tensor) -> None:
            with torch.no_grad():
                self.left.bias += (batch < 0).any()

    with pytest.raises(AssertionError, match=r"the faulty step changed left\.bias under"):
        assert_user_error(Writes, GOOD, BAD, LookupError, [ONE])


def test_threads_left_over_are_reported() -> None:
    end = threading.Event()

    class Starts(Fragile):
        def before(self, batch: Tensor) -> None:
            threading.Thread(target=end.wait, name="left-over").start()

    try:
        with pytest.raises(AssertionError, match=r"threads are left over .*left-over"):
            assert_user_error(Starts, GOOD, BAD, LookupError, [ONE])
    finally:
        end.set()


# -- Recording -------------------------------------------------------------------------------------


def test_recording_notes_what_the_driver_asks_for() -> None:
    recording = Recording(SingleDevice("cpu", shards=2))
    module = Pair()
    trainer = Trainer(
        strategy=recording,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, inputs(2))
    assert recording.calls[0] == ("open", None)
    assert recording.calls[1] == ("place", module)
    assert recording.calls[-1] == ("close", None)
    steps = [detail for method, detail in recording.calls if method == "optimizer_step"]
    left, right = (trainer.optimizers[name].optimizer for name in ("left", "right"))
    assert steps == [left, right, left, right]
    assert recording.calls.count(("add_up", 2)) == recording.count("add_up") == 4
    assert recording.calls.count(("run", 2)) == recording.count("run") >= 6


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{type(s).__name__}-{s.lanes}")
def test_recording_changes_nothing(strategy: Any) -> None:
    recording = Recording(strategy)
    assert recording.describe(6) == strategy.describe(6)
    assert_same_training(Pair, inputs(), [recording], accumulate=(1, 2))
    assert recording.count("open") == recording.count("close") == 2


def test_recording_is_named_by_what_it_carries() -> None:
    with pytest.raises(AssertionError, match=r"under SingleDevice \(1 lane\), acc"):
        assert_same_training(Scalar, inputs(), [Recording(ONE)], by_hand(0.2))


# -- run_step --------------------------------------------------------------------------------------


def test_run_step_gives_the_effects_in_order_with_their_values() -> None:
    class Varied(Scalar):
        def training_step(self, batch: Tensor) -> Step:
            both, _ = yield from Gather(batch * self.w)
            yield Mean(both.sum(), 4)
            yield self.w * 3
            yield {"optimizer": Mean(self.w * 2, 5)}

    gather, mean, bare, named = run_step(Varied(), torch.ones(2, 2))
    assert isinstance(gather, Gather) and gather.tensors[0].shape == (2, 2)
    assert isinstance(mean, Reduce) and repr(mean) == "Mean(4, 4)"
    assert isinstance(bare, Update) and isinstance(named, Update)
    assert bare.losses["optimizer"].item() == 3.0 and not bare.losses["optimizer"].requires_grad
    assert repr(named.losses["optimizer"]) == "Mean(1.4, 5)"  # w was 0.7 by then


def test_run_step_trains_and_runs_the_hooks_of_updates() -> None:
    class Hooked(Scalar):
        def on_after_optimizer_step(self, optimizer: Any, name: str) -> None:
            self.hooked = name

    module = Hooked()
    (update,) = run_step(module, torch.ones(2))
    assert isinstance(update, Update) and update.losses["optimizer"].item() == 1.0
    assert module.w.item() == pytest.approx(0.9)
    assert module.hooked == "optimizer"


def test_run_step_of_a_skipped_step_is_empty() -> None:
    class Skips(Scalar):
        def training_step(self, batch: Tensor) -> None:
            return None

    assert run_step(Skips(), torch.ones(2)) == []


def test_run_step_raises_what_the_step_raises() -> None:
    with pytest.raises(LookupError, match="a negative number"):
        run_step(Fragile(), BAD)
