"""Several validation loaders, and what their steps return at the end of the epoch."""

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from composefit import Callback, LoopModule
from composefit.data import Batches
from composefit.loops import EvaluateLoop
from tests.lockstep.steps import data, every_strategy, linear, trainer

LONG = [data(7, 3, seed=1), data(4, 3, seed=2), data(1, 3, seed=3)]
SHORT = [data(2, 3, seed=4)]


class Net(LoopModule):
    """Returns its rows and logs their mean; keeps what the end of an epoch is given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = linear(3, 2)
        self.outputs: list[Any] = []

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)

    def training_step(self, x: Tensor) -> Tensor:
        loss: Tensor = self.net(x).square().mean()
        return loss

    def validation_step(self, x: Tensor, batch_idx: int, dataloader_idx: int) -> Any:
        out = self.net(x)
        self.log("mean", out.mean())
        return {"rows": out, "loader": dataloader_idx}

    def test_step(self, x: Tensor, batch_idx: int, dataloader_idx: int) -> Any:
        return self.validation_step(x, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, outputs: Any) -> None:  # type: ignore[override]
        self.outputs.append(outputs)

    def on_test_epoch_end(self, outputs: Any) -> None:  # type: ignore[override]
        self.outputs.append(outputs)


def rows(batches: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [linear(3, 2)(x) for x in batches]


def close(found: list[Any], batches: list[Tensor], loader: int) -> None:
    assert [one["loader"] for one in found] == [loader] * len(batches)
    torch.testing.assert_close(
        [one["rows"] for one in found], rows(batches), rtol=1e-13, atol=1e-15
    )


@pytest.mark.parametrize("stage", ["validate", "test"])
@every_strategy
def test_the_end_of_an_epoch_gets_what_steps_returned_in_loader_order(
    strategy: Any, stage: str
) -> None:
    net = Net()
    getattr(trainer(strategy()), stage)(net, LONG)
    (outputs,) = net.outputs
    close(outputs, LONG, 0)

    net = Net()
    getattr(trainer(strategy()), stage)(net, {"long": LONG, "short": SHORT})
    ((long, short),) = net.outputs
    close(long, LONG, 0)
    close(short, SHORT, 1)


@every_strategy
def test_in_a_fit_too_and_for_callbacks_that_take_it(strategy: Any) -> None:
    found: list[Any] = []

    class Taking(Callback):
        def on_validation_epoch_end(self, trainer: Any, module: Any, outputs: Any) -> None:  # type: ignore[override]
            found.append([one["rows"].shape for one in outputs])

    class Own(Net):
        def on_validation_epoch_end(self) -> None:  # type: ignore[override]
            found.append("own")

    trainer(strategy(), callbacks=Taking(), max_epochs=2).fit(Own(), LONG[:2], LONG)
    assert found == [[x[:, :2].shape for x in LONG], "own"] * 2


def test_nothing_is_kept_for_an_end_that_takes_nothing() -> None:
    class Own(Net):
        alive = 0

        def validation_step(self, x: Tensor) -> Any:  # type: ignore[override]
            return Big()

        def on_validation_epoch_end(self) -> None:  # type: ignore[override]
            assert Big.alive <= 1  # the last one may still be around

    class Big:
        alive = 0

        def __init__(self) -> None:
            Big.alive += 1

        def __del__(self) -> None:
            Big.alive -= 1

    trainer().validate(Own(), LONG * 3)


MEANS = [torch.cat(rows(batches)).mean().item() for batches in (LONG, SHORT)]


def loader(batches: list[Tensor]) -> Any:
    """The same batches from a DataLoader."""
    whole = torch.cat(batches)
    cuts = [0, *accumulate(len(x) for x in batches)]
    indices = [list(range(a, b)) for a, b in pairwise(cuts)]
    return DataLoader(TensorDataset(whole), batch_sampler=indices, collate_fn=_rows)


def _rows(samples: list[Any]) -> Tensor:
    return torch.stack([x for (x,) in samples])


@pytest.mark.parametrize("form", ["list", "tuple", "dict", "dict of lists", "iterators"])
@every_strategy
def test_each_loader_has_its_own_mean_and_result(strategy: Any, form: str) -> None:
    loaders: Any = {
        "list": [loader(LONG), loader(SHORT)],
        "tuple": (loader(LONG), loader(SHORT)),
        "dict": {"long": loader(LONG), "short": loader(SHORT)},
        "dict of lists": {"long": LONG, "short": SHORT},
        "iterators": [iter(LONG), iter(SHORT)],
    }[form]
    run = trainer(strategy())
    results = run.validate(Net(), loaders, verbose=False)
    assert results == [
        {f"mean/dataloader_idx_{i}": pytest.approx(mean, rel=1e-12)} for i, mean in enumerate(MEANS)
    ]
    assert set(run.callback_metrics) == {"mean/dataloader_idx_0", "mean/dataloader_idx_1"}


@every_strategy
def test_without_the_loaders_index_a_value_is_the_mean_over_all_samples(strategy: Any) -> None:
    class Own(Net):
        def validation_step(self, x: Tensor) -> None:  # type: ignore[override]
            self.log("mean", self.net(x).mean(), add_dataloader_idx=False)

        def on_validation_epoch_end(self) -> None:  # type: ignore[override]
            self.log("end", 1.0)

    results = trainer(strategy()).validate(Own(), {"long": LONG, "short": SHORT}, verbose=False)
    mean = torch.cat(rows(LONG + SHORT)).mean().item()
    assert results == [{"mean": pytest.approx(mean, rel=1e-12), "end": 1.0}] * 2


def test_a_name_that_looks_like_a_loaders_is_anybodys() -> None:
    class Own(Net):
        def validation_step(self, x: Tensor) -> None:  # type: ignore[override]
            self.log("mean/dataloader_idx_7", 1.0)

    assert trainer().validate(Own(), LONG) == [{"mean/dataloader_idx_7": 1.0}]


def test_a_list_of_batches_is_one_loader() -> None:
    assert len(trainer().validate(Net(), LONG, verbose=False)) == 1
    pairs = [(x, x) for x in LONG]

    class Own(Net):
        def validation_step(self, batch: Any) -> None:  # type: ignore[override]
            x, y = batch
            assert x is y

    assert len(trainer().validate(Own(), pairs, verbose=False)) == 1


def test_numbers_of_batches_are_told_for_each_loader() -> None:
    class Told(Callback):
        def on_validation_start(self, trainer: Any, module: Any) -> None:
            numbers.append((trainer.num_val_batches, trainer.num_evaluation_batches))

    numbers: list[Any] = []
    run = trainer(callbacks=Told(), limit_val_batches=2, num_sanity_val_steps=1)
    run.fit(Net(), LONG, {"long": LONG, "short": SHORT})
    assert numbers == [([2, 1], [1, 1]), ([2, 1], [2, 1])]


def test_a_loop_by_itself_takes_one_loader_or_several() -> None:
    run = trainer()
    two = [loader(LONG), loader(SHORT)]
    for loaders, number in (
        *[(LONG, 1), (loader(LONG), 1), (Batches(LONG, "mine"), 1)],
        *[(two, 2), ([Batches(one, "mine") for one in two], 2), ({"a": LONG, "b": SHORT}, 2)],
    ):
        net = Net()
        results = run.run(EvaluateLoop(loaders), net)
        assert len(results) == number
        assert len(net.outputs) == 1


# -- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [True, False])
@every_strategy
def test_steps_and_hooks_are_in_the_mode_that_was_asked_for(strategy: Any, inference: bool) -> None:
    seen: list[tuple[bool, bool]] = []

    def look(*_: Any) -> None:
        seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    class Own(Net):
        def validation_step(self, x: Tensor) -> None:  # type: ignore[override]
            look()

        def on_validation_epoch_end(self) -> None:  # type: ignore[override]
            look()

        on_validation_start = on_validation_end = look

    trainer(strategy(), inference_mode=inference).fit(Own(), LONG[:1], LONG[:1])
    assert set(seen) == {(inference, False)}
    assert len(seen) in (4, 6)  # one shard or three


@every_strategy
def test_tensors_kept_from_a_validation_can_be_trained_on_without_inference_mode(
    strategy: Any,
) -> None:
    class Keeping(Net):
        kept: Any = None

        def training_step(self, x: Tensor) -> Tensor:
            target = 0.0 if self.kept is None else self.kept
            loss: Tensor = (self.net(x).mean() * target).square()
            return loss

        def on_validation_epoch_end(self, outputs: Any) -> None:  # type: ignore[override]
            self.kept = outputs[0]["rows"].mean()

    def run(inference: bool) -> Any:
        net = Keeping()
        one = trainer(strategy(), inference_mode=inference, max_epochs=2)
        one.fit(net, LONG[:2], LONG)
        return net

    assert not torch.equal(run(False).net.weight, linear(3, 2).weight)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        run(True)
