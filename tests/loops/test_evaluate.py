"""Validation: no gradients, no training mode, no trace; its outputs and means over all shards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from composefit import Callback, Gather, LoopModule, Mean, Strategy, Trainer
from tests.lockstep.steps import data, every_strategy, linear, trainer, weights

Make = Callable[[], Strategy]


class Net(LoopModule):
    """Drops out and normalises in training; a part of it never trains."""

    def __init__(self) -> None:
        super().__init__()
        self.net = linear(3, 3)
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Sequential(nn.Dropout(0.5)).eval()

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.frozen(self.drop(self.norm(self.net(x))))
        return out

    def training_step(self, x: Tensor) -> Tensor:
        assert (self.training, self.norm.training, self.frozen[0].training) == (True, True, False)
        return self(x).square().mean()

    def validation_step(self, x: Tensor) -> Any:
        out = self(x)
        assert not out.requires_grad and not any(m.training for m in self.modules())
        self.log("val", out.square().mean())
        return {"rows": out, "mean": out.mean(), "name": "net"}


class Keep(Callback):
    """What the hooks of a validation get to see."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []
        self.seen: list[tuple[bool, bool]] = []

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.seen.append((module.training, torch.is_grad_enabled()))

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any) -> None:  # type: ignore[override]
        self.outputs.append(outputs)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.seen.append((module.training, torch.is_grad_enabled()))


def modes(net: nn.Module) -> list[bool]:
    return [part.training for part in net.modules()]


@every_strategy
def test_a_validation_sees_the_whole_batch_and_changes_nothing(strategy: Make) -> None:
    net, keep = Net(), Keep()
    before, state = modes(net), {n: v.clone() for n, v in net.state_dict().items()}
    batches = [data(7, 3), data(2, 3, seed=2)]
    values = trainer(strategy(), callbacks=keep).validate(net, batches)

    assert modes(net) == before
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert keep.seen == [(False, False)] * 2
    net.eval()
    with torch.no_grad():
        expected = [net(batch) for batch in batches]
    mean = torch.cat(expected).square().mean().item()
    assert values == [{"val": pytest.approx(mean, rel=1e-13)}]
    for out, rows in zip(keep.outputs, expected, strict=True):
        torch.testing.assert_close(out["rows"], rows, rtol=1e-13, atol=0)
        assert out["name"] == "net"
        # Nothing is averaged: of a number each shard's is there.
        assert out["mean"].shape in [(), (min(3, len(rows)),)]


@every_strategy
def test_a_fit_goes_on_in_the_modes_it_had(strategy: Make) -> None:
    net, keep = Net(), Keep()
    before = modes(net)
    run = trainer(strategy(), callbacks=keep, max_epochs=2)
    run.fit(net, [data(7, 3)] * 2, [data(7, 3), data(4, 3)])
    assert modes(net) == before
    assert len(keep.outputs) == 4
    with torch.no_grad():
        rows = torch.cat([net.eval()(batch) for batch in (data(7, 3), data(4, 3))])
    assert run.callback_metrics["val"].item() == pytest.approx(
        rows.square().mean().item(), rel=1e-13
    )


def test_modes_and_logs_are_put_back_after_an_error() -> None:
    class Failing(Net):
        fails = True

        def validation_step(self, x: Tensor) -> Any:
            if self.fails:
                raise KeyError("mine")
            return super().validation_step(x)

    net = Failing()
    before = modes(net)
    run = trainer()
    with pytest.raises(KeyError, match="mine"):
        run.fit(net, [data(7, 3)], [data(7, 3)])
    assert modes(net) == before
    assert torch.is_grad_enabled()
    net.fails = False
    type(net).on_train_epoch_start = lambda self: self.log("start", 1.0)  # type: ignore[method-assign]
    run.fit(net, [data(7, 3)], [data(7, 3)])
    assert run.logs.all_values() == {"start": 1.0}


