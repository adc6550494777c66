import math
from types import SimpleNamespace

import pytest

from composefit.callbacks.monitor import better, judges_at_epoch_end, worst


@pytest.mark.parametrize("mode", ["min", "max"])
def test_any_number_beats_the_worst_and_nan_beats_nothing(mode):
    assert better(1e30, worst(mode), mode)
    assert better(-1e30, worst(mode), mode)
    assert not better(math.nan, worst(mode), mode)
    assert not better(1.0, 1.0, mode)


@pytest.mark.parametrize(
    ("batches", "interval", "epochs", "expected"),
    [
        ([3.0], 1.0, 1, True),
        ([3.0], None, 1, True),
        ([3.0], 1, 1, False),
        ([3.0], 0.5, 1, False),
        ([3.0], 1.0, 2, False),
        ([3.0], 100, None, False),
        ([], 0.5, 2, True),
        ([0.0, 0.0], 0.5, 2, True),
        ([0.0, 2.0], 0.5, 2, False),
    ],
)
def test_values_are_judged_at_the_epochs_end_where_it_has_one_validation_or_none(
    batches, interval, epochs, expected
):
    trainer = SimpleNamespace(
        num_val_batches=batches, val_check_interval=interval, check_val_every_n_epoch=epochs
    )
    assert judges_at_epoch_end(trainer, None) is expected
    assert judges_at_epoch_end(trainer, True) is True
    assert judges_at_epoch_end(trainer, False) is False
