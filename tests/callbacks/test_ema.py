import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from composefit import checkpoint
from composefit.callbacks import EMA, ModelCheckpoint
from composefit.optimizers import NamedOptimizer
from composefit.strategies import ThreadDataParallel
from tests.callbacks.fake import LoggingModule, Pair, SteppedTrainer, batches, fit


class Two(LoggingModule):
    """Two networks with one weight each, a frozen one, and statistics."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.generator = nn.Linear(1, 1, bias=False, dtype=dtype)
        self.critic = nn.Linear(1, 1, bias=False, dtype=dtype)
        self.frozen = nn.Parameter(torch.ones(1, dtype=dtype), requires_grad=False)
        self.register_buffer("mean", torch.zeros(1, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        with torch.no_grad():
            for part in (self.generator, self.critic):
                part.weight.fill_(0.0)


class Updating(SteppedTrainer):
    """Each step sets weights to the given values and tells of these optimizers' updates."""

    plan: dict[str, float]

    def __init__(self, root: Path, *callbacks: Any, **given: Any) -> None:
        super().__init__(root, *callbacks, **{"module": Two(), **given})
        module = self.module
        self.optimizers = {
            name: NamedOptimizer(name, torch.optim.SGD(getattr(module, name).parameters(), lr=0.1))
            for name in ("generator", "critic")
        }

    def to(self, **weights: float) -> None:
        self.plan = weights
        self.step()

    def update(self) -> None:
        for name, value in self.plan.items():
            self.change(name, value)

    def change(self, name: str, value: float) -> None:
        with torch.no_grad():
            getattr(self.module, name).weight.fill_(value)
        self.call("on_after_optimizer_step", self.optimizers[name].optimizer, name)


def weight(module: nn.Module, name: str = "generator") -> float:
    return float(getattr(module, name).weight.item())


def evaluated(trainer: SteppedTrainer, name: str = "generator") -> float:
    """The weight that a validation sees."""
    trainer.call("on_validation_start")
    found = weight(trainer.module, name)
    trainer.call("on_validation_end")
    return found


def closed_form(decay: float, values: list[float]) -> float:
    """The first value weighs d^(n-1), the i-th later one (1 - d) d^(n-i)."""
    last = len(values) - 1
    terms = [decay**last * values[0]]
    terms += [(1 - decay) * decay ** (last - i) * value for i, value in enumerate(values) if i]
    return sum(terms)


# -- averaging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_average_is_the_closed_form(tmp_path, decay):
    trainer = Updating(tmp_path, EMA(decay))
    trainer.begin()
    values = [3.0, -1.0, 4.0, 1.0, -5.0]
    for value in values:
        trainer.to(generator=value)
    assert evaluated(trainer) == pytest.approx(closed_form(decay, values), abs=1e-14)


