"""When there is a validation: counted in loader batches, at the ends of steps."""

from pathlib import Path
from typing import Any

import pytest

from composefit import Callback
from tests.lockstep.steps import data, every_strategy, module, trainer

BATCHES = [data(4, 3, seed=i) for i in range(5)]


class Validating(Callback):
    """Notes (epoch, loader batches trained on) at each validation."""

    def __init__(self) -> None:
        self.batches = 0
        self.at: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: Any, module: Any) -> None:  # type: ignore[override]
        self.batches += 1

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.at.append((trainer.current_epoch, self.batches))


def validated(strategy: Any = None, loader: Any = BATCHES, **options: Any) -> Any:
    """Where three epochs are validated."""
    net = module(lambda self, x: self.net(x).square().mean())
    type(net).validation_step = lambda self, x: None
    seen = Validating()
    trainer(strategy, callbacks=seen, **{"max_epochs": 3, **options}).fit(net, loader, BATCHES[:2])
    return seen.at


ENDS = [(0, 5), (1, 10), (2, 15)]
EVERY_2ND = [(0, 2), (0, 4), (1, 7), (1, 9), (2, 12), (2, 14)]

# What Lightning 2.6.6 does, run with the same loaders, limits and arguments.
LIKE_LIGHTNING: list[tuple[dict[str, Any], list[tuple[int, int]]]] = [
    ({}, ENDS),
    ({"val_check_interval": 2}, EVERY_2ND),
    ({"val_check_interval": 0.5}, EVERY_2ND),
    ({"val_check_interval": 1.0}, ENDS),
    ({"val_check_interval": 5}, ENDS),
    ({"val_check_interval": 0.1}, [(i // 5, i + 1) for i in range(15)]),
    ({"val_check_interval": 4, "check_val_every_n_epoch": None}, [(0, 4), (1, 8), (2, 12)]),
    ({"val_check_interval": 7, "check_val_every_n_epoch": None}, [(1, 7), (2, 14)]),
    ({"check_val_every_n_epoch": 2}, [(1, 10)]),
    ({"check_val_every_n_epoch": 2, "val_check_interval": 2}, [(1, 7), (1, 9)]),
    ({"limit_train_batches": 3, "val_check_interval": 2}, [(0, 2), (1, 5), (2, 8)]),
    ({"limit_train_batches": 0.7}, [(0, 3), (1, 6), (2, 9)]),
    ({"limit_val_batches": 0}, []),
    ({"limit_val_batches": 0.0}, []),
    ({"overfit_batches": 2}, [(0, 2), (1, 4), (2, 6)]),
    ({"overfit_batches": 0.5}, [(0, 2), (1, 4), (2, 6)]),
    ({"fast_dev_run": True}, [(0, 1)]),
    ({"fast_dev_run": 3}, [(0, 3)]),
    ({"fast_dev_run": 7, "accumulate_grad_batches": 2}, [(0, 5)]),
]


@pytest.mark.parametrize(("options", "at"), LIKE_LIGHTNING)
def test_validations_are_where_lightning_has_them(
    options: dict[str, Any], at: list[tuple[int, int]]
) -> None:
    assert validated(**options) == at


@pytest.mark.parametrize(
    ("options", "at"),
    [
        # Lightning validates in the middle of a window, where half a gradient is pending.
        ({"val_check_interval": 1}, [(0, 2), (0, 4), (0, 5), (1, 7), (1, 9), (1, 10)]),
        ({"val_check_interval": 3}, [(0, 4), (1, 9)]),
        ({"val_check_interval": 4}, [(0, 4), (1, 9)]),
        ({"val_check_interval": 5}, [(0, 5), (1, 10)]),
        ({"val_check_interval": 0.2}, [(0, 2), (0, 4), (0, 5), (1, 7), (1, 9), (1, 10)]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, [(0, 4), (1, 7), (1, 9)]),
        ({}, [(0, 5), (1, 10)]),
    ],
)
@every_strategy
def test_within_an_accumulation_window_it_comes_after_the_step(
    strategy: Any, options: dict[str, Any], at: list[tuple[int, int]]
) -> None:
    assert validated(strategy(), accumulate_grad_batches=2, max_epochs=2, **options) == at


def test_an_interval_longer_than_an_epoch_is_refused_with_what_to_write() -> None:
    with pytest.raises(ValueError, match=r"longer than an epoch of 5.*check_val_every_n_epoch=Non"):
        validated(val_check_interval=6)


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}])
def test_a_validation_that_failed_comes_again_when_the_run_is_resumed(
    options: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "a.ckpt"

    class Save(Callback):
        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            trainer.save_checkpoint(file)

    def fails(self: Any, x: Any) -> None:
        raise KeyError("mine")

    net = module(lambda self, x: self.net(x).square().mean())
    type(net).validation_step = fails
    with pytest.raises(KeyError, match="mine"):
        trainer(callbacks=Save(), max_epochs=2, **options).fit(net, BATCHES, BATCHES[:1])
    type(net).validation_step = lambda self, x: None
    seen: list[tuple[int, int]] = []
    type(net).on_validation_start = lambda self: seen.append((self.current_epoch, self.global_step))
    trainer(max_epochs=2, **options).fit(net, BATCHES, BATCHES[:1], ckpt_path=file)
    assert seen == ([(0, 2), (0, 4), (1, 7), (1, 9)] if options else [(0, 5), (1, 10)])


class Stream:
    """Batches that nobody can count beforehand."""

    def __iter__(self) -> Any:
        return iter(BATCHES)


def test_a_stream_is_validated_at_its_end_and_by_number_but_not_by_fraction() -> None:
    assert validated(loader=Stream()) == ENDS
    assert validated(loader=Stream(), val_check_interval=2) == EVERY_2ND
    assert validated(loader=Stream(), val_check_interval=2, max_steps=3) == [(0, 2), (0, 3)]
    with pytest.raises(ValueError, match=r"does not say how many .* give a whole number"):
        validated(loader=Stream(), val_check_interval=0.5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"val_check_interval": 0}, ValueError, "at least 1 batch"),
        ({"val_check_interval": 1.5}, ValueError, "above 0 and at most 1.0, got 1.5"),
        ({"val_check_interval": "2"}, TypeError, "a number of batches or a fraction, got '2'"),
        ({"check_val_every_n_epoch": 0}, ValueError, "at least 1, got 0"),
        ({"check_val_every_n_epoch": None}, ValueError, "give val_check_interval as a number"),
        (
            {"check_val_every_n_epoch": None, "val_check_interval": 0.5},
            ValueError,
            "give val_check_interval as a number of them, got 0.5",
        ),
    ],
)
def test_schedules_that_cannot_be_are_refused(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        trainer(**options)


@pytest.mark.parametrize(
    ("options", "at"),
    [
        # Lightning validates what a wish to stop has cut short, and not what max_steps has; here
        # both are the last word on what was trained.
        ({"max_steps": 7}, [(0, 5), (1, 7)]),
        ({"max_steps": 10}, [(0, 5), (1, 10)]),
        ({"max_steps": 4, "val_check_interval": 2}, [(0, 2), (0, 4)]),
        ({"max_steps": 3, "val_check_interval": 2}, [(0, 2), (0, 3)]),
        ({"max_steps": 3, "check_val_every_n_epoch": 2}, [(0, 3)]),
    ],
)
def test_an_epoch_that_is_left_is_validated_once_more(
    options: dict[str, Any], at: list[tuple[int, int]]
) -> None:
    assert validated(**options) == at


@pytest.mark.parametrize("every", [0, 1, 2, 3])
def test_loaders_are_asked_for_again_every_nth_epoch(every: int) -> None:
    asked: list[tuple[str, int]] = []
    net: Any = module(lambda self, x: self.net(x).square().mean())
    kind = type(net)
    kind.validation_step = lambda self, x: None
    kind.train_dataloader = lambda self: asked.append(("train", self.current_epoch)) or BATCHES
    kind.val_dataloader = lambda self: asked.append(("val", self.current_epoch)) or BATCHES[:1]
    run = trainer(max_epochs=5, reload_dataloaders_every_n_epochs=every)
    run.fit(net)
    epochs = [0] if every == 0 else list(range(0, 5, every))
    assert sorted(asked) == sorted((kind, i) for kind in ("train", "val") for i in epochs)
    assert run.global_step == 25


def test_a_loader_that_changes_is_counted_anew_at_each_reload() -> None:
    sizes = iter([2, 3, 4])
    numbers: list[float] = []
    net: Any = module(lambda self, x: self.net(x).square().mean())
    type(net).train_dataloader = lambda self: BATCHES[: next(sizes)]
    type(net).on_train_epoch_start = lambda self: numbers.append(self.trainer.num_training_batches)
    run = trainer(max_epochs=3, reload_dataloaders_every_n_epochs=1)
    run.fit(net)
    assert (run.global_step, numbers) == (9, [2, 3, 4])
