import io
import logging
import random
from typing import Any

import numpy as np
import pytest
import torch

from composefit import checkpoint
from composefit.random import Stream, hash_key, thread_local_generators
from composefit.seeding import global_states, restore_global_states, seed_everything


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that it is put back
    monkeypatch.delenv("PL_GLOBAL_SEED")


def draws() -> list[float]:
    """From all generators; an odd number of normals leaves the second of a pair behind."""
    return [
        random.random(),
        random.gauss(),
        np.random.standard_normal(),
        np.random.rand(),
        torch.rand(1).item(),
        torch.randn(1).item(),
    ]


def safely_saved(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- seeding ---------------------------------------------------------------------------------------


def test_a_seed_is_that_of_each_library() -> None:
    assert seed_everything(7) == 7
    found = draws()
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    assert draws() == found
    seed_everything(8)
    assert draws() != found


def test_without_a_seed_it_is_zero_or_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert seed_everything() == 0 and torch.initial_seed() == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "12")
    assert seed_everything() == 12 and torch.initial_seed() == 12


def test_processes_started_from_here_find_the_seed() -> None:
    seed_everything(5)
    assert seed_everything() == 5


def test_whole_numbers_of_numpy_are_seeds() -> None:
    assert seed_everything(np.int64(3)) == 3  # type: ignore[arg-type]
    assert seed_everything(2**32 - 1) == 2**32 - 1


@pytest.mark.parametrize("seed", [1.0, "1", True, torch.rand(2)])
def test_what_is_no_whole_number_is_no_seed(seed: Any) -> None:
    with pytest.raises(TypeError, match="must be a whole number"):
        seed_everything(seed)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_changes_nothing(seed: int) -> None:
    before = safely_saved(global_states())
    with pytest.raises(ValueError, match=r"from 0 to 4294967295 .* got " + str(seed)):
        seed_everything(seed)
    found = draws()
    restore_global_states(before)
    assert draws() == found


def test_an_environment_that_holds_no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "seven")
    with pytest.raises(ValueError, match="PL_GLOBAL_SEED to be a seed, got 'seven'"):
        seed_everything()


def test_workers_is_a_flag() -> None:
    assert seed_everything(1, workers=True) == 1
    with pytest.raises(TypeError, match="expects True or False"):
        seed_everything(1, workers=2)  # type: ignore[arg-type]


def test_the_seed_is_logged_unless_told_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    seed_everything(4, verbose=False)
    assert not caplog.records
    seed_everything(4)
    assert caplog.messages == ["seed set to 4"]


# -- states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [0, 1, 2])
def test_restored_generators_go_on_where_they_were_saved(drawn: int) -> None:
    for _ in range(drawn):
        draws()
    state = safely_saved(global_states())
    expected = [draws() for _ in range(3)]
    assert [draws() for _ in range(3)] != expected
    restore_global_states(state)
    assert [draws() for _ in range(3)] == expected


def test_what_was_saved_does_not_change_with_later_draws() -> None:
    state = global_states()
    expected = draws()
    restore_global_states(state)
    assert draws() == expected
    restore_global_states(state)
    assert draws() == expected


def test_a_checkpoint_takes_the_states(tmp_path: Any) -> None:
    state = {"generators": global_states()}
    expected = draws()
    checkpoint.save(tmp_path / "a.ckpt", state)
    restore_global_states(checkpoint.load(tmp_path / "a.ckpt")["generators"])
    assert draws() == expected


def test_the_state_is_the_default_generators_also_where_a_stream_is_entered() -> None:
    stream = Stream()
    state = global_states()
    with thread_local_generators(), stream:
        stream.seed(hash_key(1))
        assert torch.equal(global_states()["torch"], state["torch"])
        expected = torch.rand(3)
        stream.seed(hash_key(1))
        restore_global_states(state)
        assert torch.equal(torch.rand(3), expected)


@pytest.fixture
def other_numpy_generator() -> Any:
    before = np.random.get_bit_generator()  # type: ignore[attr-defined]
    np.random.set_bit_generator(np.random.PCG64(1))  # type: ignore[attr-defined]
    yield
    np.random.set_bit_generator(before)  # type: ignore[attr-defined]


def test_another_kind_of_numpy_generator(other_numpy_generator: None) -> None:
    draws()
    state = safely_saved(global_states())
    expected = draws()
    restore_global_states(state)
    assert draws() == expected


def test_a_state_of_another_kind_of_numpy_generator_changes_nothing(
    other_numpy_generator: None,
) -> None:
    state = {**global_states(), "numpy": {"bit_generator": "MT19937"}}
    random.random()
    before = random.getstate()
    with pytest.raises(ValueError, match=r"of a MT19937, and here it is a PCG64: call .*MT19937"):
        restore_global_states(state)
    assert random.getstate() == before


def test_without_a_gpu_in_use_none_is_asked_for() -> None:
    if not torch.cuda.is_initialized():
        assert global_states()["cuda"] == []
        assert not torch.cuda.is_initialized()


def test_states_of_gpus_that_are_not_there_are_left_out() -> None:
    state = global_states()
    state["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    if torch.cuda.device_count() == 0:
        expected = draws()
        restore_global_states(state)
        assert draws() == expected


@pytest.mark.gpu
def test_the_generator_of_a_gpu_is_restored() -> None:
    torch.rand(1, device="cuda")
    state = safely_saved(global_states())
    expected = torch.rand(3, device="cuda")
    restore_global_states(state)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
