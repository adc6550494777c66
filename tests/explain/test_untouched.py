"""`explain` leaves everything as it was, bit by bit."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from composefit import (
    Callback,
    LoopModule,
    Once,
    SingleDevice,
    Strategy,
    ThreadDataParallel,
    Trainer,
)
from composefit.explain.watching import WatchedLockstep
from composefit.seeding import global_states

STRATEGIES = [SingleDevice("cpu"), SingleDevice("cpu", shards=3), ThreadDataParallel(2)]


class Writer(LoopModule):
    """Writes wherever a step may: weights, buffers, Python state, its batch, global generators."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.seen: list[float] = []
        self.register_buffer("queue", torch.zeros(2))
        # A tensor with a graph, which deepcopy refuses.
        self.activation = self.net[0](torch.ones(1, 3))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def training_step(self, batch: dict[str, Tensor]) -> Any:
        x = batch["x"].mul_(2)
        y = self.net(x + torch.rand_like(x) + self.random.normal(len(x), 3))
        yield from Once(self.write, y)
        yield y.square().mean()

    def write(self, y: Tensor) -> None:
        self.queue += 1
        self.seen.append(y.mean().item())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        random.random(), np.random.rand(), torch.rand(1)
        self.seen.append(-1.0)


def state_of(module: LoopModule) -> dict[str, Any]:
    found: dict[str, Any] = {name: t.clone() for name, t in module.state_dict().items()}
    found |= {f"{name}.grad": p.grad for name, p in module.named_parameters()}
    found |= {f"{name}.version": p._version for name, p in module.named_parameters()}
    found |= {f"{name}.training": part.training for name, part in module.named_modules()}
    found |= {"activation": module.activation.detach().clone(), "seen": list(module.seen)}
    return found | {"attributes": sorted(vars(module)), "trainer": module.trainer}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_module_batch_and_random_states_are_as_before(strategy: Strategy) -> None:
    module, batch = Writer(), {"x": torch.randn(7, 3)}
    module.net[0].weight.grad = torch.ones(4, 3)
    module.net[1].eval()
    before, x, states = state_of(module), batch["x"].clone(), global_states()
    trainer = Trainer(strategy=strategy, seed=3, accumulate_grad_batches=2)
    trainer.explain(module, batch, show=False)
    assert same(before, state_of(module))
    assert torch.equal(batch["x"], x)
    assert same(states, global_states())


def test_a_loader_stands_where_it_stood() -> None:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(12, 3))
    loader = DataLoader(data, 4, shuffle=True, generator=generator)

    class Pairs(Writer):
        def training_step(self, batch: Any) -> Any:
            return (yield from super().training_step({"x": batch[0]}))

    iterator = iter(loader)
    batch, state = next(iterator), generator.get_state()
    rest = copy.deepcopy(list(iterator))
    iterator = iter(loader)
    generator.set_state(state)
    Trainer(strategy=SingleDevice("cpu")).explain(Pairs(), batch, show=False)
    assert torch.equal(generator.get_state(), state)
    assert len(list(iterator)) == 3 and len(rest) == 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_training_ends_where_it_does_without_being_explained(strategy: Strategy) -> None:
    def trained(explained: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module, batches = Writer(), [{"x": torch.randn(6, 3)} for _ in range(4)]
        trainer = Trainer(strategy=strategy, seed=1, logger=False, enable_checkpointing=False)
        for batch in batches:
            if explained:
                trainer.explain(module, batch, show=False)
            trainer.step(module, [copy.deepcopy(batch)])
        if explained:
            assert trainer.global_step == 4 and module.trainer is trainer
        return module.state_dict()

    with_it, without = trained(True), trained(False)
    assert all(torch.equal(value, without[name]) for name, value in with_it.items())


def test_the_trainers_own_state_and_callbacks_are_as_before() -> None:
    class Counter(Callback):
        calls = 0

        def on_after_optimizer_step(self, *_: Any) -> None:
            self.calls += 1

    counter = Counter()
    trainer = Trainer(strategy=SingleDevice("cpu"), callbacks=counter, max_epochs=1, logger=False)
    module = Writer()
    trainer.fit(module, [{"x": torch.randn(6, 3)}])
    training, calls, history = trainer.training, counter.calls, len(trainer.history.tracks)
    trainer.explain(module, {"x": torch.randn(6, 3)}, show=False)
    assert trainer.training is training and trainer.global_step == 1
    assert counter.calls == calls == 1
    assert len(trainer.history.tracks) == history
    assert type(training.driver) is not WatchedLockstep


def test_an_error_of_the_step_is_the_users_own_and_nothing_is_left_changed() -> None:
    class Failing(Writer):
        def training_step(self, batch: Any) -> Any:
            torch.manual_seed(99)
            raise LookupError("mine")

    module, batch = Failing(), {"x": torch.randn(6, 3)}
    before, states = state_of(module), global_states()
    trainer = Trainer(strategy=ThreadDataParallel(2), seed=3)
    with pytest.raises(LookupError, match="mine"):
        trainer.explain(module, batch, show=False)
    assert same(before, state_of(module)) and same(states, global_states())
    assert trainer.explain(Writer(), {"x": torch.randn(6, 3)}, show=False).barriers


def test_the_driver_of_a_training_is_the_plain_one() -> None:
    """It costs nothing where it is not called."""
    trainer = Trainer(strategy=SingleDevice("cpu"), logger=False)
    trainer.step(Writer(), [{"x": torch.randn(6, 3)}])
    assert trainer.training is not None
    assert not isinstance(trainer.training.driver, WatchedLockstep)


def test_it_cannot_be_called_while_the_trainer_runs() -> None:
    class Asking(Writer):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            assert self.trainer is not None
            self.trainer.explain(self, batch)

    trainer = Trainer(strategy=SingleDevice("cpu"), max_epochs=1, logger=False)
    with pytest.raises(RuntimeError, match="running already: explain"):
        trainer.fit(Asking(), [{"x": torch.randn(6, 3)}])


def test_what_is_no_module_to_train_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a LoopModule, got Linear"):
        Trainer(strategy=SingleDevice("cpu")).explain(nn.Linear(1, 1), torch.ones(1))  # type: ignore[arg-type]


def test_a_step_that_a_hook_skips_is_an_error() -> None:
    class Skipping(Writer):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int:  # type: ignore[override]
            return -1

    with pytest.raises(ValueError, match="returned -1, which ends the epoch"):
        Trainer(strategy=SingleDevice("cpu")).explain(Skipping(), {"x": torch.randn(6, 3)})