def test_what_is_logged_after_it_belongs_to_training_again() -> None:
    class Own(Net):
        def on_train_epoch_end(self) -> None:
            self.log("end", 1.0)

    run = trainer()
    run.fit(Own(), [data(7, 3)], [data(7, 3)])
    assert run.logs.all_values() == {"end": 1.0}
    assert set(run.evaluation.logs.all_values()) == {"val"}


@every_strategy
def test_effects_that_only_reduce_work_in_validation(strategy: Make) -> None:
    seen: list[Any] = []

    class Gathering(Net):
        def validation_step(self, x: Tensor) -> Any:
            rows, _ = yield from Gather(self.net(x))
            mean = yield from Mean(x.sum(), x.numel())
            seen.append((rows.shape, mean.item()))
            return rows.detach()[:1]

    batch = data(7, 3)
    trainer(strategy()).validate(Gathering(), [batch])
    assert {shape for shape, _ in seen} == {(7, 3)}
    assert [mean for _, mean in seen] == pytest.approx([batch.mean().item()] * len(seen))


@every_strategy
def test_an_update_in_validation_is_refused(strategy: Make) -> None:
    class Updating(Net):
        def validation_step(self, x: Tensor) -> Any:
            yield {"optimizer": self.net(x).mean()}

    net = Updating()
    before = weights(net)
    with pytest.raises(TypeError, match="validation_step yields an update, but nothing is trained"):
        trainer(strategy()).validate(net, [data(7, 3)])
    assert all(map(torch.equal, weights(net), before))


@pytest.mark.parametrize(("limit", "number"), [(2, 2), (0.5, 2), (1.0, 5), (9, 5), (None, 5)])
def test_its_limit_counts_loader_batches(limit: Any, number: int) -> None:
    keep = Keep()
    run = trainer(callbacks=keep, limit_val_batches=limit)
    run.fit(Net(), [data(7, 3)] * 2, [data(3, 3, seed=i) for i in range(5)])
    assert len(keep.outputs) == number
    assert run.num_val_batches == [number]


def test_hooks_know_the_means_and_may_add_to_them() -> None:
    class Own(Net):
        def on_validation_epoch_end(self) -> None:
            assert self.trainer is not None
            self.log("double", 2 * self.trainer.callback_metrics["val"])

        def on_validation_end(self) -> None:
            assert self.trainer is not None
            self.log("also", 3.0)

    (values,) = trainer().validate(Own(), [data(7, 3)])
    assert values == {"val": values["val"], "double": 2 * values["val"], "also": 3.0}


def test_values_that_no_logger_gets_are_returned_all_the_same() -> None:
    class Own(Net):
        def validation_step(self, x: Tensor) -> Any:
            self.log("quiet", 2.0, logger=False)

    assert trainer().validate(Own(), [data(7, 3)]) == [{"quiet": 2.0}]


def test_a_one_shot_iterator_is_refused_before_anything_is_trained() -> None:
    net = Net()
    before = weights(net)
    with pytest.raises(ValueError, match="val_dataloaders is a one-shot iterator"):
        trainer(max_epochs=2).fit(net, [data(7, 3)], iter([data(7, 3)]))
    assert all(map(torch.equal, weights(net), before))
    trainer(max_epochs=1).fit(net, [data(7, 3)], iter([data(7, 3)]))


def test_each_module_is_evaluated_as_itself() -> None:
    class Named(Net):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def validation_step(self, x: Tensor) -> str:
            return self.name

    run = trainer()
    assert [run.evaluate(net, data(2, 3)) for net in (Named("a"), Named("b"))] == ["a", "b"]


def test_the_batch_index_is_handed_over() -> None:
    seen: list[int] = []

    class Indexed(Net):
        def validation_step(self, x: Tensor, batch_idx: int) -> None:
            seen.append(batch_idx)

    run: Trainer = trainer()
    run.validate(Indexed(), [data(3, 3)] * 3)
    assert seen == [0, 1, 2]