def test_the_average_is_that_of_torch(tmp_path):
    trainer = Updating(tmp_path, EMA(0.7))
    reference = AveragedModel(trainer.module.generator, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    trainer.begin()
    for value in torch.randn(10).tolist():
        trainer.to(generator=value)
        reference.update_parameters(trainer.module.generator)
    assert evaluated(trainer) == reference.module.weight.item()


def test_each_optimizers_parameters_are_averaged_at_the_steps_that_update_it(tmp_path):
    callback = EMA(0.5)
    trainer = Updating(tmp_path, callback)
    trainer.begin()
    critic, generator = [], []
    for step in range(6):
        plan = {"critic": float(step)}
        if step % 3 == 0:
            plan["generator"] = 10.0 + step
        trainer.to(**plan)
        critic.append(plan["critic"])
        generator += [plan["generator"]] if step % 3 == 0 else []
    assert evaluated(trainer, "critic") == closed_form(0.5, critic)
    assert evaluated(trainer, "generator") == closed_form(0.5, generator)


def test_several_updates_of_an_optimizer_within_a_step_count_once(tmp_path):
    class Often(Updating):
        def update(self) -> None:
            for value in (7.0, 8.0):
                self.change("critic", value)
            super().update()

    trainer = Often(tmp_path, EMA(0.5))
    trainer.begin()
    for value in (1.0, 2.0, 3.0):
        trainer.to(critic=value)
    assert evaluated(trainer, "critic") == closed_form(0.5, [1.0, 2.0, 3.0])


def test_a_parameter_of_two_optimizers_is_averaged_once_a_step_at_its_end(tmp_path):
    trainer = Updating(tmp_path, EMA(0.5))
    shared = trainer.module.generator.weight
    trainer.optimizers["critic"].optimizer.add_param_group({"params": [shared]})
    trainer.begin()
    for value in (1.0, 2.0, 3.0):
        trainer.to(critic=-value, generator=value)
    assert evaluated(trainer) == closed_form(0.5, [1.0, 2.0, 3.0])


def test_a_step_of_several_loader_batches_counts_once(tmp_path):
    trainer = Updating(tmp_path, EMA(0.5), window=3)
    trainer.begin()
    for value in (1.0, 2.0, 3.0):
        trainer.to(generator=value)
    assert evaluated(trainer) == closed_form(0.5, [1.0, 2.0, 3.0])


def test_averaging_begins_after_so_many_steps(tmp_path):
    trainer = Updating(tmp_path, EMA(0.5, update_after_step=2))
    trainer.begin()
    for value in (1.0, 2.0):
        trainer.to(generator=value)
        assert evaluated(trainer) == value
    for value in (3.0, 4.0):
        trainer.to(generator=value)
    assert evaluated(trainer) == closed_form(0.5, [3.0, 4.0])


def test_every_nth_update_is_counted_for_each_optimizer_by_itself(tmp_path):
    trainer = Updating(tmp_path, EMA(0.5, every_n_updates=2))
    trainer.begin()
    trainer.to(critic=1.0)
    for value in (2.0, 3.0, 4.0, 5.0):
        trainer.to(critic=value, generator=value)
    assert evaluated(trainer, "critic") == closed_form(0.5, [2.0, 4.0])
    assert evaluated(trainer, "generator") == closed_form(0.5, [3.0, 5.0])


def test_only_the_children_named_are_averaged(tmp_path):
    callback = EMA(0.5, modules=["generator"])
    trainer = Updating(tmp_path, callback)
    trainer.begin()
    for value in (1.0, 2.0):
        trainer.to(critic=value, generator=value)
    assert evaluated(trainer, "generator") == 1.5
    assert evaluated(trainer, "critic") == 2.0
    assert list(callback.state_dict()["averages"]) == ["generator.weight"]


def test_parameters_that_nobody_updates_are_what_they_are(tmp_path):
    callback = EMA(0.5)
    trainer = Updating(tmp_path, callback)
    trainer.begin()
    trainer.to(generator=1.0)
    assert list(callback.state_dict()["averages"]) == ["generator.weight"]


@pytest.mark.parametrize("use_buffers", [False, True])
def test_buffers_are_averaged_on_request(tmp_path, use_buffers):
    trainer = Updating(tmp_path, EMA(0.5, use_buffers=use_buffers))
    module = trainer.module
    trainer.begin()
    for value in (1.0, 2.0):
        module.mean.fill_(value)
        module.count += 1
        trainer.to(generator=value)
    trainer.call("on_validation_start")
    assert module.mean.item() == (1.5 if use_buffers else 2.0)
    assert module.count.item() == 2
    trainer.call("on_validation_end")
    assert module.mean.item() == 2.0


def test_a_buffer_that_is_in_no_state_dict_stays_out_of_it(tmp_path):
    module = Two()
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    callback = EMA(0.5, use_buffers=True)
    trainer = Updating(tmp_path, callback, module=module)
    trainer.begin()
    trainer.to(generator=1.0)
    assert "scratch" in callback.state_dict()["averages"]
    assert callback.averaged_state_dict().keys() == module.state_dict().keys()


def test_averages_of_short_floats_do_not_lose_small_changes(tmp_path):
    trainer = Updating(tmp_path, EMA(0.999), module=Two(torch.bfloat16))
    trainer.begin()
    trainer.to(generator=1.0)
    for _ in range(700):
        trainer.to(generator=2.0)
    # In bfloat16 itself 1 + 0.001 rounds to 1, and the average would never move.
    assert evaluated(trainer) == pytest.approx(2 - 0.999**700, rel=2**-8)
    assert trainer.module.generator.weight.dtype == torch.bfloat16


def test_averages_are_no_parameters_of_the_module(tmp_path):
    trainer = Updating(tmp_path, EMA(0.5))
    before = [id(p) for p in trainer.module.parameters()], list(trainer.module.state_dict())
    trainer.begin()
    trainer.to(generator=1.0)
    trainer.call("on_validation_start")
    assert ([id(p) for p in trainer.module.parameters()], list(trainer.module.state_dict())) == (
        before
    )
    trainer.call("on_validation_end")


def test_a_parameter_that_came_later_is_averaged_from_the_next_epoch_on(tmp_path):
    trainer = Updating(tmp_path, EMA(0.5))
    trainer.begin()
    trainer.to(generator=1.0)
    trainer.end_epoch()
    trainer.module.late = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    late = torch.optim.SGD(trainer.module.late.parameters(), lr=0.1)
    trainer.optimizers["late"] = NamedOptimizer("late", late)
    trainer.call("on_train_epoch_start")
    for value in (1.0, 2.0):
        trainer.to(late=value)
    assert evaluated(trainer, "late") == 1.5


def test_a_step_that_failed_is_not_averaged(tmp_path):
    trainer = Updating(tmp_path, EMA(0.5))
    trainer.begin()
    trainer.to(generator=1.0)
    trainer.exception = RuntimeError()
    trainer.to(generator=2.0)
    trainer.exception = None
    assert evaluated(trainer) == 1.0


# -- standing in -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["validation", "test", "predict"])
def test_averages_stand_in_during_every_evaluation(tmp_path, stage):
    trainer = Updating(tmp_path, EMA(0.5))
    trainer.begin()
    trainer.to(generator=1.0)
    trainer.to(generator=2.0)
    trainer.call(f"on_{stage}_start")
    assert weight(trainer.module) == 1.5
    trainer.call(f"on_{stage}_end")
    assert weight(trainer.module) == 2.0


def test_validation_can_be_left_out(tmp_path):
    trainer = Updating(tmp_path, EMA(0.5, validate=False))
    trainer.begin()
    trainer.to(generator=1.0)
    trainer.to(generator=2.0)
    assert evaluated(trainer) == 2.0
    trainer.call("on_test_start")
    assert weight(trainer.module) == 1.5
    trainer.call("on_test_end")


def test_weights_come_back_bit_by_bit_in_place(tmp_path):
    trainer = Updating(tmp_path, EMA(0.9))
    trainer.begin()
    for value in torch.randn(3).tolist():
        trainer.to(generator=value)
    parameter = trainer.module.generator.weight
    before, pointer = parameter.detach().clone(), parameter.data_ptr()
    trainer.call("on_validation_start")
    assert parameter.data_ptr() == pointer and not torch.equal(parameter, before)
    trainer.call("on_validation_end")
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("hook", ["on_exception", "teardown"])
def test_weights_come_back_after_a_fault_whatever_the_end_hooks_do(tmp_path, hook):
    trainer = Updating(tmp_path, EMA(0.5))
    trainer.begin()
    trainer.to(generator=1.0)
    trainer.to(generator=2.0)
    trainer.call("on_validation_start")
    trainer.call(hook, RuntimeError() if hook == "on_exception" else "fit")
    assert weight(trainer.module) == 2.0
    trainer.call("on_validation_end")
    assert weight(trainer.module) == 2.0


def test_weights_can_be_trained_on_after_an_evaluation_in_inference_mode(tmp_path):
    trainer = Updating(tmp_path, EMA(0.5))
    trainer.begin()
    trainer.to(generator=1.0)
    trainer.to(generator=2.0)
    with torch.inference_mode():
        assert evaluated(trainer) == 1.5
    (trainer.module.generator.weight * 3.0).sum().backward()
    assert trainer.module.generator.weight.grad.item() == 3.0
    trainer.to(generator=3.0)
    assert evaluated(trainer) == 2.25


@pytest.mark.parametrize("modules", [None, ["generator"], ["tied"]])
def test_tied_parameters_are_averaged_once_and_stand_in_under_both_names(tmp_path, modules):
    module = Two()
    module.tied = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    module.tied.weight = module.generator.weight
    callback = EMA(0.5, modules)
    trainer = Updating(tmp_path, callback, module=module)
    trainer.begin()
    trainer.to(generator=1.0)
    trainer.to(generator=2.0)
    assert evaluated(trainer, "tied") == 1.5
    exported = callback.averaged_state_dict()
    assert exported["tied.weight"].item() == exported["generator.weight"].item() == 1.5
    trainer.call("on_validation_start")
    state = module.state_dict()
    assert state["tied.weight"].item() == state["generator.weight"].item() == 2.0
    trainer.call("on_validation_end")


def test_another_module_is_evaluated_as_it_is(tmp_path):
    trainer = Updating(tmp_path, EMA(0.5))
    trainer.begin()
    trainer.to(generator=1.0)
    other = trainer.module = Two()
    trainer.call("on_test_start")
    assert weight(other) == 0.0
    trainer.call("on_test_end")


def test_averages_of_another_kind_of_module_are_refused(tmp_path):
    trainer = Updating(tmp_path, EMA(0.5))
    trainer.call("setup", "test")
    trainer.callbacks[0].load_state_dict({"averages": {"net.weight": torch.ones(2)}, "counts": {}})
    with pytest.raises(ValueError, match=r"averages of \['net.weight'\], which Two does not have"):
        trainer.call("on_test_start")


# -- checkpoints -----------------------------------------------------------------------------------


def test_a_checkpoint_written_while_averages_stand_in_holds_the_trained_weights(tmp_path):
    callback = EMA(0.5)
    trainer = Updating(tmp_path, callback)
    trainer.begin()
    trainer.to(generator=1.0)
    trainer.to(generator=2.0)
    trainer.call("on_validation_start")
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert weight(trainer.module) == 1.5  # the validation goes on with the averages
    trainer.call("on_validation_end")
    for name in ("whole", "weights"):
        state = checkpoint.load(tmp_path / f"{name}.ckpt")["state_dict"]
        assert state["generator.weight"].item() == 2.0
    state = checkpoint.load(tmp_path / "whole.ckpt")["callbacks"][callback.state_key]
    assert state["averages"]["generator.weight"].item() == 1.5
    # Afterwards a state dict is again the module's own.
    assert trainer.module.state_dict()["generator.weight"].data_ptr() == (
        trainer.module.generator.weight.data_ptr()
    )


def test_checkpoints_at_the_end_of_a_validation_hold_the_trained_weights(tmp_path):
    # In whichever order they are listed.
    saver = ModelCheckpoint(monitor="val_loss", save_on_train_epoch_end=False)
    trainer = Updating(tmp_path, saver, EMA(0.5))
    trainer.begin()
    trainer.to(generator=1.0)
    trainer.to(generator=2.0)
    trainer.validate(val_loss=0.1)
    found = checkpoint.load(saver.best_model_path)["state_dict"]["generator.weight"]
    assert found.item() == 2.0


def test_a_resumed_run_goes_on_bit_by_bit(tmp_path):
    values = torch.randn(8, dtype=torch.float64).tolist()

    def make() -> Updating:
        return Updating(tmp_path, EMA(0.9, every_n_updates=2, use_buffers=True))

    whole = make()
    whole.begin()
    for value in values:
        whole.to(generator=value, critic=-value)
    first = make()
    first.begin()
    for value in values[:3]:
        first.to(generator=value, critic=-value)
    first.save_checkpoint(tmp_path / "x.ckpt")
    state = checkpoint.load(tmp_path / "x.ckpt")
    second = make()
    second.module.load_state_dict(state["state_dict"])
    second.begin(state)
    for value in values[3:]:
        second.to(generator=value, critic=-value)
    one = whole.callbacks[0].state_dict()
    other = second.callbacks[0].state_dict()
    assert one["counts"] == other["counts"] == {"generator": 8, "critic": 8}
    assert one["averages"].keys() == other["averages"].keys()
    for name, average in one["averages"].items():
        assert torch.equal(average, other["averages"][name])


def test_averages_come_and_go_with_the_weights_that_are_loaded(tmp_path):
    trainer = Updating(tmp_path, EMA(0.5))
    trainer.begin()
    trainer.to(generator=1.0)
    trainer.to(generator=2.0)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    trainer.to(generator=100.0)
    for name, expected in (("whole", 1.5), ("weights", 2.0)):
        state = checkpoint.load(tmp_path / f"{name}.ckpt")
        trainer.module.load_state_dict(state["state_dict"])
        trainer.call("on_load_checkpoint", state)
        trainer.call("on_test_start")
        assert weight(trainer.module) == expected
        trainer.call("on_test_end")


def test_a_second_fit_begins_anew(tmp_path):
    trainer = Updating(tmp_path, EMA(0.5))
    for _ in range(2):
        trainer.begin()
        trainer.to(generator=1.0)
        trainer.to(generator=3.0)
        assert evaluated(trainer) == 2.0
    # So does a second fold of a run.
    trainer.begin_fold()
    trainer.to(generator=7.0)
    assert evaluated(trainer) == 7.0


# -- export ----------------------------------------------------------------------------------------


def test_the_averages_can_be_taken_away_as_a_state_dict(tmp_path):
    callback = EMA(0.5)
    trainer = Updating(tmp_path, callback)
    trainer.begin()
    trainer.to(generator=1.0)
    trainer.to(generator=2.0)
    exported = callback.averaged_state_dict()
    other = Two()
    other.load_state_dict(exported)
    assert weight(other) == 1.5
    trainer.to(generator=100.0)
    trainer.module.mean.fill_(9.0)
    assert exported["generator.weight"].item() == 1.5
    assert exported["mean"].item() == 0.0


def test_an_export_needs_averages_and_a_module(tmp_path):
    callback = EMA(0.5)
    with pytest.raises(RuntimeError, match="nothing was averaged yet"):
        callback.averaged_state_dict()
    trainer = Updating(tmp_path, callback)
    trainer.begin()
    trainer.to(generator=1.0)
    del trainer
    gc.collect()
    with pytest.raises(RuntimeError, match=r"write averaged_state_dict\(module\)"):
        callback.averaged_state_dict()
    assert callback.averaged_state_dict(Two())["generator.weight"].item() == 1.0


def saved(path: Path, *callbacks: EMA) -> str:
    trainer = Updating(path, *callbacks)
    trainer.begin()
    trainer.module.mean.fill_(7.0)
    trainer.to(generator=1.0, critic=1.0)
    trainer.to(generator=2.0, critic=2.0)
    trainer.save_checkpoint(path / "x.ckpt")
    return str(path / "x.ckpt")


def test_the_averages_of_a_checkpoint_are_loaded_into_a_module(tmp_path):
    path = saved(tmp_path, EMA(0.5, modules=["generator"]))
    module = Two()
    EMA.load_into(module, path)
    assert (weight(module), weight(module, "critic"), module.mean.item()) == (1.5, 2.0, 7.0)


def test_of_several_averages_one_is_chosen(tmp_path):
    slow, fast = EMA(0.75), EMA(0.25)
    path = saved(tmp_path, slow, fast)
    module = Two()
    with pytest.raises(ValueError, match=r"choose one, EMA\.load_into"):
        EMA.load_into(module, path)
    assert weight(module) == 0.0
    EMA.load_into(module, path, slow.state_key)
    assert weight(module) == 1.25
    EMA.load_into(module, path, fast.state_key)
    assert weight(module) == 1.75


def test_a_checkpoint_without_averages_or_of_another_module_changes_nothing(tmp_path):
    module = Two()
    with pytest.raises(ValueError, match="no EMA"):
        EMA.load_into(module, saved(tmp_path))

    class Other(Two):
        def __init__(self) -> None:
            super().__init__()
            self.critic = nn.Linear(2, 1, bias=False, dtype=torch.float64)
            self.more: Tensor = nn.Parameter(torch.zeros(1))

    other = Other()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"another shape \(critic.weight .*missing in the file \(more\)"
    ):
        EMA.load_into(other, saved(tmp_path, EMA(0.5)))
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


