"""Laws 2 and 3 over ranks: the same bits again, and the same bits after a stop.

Two optimizers, accumulation, averaged weights, noise, dropout, shuffled and ragged data, under
replicated and sharded parameters; in ranks that are kept, and (`full`) in processes that are
launched, with loader workers.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from composefit import Distributed, LoopModule, SingleDevice, Strategy, Trainer
from composefit.callbacks import EMA
from composefit.strategies.fully_sharded import FullySharded
from tests.ranks.pool import RankPool

KINDS = {"distributed": Distributed, "sharded": FullySharded}

SAMPLES, EPOCHS = 22, 3

#: Of six loader batches, the last with two samples, two in each step: three steps an epoch.
STEPS = 9


class Net(LoopModule):
    """Two networks with an optimizer each; what each step was given is noted in a file."""

    def __init__(self, dropout: float, folder: str, stop: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a = nn.Sequential(nn.Linear(3, 6), nn.Dropout(dropout), nn.Linear(6, 3)).double()
        self.b = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        self.folder, self.stop = folder, stop

    def configure_optimizers(self) -> Any:
        return {
            "b": torch.optim.Adam(self.b.parameters(), lr=0.01),
            "a": torch.optim.SGD(self.a.parameters(), lr=0.05, momentum=0.9),
        }

    def training_step(self, batch: Any) -> Any:
        (x,) = batch
        with open(f"{self.folder}/{self.global_step}-{os.getpid()}", "a") as file:
            file.writelines(f"{value}\n" for value in x[:, 0].tolist())
        self.reach("step")
        made = self.a(x + 0.1 * self.random.normal(len(x), 3, dtype=torch.float64))
        yield {"b": (self.b(made) - self.b(x)).square().mean() + self.b(x).mean()}
        yield {"a": self.b(made).mean() + (made - x).square().mean()}

    def validation_step(self, batch: Any) -> None:
        self.reach("validation")
        self.log("val", self.b(batch[0]).mean())

    def reach(self, place: str) -> None:
        """One rank alone gets a signal; in the fifth step, or the validation after the third."""
        step, _, rank = self.stop.partition(" on rank ")
        at = {"step": 4, "validation": 3}[place]
        if step == place and self.global_step == at and self.global_rank == int(rank):
            os.kill(os.getpid(), signal.SIGTERM)


def train(
    strategy: Strategy,
    folder: Path,
    *,
    dropout: float = 0.0,
    stop: str = "",
    steps: int = -1,
    resume: str | None = None,
    workers: int = 0,
) -> dict[str, Tensor]:
    """The weights and averages that a fit ends with, whole."""
    folder.mkdir(exist_ok=True)
    net, average = Net(dropout, str(folder), stop), EMA(0.8)
    draws = torch.Generator().manual_seed(5)
    rows = TensorDataset(torch.randn(SAMPLES, 3, generator=draws, dtype=torch.float64))
    trainer = Trainer(
        strategy=strategy,
        max_epochs=EPOCHS,
        max_steps=steps,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[average],
        seed=7,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(
            net,
            DataLoader(rows, batch_size=4, shuffle=True, num_workers=workers),
            DataLoader(rows, batch_size=8),
            ckpt_path=resume,
        )
    except SystemExit as end:
        assert end.code == 143
        assert stop
    states = {"weights": net.state_dict(), "averages": average.averaged_state_dict(net)}
    return {
        f"{kind} {name}": value.full_tensor() if hasattr(value, "full_tensor") else value
        for kind, state in states.items()
        for name, value in state.items()
    }


def in_a_rank(kind: str, folder: Path, **arguments: Any) -> dict[str, Tensor]:
    return train(KINDS[kind](accelerator="cpu", timeout=60), folder, **arguments)


def samples(folder: Path) -> dict[int, list[float]]:
    """Step -> the samples that all ranks were given for it, sorted."""
    found: dict[int, list[float]] = {}
    for path in folder.glob("*-*"):
        step = path.name.partition("-")[0]
        if step.isdecimal():
            found.setdefault(int(step), []).extend(map(float, path.read_text().split()))
    return {step: sorted(values) for step, values in sorted(found.items())}


def check_samples(found: dict[int, list[float]], expected: dict[int, list[float]]) -> None:
    """The same ones in every step; none twice and none lost in an epoch."""
    assert list(found) == list(range(STEPS))
    assert found == expected
    for epoch in range(EPOCHS):
        own = [one for step in range(3 * epoch, 3 * epoch + 3) for one in found[step]]
        assert len(own) == len(set(own)) == SAMPLES


def bitwise(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) for name, value in expected.items()
    )


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - value).abs().max() / value.abs().max())
        for name, value in expected.items()
    )


# -- in ranks that are kept ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bits_on_all_ranks(
    two_ranks: RankPool, tmp_path: Path, kind: str
) -> None:
    first, other = two_ranks.run(lambda: in_a_rank(kind, tmp_path / "one", dropout=0.3))
    again, _ = two_ranks.run(lambda: in_a_rank(kind, tmp_path / "two", dropout=0.3))
    assert bitwise(other, first)
    assert bitwise(again, first)
    assert samples(tmp_path / "one") == samples(tmp_path / "two")


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_anywhere_and_resumed_it_ends_with_the_same_bits(
    two_ranks: RankPool, tmp_path: Path, kind: str
) -> None:
    """After the first step, in mid-epoch, at its end; by a signal in a step and a validation."""
    through, _ = two_ranks.run(lambda: in_a_rank(kind, tmp_path / "through", dropout=0.3))
    expected = samples(tmp_path / "through")
    stops: list[dict[str, Any]] = [{"steps": steps} for steps in (1, 3, 5)]
    stops += [{"stop": "step on rank 1"}, {"stop": "validation on rank 0"}]
    for number, how in enumerate(stops):
        folder = tmp_path / str(number)

        def stopped(folder: Path = folder, how: dict[str, Any] = how) -> None:
            in_a_rank(kind, folder, dropout=0.3, **how)

        def resumed(folder: Path = folder) -> dict[str, Tensor]:
            return in_a_rank(kind, folder, dropout=0.3, resume="last")

        two_ranks.run(stopped)
        done = len(samples(folder))
        assert 0 < done < STEPS, how
        found, other = two_ranks.run(resumed)
        assert bitwise(found, through), how
        assert bitwise(other, through), how
        check_samples(samples(folder), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [1, 2])
def test_resumed_in_another_world_it_trains_on_the_same_samples(
    two_ranks: RankPool, tmp_path: Path, kind: str, before: int
) -> None:
    through = train(SingleDevice("cpu"), tmp_path / "through")
    folder = tmp_path / "parts"
    if before == 1:
        train(SingleDevice("cpu"), folder, steps=4)
        found, _ = two_ranks.run(lambda: in_a_rank(kind, folder, resume="last"))
    else:
        two_ranks.run(lambda: in_a_rank(kind, folder, steps=4))
        found = train(SingleDevice("cpu"), folder, resume="last")
    assert apart(found, through) < 1e-10
    check_samples(samples(folder), samples(tmp_path / "through"))


# -- in processes that are launched ----------------------------------------------------------------


def launched(kind: str, processes: int) -> Strategy:
    return KINDS[kind](processes=processes, accelerator="cpu", timeout=60)  # type: ignore[no-any-return]


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how", [{"steps": 4}, {"stop": "step on rank 0"}, {"stop": "step on rank 1"}]
)
def test_launched_with_workers_stopped_and_resumed_it_ends_with_the_same_bits(
    tmp_path: Path, kind: str, how: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"dropout": 0.3, "workers": 2}
    through = train(launched(kind, 2), tmp_path / "through", **options)
    folder = tmp_path / "parts"
    train(launched(kind, 2), folder, **options, **how)
    found = train(launched(kind, 2), folder, **options, resume="last")
    assert bitwise(found, through)
    check_samples(samples(folder), samples(tmp_path / "through"))


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (3, 2)])
def test_launched_in_another_number_of_processes_it_trains_on_the_same_samples(
    tmp_path: Path, kind: str, before: int, after: int
) -> None:
    through = train(launched(kind, after), tmp_path / "through")
    folder = tmp_path / "parts"
    train(launched(kind, before), folder, steps=4)
    found = train(launched(kind, after), folder, resume="last")
    assert apart(found, through) < 1e-10
    check_samples(samples(folder), samples(tmp_path / "through"))
