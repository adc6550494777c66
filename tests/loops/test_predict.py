"""Prediction: an entry for each loader batch, in order, whatever the strategy."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from composefit import Callback, LoopModule
from composefit.loops import PredictLoop
from tests.lockstep.steps import data, every_strategy, linear, trainer

BATCHES = [data(7, 3, seed=1), data(4, 3, seed=2), data(1, 3, seed=3)]
OTHERS = [data(2, 3, seed=4)]


class Net(LoopModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def expected(batches: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [linear(3, 2)(x) for x in batches]


def close(found: Any, batches: list[Tensor]) -> None:
    assert isinstance(found, list)
    torch.testing.assert_close(found, expected(batches), rtol=1e-13, atol=1e-15)


@every_strategy
def test_there_is_an_entry_for_each_loader_batch_in_order(strategy: Any) -> None:
    close(trainer(strategy()).predict(Net(), BATCHES), BATCHES)


@every_strategy
def test_with_several_loaders_there_is_a_list_for_each(strategy: Any) -> None:
    for loaders in ({"a": BATCHES, "b": OTHERS}, [iter(BATCHES), iter(OTHERS)]):
        found = trainer(strategy()).predict(Net(), loaders)
        assert found is not None
        assert len(found) == 2
        close(found[0], BATCHES)
        close(found[1], OTHERS)


class Row(NamedTuple):
    out: Tensor
    names: list[str]


@every_strategy
def test_what_a_step_returns_keeps_its_structure(strategy: Any) -> None:
    class Structured(Net):
        def predict_step(self, x: Tensor) -> Any:
            out = self.net(x)
            return {"row": Row(out, [f"{v:.3f}" for v in x[:, 0]]), "number": out[:, :1]}

    for x, found in zip(BATCHES, trainer(strategy()).predict(Structured(), BATCHES), strict=True):
        assert isinstance(found["row"], Row)
        torch.testing.assert_close(found["row"].out, expected([x])[0], rtol=1e-13, atol=1e-15)
        assert found["row"].names == [f"{v:.3f}" for v in x[:, 0]]
        assert torch.equal(found["number"], found["row"].out[:, :1])


@every_strategy
def test_without_return_predictions_only_callbacks_see_them(strategy: Any) -> None:
    class Keep(Callback):
        def __init__(self) -> None:
            self.found: list[Any] = []

        def on_predict_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, i: int, loader: int = 0
        ) -> None:
            self.found.append((i, loader, outputs))

    keep = Keep()
    run = trainer(strategy(), callbacks=keep)
    assert run.predict(Net(), {"a": BATCHES, "b": OTHERS}, return_predictions=False) is None
    assert [(i, loader) for i, loader, _ in keep.found] == [(0, 0), (1, 0), (2, 0), (0, 1)]
    close([outputs for *_, outputs in keep.found], BATCHES + OTHERS)


@every_strategy
def test_what_cannot_be_joined_does_no_harm_where_nobody_looks_at_it(strategy: Any) -> None:
    class Opaque(Net):
        def predict_step(self, x: Tensor) -> Any:
            return object()

    run = trainer(strategy())
    assert run.predict(Opaque(), BATCHES, return_predictions=False) is None
    if strategy().lanes > 1:
        with pytest.raises(TypeError, match="cannot be joined; return tensors"):
            run.predict(Opaque(), BATCHES)


@pytest.mark.parametrize(
    ("limit", "number"), [(None, 3), (2, 2), (0.5, 1), (1.0, 3), (0.1, 1), (99, 3)]
)
def test_its_limit_counts_loader_batches_of_each_loader(limit: Any, number: int) -> None:
    run = trainer(limit_predict_batches=limit)
    found = run.predict(Net(), {"a": BATCHES, "b": BATCHES})
    assert [len(one) for one in found or []] == [number, number]


def test_its_step_is_told_the_batch_and_the_loader() -> None:
    class Told(Net):
        def predict_step(self, x: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return (batch_idx, dataloader_idx)

    found = trainer().predict(Told(), {"a": BATCHES, "b": OTHERS})
    assert found == [[(0, 0), (1, 0), (2, 0)], [(0, 1)]]


@every_strategy
def test_it_is_in_evaluation_mode_without_gradients_and_puts_modes_back(strategy: Any) -> None:
    class Modes(Net):
        def predict_step(self, x: Tensor) -> Any:
            out = self.net(x)
            assert not out.requires_grad
            assert not self.training
            return out

    net = Modes()
    for training in (True, False):
        net.train(training)
        trainer(strategy()).predict(net, BATCHES)
        assert net.training is training


def test_predictions_can_be_trained_on_where_inference_mode_is_off() -> None:
    for inference in (True, False):
        (found, *_) = trainer(inference_mode=inference).predict(Net(), BATCHES) or []
        assert found.is_inference() is inference


def test_a_loop_by_itself_takes_a_loader_or_batches_of_several() -> None:
    run = trainer()
    close(run.run(PredictLoop(BATCHES), Net()), BATCHES)
    assert run.run(PredictLoop(BATCHES, keep=False), Net()) is None


def test_a_module_without_a_forward_is_told_so() -> None:
    class Bare(LoopModule): ...

    with pytest.raises(NotImplementedError, match=r"Bare defines no forward\(\)"):
        trainer().predict(Bare(), BATCHES)


def test_predicting_after_a_fit_changes_nothing_of_it() -> None:
    class Trained(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, x: Tensor) -> Tensor:
            loss = self.net(x).square().mean()
            self.log("loss", loss)
            return loss

    run, net = trainer(max_epochs=2), Trained()
    run.fit(net, BATCHES)
    before = (run.global_step, run.current_epoch, run.callback_metrics, run.updates)
    found = run.predict(net, BATCHES)
    assert (run.global_step, run.current_epoch, run.callback_metrics, run.updates) == before
    again = run.predict(dataloaders=BATCHES)  # the module of the last run
    torch.testing.assert_close(found, again, rtol=0, atol=0)
