"""Law 2: the same seed under the same strategy gives bitwise the same parameters."""

from __future__ import annotations

import pytest
import torch

from composefit import SingleDevice, Strategy, ThreadDataParallel, Trainer
from composefit.testing import assert_deterministic
from tests.laws.noisy import Noisy, batches

STRATEGIES = {
    "one shard": lambda: SingleDevice("cpu"),
    "4 shards": lambda: SingleDevice("cpu", shards=4),
    "4 threads": lambda: ThreadDataParallel(4),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_seeded_runs_are_bitwise_equal(strategy: str) -> None:
    assert_deterministic(Noisy, batches(3), STRATEGIES[strategy](), runs=20)


def test_seeded_accumulated_runs_in_threads_are_bitwise_equal() -> None:
    assert_deterministic(
        Noisy, batches(6), ThreadDataParallel(4), runs=5, accumulate_grad_batches=2
    )


def trained(strategy: Strategy, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = Noisy()
    trainer = Trainer(
        strategy=strategy,
        max_epochs=1,
        seed=seed,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, batches(3))
    return module.state_dict()


def test_shards_in_a_row_are_bitwise_those_in_threads_noise_included() -> None:
    in_a_row = trained(SingleDevice("cpu", shards=4), seed=0)
    in_threads = trained(ThreadDataParallel(4), seed=0)
    for name, value in in_a_row.items():
        assert torch.equal(value, in_threads[name]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_seed_gives_other_parameters(strategy: str) -> None:
    one, other = (trained(STRATEGIES[strategy](), seed) for seed in (0, 1))
    for name, parameter in Noisy().named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(one[name], other[name]), name
