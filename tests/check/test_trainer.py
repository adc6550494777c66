"""`Trainer.check`, `Trainer(check=True)`, `fast_dev_run` and `check_losses`."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from composefit import DataModule, Distributed, LoopModule, SingleDevice, ThreadDataParallel
from composefit.testing import check_losses
from composefit.trainer import Trainer
from tests.check.wrong import Net, TokenMean, labelled, texts


class Classifier(Net):
    """Right."""

    def training_step(self, batch: list[Tensor]) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


def trainer(**arguments: Any) -> Trainer:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"logger": False, "enable_checkpointing": False, "strategy": SingleDevice("cpu")}
    return Trainer(**quiet | arguments)


def loader(n: int = 24) -> Any:
    return DataLoader(TensorDataset(*labelled(n)), batch_size=8)


def test_report_is_printed_and_is_its_own_text(capsys: pytest.CaptureFixture[str]) -> None:
    report = trainer().check(TokenMean(), texts())
    shown = capsys.readouterr().out
    for text in ("optimizer", "depends on the cut", "token mean", "Mean.of(loss"):
        assert text in shown
        assert text in str(report)
    assert "wrong.py" in shown
    assert len(str(report).splitlines()) < 12


def test_nothing_is_printed_where_nobody_wants_it(capsys: pytest.CaptureFixture[str]) -> None:
    trainer().check(Classifier(), labelled(), show=False)
    assert capsys.readouterr().out == ""


def test_several_batches_are_looked_at() -> None:
    class EveryOther(Classifier):
        def training_step(self, batch: list[Tensor]) -> Any:
            x, y = batch
            odd = bool(y[0] % 2)  # the same in all shards of these batches
            return F.cross_entropy(self.net(x), y, reduction="sum" if odd else "mean")

    x, _ = labelled(16)
    labels = torch.cat([torch.zeros(8), torch.ones(8)]).long()
    batches = DataLoader(TensorDataset(x, labels), batch_size=8)
    assert trainer().check(EveryOther(), batches, show=False).ok
    report = trainer().check(EveryOther(), batches, batches=2, show=False)
    assert not report.ok
    assert report.optimizers["optimizer"].causes[0].name == "sum"


@pytest.mark.parametrize(
    ("given", "batches", "error", "text"),
    [
        (lambda: labelled(1), 1, ValueError, "1 sample cannot be cut"),
        (lambda: labelled(), 2, ValueError, "got one batch"),
        (loader, 4, ValueError, "one to 3 batches"),
        (loader, 0, ValueError, "at least 1"),
        (DataModule, 1, TypeError, "got a DataModule"),
        (lambda: iter(loader()), 1, ValueError, "one-shot iterator"),
    ],
)
def test_what_cannot_be_checked_is_refused(given: Any, batches: int, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        trainer().check(Classifier(), given(), batches, show=False)


def test_a_module_that_cannot_be_trained_is_refused() -> None:
    with pytest.raises(TypeError, match="defines no training_step"):
        trainer().check(LoopModule(), labelled())


def test_setup_and_lazy_layers_are_those_of_a_fit() -> None:
    class Late(LoopModule):
        stage = ""

        def setup(self, stage: str) -> None:
            self.stage = stage

        def configure_model(self) -> None:
            assert self.stage == "fit"
            self.net = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(4))

        def training_step(self, batch: list[Tensor]) -> Any:
            x, y = batch
            assert self.trainer is not None
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Late()
    assert trainer().check(module, labelled(), show=False).ok
    assert module.stage == ""
    assert not hasattr(module, "net")


def test_launching_strategies_are_checked_in_this_process() -> None:
    found = trainer(strategy=Distributed(2, accelerator="cpu"))
    report = found.check(Classifier(), labelled(), show=False)
    assert report.ok
    assert "one after another" in report.shards


# -- in a fit --------------------------------------------------------------------------------------


class Counts(Classifier):
    """Counts where copies do not reach."""

    seen: list[int] = []  # noqa: RUF012

    def training_step(self, batch: list[Tensor]) -> Any:
        self.seen.append(len(batch[0]))
        return super().training_step(batch)


def test_the_first_step_of_a_fit_is_checked_and_no_other(capsys: Any) -> None:
    Counts.seen.clear()
    trainer(max_epochs=1, check=True).fit(Counts(), loader())
    assert Counts.seen == [8, 5, 3, 8, 8, 8]  # whole, in two shards, and the three steps
    assert capsys.readouterr().out.count("right") == 1


def test_a_fit_that_was_not_asked_checks_nothing(capsys: Any) -> None:
    Counts.seen.clear()
    trainer(max_epochs=1).fit(Counts(), loader())
    assert Counts.seen == [8, 8, 8]
    assert capsys.readouterr().out == ""


def test_wrong_losses_warn_where_the_check_was_asked_for() -> None:
    batches = DataLoader(texts(), batch_size=16)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"depends on how its batch is cut.*token mean"):
        trainer(max_epochs=1, check=True).fit(TokenMean(), batches)


def test_a_trial_run_shows_what_the_check_finds(capsys: Any) -> None:
    batches = DataLoader(texts(), batch_size=16)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(fast_dev_run=True).fit(TokenMean(), batches)
    assert "token mean" in capsys.readouterr().out


def test_a_trial_run_of_a_generator_of_batches_is_checked_too(capsys: Any) -> None:
    def batches() -> Iterator[list[Tensor]]:
        yield from loader()

    found = trainer(fast_dev_run=True)
    found.fit(Classifier(), batches())
    assert found.global_step == 1
    assert "right" in capsys.readouterr().out


def test_a_batch_of_one_sample_does_not_keep_a_fit_from_running(capsys: Any) -> None:
    found = trainer(fast_dev_run=True)
    found.fit(Classifier(), DataLoader(TensorDataset(*labelled(3)), batch_size=1))
    assert found.global_step == 1
    assert "not checked" in capsys.readouterr().out


def test_a_step_that_fails_fails_as_it_would_without_a_check(capsys: Any) -> None:
    class Failing(Classifier):
        def training_step(self, batch: list[Tensor]) -> Any:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        trainer(check=True, max_epochs=1).fit(Failing(), loader())
    assert "while the check ran" not in "".join(caught.value.__notes__)
    assert capsys.readouterr().out == ""


def test_a_fit_with_threads_is_checked_in_its_threads(capsys: Any) -> None:
    trainer(check=True, max_epochs=1, strategy=ThreadDataParallel(2)).fit(Classifier(), loader())
    assert "2 threads" in capsys.readouterr().out


def test_check_must_be_true_or_false() -> None:
    with pytest.raises(TypeError, match="check must be True or False"):
        trainer(check="yes")


# -- as a test -------------------------------------------------------------------------------------


def test_check_losses_raises_what_the_report_says() -> None:
    with pytest.raises(AssertionError, match="token mean") as caught:
        check_losses(TokenMean, texts())
    assert "Mean.of(loss, (target != ignore_index).sum())" in str(caught.value)


def test_check_losses_takes_modules_loaders_and_strategies() -> None:
    module = Classifier()
    assert check_losses(module, loader(), batches=2).ok
    assert "2 threads" in check_losses(module, labelled(), ThreadDataParallel(2)).shards