# -- in a run --------------------------------------------------------------------------------------


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


class Watching(Pair):
    """Notes its weights at the end of each step, and what each validation sees."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__.update(steps=[], seen=[])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(copies(self))

    def validation_step(self, batch: Tensor) -> None:
        self.seen.append(copies(self))
        super().validation_step(batch)


@pytest.mark.parametrize("threads", [1, 2])
def test_in_a_run_each_step_is_averaged_and_each_validation_sees_the_averages(tmp_path, threads):
    module = Watching()
    strategy = ThreadDataParallel(threads) if threads > 1 else "single"
    trainer = fit(tmp_path, module, EMA(0.75), strategy=strategy, max_epochs=2)
    assert trainer.global_step == len(module.steps) == 12
    # Each epoch's validation has three batches, and each shard of them has a look.
    looks = len(module.seen) // 2
    for epoch in (0, 1):
        average = module.steps[0]
        for weights in module.steps[1 : 6 * epoch + 6]:
            average = {n: 0.75 * average[n] + 0.25 * weights[n] for n in average}
        for seen in module.seen[epoch * looks : (epoch + 1) * looks]:
            for name, value in average.items():
                torch.testing.assert_close(seen[name], value, rtol=0, atol=1e-14)
    assert all(torch.equal(p, module.steps[-1][n]) for n, p in module.named_parameters())


def test_in_a_run_a_validation_that_fails_leaves_the_trained_weights_everywhere(tmp_path):
    class Failing(Watching):
        def validation_step(self, batch: Tensor) -> None:
            super().validation_step(batch)
            raise ArithmeticError("oh")

    module = Failing()
    with pytest.raises(ArithmeticError, match="oh"):
        fit(tmp_path, module, EMA(0.75))
    trained = module.steps[-1]
    assert not torch.equal(module.seen[0]["critic.weight"], trained["critic.weight"])
    assert torch.equal(module.critic.weight, trained["critic.weight"])
    saved = checkpoint.load(tmp_path / "last.ckpt")["state_dict"]
    assert torch.equal(saved["critic.weight"], trained["critic.weight"])


def test_in_a_run_stopped_and_resumed_the_averages_are_the_same_bits(tmp_path):
    def settings() -> Any:
        return {"accumulate_grad_batches": 2, "max_epochs": 2}

    whole = EMA(0.75)
    fit(tmp_path / "whole", Pair(), whole, **settings())
    fit(tmp_path / "parts", Pair(), EMA(0.75), **{**settings(), "max_steps": 4})
    resumed = EMA(0.75)
    path = tmp_path / "parts" / "last.ckpt"
    trainer = fit(tmp_path / "parts", Pair(), resumed, ckpt_path=path, **settings())
    assert trainer.global_step == 6
    one, other = whole.state_dict(), resumed.state_dict()
    assert one["counts"] == other["counts"]
    assert all(torch.equal(value, other["averages"][n]) for n, value in one["averages"].items())


def test_in_a_run_a_file_of_trained_weights_alone_leaves_the_frozen_ones(tmp_path):
    class Frozen(Pair):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.full((2,), value), requires_grad=False)

    trained, module, callback = Frozen(1.0), Frozen(2.0), EMA(0.75)
    fit(tmp_path, trained, callback, ModelCheckpoint(save_trainable_only=True))
    EMA.load_into(module, tmp_path / "last.ckpt")
    assert module.table.tolist() == [2.0, 2.0]
    average = callback.averaged_state_dict()["critic.weight"]
    assert torch.equal(module.critic.weight, average)


def test_in_a_run_of_a_test_after_a_fit_the_averages_are_used(tmp_path):
    class Tested(Watching):
        def test_step(self, batch: Tensor) -> None:
            self.seen.append(copies(self))

    module, callback = Tested(), EMA(0.75)
    trainer = fit(tmp_path, module, callback)
    trainer.test(module, batches(), verbose=False)
    average = callback.averaged_state_dict()["critic.weight"]
    assert torch.equal(module.seen[-1]["critic.weight"], average)
    assert torch.equal(module.critic.weight, module.steps[-1]["critic.weight"])


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"decay": 1.0}, ValueError, "decay must be at least 0 and below 1, got 1.0"),
        ({"decay": -0.1}, ValueError, "decay must be at least 0"),
        ({"decay": "0.9"}, TypeError, "decay must be a number"),
        ({"modules": "generator"}, TypeError, r"write \['generator'\]"),
        ({"update_after_step": -1}, ValueError, "update_after_step must be at least 0"),
        ({"every_n_updates": 0}, ValueError, "every_n_updates must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        EMA(**settings)


def test_a_child_that_does_not_exist_is_refused_when_the_fit_starts(tmp_path):
    trainer = Updating(tmp_path, EMA(modules=["generater"]))
    with pytest.raises(ValueError, match=r"no such child; it has \['generator', 'critic'\]"):
        trainer.begin()
